"""The notes in the example workflows.

Names of files, folders and settings are bold: the newer canvas (Nodes 2.0) shows inline code in notes as blue on blue.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Note:
    """A note on the canvas.

    Attributes:
        text: in Markdown.
        title: of the note.
    """

    text: str
    title: str


def about(text: str) -> Note:
    """What a workflow does."""
    return Note(text, "What this workflow does")


def tips(text: str) -> Note:
    """What to change."""
    return Note(text, "Settings")


FAITHDIFF_PAGE = "https://huggingface.co/jychen9811/FaithDiff"
CHECKPOINT_PAGE = "https://huggingface.co/SG161222/RealVisXL_V4.0"

_FAITHDIFF = (
    "- **FaithDiff.bin** (10 GB; *Download all* leaves it out) into **models/faithdiff**, from "
    f"[{FAITHDIFF_PAGE[8:]}]({FAITHDIFF_PAGE})"
)
_CHECKPOINT = (
    f"- **RealVisXL_V4.0.safetensors** into **models/checkpoints**, from [{CHECKPOINT_PAGE[8:]}]({CHECKPOINT_PAGE}), "
    "or another SDXL checkpoint: it gives text encoders and VAE"
)


def files(*more: str, checkpoint: str = _CHECKPOINT) -> Note:
    """Where the files come from and where they go."""
    lines = [_FAITHDIFF, checkpoint, *(f"- {line}" for line in more)]
    return Note("\n".join(lines), "Files: where they come from, and where they go")


FILES = files()

_PROMPT = "say in the positive prompt what is in it (the more exactly, the better)"

NOTES: dict[str, dict[str, Note]] = {
    "faithdiff_2x": {
        "about": about(
            "## FaithDiff, twice the size\n\n"
            f"The published settings. Choose your image in **Load Image**, {_PROMPT}, and run."
        ),
        "tips": tips(
            "- **Four times the size:** two passes of two are more faithful. Take *faithdiff_4x_progressive*.\n"
            "- **Little video memory:** *faithdiff_low_vram*.\n"
            "- **Another result:** another **seed**. **cfg** 2 to 8: lower is closer to the image, higher adds detail."
        ),
    },
    "faithdiff_4x_progressive": {
        "about": about(
            "## FaithDiff, four times the size in two passes\n\n"
            "Twice the size, and twice again. The second pass sees the restored image, so it has to invent less than "
            "one pass of four would; faces profit most."
        ),
        "tips": tips(
            "The second pass works on four times the pixels, in tiles, and takes about four times as long.\n\n"
            "To stop after the first pass, save the image of the first **FaithDiff Finish Image**."
        ),
    },
    "faithdiff_8k": {
        "about": about(
            "## FaithDiff up to 8K and beyond\n\n"
            "Twice the size, and twice again, in tiles that move from step to step: a 2K scan becomes 8K. With "
            "**tile_grid** on **moving** and **overlap** 0.125, 8192 x 8192 takes 81 tiles a step instead of the "
            "published 225."
        ),
        "tips": tips(
            "- **The published tiles:** **tile_grid** fixed, **overlap** 0.5.\n"
            "- **A scan of 4K or more:** one pass is enough. Mute the second pass, and save the image of the first "
            "**FaithDiff Finish Image**.\n"
            "- **Little video memory:** in the loader **weight_dtype** fp8_e4m3fn, in the samplers **tile_batch** 1."
        ),
    },
    "faithdiff_own_checkpoint_lora": {
        "about": about(
            "## FaithDiff on your own checkpoint and LoRA\n\n"
            "Your SDXL checkpoint, with a LoRA, is moved towards FaithDiff's U-Net. Choose your files in the two "
            f"loaders, {_PROMPT}, and run."
        ),
        "files": files(
            "your LoRA for SDXL into **models/loras**",
            checkpoint="- your SDXL checkpoint into **models/checkpoints**: it gives U-Net, text encoders and VAE",
        ),
        "tips": tips(
            "- **unet_strength** in the loader: 1 follows the image most closely, 0 keeps your style and follows it "
            "least. 0.6 to 0.9 is a good range.\n"
            "- The LoRA keeps its full strength, before the loader (as here) or behind it."
        ),
    },
    "faithdiff_few_steps": {
        "about": about(
            "## FaithDiff in 8 steps\n\n"
            "A few-step LoRA for **SDXL base** on FaithDiff's U-Net, with cfg 1: a fifth of the usual work. Expect "
            "smoother textures than with 20 steps."
        ),
        "files": files(
            "**sdxl_lightning_8step_lora.safetensors** into **models/loras**, from "
            "[huggingface.co/ByteDance/SDXL-Lightning](https://huggingface.co/ByteDance/SDXL-Lightning)"
        ),
        "tips": tips(
            "- The LoRA's steps must match its file: an 8-step LoRA with 8 **steps**. DMD2 works with 4 steps and the "
            "sampler **lcm**.\n"
            "- At **cfg** 1 the negative prompt has no effect."
        ),
    },
    "faithdiff_low_vram": {
        "about": about(
            "## FaithDiff with 6 to 8 GB of video memory\n\n"
            "Weights in fp8 (half the memory of fp16), encoding and decoding in tiles of 512, sampling in moving tiles "
            f"of 768, one at a time. Choose your image, {_PROMPT}, and run."
        ),
        "tips": tips(
            "- **Still too much?** Sample in tiles of 512 (**tile_size**).\n"
            "- The image's size hardly matters: only a tile is on the card."
        ),
    },
    "faithdiff_batch_folder": {
        "about": about(
            "## FaithDiff for a folder\n\n"
            "1. Put your images into the folder **restore** in ComfyUI's **input** folder (make it, then press **R**), "
            "or choose another one in **folder**.\n"
            "2. Run. Each image is saved as soon as it is done, under its own name, in **output/restored**.\n\n"
            "Phone photographs stand upright; 16 bits, transparency, colour profile, date and camera are kept."
        ),
        "tips": tips(
            "- **Stopped, or new images?** Run again: what is there is skipped. **existing** overwrite does all "
            "again.\n"
            "- **An image that fails** is named in the report; the others are done.\n"
            "- **A text of its own for each image:** put **NAME.txt** beside **NAME.jpg**. All others take the "
            "positive prompt.\n"
            "- **Where it was taken** stays in the file. Switch **keep_location** off before you publish it.\n"
            "- **Four times the size:** **scale_by** 4 with **passes** 2."
        ),
    },
    "faithdiff_photograph": {
        "about": about(
            "## FaithDiff for photographs and scans\n\n"
            "Twice the size, and the file keeps what it knows: 16 bits, transparency, colour profile, date, camera, "
            f"author. Choose your image in **FaithDiff Load Image**, {_PROMPT}, and run."
        ),
        "tips": tips(
            "- **16 bits:** format **png** or **tif**. **jpg** and **webp** have 8.\n"
            "- **Where it was taken** stays in the file. Switch **keep_location** off before you publish it.\n"
            "- **Your workflow** goes into the file, with the prompt: **embed_workflow**."
        ),
    },
    "faithdiff_auto_caption": {
        "about": about(
            "## FaithDiff with a caption made for it\n\n"
            "FaithDiff was trained with captions of LLaVA-1.5. **FaithDiff Caption** asks a local model the same "
            "question and trims the answer as the published code does."
        ),
        "files": files(
            "a model folder into **models/LLM**: **llava-1.5-7b-hf**, from "
            "[huggingface.co/llava-hf/llava-1.5-7b-hf](https://huggingface.co/llava-hf/llava-1.5-7b-hf), or any "
            "image-to-text model that transformers loads"
        ),
        "tips": tips(
            "**allow_download** in FaithDiff Caption lets it fetch a model by its hub id, instead of a folder in "
            "**models/LLM**.\n\n"
            "A very poor image is described better when it is cleaned first, as the published test script does: put "
            "**Upscale Image (using Model)** with any upscale or denoising model between Load Image and FaithDiff "
            "Caption. The image that is restored stays the low-quality one."
        ),
    },
    "faithdiff_other_captioner": {
        "about": about(
            "## FaithDiff with another captioner\n\n"
            "Any node that gives a text will do. Here ComfyUI's own **Generate Text** looks at the image, and "
            "**FaithDiff Trim Caption** drops the lead-in and keeps two sentences."
        ),
        "files": files(
            "**qwen3vl_4b_fp8_scaled.safetensors** (5 GB) into **models/text_encoders**, from "
            "[huggingface.co/Comfy-Org/Qwen3-VL](https://huggingface.co/Comfy-Org/Qwen3-VL), or another model that "
            "ComfyUI loads there and that sees images"
        ),
        "tips": tips("Choose the model in **A vision-language model**; its **type** must fit the file."),
    },
    "faithdiff_controlnet": {
        "about": about(
            "## FaithDiff with a ControlNet\n\n"
            "FaithDiff needs none. Where outlines matter more than anything (drawings, plans), a light one can help; "
            "every tile gets its part of the hint."
        ),
        "files": files(
            "any ControlNet for SDXL into **models/controlnet**, such as the file of "
            "[huggingface.co/diffusers/controlnet-canny-sdxl-1.0]"
            "(https://huggingface.co/diffusers/controlnet-canny-sdxl-1.0), renamed "
            "**controlnet-canny-sdxl-1.0.safetensors**"
        ),
        "tips": tips(
            "**strength** and **end_percent** of Apply ControlNet: the lower, the more FaithDiff decides. 0.3 to 0.5 "
            "and 0.6 are a good start."
        ),
    },
    "faithdiff_tile_captions": {
        "about": about(
            "## FaithDiff with a caption for each part\n\n"
            "On a large image, every tile is told the whole image's caption, and may invent what is elsewhere. Here a "
            "local model describes each part, and each tile gets the text of where it lies. Choose your image, "
            f"{_PROMPT}, and run."
        ),
        "files": files(
            "a model folder into **models/LLM**: **llava-1.5-7b-hf**, from "
            "[huggingface.co/llava-hf/llava-1.5-7b-hf](https://huggingface.co/llava-hf/llava-1.5-7b-hf), or any "
            "image-to-text model that transformers loads"
        ),
        "tips": tips(
            "- **columns** and **rows**: 2 x 2 for 4096 pixels, 3 x 3 for 8192.\n"
            "- **mix**: 0 is the whole image's text alone, 1 the parts' alone.\n"
            "- **preview_tile** in FaithDiff Sampler restores a single tile first."
        ),
    },
    "faithdiff_masked": {
        "about": about(
            "## FaithDiff for scratches or faces only\n\n"
            "Choose your image in **Load Image**, right-click it, **Open in MaskEditor**, and paint over what is to be "
            f"restored. In the text, {_PROMPT}. The rest of the image stays as it is, to the pixel, and costs no work."
        ),
        "tips": tips(
            "- **denoise** in FaithDiff Sampler: 0.5 to 0.8 keeps more of a face; scratches need 1.\n"
            "- **scale_by** 1 keeps the size. With 2, what is not painted is enlarged by Lanczos alone.\n"
            "- Nothing painted: nothing changes."
        ),
    },
    "faithdiff_demo": {
        "about": about(
            "## FaithDiff without a download\n\n"
            "**Press Run.** The damaged sample image is restored in seconds on any computer, and **FaithDiff Compare** "
            "shows before and after.\n\n"
            "The small model that comes with this pack has all parts of FaithDiff, about a thousand times smaller, and "
            "was trained briefly. It shows that the nodes work, not how well FaithDiff restores: for that, take "
            "*faithdiff_2x*.",
        ),
        "own": Note(
            "Connect **Load Image** to FaithDiff Prepare Image and to **before** of FaithDiff Compare.\n\n"
            "The model knows one kind of damage: **half the size, slight blur, strong noise, JPEG**. Such images come "
            "out cleaner, if softer; clean images come out worse. The captions of its training say no more than **A "
            "photograph.** or **A drawing.**",
            "With an image of yours",
        ),
        "tips": tips(
            "**steps**: more than 12 hardly change the result. **seed**: other noise, other details.",
        ),
    },
}
"""All notes by workflow and key; a workflow without `files` of its own has the usual ones."""
