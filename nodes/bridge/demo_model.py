"""The demo model as ComfyUI models.

ComfyUI recognizes models by their sizes, and does not know the demo model's. So its classes are built here with the
sizes that the files show. Everything is kept in single precision: the demo model is small, and then equals the engine.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import comfy.clip_model
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.sd1_clip
import comfy.sdxl_clip
import comfy.supported_models
import comfy.supported_models_base
import comfy.utils
import torch
from torch import Tensor, nn

from ...faithdiff_core.errors import WeightsError
from ...faithdiff_core.images.reading import load_image
from ...faithdiff_core.weights.faithdiff_file import read_faithdiff
from ...faithdiff_core.weights.unet_shapes import UNetConfig
from .graph_types import AdapterModels
from .model_loading import attach_alignment

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

DEMO_FOLDER = Path(__file__).resolve().parents[2] / "demo" / "model"
"""A diffusers folder with FaithDiff's file inside, made by demo/make_model.py."""

SAMPLE = DEMO_FOLDER.parents[1] / "assets" / "noisy_coffee.png"
"""A held-out photograph, degraded as demo/degradation.yaml says; `make demo` restores it, too."""

FAITHDIFF_FILE = "faithdiff.safetensors"

TEXT_ENCODERS = {"clip_l": ("text_encoder", "tokenizer"), "clip_g": ("text_encoder_2", "tokenizer_2")}
"""ComfyUI's names of SDXL's two text encoders, and diffusers' folders."""


def load_demo(folder: Path = DEMO_FOLDER) -> tuple[ModelPatcher, comfy.sd.CLIP, comfy.sd.VAE, AdapterModels]:
    """Load the alignment-patched MODEL, CLIP, VAE and FAITHDIFF.

    Args:
        folder: a small SDXL model in diffusers' format, with FaithDiff's file inside.

    Raises:
        WeightsError: a file is missing or broken.
    """
    _check_complete(folder)
    model = load_unet(str(folder))
    faithdiff = attach_alignment(model, read_faithdiff(folder / FAITHDIFF_FILE), "fp32")
    return model, _load_clip(folder), _load_vae(folder), faithdiff


def load_sample(path: Path = SAMPLE) -> Tensor:
    """The damaged image that comes with the demo model, (1, H, W, 3) in [0, 1].

    Raises:
        ImageError: the file is missing, or cannot be read.
    """
    return load_image(path).colors.movedim(0, -1)[None]


def _check_complete(folder: Path) -> None:
    wanted = [FAITHDIFF_FILE, "unet/config.json", "vae/config.json", "vae/diffusion_pytorch_model.safetensors"]
    for encoder, tokenizer in TEXT_ENCODERS.values():
        wanted += [f"{encoder}/config.json", f"{encoder}/model.safetensors", f"{tokenizer}/tokenizer_config.json"]
    missing = [name for name in wanted if not (folder / name).is_file()]
    if missing:
        raise WeightsError(
            f"the demo model in {folder} lacks {', '.join(missing)}. It comes with the pack: install that again, whole."
        )


def load_unet(folder: str, disable_dynamic: bool = False) -> ModelPatcher:
    """The MODEL without the alignment; also what ComfyUI calls again when it needs it in another form.

    Args:
        folder: the demo model's.
        disable_dynamic: ComfyUI's argument: make a MODEL without dynamic video memory.

    Raises:
        WeightsError: there is no U-Net in FaithDiff's file, or its attention heads differ in width.
    """
    weights = read_faithdiff(Path(folder) / FAITHDIFF_FILE)
    if weights.unet is None:
        raise WeightsError(f"{weights.path.name} of the demo model holds no U-Net. Rebuild it with demo/make_model.py.")
    config = unet_config(weights.unet.config, _read_json(Path(folder) / "unet" / "config.json")["attention_head_dim"])
    supported = comfy.supported_models.SDXL(dict(config))
    supported.set_inference_dtype(torch.float32, None)
    offload_device = comfy.model_management.unet_offload_device()
    model = supported.get_model({}, "", device=offload_device)
    # Looked up when called, as ComfyUI replaces the second one while it starts.
    kind = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    patcher = kind(model, load_device=comfy.model_management.get_torch_device(), offload_device=offload_device)
    names = comfy.utils.unet_to_diffusers(config)
    state = {names[key]: value.float() for key, value in weights.unet.state.items()}
    model.diffusion_model.load_state_dict(state, assign=patcher.is_dynamic())
    patcher.cached_patcher_init = (load_unet, (folder,))
    return patcher


