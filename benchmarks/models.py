"""Models with random weights in the published sizes, and the peers that they are compared with."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from faithdiff_core.backbone import SDXL
from faithdiff_core.models.alignment import QUICK_GELU, Alignment, AlignmentConfig
from faithdiff_core.models.lq_encoder import NORM_EPS, NORM_GROUPS, LQEncoder, LQEncoderConfig
from faithdiff_core.weights.faithdiff_file import ENCODER_PREFIX
from faithdiff_core.weights.unet_shapes import UNetConfig

ALIGNMENT = AlignmentConfig(
    feature_channels=512, condition_channels=320, unet_channels=320, mlp_channels=1280, layers=2
)
"""The published sizes."""

LQ_ENCODER = LQEncoderConfig((128, 256, 512, 512), 2)
"""The published sizes."""

TOKENS = 77
"""Text tokens of a prompt that fits one window."""

POOLED = 1280
"""Width of SDXL's pooled text embedding."""

UNET: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": list(SDXL.block_out_channels),
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 2,
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": SDXL.context_width,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
"""SDXL's U-Net in diffusers' terms."""

VAE: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "scaling_factor": 0.13025,
    "sample_size": 1024,
    "force_upcast": False,
}
"""SDXL's VAE in diffusers' terms."""

CONTROLNET_ONLY: dict[str, Any] = {"conditioning_embedding_out_channels": (16, 32, 96, 256)}
"""What diffusers' ControlNet has beyond the U-Net that it is a copy of."""

CONTROLNET_XS: dict[str, Any] = {
    "ctrl_conditioning_embedding_out_channels": (16, 32, 96, 256),
    "time_embedding_mix": 1.0,
}
"""What a ControlNet-XS has beyond the U-Net; its width is a tenth of the U-Net's, as
`ControlNetXSAdapter.from_unet(unet, size_ratio=0.1)` has it."""

SMALL_UNET: dict[str, Any] = UNET | {
    "block_out_channels": [320, 320, 640],
    "transformer_layers_per_block": [1, 1, 1],
    "attention_head_dim": [5, 5, 10],
}
"""A U-Net with SDXL's conv_in and a tenth of its weights, for what a CPU can train and time."""

_POOL = 2**20


@torch.no_grad()
def randomize(module: nn.Module, seed: int = 0) -> None:
    """Give a module weights that keep the variance, norms that are the identity and biases of zero.

    The numbers repeat after a million: what they are makes no difference to the time, and drawing billions would take
    longer than the benchmark.
    """
    generator = torch.Generator().manual_seed(seed)
    pool = torch.randn(_POOL, generator=generator)
    for name, value in module.named_parameters():
        if value.is_meta:
            continue
        if value.ndim < 2:
            value.fill_(1.0 if name.endswith("weight") else 0.0)
            continue
        scaled = (pool / value[0].numel() ** 0.5).to(value)
        flat = value.view(-1)
        for start in range(0, flat.numel(), _POOL):
            part = flat[start : start + _POOL]
            part.copy_(scaled[: part.numel()])


def _ready(module: nn.Module, seed: int) -> Any:
    randomize(module, seed)
    return module.eval().requires_grad_(False)


def alignment(device: torch.device, dtype: torch.dtype) -> Alignment:
    """Our alignment, as it is used for inference."""
    module: Alignment = _ready(Alignment(ALIGNMENT, dtype=dtype, device=device), 1)
    return module


def lq_encoder(device: torch.device, dtype: torch.dtype) -> LQEncoder:
    """The LQ encoder."""
    module: LQEncoder = _ready(LQEncoder(LQ_ENCODER, dtype=dtype, device=device), 2)
    return module


def _empty(kind: Any, config: dict[str, Any], device: torch.device, dtype: torch.dtype) -> Any:
    """A diffusers model, made without the seconds that initial values take."""
    with torch.device("meta"):
        module = kind.from_config(config)
    # Past diffusers' own `to`, which warns of layers that are to stay in fp32 even where there are none.
    return nn.Module.to(module, dtype).to_empty(device=device)


def unet(device: torch.device, dtype: torch.dtype) -> Any:
    """SDXL's U-Net (2.6 billion parameters) of diffusers."""
    from diffusers import UNet2DConditionModel

    return _ready(_empty(UNet2DConditionModel, UNET, device, dtype), 3)


def _controlnet_config(unet_config: dict[str, Any]) -> dict[str, Any]:
    left_out = ("out_channels", "up_block_types")
    return {key: value for key, value in unet_config.items() if key not in left_out} | CONTROLNET_ONLY


def controlnet(device: torch.device, dtype: torch.dtype, *, small: bool = False) -> Any:
    """A ControlNet of diffusers for SDXL (1.25 billion parameters), or for `SMALL_UNET`."""
    from diffusers import ControlNetModel

    return _ready(_empty(ControlNetModel, _controlnet_config(SMALL_UNET if small else UNET), device, dtype), 7)


