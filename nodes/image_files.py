"""FaithDiff Load Image and FaithDiff Save Image."""

from __future__ import annotations

from dataclasses import replace

from comfy_api.latest import io, ui
from torch import Tensor

from .bridge.graph_types import ImageSource, ImageSourceType
from .bridge.image_files import BITS, FORMATS, fingerprint, graph_entries, image_path, input_images
from .bridge.image_files import load as load_image
from .bridge.image_files import save as save_images
from .bridge.step_progress import show_text
from .errors import complaint, named_errors
from .inputs import CATEGORY

KEEP_METADATA_TOOLTIP = (
    "Keep the source's metadata: EXIF (camera, date, exposure), XMP and resolution. The colour "
    "profile stays in any case."
)
KEEP_LOCATION_TOOLTIP = "Off: remove where the photograph was taken (GPS data and place names), and keep the rest."


class FaithDiffLoadImage(io.ComfyNode):
    """Loads images with all that their files say."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FaithDiffLoadImage",
            display_name="FaithDiff Load Image",
            category=CATEGORY,
            description="Loads an image at its full bit depth (16 bits too), upright, with its colours right (8-bit "
            "colours with a profile become sRGB) and its transparency as a mask. The file's metadata goes to FaithDiff "
            "Save Image.",
            search_aliases=["faithdiff load", "load image 16 bit", "load tiff", "exif", "metadata", "icc profile"],
            inputs=[
                io.Combo.Input(
                    "image",
                    options=input_images(),
                    upload=io.UploadType.image,
                    image_folder=io.FolderType.input,
                    tooltip="A file in ComfyUI's input folder: PNG, JPEG, WebP, TIFF, AVIF, BMP, GIF and more.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="image"),
                io.Mask.Output(
                    display_name="mask", tooltip="Transparency; 64 x 64 zeros if there is none, like Load Image."
                ),
                ImageSourceType.Output(
                    display_name="source", tooltip="Name, bit depth, profile and metadata, for FaithDiff Save Image."
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, image: str | None = None) -> bool | str:
        return (complaint(image_path, image) if image is not None else None) or True

    @classmethod
    def fingerprint_inputs(cls, image: str) -> str:
        return fingerprint(image)

    @classmethod
    @named_errors
    def execute(cls, image: str) -> io.NodeOutput:
        return io.NodeOutput(*load_image(image))


class FaithDiffSaveImage(io.ComfyNode):
    """Saves images with all that their sources say."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FaithDiffSaveImage",
            display_name="FaithDiff Save Image",
            category=CATEGORY,
            description="Saves PNG, JPEG, WebP or TIFF with 8 or 16 bits, transparency, and, with a source, its colour "
            "profile, EXIF, XMP and resolution. The file holds the workflow; png and webp can be dragged back.",
            search_aliases=["faithdiff save", "save jpg", "save webp", "save tiff", "save 16 bit", "exif", "metadata"],
            is_output_node=True,
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
            inputs=[
                io.Image.Input("images", tooltip="The images to save."),
                io.String.Input(
                    "filename_prefix",
                    default="FaithDiff",
                    tooltip="Beginning of the file names, in ComfyUI's output folder; a number follows. %name% is the "
                    "source's name; Save Image's placeholders (%date:yyyy-MM-dd%, %width%) work, too.",
                ),
                io.Combo.Input(
                    "format",
                    options=list(FORMATS),
                    default="png",
                    tooltip="png and tif keep 16 bits; jpg holds no transparency. Dragged back into the page, png and "
                    "webp bring their workflow.",
                ),
                io.Combo.Input(
                    "bits",
                    options=list(BITS),
                    default="source",
                    tooltip="Bits per channel. `source`: 16 where the source has 16 and the format holds them, else 8.",
                ),
                io.Int.Input("quality", default=95, min=1, max=100, tooltip="Of jpg and webp files."),
                io.Boolean.Input("keep_metadata", default=True, tooltip=KEEP_METADATA_TOOLTIP),
                io.Boolean.Input("keep_location", default=True, tooltip=KEEP_LOCATION_TOOLTIP),
                io.Boolean.Input(
                    "embed_workflow",
                    default=True,
                    tooltip="Put the workflow, which contains the prompt, into the file, as Save Image does.",
                ),
                io.Mask.Input(
                    "mask", optional=True, tooltip="Transparency (FaithDiff Finish Image's mask). All zeros: none."
                ),
                ImageSourceType.Input("source", optional=True, tooltip="From FaithDiff Load Image."),
            ],
            outputs=[],
        )

    @classmethod
    @named_errors
    def execute(
        cls,
        images: Tensor,
        filename_prefix: str,
        format: str,
        bits: str,
        quality: int,
        keep_metadata: bool,
        keep_location: bool,
        embed_workflow: bool,
        mask: Tensor | None = None,
        source: ImageSource | None = None,
    ) -> io.NodeOutput:
        source = source or ImageSource()
        results, notes = save_images(
            images,
            replace(source, metadata=source.metadata.kept(keep_metadata, keep_location)),
            mask,
            prefix=filename_prefix,
            suffix=f".{format}",
            bits=bits,
            quality=quality,
            entries=graph_entries(cls.hidden) if embed_workflow else {},
        )
        if notes:
            show_text("; ".join(notes))
        # Browsers show no TIFF; the page gets a preview.
        shown = ui.PreviewImage(images[..., :3], cls=cls).values if format == "tif" else results
        return io.NodeOutput(ui={"images": shown})
