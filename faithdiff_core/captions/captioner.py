"""Captioners: image-to-text models of transformers that write the caption for an image.

Any model that `AutoModelForImageTextToText` loads will do: LLaVA-1.5, which wrote FaithDiff's training captions,
Qwen-VL, BLIP, GIT and so on. Nothing is downloaded unless asked, and code that comes with a model is never run.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ImageError, MissingPackageError, SettingsError, WeightsError, install_extra
from .trim import CAPTION_PROMPT

MAX_NEW_TOKENS = 256
"""Tokens of a caption before trimming; LLaVA's detailed descriptions take about 150."""

LLAVA_FORMAT = "USER: <image>\n{prompt} ASSISTANT:"
"""How LLaVA-1.5 is asked, for folders without a chat template (https://huggingface.co/llava-hf/llava-1.5-7b-hf)."""

OLDEST_TRANSFORMERS = (4, 50)
"""What ComfyUI and the extra `engine` ask for."""

_LONGEST_HUB_ID = 96
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")

OnToken = Callable[[int], None]
"""Called after every new token with the number so far; what it raises ends the caption."""


class Captioner:
    """A loaded image-to-text model.

    Attributes:
        name: folder or hub id, for messages.
        model: transformers' model, an `nn.Module`. Move it between devices as any other; captions are made where it is.
        processor: transformers' processor, which turns an image and a prompt into the model's inputs.
    """

    def __init__(self, name: str, model: Any, processor: Any) -> None:
        self.name = name
        self.model = model
        self.processor = processor

    def caption(
        self,
        image: Tensor,
        prompt: str = CAPTION_PROMPT,
        max_new_tokens: int = MAX_NEW_TOKENS,
        temperature: float = 0.0,
        seed: int = 0,
        on_token: OnToken | None = None,
    ) -> str:
        """Describe one image.

        Args:
            image: (3, H, W) in [0, 1].
            prompt: the question or, for models that continue a text (BLIP, GIT), its beginning; may be empty.
            max_new_tokens: longest answer in tokens, 1 or more.
            temperature: 0 takes the likeliest token each time; above, tokens are drawn, and the higher the freer.
            seed: of the drawing. PyTorch's global generators are left as they were.
            on_token: called after every new token.

        Returns:
            The new text alone, without prompt and special tokens. Trim it with `trim_caption`.

        Raises:
            ImageError: the image has another shape.
            SettingsError: a number is out of range.
        """
        if image.ndim != 3 or image.shape[0] != 3:
            raise ImageError(f"A captioner takes one image of shape (3, H, W), got {tuple(image.shape)}.")
        if max_new_tokens < 1:
            raise SettingsError(f"max_new_tokens must be 1 or more, got {max_new_tokens}.")
        if temperature < 0.0:
            raise SettingsError(f"temperature must be 0 (no chance) or more, got {temperature}.")
        from transformers import StoppingCriteriaList

        inputs = self._inputs(image, prompt)
        counter = _TokenCounter(on_token)
        options: dict[str, Any] = {"do_sample": temperature > 0.0, "num_beams": 1, "return_dict_in_generate": False}
        if temperature > 0.0:
            options["temperature"] = temperature
        with torch.no_grad(), _seeded(seed, self.model.device):
            tokens = self.model.generate(
                **inputs, **options, max_new_tokens=max_new_tokens, stopping_criteria=StoppingCriteriaList([counter])
            )
        # Some architectures give the prompt back and some do not, but all end with what was counted.
        new = tokens[0, tokens.shape[1] - counter.count :]
        return str(self._tokenizer.decode(new, skip_special_tokens=True)).strip()

    @property
    def _tokenizer(self) -> Any:
        return self.processor.tokenizer

    def _inputs(self, image: Tensor, prompt: str) -> dict[str, Any]:
        """The model's inputs, where the model is and of its precision."""
        text, options = self._text(prompt)
        if text:
            inputs = self.processor(images=_to_pil(image), text=text, return_tensors="pt", **options)
            if self.model.config.model_type == "git" and inputs["input_ids"][0, -1] == self._tokenizer.sep_token_id:
                # Some releases of its processor close the prompt, and the model would take it for finished.
                inputs = {key: value[:, :-1] if value.ndim == 2 else value for key, value in inputs.items()}
        else:
            inputs = self.processor(images=_to_pil(image), return_tensors="pt")
        device, dtype = self.model.device, self.model.dtype
        return {
            key: value.to(device, dtype if value.is_floating_point() else None) if isinstance(value, Tensor) else value
            for key, value in inputs.items()
        }

    def _text(self, prompt: str) -> tuple[str, dict[str, Any]]:
        """The prompt in the model's own format, and options of the processor that belong to it."""
        if getattr(self.processor, "chat_template", None) is None:
            return (LLAVA_FORMAT.format(prompt=prompt) if self.model.config.model_type == "llava" else prompt), {}
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        text = self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        begin = getattr(self._tokenizer, "bos_token", None)
        # A template that writes the first special token itself must not get another one.
        return text, {"add_special_tokens": False} if begin and text.startswith(begin) else {}