def controlnet_xs(device: torch.device, dtype: torch.dtype, *, small: bool = False) -> Any:
    """SDXL's U-Net with a ControlNet-XS in it, of diffusers, or `SMALL_UNET` with one of a tenth of its width."""
    from diffusers import UNetControlNetXSModel

    unet_config = SMALL_UNET if small else UNET
    left_out = ("in_channels", "out_channels", "layers_per_block", "attention_head_dim")
    config = {key: value for key, value in unet_config.items() if key not in left_out}
    config["num_attention_heads"] = config["ctrl_num_attention_heads"] = unet_config["attention_head_dim"]
    config["ctrl_block_out_channels"] = [channels // 10 for channels in unet_config["block_out_channels"]]
    return _ready(_empty(UNetControlNetXSModel, config | CONTROLNET_XS, device, dtype), 8)


def small_unet(device: torch.device, dtype: torch.dtype = torch.float32) -> Any:
    """The U-Net of `SMALL_UNET`."""
    from diffusers import UNet2DConditionModel

    return _ready(_empty(UNet2DConditionModel, SMALL_UNET, device, dtype), 9)


def vae(device: torch.device, dtype: torch.dtype) -> Any:
    """SDXL's VAE of diffusers."""
    from diffusers import AutoencoderKL

    return _ready(_empty(AutoencoderKL, VAE, device, dtype), 4)


def unet_inputs(rows: int, side: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of one U-Net call with `rows` rows of side x side latent units."""
    made: dict[str, Any] = {"device": device, "dtype": dtype}
    return {
        "sample": torch.randn(rows, 4, side, side, **made),
        "timestep": torch.tensor(500, device=device),
        "encoder_hidden_states": torch.randn(rows, TOKENS, SDXL.context_width, **made),
        "added_cond_kwargs": {
            "text_embeds": torch.randn(rows, POOLED, **made),
            "time_ids": torch.tensor([[1024.0, 1024, 0, 0, 1024, 1024]], **made).repeat(rows, 1),
        },
    }


class _PublishedBlock(nn.Module):
    """Residual block whose attention runs over the first axis, which is the batch."""

    def __init__(self, width: int, hidden: int, **kw: Any) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, 8, **kw)
        self.ln_1, self.ln_2 = nn.LayerNorm(width, **kw), nn.LayerNorm(width, **kw)
        self.c_fc, self.c_proj = nn.Linear(width, hidden, **kw), nn.Linear(hidden, width, **kw)

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        y = self.c_fc(self.ln_2(x))
        return x + self.c_proj(y * torch.sigmoid(QUICK_GELU * y))


class PublishedAlignment(nn.Module):
    """The alignment as it was published: every call embeds the features again, and both guidance halves go through
    torch's attention layer with the batch as its sequence."""

    def __init__(self, config: AlignmentConfig, **kw: Any) -> None:
        super().__init__()
        channels = config.feature_channels
        self.norm_in = nn.GroupNorm(NORM_GROUPS, channels, eps=NORM_EPS, **kw)
        self.conv_in = nn.Conv2d(channels, channels, 3, padding=1, **kw)
        self.conv_out = nn.Conv2d(channels, config.condition_channels, 3, padding=1, **kw)
        self.layers = nn.Sequential(
            *(_PublishedBlock(config.width, config.mlp_channels, **kw) for _ in range(config.layers))
        )
        self.proj = nn.Linear(config.width, config.unet_channels, **kw)

    def forward(self, h: Tensor, features: Tensor) -> Tensor:
        """h, (2, C, H, W), with the residual of its features, (2, C, H, W)."""
        condition = self.conv_out(F.silu(self.conv_in(self.norm_in(features))))
        tokens = torch.cat([h, condition], dim=1).flatten(2).transpose(1, 2)
        return h + self.proj(self.layers(tokens)).transpose(1, 2).reshape(h.shape)

    def load(self, alignment: Alignment) -> None:
        """Take the weights of an unfolded alignment, so that results can be compared."""
        embedding = alignment.condition_embedding
        for name in ("norm_in", "conv_in", "conv_out"):
            getattr(self, name).load_state_dict(getattr(embedding, name).state_dict())
        self.proj.load_state_dict(alignment.proj.state_dict())
        pairs: Iterable[tuple[Any, Any]] = zip(self.layers, alignment.blocks, strict=True)
        for mine, other in pairs:
            width = alignment.config.width
            with torch.no_grad():
                mine.attn.in_proj_weight[2 * width :] = other.attn.v_proj.weight
                mine.attn.in_proj_bias[2 * width :] = other.attn.v_proj.bias
            mine.attn.out_proj.load_state_dict(other.attn.out_proj.state_dict())
            for name in ("ln_1", "ln_2"):
                getattr(mine, name).load_state_dict(getattr(other, name).state_dict())
            mine.c_fc.load_state_dict(other.mlp.c_fc.state_dict())
            mine.c_proj.load_state_dict(other.mlp.c_proj.state_dict())


def published_alignment(device: torch.device, dtype: torch.dtype) -> PublishedAlignment:
    """The published formulation."""
    module: PublishedAlignment = _ready(PublishedAlignment(ALIGNMENT, device=device, dtype=dtype), 5)
    return module


def write_faithdiff(path: Path, unet: UNetConfig | None) -> Path:
    """Write a file with the published names, random values and fp32, with a U-Net or, for an adapter, without."""
    from safetensors.torch import save_file

    shapes: dict[str, tuple[int, ...]] = dict(unet.shapes()) if unet is not None else {}
    encoder = lq_encoder(torch.device("meta"), torch.float32)
    shapes |= {ENCODER_PREFIX + key: tuple(value.shape) for key, value in encoder.state_dict().items()}
    shapes |= ALIGNMENT.published_shapes()
    save_file({key: _values(key, shape) for key, shape in shapes.items()}, str(path))
    to_disk(path)  # else the system would write it while the first rounds are measured
    return path


def to_disk(path: Path) -> None:
    """Wait until a file is on the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _values(key: str, shape: tuple[int, ...]) -> Tensor:
    if len(shape) < 2:
        norm = "norm" in key or ".ln_" in key
        return torch.ones(shape) if norm and key.endswith("weight") else torch.zeros(shape)
    value = torch.empty(shape)
    flat = value.view(-1)
    pool = torch.randn(min(flat.numel(), 2**20), generator=torch.Generator().manual_seed(0))
    pool /= value[0].numel() ** 0.5
    for begin in range(0, flat.numel(), len(pool)):
        part = flat[begin : begin + len(pool)]
        part.copy_(pool[: part.numel()])
    return value
