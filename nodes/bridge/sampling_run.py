"""What travels from a MODEL to the U-Net calls of a sampling run, under one key of the transformer options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any
from uuid import UUID

from ...faithdiff_core.errors import SettingsError
from ...faithdiff_core.tiling.grid import OneTileGrid, Tile, TileGrid, check_overlap, check_tile_size
from ...faithdiff_core.tiling.moving import TileGridKind, TileGrids
from .control_hints import ControlHints
from .graph_types import LQFeatures
from .noise_mask import NoiseMask
from .step_progress import TileProgress

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

    from .attribution import AttributionRecord, RecordedCalls
    from .tile_state import TileState

RUN_KEY = "faithdiff"
"""Where transformer options carry the `SamplingRun`."""


@dataclass(frozen=True)
class Tiling:
    """How a MODEL samples in tiles.

    Attributes:
        tile_size: tile side in pixels, a multiple of 8 from 64.
        overlap: overlap as a fraction of the tile, 0 to 0.9.
        tile_batch: tiles in one U-Net call; 0 for as many as fit.
        tile_grid: `fixed` or `moving`.
    """

    tile_size: int
    overlap: float
    tile_batch: int = 0
    tile_grid: TileGridKind | str = TileGridKind.FIXED

    def __post_init__(self) -> None:
        check_tile_size(self.tile_size)
        check_overlap(self.overlap)
        if self.tile_batch < 0:
            raise SettingsError(f"tile_batch must be 0 (as many as fit) or more, got {self.tile_batch}.")

    def preview(self, number: int, height: int, width: int) -> Tile:
        """One tile of a latent of this size, as they lie in a fixed grid.

        Raises:
            SettingsError: there is no tile of this number.
        """
        grid = TileGrid(height, width, self.tile_size, self.overlap)
        if number >= len(grid):
            raise SettingsError(
                f"preview_tile must be from 0 to {len(grid) - 1}, got {number}: there are {len(grid.columns)} x "
                f"{len(grid.rows)} tiles (columns x rows), numbered row by row."
            )
        return grid.tiles[number]

    def grid(self, height: int, width: int, seed: int, sigma: float, only: Tile | None = None) -> TileGrid:
        """The tiles of a latent of this size at a noise level of a run, or `only` the one that is previewed."""
        if only is not None:
            return OneTileGrid(height, width, self.tile_size, self.overlap, only=only)
        return self.grids(height, width, seed).at(sigma)

    def grids(self, height: int, width: int, seed: int = 0) -> TileGrids:
        """The tiles of a latent of this size at each noise level of a run."""
        return TileGrids(height, width, self.tile_size, self.overlap, self.tile_grid, seed)


@dataclass(frozen=True)
class CallCondition:
    """The LQ condition of one conditioning's rows in a U-Net call.

    Attributes:
        features: the features of the whole image.
        tiles: the parts that the rows see; rows are tile by tile, and image by image within a tile.
        strength: factor on the alignment's residual.
    """

    features: LQFeatures
    tiles: tuple[Tile, ...]
    strength: float


@dataclass(frozen=True)
class SamplingRun:
    """One sampling run: what the MODEL asks for, what lasts for the run, and what the coming U-Net call needs.

    A MODEL carries one as it was set up. Each run works with its own (`started`), each group of tiles with one that
    knows the group's conditions (`calling`).

    Attributes:
        tiling: how to cut the latent; None samples it whole.
        progress: of the node that samples, if it shows tiles.
        only: the one tile that is computed, of the fixed grid; None for all.
        seed: of the sampler; moving tiles follow it.
        hints: of the ControlNets, made during the run.
        state: what other patches hold, apart for every tile; None before a run.
        mask: of the latent, where it limits what changes; None before a run.
        prompts: ComfyUI's conditionings of the run, of which a step may use a part.
        conditions: of the coming U-Net call, by the conditioning's uuid; one that is missing is left alone.
        record: records the attention of the run, if the MODEL asks for that.
        recorded: of the coming U-Net call's attention.
        copies_equal: whether all rows of one image and tile are equal before the alignment, whatever their
            conditioning. True unless a control or concatenated latents may differ between conditionings.
    """

    tiling: Tiling | None = None
    progress: TileProgress | None = None
    only: Tile | None = None
    seed: int = 0
    hints: ControlHints = field(default_factory=ControlHints)
    state: TileState | None = None
    mask: NoiseMask | None = None
    prompts: tuple[list[dict[str, Any]], ...] = ()
    conditions: Mapping[UUID, CallCondition] = field(default_factory=dict)
    copies_equal: bool = True
    record: AttributionRecord | None = None
    recorded: RecordedCalls | None = None

    def started(self, seed: int, state: TileState | None, prompts: tuple[list[dict[str, Any]], ...]) -> SamplingRun:
        """The same for a run that begins: nothing is left of an earlier one."""
        return SamplingRun(
            self.tiling,
            self.progress,
            self.only,
            seed,
            state=state,
            mask=self.mask,
            prompts=prompts,
            record=self.record,
        )

    def calling(
        self, conditions: Mapping[UUID, CallCondition], copies_equal: bool, recorded: RecordedCalls | None
    ) -> SamplingRun:
        """The same with the conditions of the coming U-Net call, and what of it is recorded."""
        return replace(self, conditions=conditions, copies_equal=copies_equal, recorded=recorded)


def run_of(transformer_options: Mapping[str, Any]) -> SamplingRun:
    """The run that transformer options carry; an empty one where FaithDiff has set nothing up."""
    run = transformer_options.get(RUN_KEY)
    return run if isinstance(run, SamplingRun) else SamplingRun()


def with_run(model_options: dict[str, Any], run: SamplingRun) -> dict[str, Any]:
    """Model options that carry a run; the given ones stay as they are."""
    options = {**model_options.get("transformer_options", {}), RUN_KEY: run}
    return {**model_options, "transformer_options": options}


def set_up_run(model: ModelPatcher, **changes: Any) -> None:
    """Change what a cloned MODEL asks for, in place: `tiling`, `progress`, `only` or `record` of `SamplingRun`."""
    options: dict[str, Any] = model.model_options["transformer_options"]
    options[RUN_KEY] = replace(run_of(options), **changes)