class _TokenCounter:
    """A stopping criterion that never stops: it counts, and gives the caller a chance to cancel."""

    def __init__(self, on_token: OnToken | None) -> None:
        self.count = 0
        self._on_token = on_token

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        self.count += 1
        if self._on_token is not None:
            self._on_token(self.count)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def load_captioner(model: str | Path, dtype: torch.dtype | None = None, allow_download: bool = False) -> Captioner:
    """Load an image-to-text model onto the CPU.

    Args:
        model: a folder as transformers saves it, or a hub id ("llava-hf/llava-1.5-7b-hf").
        dtype: precision of the weights; None for the one they were saved in.
        allow_download: let transformers fetch a hub id that is not on this machine. A folder is never fetched.

    Raises:
        MissingPackageError: transformers is not installed, or is too old.
        WeightsError: nothing is there, files are missing or broken, or transformers has no image-to-text model for it.
    """
    try:
        import transformers
        from safetensors import SafetensorError
    except ImportError as error:
        raise MissingPackageError(
            f"Captioning needs transformers, which ComfyUI brings along; outside of it, {install_extra('engine')}."
        ) from error
    _check_version(transformers.__version__)
    name = str(model)
    source = _source(name, allow_download)
    options: dict[str, Any] = {"local_files_only": not allow_download, "trust_remote_code": False}
    version = f"transformers {transformers.__version__}"
    try:
        config = transformers.AutoConfig.from_pretrained(source, **options)
    except (OSError, ValueError, KeyError) as error:
        raise WeightsError(
            f"{name}: {version} cannot read its config.json or does not know its architecture. A newer transformers "
            f"may; models that bring their own code are not run. ({_first_line(error)})"
        ) from error
    if type(config) not in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise WeightsError(
            f"{name} is of the type `{config.model_type}`, which {version} does not load as an image-to-text model. "
            f"Choose one that it does, such as LLaVA, Qwen-VL, BLIP or GIT."
        )
    # Renamed in transformers 4.56; releases before that take an unknown keyword for the model's own.
    keyword = "dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype"
    try:
        processor = transformers.AutoProcessor.from_pretrained(source, **options)
        loaded, info = transformers.AutoModelForImageTextToText.from_pretrained(
            source, **options, **{keyword: dtype or "auto"}, output_loading_info=True
        )
    except ImportError as error:
        raise MissingPackageError(f"{name} needs a package that is not installed: {_first_line(error)}") from error
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise WeightsError(
            f"{name} cannot be loaded: {_first_line(error)} A whole model folder has config.json, weights "
            f"(*.safetensors), and the files of its tokenizer and its image processor; download it again."
        ) from error
    if missing := sorted(info["missing_keys"]):
        raise WeightsError(
            f"{name} lacks {len(missing)} weights of a `{config.model_type}` model ({', '.join(missing[:3])}, ...). "
            f"The download may be incomplete, or config.json belongs to another model."
        )
    if not hasattr(processor, "image_processor") or not hasattr(processor, "tokenizer"):
        raise WeightsError(
            f"{name}: found a {type(processor).__name__}, but a processor for both images and text is needed "
            f"(preprocessor_config.json and the tokenizer's files)."
        )
    return Captioner(name, loaded.eval().requires_grad_(False), processor)


def _check_version(version: str) -> None:
    if tuple(int(number) for number in version.split(".")[:2]) < OLDEST_TRANSFORMERS:
        oldest = ".".join(str(number) for number in OLDEST_TRANSFORMERS)
        raise MissingPackageError(
            f"Captioning needs transformers {oldest} or later, and {version} is installed. Install ComfyUI's "
            f"requirements again; outside of ComfyUI, {install_extra('engine')}."
        )


def _is_hub_id(name: str) -> bool:
    return len(name) <= _LONGEST_HUB_ID and _HUB_ID.fullmatch(name) is not None


def _source(name: str, allow_download: bool) -> str:
    """The folder to load from, or the hub id if it may be downloaded."""
    folder = Path(os.path.expanduser(name))
    if os.path.isdir(folder):
        if not (folder / "config.json").is_file():
            raise WeightsError(
                f"{folder} has no config.json. Name a folder as transformers saves it, with config.json, *.safetensors "
                f"and the files of its tokenizer and image processor (a single .gguf or .safetensors file will not do)."
            )
        return str(folder)
    # Of os.path, which takes names that no file system holds for names of nothing.
    if os.path.exists(folder) or folder.is_absolute() or not _is_hub_id(name):
        raise WeightsError(
            f"`{name[:200]}` is neither a folder nor a hub id. Name a model folder, or a hub id such as "
            f"llava-hf/llava-1.5-7b-hf."
        )
    if allow_download:
        return name
    from huggingface_hub import snapshot_download

    try:
        # From its folder on, no step can ask the hub for anything.
        return str(snapshot_download(name, local_files_only=True))
    except (OSError, ValueError) as error:
        raise WeightsError(
            f"`{name}` is not on this machine, and downloading is off. Put the model's files in a folder and name "
            f"that, or allow the download."
        ) from error


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed PyTorch's global generators, which transformers draws from, and put them back afterwards."""
    if device.type == "mps":
        state = torch.mps.get_rng_state()
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                yield
        finally:
            torch.mps.set_rng_state(state)
        return
    kind = "cuda" if device.type == "cpu" else device.type
    devices = list(range(torch.get_device_module(kind).device_count()))
    with torch.random.fork_rng(devices=devices, device_type=kind):
        torch.manual_seed(seed)
        yield


def _to_pil(image: Tensor) -> Any:
    """The image as every processor takes it."""
    from PIL import Image

    pixels = (image.detach().float().clamp(0.0, 1.0) * 255.0).round().to(torch.uint8)
    return Image.fromarray(pixels.movedim(0, -1).cpu().contiguous().numpy())


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") + "." if lines else type(error).__name__
