"""Tiny image-to-text models with random weights, saved as transformers saves real ones."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

_TEXT = """
the image features a an two cat dog house tree river stone window old small red blue green grey bright soft dark with on
under beside behind and of in is are has sits stands runs photo painting drawing style detailed sky water light . ,
Describe this describe its very manner USER : ASSISTANT what do you see
"""
WORDS = _TEXT.split()

LLAVA_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() }}: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
"""LLaVA-1.5's format as a chat template."""


def make_llava(
    folder: Path, chat_template: str | None = None, seed: int = 1, dtype: torch.dtype = torch.float32
) -> Path:
    """A LLaVA-1.5: CLIP's vision tower, a projector, and Llama."""
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    tokenizer = _llama_tokenizer()
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, projection_dim=32, num_hidden_layers=2, num_attention_heads=2,
        image_size=28, patch_size=14, initializer_range=0.5,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.6,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2, vision_feature_select_strategy="default",
    )  # fmt: skip
    processor = LlavaProcessor(
        _images("CLIPImageProcessor", 28), tokenizer, patch_size=14, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=chat_template,
    )  # fmt: skip
    return _save(folder, _seeded_model(LlavaForConditionalGeneration, config, seed), processor, dtype)


def make_blip(folder: Path, seed: int = 2) -> Path:
    """A BLIP captioner: ViT and a BERT that decodes."""
    from transformers import BlipConfig, BlipForConditionalGeneration, BlipProcessor, BlipTextConfig, BlipVisionConfig

    tokenizer = _bert_tokenizer(folder, "[DEC]")
    text = BlipTextConfig(
        vocab_size=len(tokenizer), hidden_size=32, encoder_hidden_size=32, intermediate_size=64, projection_dim=32,
        num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=64, initializer_range=0.5,
        bos_token_id=tokenizer.convert_tokens_to_ids("[DEC]"), sep_token_id=tokenizer.sep_token_id,
        eos_token_id=tokenizer.sep_token_id, pad_token_id=tokenizer.pad_token_id, is_decoder=True,
    )  # fmt: skip
    vision = BlipVisionConfig(
        hidden_size=32, intermediate_size=64, projection_dim=32, num_hidden_layers=2, num_attention_heads=2,
        image_size=32, patch_size=16, initializer_range=0.5,
    )  # fmt: skip
    config = BlipConfig(
        text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=32, image_text_hidden_size=32
    )
    processor = BlipProcessor(_images("BlipImageProcessor", 32), tokenizer)
    return _save(folder, _seeded_model(BlipForConditionalGeneration, config, seed), processor)


def make_git(folder: Path, seed: int = 3) -> Path:
    """A GIT: CLIP's vision tower and a decoder that sees image and text in one row."""
    from transformers import GitConfig, GitForCausalLM, GitProcessor

    tokenizer = _bert_tokenizer(folder)
    config = GitConfig(
        vision_config={
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
            "image_size": 32, "patch_size": 16, "initializer_range": 0.5,
        },
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, initializer_range=0.5, bos_token_id=tokenizer.cls_token_id,
        eos_token_id=tokenizer.sep_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    processor = GitProcessor(_images("CLIPImageProcessor", 32), tokenizer)
    return _save(folder, _seeded_model(GitForCausalLM, config, seed), processor)


def _llama_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(dict.fromkeys(["<s>", "</s>", "<pad>", "<unk>", *WORDS]))}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return tokenizer


def _bert_tokenizer(folder: Path, *others: str) -> Any:
    from transformers import BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *others, *(word.lower() for word in WORDS)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(dict.fromkeys(words)))
    tokenizer = BertTokenizerFast.from_pretrained(folder, model_input_names=["input_ids", "attention_mask"])
    if others:
        tokenizer.add_special_tokens({"additional_special_tokens": list(others)})
    return tokenizer


def _images(kind: str, side: int) -> Any:
    import transformers

    sizes: dict[str, Any] = {"size": {"height": side, "width": side}}
    if kind == "CLIPImageProcessor":
        sizes = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    return getattr(transformers, kind)(**sizes)


def _seeded_model(kind: Any, config: Any, seed: int) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind(config).eval()


def _save(folder: Path, model: Any, processor: Any, dtype: torch.dtype = torch.float32) -> Path:
    model.to(dtype).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
