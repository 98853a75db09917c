"""FaithDiff Restore Folder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from comfy_api.latest import io

from .bridge.graph_types import AdapterModels, FaithDiffType
from .bridge.image_files import EXISTING, FORMATS, graph_entries, input_folder, input_folders
from .bridge.lq_conditioning import Conditioning
from .bridge.sampling_run import Tiling
from .errors import complaint, named_errors
from .image_files import KEEP_LOCATION_TOOLTIP, KEEP_METADATA_TOOLTIP
from .inputs import CATEGORY, setting_input
from .prepare_finish import FaithDiffFinishImage, FaithDiffPrepareImage
from .sampler import FaithDiffSampler
from .vae_decode import FaithDiffTiledVAEDecode

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher
    from comfy.sd import CLIP, VAE


def _inputs_of(node: type[io.ComfyNode]) -> dict[str, Any]:
    """A node's inputs by id: what is the same there has one description."""
    return {entry.id: entry for entry in node.define_schema().inputs or []}


class FaithDiffRestoreFolder(io.ComfyNode):
    """Restores every image of a folder, and saves each when it is done."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        prepare, sampler = _inputs_of(FaithDiffPrepareImage), _inputs_of(FaithDiffSampler)
        return io.Schema(
            node_id="FaithDiffRestoreFolder",
            display_name="FaithDiff Restore Folder",
            category=CATEGORY,
            description="Restores all images of a folder, one after the other, and saves each when it is done, under "
            "its own name: with its bit depth, transparency, profile and metadata, as the command line does. One that "
            "fails is named in the report; the others are restored. An interrupted run continues where it stopped.",
            search_aliases=["faithdiff folder", "batch", "load images from folder", "directory", "bulk"],
            is_output_node=True,
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
            inputs=[
                sampler["model"],
                FaithDiffType.Input("faithdiff", tooltip="From FaithDiff Model Loader."),
                _inputs_of(FaithDiffTiledVAEDecode)["vae"],
                io.Conditioning.Input("positive", tooltip="The prompt for all images."),
                sampler["negative"],
                io.Combo.Input(
                    "folder",
                    options=input_folders(),
                    tooltip="A folder in ComfyUI's input folder; its subfolders are included. A new one is listed "
                    "when the page is refreshed (R).",
                ),
                io.String.Input(
                    "output_folder",
                    default="restored",
                    tooltip="A folder in ComfyUI's output folder, created if needed. a.jpg becomes a.png there.",
                ),
                io.Combo.Input(
                    "format",
                    options=list(FORMATS),
                    default="png",
                    tooltip="png and tif keep 16 bits; jpg holds no transparency.",
                ),
                io.Combo.Input(
                    "existing",
                    options=list(EXISTING),
                    default=EXISTING[0],
                    tooltip="skip: keep existing results, so that an interrupted run continues where it stopped. "
                    "overwrite: restore all again.",
                ),
                prepare["scale_by"],
                prepare["longest_side"],
                setting_input(
                    "passes", "Reach the size in this many equal enlargements: two for 4x are more faithful than one."
                ),
                *(sampler[name] for name in ("seed", "steps", "cfg", "sampler_name", "scheduler", "start_point")),
                *(sampler[name] for name in ("tile_size", "overlap", "tile_batch")),
                _inputs_of(FaithDiffFinishImage)["color_fix"],
                io.Boolean.Input("keep_metadata", default=True, tooltip=KEEP_METADATA_TOOLTIP),
                io.Boolean.Input("keep_location", default=True, tooltip=KEEP_LOCATION_TOOLTIP),
                io.Boolean.Input(
                    "embed_workflow",
                    default=True,
                    tooltip="Put the workflow, which contains the prompt, into every file.",
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="With it, an image with a caption NAME.txt beside it takes that as its prompt.",
                ),
                sampler["strength"],
                sampler["tile_grid"],
                setting_input(
                    "encoder_tile", "Pixels: tile side of the LQ encoder.", "encoder_tile", optional=True, advanced=True
                ),
                setting_input(
                    "vae_tile", "Pixels: tile side of the VAE's decoder.", "vae_tile", optional=True, advanced=True
                ),
            ],
            outputs=[
                io.String.Output(
                    display_name="report",
                    tooltip="How many were restored, which failed and why; for Preview as Text.",
                )
            ],
        )

    @classmethod
    def validate_inputs(cls, folder: str | None = None) -> bool | str:
        return (complaint(input_folder, folder) if folder is not None else None) or True

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> float:
        return float("nan")  # files may have changed; never equal to itself, so that each run looks

    @classmethod
    @named_errors
    def execute(
        cls,
        model: ModelPatcher,
        faithdiff: AdapterModels,
        vae: VAE,
        positive: Conditioning,
        negative: Conditioning,
        folder: str,
        output_folder: str,
        format: str,
        existing: str,
        scale_by: float,
        longest_side: int,
        passes: int,
        seed: int,
        steps: int,
        cfg: float,
        sampler_name: str,
        scheduler: str,
        start_point: str,
        tile_size: int,
        overlap: float,
        tile_batch: int,
        color_fix: str,
        keep_metadata: bool,
        keep_location: bool,
        embed_workflow: bool,
        clip: CLIP | None = None,
        strength: float = 1.0,
        tile_grid: str = "fixed",
        encoder_tile: int = 1024,
        vae_tile: int = 1024,
    ) -> io.NodeOutput:
        # Here, not above: the tiled decode and the readers and writers of image files take long to import.
        from .bridge.folder_run import FolderRun, restore_folder

        run = FolderRun(
            model=model,
            faithdiff=faithdiff,
            vae=vae,
            positive=positive,
            negative=negative,
            clip=clip,
            size={"longest_side": longest_side} if longest_side else {"scale": scale_by},
            passes=passes,
            seed=seed,
            sampling={
                "steps": steps,
                "cfg": cfg,
                "sampler_name": sampler_name,
                "scheduler": scheduler,
                "start_point": start_point,
                "tiling": Tiling(tile_size, overlap, tile_batch, tile_grid),
                "strength": strength,
            },
            color_fix=color_fix,
            encoder_tile=encoder_tile,
            vae_tile=vae_tile,
            keep_metadata=keep_metadata,
            keep_location=keep_location,
            entries=graph_entries(cls.hidden) if embed_workflow else {},
        )
        report, written = restore_folder(run, folder, output_folder, f".{format}", existing)
        return io.NodeOutput(report, ui={"images": [] if format == "tif" else written, "text": [report]})
