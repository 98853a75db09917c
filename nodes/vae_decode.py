"""FaithDiff Tiled VAE Decode."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from comfy_api.latest import io
from torch import Tensor

from ..faithdiff_core.images.region import FEATHER
from .errors import named_errors
from .inputs import CATEGORY, check_tile, mask_inputs, setting_input

if TYPE_CHECKING:
    from comfy.sd import VAE


class FaithDiffTiledVAEDecode(io.ComfyNode):
    """Decodes large latents without seams."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FaithDiffTiledVAEDecode",
            display_name="FaithDiff Tiled VAE Decode",
            category=CATEGORY,
            description="Decodes large latents in tiles that share their normalization statistics: no tile differs in "
            "tone from its neighbour, and the result matches a decode in one piece.",
            search_aliases=["faithdiff decode", "vae decode tiled", "seamless decode"],
            inputs=[
                io.Latent.Input("samples", tooltip="From a sampler."),
                io.Vae.Input(
                    "vae",
                    tooltip="The checkpoint's VAE. SDXL's gives black images in fp16: use the fp16-fix VAE there.",
                ),
                setting_input(
                    "vae_tile",
                    "Pixels. Larger images are decoded in tiles of this side. Smaller tiles need less memory (ComfyUI "
                    "reserves 4.3 GiB at 1024 and 1.1 GiB at 512 in half precision) and take a little longer.",
                    "tile_size",
                ),
                setting_input("encoder_overlap", "Fraction of a tile that it shares with its neighbour.", "overlap"),
                *mask_inputs(),
                io.Image.Input(
                    "original",
                    optional=True,
                    tooltip="With restore_mask: the image that VAE Encode got. Outside the mask it is kept.",
                ),
            ],
            outputs=[io.Image.Output(display_name="image")],
        )

    @classmethod
    def validate_inputs(cls, tile_size: int | None = None) -> bool | str:
        return check_tile(tile_size)

    @classmethod
    @named_errors
    def execute(
        cls,
        samples: dict[str, Any],
        vae: VAE,
        tile_size: int,
        overlap: float,
        restore_mask: Tensor | None = None,
        feather: int = FEATHER,
        original: Tensor | None = None,
    ) -> io.NodeOutput:
        from .bridge.vae_tiles import decode_in_tiles, decode_part

        if restore_mask is None and original is None:
            return io.NodeOutput(decode_in_tiles(vae, samples["samples"], tile_size, overlap))
        return io.NodeOutput(decode_part(vae, samples["samples"], tile_size, overlap, restore_mask, feather, original))
