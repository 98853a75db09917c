"""Reading FaithDiff's weights: the published pickle, the same as safetensors, and the files that `convert` writes.

A file is recognised by its keys, and its sizes are read off its tensors. Tensors are mapped from the file and read when
they are used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import WeightsError
from ..models.alignment import LAYERS_PREFIX, Alignment, AlignmentConfig, alignment_state
from ..models.lq_encoder import LQEncoder, LQEncoderConfig
from .checkpoint_file import REDOWNLOAD, listing, open_tensors
from .unet_shapes import Shape, UNetConfig

ENCODER_PREFIX = "denoise_encoder."
"""Where a FaithDiff file keeps the LQ encoder."""

ALIGNMENT_PREFIXES = ("condition_embedding.", LAYERS_PREFIX, "spatial_ch_projs.")
"""Where it keeps the alignment."""

IGNORED_PREFIXES = ("agg_net.",)
"""Left empty by the authors' training code."""

UNET_PREFIXES = (
    "conv_in.",
    "time_embedding.",
    "add_embedding.",
    "down_blocks.",
    "mid_block.",
    "up_blocks.",
    "conv_norm_out.",
    "conv_out.",
)
"""Where a U-Net in diffusers' format keeps its tensors."""


@dataclass(frozen=True)
class FaithDiffWeights:
    """What a FaithDiff file holds.

    Attributes:
        path: the file.
        unet: the U-Net's tensors under diffusers' names, or None.
        lq_encoder: the LQ encoder's tensors under diffusers' encoder names, or None.
        alignment: the alignment's tensors under the published names, or None.
        unet_config, lq_encoder_config, alignment_config: sizes of the parts that are there.
        metadata: the text entries of a safetensors file; empty for a pickle.
    """

    path: Path
    unet: dict[str, Tensor] | None = field(repr=False)
    lq_encoder: dict[str, Tensor] | None = field(repr=False)
    alignment: dict[str, Tensor] | None = field(repr=False)
    unet_config: UNetConfig | None
    lq_encoder_config: LQEncoderConfig | None
    alignment_config: AlignmentConfig | None
    metadata: dict[str, str]

    @property
    def parts(self) -> dict[str, dict[str, Tensor]]:
        """The parts that are there, by name."""
        named = {"unet": self.unet, "lq_encoder": self.lq_encoder, "alignment": self.alignment}
        return {name: part for name, part in named.items() if part is not None}

    @property
    def kind(self) -> str:
        """`full` (U-Net and adapter), `adapter` (LQ encoder and alignment), `unet`, or `partial`."""
        names = set(self.parts)
        if names == {"unet", "lq_encoder", "alignment"}:
            return "full"
        if names == {"lq_encoder", "alignment"}:
            return "adapter"
        return "unet" if names == {"unet"} else "partial"

    def lq_encoder_state(self) -> dict[str, Tensor]:
        """The state dict for `LQEncoder`.

        Raises:
            WeightsError: the file has no LQ encoder.
        """
        return self._need("lq_encoder", self.lq_encoder)

    def alignment_state(self, dtype: torch.dtype | None = None, *, folded: bool = True) -> dict[str, Tensor]:
        """The state dict for `Alignment`, in the file's dtype unless told; see there for `folded`.

        Raises:
            WeightsError: the file has no alignment.
        """
        published = self._need("alignment", self.alignment)
        assert self.alignment_config is not None
        return alignment_state(published, self.alignment_config, folded=folded, dtype=dtype)

    def build_lq_encoder(
        self,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        operations: Any = nn,
    ) -> LQEncoder:
        """Make the LQ encoder with the file's weights.

        Args:
            dtype: of the parameters; the file's unless told.
            device: of the parameters; CPU unless told.
            operations: see `LQEncoder`.

        Raises:
            WeightsError: the file has no LQ encoder.
        """
        state = self.lq_encoder_state()
        assert self.lq_encoder_config is not None
        dtype = state["conv_in.weight"].dtype if dtype is None else dtype
        module = LQEncoder(self.lq_encoder_config, dtype=dtype, device=device or "cpu", operations=operations)
        module.load_state_dict(state)
        return module.eval().requires_grad_(False)

    def build_alignment(
        self,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        operations: Any = nn,
        *,
        folded: bool = True,
    ) -> Alignment:
        """Make the alignment with the file's weights; arguments as in `build_lq_encoder`, `folded` as in `Alignment`.

        Raises:
            WeightsError: the file has no alignment.
        """
        state = self.alignment_state(dtype, folded=folded)
        assert self.alignment_config is not None
        dtype = state["proj.weight"].dtype if dtype is None else dtype
        module = Alignment(
            self.alignment_config, dtype=dtype, device=device or "cpu", operations=operations, folded=folded
        )
        module.load_state_dict(state)
        return module.eval().requires_grad_(False)

    def _need(self, name: str, part: dict[str, Tensor] | None) -> dict[str, Tensor]:
        if part is None:
            raise WeightsError(
                f"{self.path.name} holds only {listing(sorted(self.parts))}, but the {name} is needed. {REDOWNLOAD}"
            )
        return part