def unet_config(sizes: UNetConfig, heads: int | list[int]) -> dict[str, Any]:
    """A U-Net's sizes in ComfyUI's terms.

    Args:
        sizes: those of the file.
        heads: number of attention heads, of all levels or of each (diffusers' `attention_head_dim`).

    Raises:
        WeightsError: heads of several widths, which ComfyUI cannot have.
    """
    channels, depths, layers = sizes.block_out_channels, sizes.transformer_depths, sizes.layers_per_block
    counts = heads if isinstance(heads, list) else [heads] * len(channels)
    widths = {c // count for c, count, depth in zip(channels, counts, depths, strict=True) if depth}
    if len(widths) != 1:
        raise WeightsError(
            f"the demo model's attention heads must have one width, got {sorted(widths)} channels. Choose "
            f"`attention_head_dim` in proportion to `block_out_channels`."
        )
    return {
        "image_size": 32,
        "in_channels": sizes.in_channels,
        "out_channels": sizes.out_channels,
        "model_channels": channels[0],
        "num_res_blocks": [layers] * len(channels),
        "channel_mult": [c // channels[0] for c in channels],
        "transformer_depth": [depth for depth in depths for _ in range(layers)],
        "transformer_depth_output": [depth for depth in depths for _ in range(layers + 1)],
        "transformer_depth_middle": sizes.mid_depth,
        "use_linear_in_transformer": True,
        "context_dim": sizes.cross_attention_dim,
        "adm_in_channels": sizes.add_embedding_dim,
        "num_classes": "sequential",
        "use_spatial_transformer": True,
        "legacy": False,
        "use_temporal_resblock": False,
        "use_temporal_attention": False,
        "num_head_channels": widths.pop(),
        "num_heads": -1,
    }


def _load_vae(folder: Path) -> comfy.sd.VAE:
    config = _read_json(folder / "vae" / "config.json")
    channels = config["block_out_channels"]
    sizes = {
        "double_z": True,
        "z_channels": config["latent_channels"],
        "resolution": config["sample_size"],
        "in_channels": config["in_channels"],
        "out_ch": config["out_channels"],
        "ch": channels[0],
        "ch_mult": [c // channels[0] for c in channels],
        "num_res_blocks": config["layers_per_block"],
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    state = _read_tensors(folder / "vae" / "diffusion_pytorch_model.safetensors")
    parameters = {"ddconfig": sizes, "embed_dim": config["latent_channels"]}
    vae = comfy.sd.VAE(sd=state, config={"params": parameters}, dtype=torch.float32)
    vae.throw_exception_if_invalid()
    return vae


def _load_clip(folder: Path) -> comfy.sd.CLIP:
    target = comfy.supported_models_base.ClipTarget(partial(_Tokenizers, folder), partial(_TextEncoders, folder))
    clip = comfy.sd.CLIP(target, model_options={"dtype": torch.float32})
    for name, (encoder, _) in TEXT_ENCODERS.items():
        state = _read_tensors(folder / encoder / "model.safetensors")
        # Some versions of transformers leave out the first part of the names.
        named = {
            key if key.startswith("text_projection.") else f"text_model.{key.removeprefix('text_model.')}": value
            for key, value in state.items()
        }
        getattr(clip.cond_stage_model, name).transformer.load_state_dict(named, assign=clip.patcher.is_dynamic())
    return clip


class _TextModel(comfy.clip_model.CLIPTextModel):
    """ComfyUI's CLIP with a vocabulary and a projection of the configuration's sizes; ComfyUI's are fixed."""

    def __init__(self, config: dict[str, Any], dtype: torch.dtype, device: torch.device, operations: Any) -> None:
        super().__init__(config, dtype, device, operations)
        width, kind = config["hidden_size"], {"dtype": dtype, "device": device}
        self.text_model.embeddings.token_embedding = operations.Embedding(config["vocab_size"], width, **kind)
        projected = "CLIPTextModelWithProjection" in config["architectures"]
        self.text_projection = (
            operations.Linear(width, config["projection_dim"], bias=False, **kind) if projected else nn.Identity()
        )


class _TextEncoders(comfy.sdxl_clip.SDXLClipModel):
    """Both text encoders, used as ComfyUI uses SDXL's."""

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype, model_options: dict[str, Any]) -> None:
        from transformers import CLIPTokenizer

        # Not the parent's own: it would build encoders of SDXL's size.
        nn.Module.__init__(self)
        for name, (encoder, tokenizer) in TEXT_ENCODERS.items():
            config = _read_json(folder / encoder / "config.json")
            # The two pad differently, which the encoders' configurations do not tell.
            pad = CLIPTokenizer.from_pretrained(str(folder / tokenizer)).pad_token_id
            model = comfy.sd1_clip.SDClipModel(
                device=device,
                dtype=dtype,
                max_length=config["max_position_embeddings"],
                layer="hidden",
                layer_idx=config["num_hidden_layers"] - 2,
                textmodel_json_config=config,
                model_class=_TextModel,
                special_tokens={"start": config["bos_token_id"], "end": config["eos_token_id"], "pad": pad},
                layer_norm_hidden_state=False,
                model_options={**model_options, "model_name": name},
            )
            setattr(self, name, model)
        self.dtypes = {dtype}


class _Tokenizers(comfy.sdxl_clip.SDXLTokenizer):
    """Both tokenizers, used as ComfyUI uses SDXL's."""

    def __init__(self, folder: Path, embedding_directory: Any, tokenizer_data: dict[str, Any]) -> None:
        for name, (encoder, tokenizer) in TEXT_ENCODERS.items():
            config = _read_json(folder / encoder / "config.json")
            made = comfy.sd1_clip.SDTokenizer(
                str(folder / tokenizer),
                max_length=config["max_position_embeddings"],
                embedding_directory=embedding_directory,
                embedding_size=config["hidden_size"],
                embedding_key=name,
                tokenizer_data=tokenizer_data,
            )
            made.pad_token = made.tokenizer.pad_token_id
            setattr(self, name, made)


def _read_json(path: Path) -> dict[str, Any]:
    out: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return out


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """A file's tensors in single precision."""
    return {key: value.float() for key, value in comfy.utils.load_torch_file(str(path), safe_load=True).items()}
