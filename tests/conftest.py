"""Fixtures that several test files share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.golden import Golden, read_golden


@pytest.fixture(scope="session")
def golden() -> Golden:
    """The golden data; see `Golden`."""
    return read_golden()


@pytest.fixture(scope="session", autouse=True)
def _few_threads() -> None:
    """Small tensors are slower on many threads, and other test runs want processors too."""
    torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory: pytest.TempPathFactory, golden: Golden) -> Path:
    """An SDXL model as a diffusers folder: the golden U-Net and VAE, and random text encoders of the same kind."""
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from safetensors.torch import load_file
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    from faithdiff_core import read_faithdiff

    folder = tmp_path_factory.mktemp("tiny_sdxl")
    unet = UNet2DConditionModel(**golden.manifest["unet"])
    unet.load_state_dict({k: v.float() for k, v in read_faithdiff(golden.model).parts["unet"].state.items()})
    vae = AutoencoderKL(**golden.manifest["vae"])
    vae.load_state_dict({key: value.float() for key, value in load_file(golden.vae).items()})
    context = golden.manifest["unet"]["cross_attention_dim"]
    pooled = golden.manifest["unet"]["projection_class_embeddings_input_dim"] - 6 * 256
    torch.manual_seed(0)
    encoders = [
        kind(
            CLIPTextConfig(
                vocab_size=514,
                bos_token_id=512,
                eos_token_id=513,
                pad_token_id=513,
                hidden_size=context // 2,
                intermediate_size=context,
                num_hidden_layers=2,
                num_attention_heads=1,
                projection_dim=pooled,
                hidden_act=activation,
            )
        )
        for kind, activation in ((CLIPTextModel, "quick_gelu"), (CLIPTextModelWithProjection, "gelu"))
    ]
    StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=encoders[0],
        text_encoder_2=encoders[1],
        tokenizer=_byte_tokenizer(folder / "tokenizer", "<|endoftext|>"),
        tokenizer_2=_byte_tokenizer(folder / "tokenizer_2", "!"),
        unet=unet,
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            timestep_spacing="leading",
            steps_offset=1,
        ),
        add_watermarker=False,
        force_zeros_for_empty_prompt=False,
    ).save_pretrained(folder)
    return folder


def _byte_tokenizer(folder: Path, pad: str) -> Any:
    """A tokenizer in CLIP's format that knows no words, only bytes."""
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir()
    vocabulary, merges = folder / "vocab.json", folder / "merges.txt"
    vocabulary.write_text(json.dumps({word: number for number, word in enumerate(words)}), encoding="utf-8")
    merges.write_text("#version: 0.2\n", encoding="utf-8")
    return CLIPTokenizer(vocab=str(vocabulary), merges=str(merges), pad_token=pad, model_max_length=77)
