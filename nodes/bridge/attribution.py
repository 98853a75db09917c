"""Attribution maps in ComfyUI: recording a sampling run, and the words of a CLIP's tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import torch
from comfy_api.latest import io
from torch import Tensor

from ...faithdiff_core.attribution.overlay import image_maps, overlay
from ...faithdiff_core.attribution.recorder import CrossAttentionRecorder, RecordedRow
from ...faithdiff_core.attribution.words import content_tokens, split_words, word_positions
from ...faithdiff_core.errors import ImageError, SettingsError
from ...faithdiff_core.tiling.grid import Tile, TileGrid
from .active_conditions import OUTER_UUID, Conds, other_tiler
from .checks import check_image
from .tile_texts import tile_texts_of

AttributionType = io.Custom("FAITHDIFF_ATTRIBUTION")

PROMPTS = ("positive", "negative")
"""Which of the guidance's prompts is recorded."""

_SAME_RUN = 1e-2
"""Largest difference, relative to the latent's largest value, up to which it counts as the recorded run's: latents may
be kept in half precision."""


class AttributionRecord:
    """FAITHDIFF_ATTRIBUTION: the cross-attention of the last sampling run of a MODEL.

    Args:
        prompt: `positive` or `negative`.
        memory: bytes that it may take.

    Attributes:
        latent: the run's result, on the CPU; None before a run has ended.
    """

    def __init__(self, prompt: str, memory: int) -> None:
        self.prompt = prompt
        self.recorder = CrossAttentionRecorder(memory)
        self.latent: Tensor | None = None
        self._tokens: dict[UUID, int] = {}
        self._last: tuple[Tensor, Tensor] | None = None

    @contextmanager
    def run(self, guider: Any, *, tiled: bool = False, masked: bool = False) -> Iterator[None]:
        """Record the sampling run of a guider within the context.

        Args:
            guider: ComfyUI's.
            tiled: the latent is sampled in several tiles.
            masked: parts of the latent may be left out, by a noise mask or in a preview of one tile.

        Raises:
            SettingsError: the guider has several conditionings for the prompt, or one for a part of the image, or tiles
                get texts of their own.
        """
        self.recorder.begin(0)
        self.latent, self._last = None, None
        conds = getattr(guider, "conds", {}).get(self.prompt, ())
        if len(conds) != 1:
            raise SettingsError(
                f"FaithDiff Attribution Record: expected one {self.prompt} conditioning, got {len(conds)}. Take out "
                f"nodes that combine conditionings (Conditioning Combine, timestep ranges); if the guider has no "
                f"{self.prompt} prompt, record the other one."
            )
        if "area" in conds[0]:
            raise SettingsError(
                "FaithDiff Attribution Record: the conditioning is for an area of the image. Take the area out."
            )
        if tiled and tile_texts_of(conds[0]) is not None:
            raise SettingsError(
                "FaithDiff Attribution Record: the map shows words of one prompt, but with FaithDiff Tile Conditioning "
                "each tile gets another text. Take that node out, or set its mix to 0."
            )
        self._tokens = {cond["uuid"]: _tokens(cond) for cond in conds}
        self.recorder.begin(max(self._tokens.values()), gaps=masked)
        with self.recorder.watching(guider.inner_model.diffusion_model):
            yield

    def ended(self, latent: Tensor) -> Tensor:
        """Remember the run's result, by which the map knows that it belongs to this run, and give it back."""
        self.latent = latent.detach().to("cpu", torch.float32)
        return latent

    def step(self, conds: Conds, x: Tensor, timestep: Tensor) -> RecordedStep | None:
        """What to record of a prediction of the whole latent; None if nothing.

        Guidance that perturbs the attention asks a second time at the same latent and noise level; the first counts.
        """
        if not any(cond["uuid"] in self._tokens for group in conds for cond in group or ()):
            return None
        if self._last is not None and self._last[0] is x and self._last[1] is timestep:
            return None
        self._last = (x, timestep)
        return RecordedStep(self.recorder, self._tokens, x.shape[0], (x.shape[-2], x.shape[-1]))

    def check_latent(self, latent: Tensor) -> None:
        """Check that a latent is the result of the recorded run.

        Raises:
            SettingsError: it is another run's, or nothing has been sampled.
        """
        mine = self.latent
        if mine is None:
            raise SettingsError(
                "Nothing was recorded: the sampler has to get the MODEL of FaithDiff Attribution Record."
            )
        other = latent.detach().to("cpu", torch.float32)
        if mine.shape != other.shape or float((mine - other).abs().max()) > _SAME_RUN * float(mine.abs().max()):
            raise SettingsError(
                "The latent is not the result of the last run that was recorded. Connect the sampler's output as it is "
                "(not the denoised one, nor one that was changed), and give each sampler its own FaithDiff Attribution "
                "Record."
            )