def read_faithdiff(path: str | Path) -> FaithDiffWeights:
    """Open a FaithDiff file.

    Takes the published `FaithDiff.bin`, the same tensors as safetensors, and the `*_unet` and `*_adapter` files that
    `convert` writes. Every part is checked for missing and mis-shaped tensors.

    Args:
        path: the file.

    Returns:
        The parts it holds; tensors are mapped from the file.

    Raises:
        WeightsError: it is not a FaithDiff file, or a broken one; the text says what it is and what to do.
    """
    path = Path(path)
    tensors, metadata = open_tensors(path)
    parts = _split(path, tensors)
    unet_config = encoder_config = alignment_config = None
    if parts["unet"]:
        unet_config = _checked_config(path, "U-Net", parts["unet"], UNetConfig.from_shapes, UNetConfig.shapes)
    if parts["lq_encoder"]:
        encoder_config = _checked_config(
            path,
            "LQ encoder",
            parts["lq_encoder"],
            lambda _: LQEncoderConfig.from_state_dict(parts["lq_encoder"]),
            _encoder_shapes,
        )
    if parts["alignment"]:
        alignment_config = _checked_config(
            path,
            "alignment",
            parts["alignment"],
            lambda _: AlignmentConfig.from_state_dict(parts["alignment"]),
            AlignmentConfig.published_shapes,
        )
    if encoder_config and alignment_config and encoder_config.feature_channels != alignment_config.feature_channels:
        raise WeightsError(
            f"{path.name}: the LQ encoder gives {encoder_config.feature_channels} channels, but the alignment takes "
            f"{alignment_config.feature_channels}. The parts belong to different models. {REDOWNLOAD}"
        )
    if unet_config and alignment_config and unet_config.block_out_channels[0] != alignment_config.unet_channels:
        raise WeightsError(
            f"{path.name}: the U-Net begins with {unet_config.block_out_channels[0]} channels, but the alignment is "
            f"made for {alignment_config.unet_channels}. The parts belong to different models. {REDOWNLOAD}"
        )
    return FaithDiffWeights(
        path=path,
        unet=parts["unet"] or None,
        lq_encoder=parts["lq_encoder"] or None,
        alignment=parts["alignment"] or None,
        unet_config=unet_config,
        lq_encoder_config=encoder_config,
        alignment_config=alignment_config,
        metadata=metadata,
    )


def part_of(key: str) -> tuple[str, str] | None:
    """Which part a key of a FaithDiff file belongs to, and its name there; None for keys that mean nothing."""
    if key.startswith(ENCODER_PREFIX):
        return "lq_encoder", key.removeprefix(ENCODER_PREFIX)
    if key.startswith(ALIGNMENT_PREFIXES):
        return "alignment", key
    if key.startswith(UNET_PREFIXES):
        return "unet", key
    return None


