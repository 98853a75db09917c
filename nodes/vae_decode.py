"""FaithDiff Tiled VAE Decode."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import comfy.model_management
import comfy.utils
from comfy_api.latest import io

from ..faithdiff_core.errors import NotFiniteError, SettingsError
from ..faithdiff_core.tiling.grid import check_tile_size
from ..faithdiff_core.vae.decoder_stages import parts_from_ldm
from ..faithdiff_core.vae.tiled_decode import decode_tiled
from .errors import named_errors
from .inputs import check_tiles, overlap_input, tile_size_input

if TYPE_CHECKING:
    from comfy.sd import VAE


class FaithDiffTiledVAEDecode(io.ComfyNode):
    """Decodes large latents without seams."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FaithDiffTiledVAEDecode",
            display_name="FaithDiff Tiled VAE Decode",
            category="FaithDiff",
            description="Decodes large latents in tiles that share their normalisation statistics: no tile differs in "
            "tone from its neighbour, and the result is that of a decode in one piece.",
            search_aliases=["faithdiff decode", "vae decode tiled", "seamless decode"],
            inputs=[
                io.Latent.Input("samples", tooltip="From a sampler."),
                io.Vae.Input(
                    "vae", tooltip="SDXL's VAE. In fp16 use the fp16-fix VAE; others give black images there."
                ),
                tile_size_input(
                    "Pixels. Images no larger are decoded in one piece. Smaller tiles need less memory (ComfyUI "
                    "reserves 4.3 GB at 1024 and 1.1 GB at 512 in half precision) and take a little longer."
                ),
                overlap_input("Part of a tile that it shares with its neighbour.", 0.25),
            ],
            outputs=[io.Image.Output(display_name="image")],
        )

    @classmethod
    def validate_inputs(cls, tile_size: int | None = None, overlap: float | None = None) -> bool | str:
        return check_tiles(tile_size, overlap)

    @classmethod
    def execute(cls, samples: dict[str, Any], vae: VAE, tile_size: int, overlap: float) -> io.NodeOutput:
        with named_errors("FaithDiff Tiled VAE Decode"):
            latents = samples["samples"]
            if latents.ndim != 4:
                raise SettingsError(
                    f"expected image latents of shape (batch, channels, height, width), got {tuple(latents.shape)}."
                )
            parts = parts_from_ldm(vae.first_stage_model)
            tile = check_tile_size(tile_size)
            height, width = (min(side, tile) for side in latents.shape[-2:])
            memory = vae.memory_used_decode((1, latents.shape[1], height, width), vae.vae_dtype)
            comfy.model_management.load_models_gpu([vae.patcher], memory_required=memory)
            bar: comfy.utils.ProgressBar | None = None

            def progress(done: int, total: int) -> None:
                nonlocal bar
                comfy.model_management.throw_exception_if_processing_interrupted()
                bar = bar or comfy.utils.ProgressBar(total)
                bar.update_absolute(done, total)

            try:
                pixels = decode_tiled(
                    parts,
                    latents,
                    tile=tile_size,
                    overlap=overlap,
                    device=vae.device,
                    dtype=vae.vae_dtype,
                    progress=progress,
                )
            except NotFiniteError as error:
                dtype = str(vae.vae_dtype).removeprefix("torch.")
                raise NotFiniteError(
                    f"the decoded image is not a number: the VAE, computing in {dtype}, overflowed. Use the fp16-fix "
                    f"VAE, or start ComfyUI with --bf16-vae or --fp32-vae."
                ) from error
            image = vae.process_output(pixels).movedim(1, -1).contiguous()
            return io.NodeOutput(image.to(comfy.model_management.intermediate_device()))