@dataclass(frozen=True)
class RecordedStep:
    """The recording of one prediction of the whole latent.

    Attributes:
        recorder: what records.
        tokens: of the recorded conditionings, by the uuid that they have outside of tiles.
        images: number of latents.
        size: (height, width) of the whole latent.
    """

    recorder: CrossAttentionRecorder
    tokens: Mapping[UUID, int]
    images: int
    size: tuple[int, int]

    def of(self, conds: Conds, tiles: Sequence[Tile], grid: TileGrid | None) -> RecordedCalls:
        """The recording of the U-Net calls for some tiles, whose conditionings have uuids of their own."""
        by_uuid: dict[UUID, int] = {}
        for group in conds:
            for cond in group or ():
                outer: UUID = cond[OUTER_UUID if OUTER_UUID in cond else "uuid"]
                if outer in self.tokens:
                    by_uuid[cond["uuid"]] = self.tokens[outer]
        return RecordedCalls(self, by_uuid, tuple(tiles), grid)


@dataclass(frozen=True)
class RecordedCalls:
    """The recording of U-Net calls that see the same tiles: one, or one for each conditioning where memory is short.

    Attributes:
        step: what they are part of.
        tokens: of the recorded conditionings, by uuid.
        tiles: that the calls see, one below the other.
        grid: of the tiles; None if there is one tile, the whole latent.
    """

    step: RecordedStep
    tokens: Mapping[UUID, int]
    tiles: tuple[Tile, ...]
    grid: TileGrid | None

    def call(self, uuids: Sequence[UUID], x: Tensor) -> AbstractContextManager[None]:
        """The context of a U-Net call.

        Args:
            uuids: of its conditionings, in the order of its rows.
            x: its latents.

        Raises:
            SettingsError: the call sees something else than the tiles.
        """
        if not any(uuid in self.tokens for uuid in uuids):
            return nullcontext()
        first, images = self.tiles[0], self.step.images
        if (first.height, first.width) != tuple(x.shape[-2:]) or x.shape[0] != len(uuids) * images * len(self.tiles):
            raise SettingsError(other_tiler(first, (x.shape[-2], x.shape[-1])))
        rows = []
        for place, uuid in enumerate(uuids):
            if uuid not in self.tokens:
                continue
            for t, tile in enumerate(self.tiles):
                whole = self.grid is None or len(self.grid) == 1
                weights = None if self.grid is None or whole else self.grid.weights(tile, x.device)
                for image in range(images):
                    row = (place * len(self.tiles) + t) * images + image
                    rows.append(RecordedRow(row, image, tile, self.tokens[uuid], weights))
        return self.step.recorder.call(rows, x.shape[0], images, self.step.size, x.device)


def word_maps(
    record: AttributionRecord, latent: Tensor, clip: Any, prompt: str, words: str, image: Tensor, opacity: float
) -> tuple[Tensor, Tensor]:
    """The maps of words as overlays and masks.

    Args:
        record: of the run.
        latent: the run's result.
        clip: the CLIP that encoded the prompt.
        prompt: as it was encoded.
        words: with commas between them.
        image: the restored IMAGE, (B, H, W, 3).
        opacity: of the hottest places, 0 to 1.

    Returns:
        IMAGE and MASK, all images of the first word before those of the second.

    Raises:
        SettingsError: a word is not in the prompt, or record, latent, prompt and image do not belong together.
    """
    record.check_latent(latent)
    maps = record.recorder.recorded()
    wanted = split_words(words)
    tokens, of_prompt = _prompt_tokens(clip, prompt)
    if of_prompt != maps.sums.shape[1]:
        raise SettingsError(
            f"The prompt has {of_prompt} tokens with this CLIP, but the recorded conditioning {maps.sums.shape[1]}. "
            f"Give the text that was encoded, and its CLIP; joined conditionings (Conditioning Concat) have no maps."
        )
    positions = word_positions(wanted, prompt, tokens, lambda word: [i for _, i in _prompt_tokens(clip, word)[0]])
    image = check_image(image, "image")[..., :3].movedim(-1, 1)
    if image.shape[0] != maps.sums.shape[0]:
        raise ImageError(f"there are {image.shape[0]} images, but {maps.sums.shape[0]} latents were recorded.")
    scaled = [image_maps(maps.mean(at).cpu(), *image.shape[-2:]) for at in positions]
    shown = [overlay(image, one, opacity).movedim(1, -1).contiguous() for one in scaled]
    return torch.cat(shown), torch.cat(scaled)


def _tokens(cond: dict[str, Any]) -> int:
    cross = cond["model_conds"].get("c_crossattn")
    if cross is None:
        raise SettingsError("FaithDiff Attribution Record: the conditioning has no text for cross-attention.")
    return int(cross.cond.shape[1])


def _prompt_tokens(clip: Any, text: str) -> tuple[list[tuple[int, int]], int]:
    """Positions and ids of a text's tokens with a CLIP, and the number of positions."""
    by_encoder: dict[str, list[list[tuple[Any, float]]]] = clip.tokenize(text)
    # SDXL's two tokenizers cut alike and differ in padding alone.
    name = "l" if "l" in by_encoder else next(iter(by_encoder))
    tokenizer = getattr(clip.tokenizer, f"clip_{name}", None)
    if tokenizer is None or tokenizer.end_token is None:
        raise SettingsError(f"Attribution needs a CLIP text encoder; this one has the tokenizers {list(by_encoder)}.")
    # A textual inversion's tokens are vectors; they get an id that no text has.
    chunks = [[token if isinstance(token, int) else -1 for token, *_ in chunk] for chunk in by_encoder[name]]
    return content_tokens(chunks, {tokenizer.start_token}, tokenizer.end_token), sum(map(len, chunks))