def _split(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    parts: dict[str, dict[str, Tensor]] = {"unet": {}, "lq_encoder": {}, "alignment": {}}
    other: list[str] = []
    for key, value in tensors.items():
        place = part_of(key)
        if place is not None:
            parts[place[0]][place[1]] = value
        elif not key.startswith(IGNORED_PREFIXES):
            other.append(key)
    foreign = _foreign_kind(list(tensors), tensors)
    if foreign is not None:
        raise WeightsError(f"{path.name} is {foreign}, not a FaithDiff file. {REDOWNLOAD}")
    if not any(parts.values()):
        raise WeightsError(
            f"{path.name} has none of FaithDiff's tensors; its first ones are {listing(sorted(tensors)[:3])}. "
            f"{REDOWNLOAD}"
        )
    if other:
        raise WeightsError(
            f"{path.name} has {len(other)} tensor(s) that FaithDiff does not know, such as {listing(other[:3])}. It "
            f"is another model, or a later version of FaithDiff than this one reads. {REDOWNLOAD}"
        )
    return parts


def _foreign_kind(keys: list[str], tensors: Mapping[str, Tensor]) -> str | None:
    """Name well-known files that people pick by mistake."""
    if not keys:
        return "an empty file without tensors"
    if any(k.startswith(("denoise_encoder.", LAYERS_PREFIX)) for k in keys):
        return None
    if any("lora_" in k or ".lora." in k or k.endswith(".alpha") or "hada_" in k for k in keys):
        return "a LoRA"
    if any(k.startswith(("model.diffusion_model.", "first_stage_model.", "conditioner.")) for k in keys):
        if any(k.startswith("conditioner.embedders.1.") for k in keys):
            return "an SDXL checkpoint"
        context = tensors.get("model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight")
        if context is not None and context.shape[1] in (768, 1024):
            return "an SD 1.5 checkpoint" if context.shape[1] == 768 else "an SD 2 checkpoint"
        return "a Stable Diffusion checkpoint"
    if any(k.startswith("input_blocks.") for k in keys):
        return "a U-Net in ComfyUI's own format"
    if any(k.startswith(("controlnet_cond_embedding.", "control_model.", "controlnet_down_blocks.")) for k in keys):
        return "a ControlNet"
    if any(k.startswith("decoder.") for k in keys) and any(k.startswith("encoder.") for k in keys):
        return "a VAE"
    if any(k.startswith(("text_model.", "text_projection", "transformer.text_model.")) for k in keys):
        return "a text encoder"
    if any(k.startswith("down_blocks.") for k in keys) and not any(k.startswith("add_embedding.") for k in keys):
        context = tensors.get("down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight")
        if context is not None:
            return f"an SD {'1.5' if context.shape[1] == 768 else '2'} U-Net"
    return None


def _checked_config(path: Path, name: str, part: Mapping[str, Tensor], read: Any, expected: Any) -> Any:
    """Read a part's sizes and compare all of its tensors with what these sizes call for."""
    shapes: dict[str, Shape] = {key: tuple(value.shape) for key, value in part.items()}
    try:
        config = read(shapes)
        wanted: dict[str, Shape] = expected(config)
    except (KeyError, IndexError, ValueError) as error:
        missing = f"a tensor such as {error.args[0]}" if isinstance(error, KeyError) else "a tensor of the usual rank"
        raise WeightsError(
            f"{path.name}: the {name} is incomplete; it lacks {missing}. The file is damaged or was cut. {REDOWNLOAD}"
        ) from error
    missing_keys = sorted(wanted.keys() - shapes.keys())
    if missing_keys:
        raise WeightsError(
            f"{path.name}: the {name} lacks {len(missing_keys)} of {len(wanted)} tensors, such as "
            f"{listing(missing_keys[:3])}. The file is damaged or was cut. {REDOWNLOAD}"
        )
    wrong = [key for key in wanted if shapes[key] != wanted[key]]
    if wrong:
        key = wrong[0]
        raise WeightsError(
            f"{path.name}: {len(wrong)} tensor(s) of the {name} have the wrong shape; {key} should be {wanted[key]} "
            f"and is {shapes[key]}. {REDOWNLOAD}"
        )
    unknown = sorted(shapes.keys() - wanted.keys())
    if unknown:
        raise WeightsError(
            f"{path.name}: the {name} has {len(unknown)} tensor(s) too many, such as {listing(unknown[:3])}. "
            f"{REDOWNLOAD}"
        )
    return config


def _encoder_shapes(config: LQEncoderConfig) -> dict[str, Shape]:
    return {k: tuple(v.shape) for k, v in LQEncoder(config, device="meta").state_dict().items()}
