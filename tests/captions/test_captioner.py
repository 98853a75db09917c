"""Captioners: real loading and generating, on tiny models of three architectures."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import captioners as tiny_captioners
from torch import Tensor

from faithdiff_core.captions.captioner import LLAVA_FORMAT, Captioner, load_captioner
from faithdiff_core.captions.trim import CAPTION_PROMPT, trim_caption
from faithdiff_core.errors import ImageError, MissingPackageError, SettingsError, WeightsError

ARCHITECTURES = ("llava", "blip", "git")
PROMPT = "Describe this image"
TOKENS = 12


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("captioners")
    make: dict[str, Callable[..., Path]] = {
        "llava": tiny_captioners.make_llava, "blip": tiny_captioners.make_blip, "git": tiny_captioners.make_git,
    }  # fmt: skip
    return {name: make[name](base / name) for name in ARCHITECTURES}


@pytest.fixture(scope="module")
def captioners(folders: dict[str, Path]) -> dict[str, Captioner]:
    return {name: load_captioner(folder) for name, folder in folders.items()}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small lose more time to threads than they gain."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Closes the network, and lists who tried it."""
    calls: list[Any] = []

    def closed(*address: Any, **_: Any) -> None:
        calls.append(address)
        raise OSError("the network is closed in this test")

    monkeypatch.setattr(socket, "getaddrinfo", closed)
    monkeypatch.setattr(socket.socket, "connect", closed)
    return calls


def image(seed: int = 0) -> Tensor:
    return torch.rand(3, 40, 50, generator=torch.Generator().manual_seed(seed))


def greedy_by_hand(captioner: Captioner, image: Tensor, prompt: str) -> str:
    """The likeliest token again and again, each from one pass over the whole text so far."""
    model, tokenizer = captioner.model, captioner.processor.tokenizer
    pixels = (image * 255).round().to(torch.uint8)
    pixels = captioner.processor.image_processor(images=[pixels], return_tensors="pt")["pixel_values"]
    kind = model.config.model_type
    if kind == "llava":
        # An image of 2 x 2 patches, and one BOS.
        ids = tokenizer(LLAVA_FORMAT.format(prompt=prompt).replace("<image>", "<image>" * 4)).input_ids
        end = tokenizer.eos_token_id
    else:
        ids = tokenizer(prompt, add_special_tokens=False).input_ids
        ids = [tokenizer.convert_tokens_to_ids("[DEC]") if kind == "blip" else tokenizer.cls_token_id, *ids]
        end = tokenizer.sep_token_id
    new: list[int] = []
    with torch.no_grad():
        seen = model.vision_model(pixel_values=pixels)[0] if kind == "blip" else None
        while len(new) < TOKENS and end not in new:
            row = torch.tensor([ids + new])
            if kind == "blip":
                logits = model.text_decoder(input_ids=row, encoder_hidden_states=seen).logits
            else:
                logits = model(input_ids=row, pixel_values=pixels).logits
            new.append(int(logits[0, -1].argmax()))
    return str(tokenizer.decode(new, skip_special_tokens=True)).strip()


@pytest.mark.parametrize("prompt", ["", PROMPT])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_caption_is_the_new_text_alone(captioners: dict[str, Captioner], name: str, prompt: str) -> None:
    texts = []
    for seed in range(3):
        texts.append(captioners[name].caption(image(seed), prompt, TOKENS))
        assert texts[-1] == greedy_by_hand(captioners[name], image(seed), prompt)
    assert len(set(texts)) > 1, "the image has no effect"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_prompt_has_an_effect(captioners: dict[str, Captioner], name: str) -> None:
    texts = {captioners[name].caption(image(1), prompt, TOKENS) for prompt in ("", PROMPT, "a photo of the dog")}
    assert len(texts) > 1


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_seed_and_temperature(captioners: dict[str, Captioner], name: str) -> None:
    def caption(temperature: float, seed: int) -> str:
        return captioners[name].caption(image(), PROMPT, TOKENS, temperature, seed)

    torch.manual_seed(5)
    before = torch.get_rng_state()
    drawn = [caption(1.0, seed) for seed in range(4)]
    assert drawn == [caption(1.0, seed) for seed in range(4)]
    assert len(set(drawn)) > 1
    assert caption(0.0, 0) == caption(0.0, 1)
    assert torch.equal(torch.get_rng_state(), before), "the global generator was touched"


def test_largest_seed(captioners: dict[str, Captioner]) -> None:
    assert isinstance(captioners["llava"].caption(image(), PROMPT, 2, 1.0, 2**64 - 1), str)


def test_chat_template_is_used(folders: dict[str, Path], tmp_path: Path) -> None:
    """LLaVA's own format as a template gives the same caption; another template another one."""
    plain = load_captioner(folders["llava"]).caption(image(), PROMPT, TOKENS)
    same = load_captioner(tiny_captioners.make_llava(tmp_path / "same", tiny_captioners.LLAVA_TEMPLATE))
    assert same.caption(image(), PROMPT, TOKENS) == plain
    # One that writes the first token itself: it must not be doubled.
    begin = load_captioner(tiny_captioners.make_llava(tmp_path / "begin", "<s>" + tiny_captioners.LLAVA_TEMPLATE))
    assert begin.caption(image(), PROMPT, TOKENS) == plain
    other = load_captioner(tiny_captioners.make_llava(tmp_path / "other", tiny_captioners.LLAVA_TEMPLATE + " a dog"))
    assert other.caption(image(), PROMPT, TOKENS) != plain


def test_caption_can_be_trimmed(captioners: dict[str, Captioner]) -> None:
    texts = (captioners["llava"].caption(image(seed), CAPTION_PROMPT, TOKENS) for seed in range(10))
    text = next(text for text in texts if len(text.split()) > 4)
    words = text.split()
    trimmed = trim_caption(text, sentences=0)
    assert trimmed == " ".join(words[3:])[0].upper() + " ".join(words[3:])[1:]


def test_every_token_is_told_and_can_cancel(captioners: dict[str, Captioner]) -> None:
    counts: list[int] = []
    captioners["llava"].caption(image(), PROMPT, 4, on_token=counts.append)
    assert counts == [1, 2, 3, 4]

    class Cancelled(BaseException):
        pass

    def cancel(count: int) -> None:
        counts.append(count)
        if count == 3:
            raise Cancelled

    counts.clear()
    for name in ARCHITECTURES:
        if name == "git":
            continue  # may be finished before
        with pytest.raises(Cancelled):
            captioners[name].caption(image(), "", TOKENS, on_token=cancel)
    assert counts == [1, 2, 3] * 2


@pytest.mark.parametrize(("saved", "asked", "expected"), [
    (torch.float32, None, torch.float32),
    (torch.bfloat16, None, torch.bfloat16),
    (torch.float16, None, torch.float16),
    (torch.float32, torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float32, torch.float32),
])  # fmt: skip
def test_precision(tmp_path: Path, saved: torch.dtype, asked: torch.dtype | None, expected: torch.dtype) -> None:
    captioner = load_captioner(tiny_captioners.make_llava(tmp_path / "m", dtype=saved), asked)
    assert {p.dtype for p in captioner.model.parameters()} == {expected}
    assert captioner.caption(image(), PROMPT, TOKENS)
    assert not captioner.model.training
    assert not any(p.requires_grad for p in captioner.model.parameters())


def test_wrong_numbers_and_images(captioners: dict[str, Captioner]) -> None:
    captioner = captioners["blip"]
    with pytest.raises(ImageError, match=r"\(3, H, W\), got \(1, 3, 8, 8\)"):
        captioner.caption(torch.zeros(1, 3, 8, 8))
    with pytest.raises(SettingsError, match="max_new_tokens must be 1 or more, got 0"):
        captioner.caption(image(), max_new_tokens=0)
    with pytest.raises(SettingsError, match="temperature must be 0"):
        captioner.caption(image(), temperature=-0.5)


def test_names_that_lead_nowhere(tmp_path: Path, calls: list[Any]) -> None:
    with pytest.raises(WeightsError, match="downloading is off"):
        load_captioner("nobody/no-such-model-here")
    with pytest.raises(WeightsError, match="neither a folder nor a hub id"):
        load_captioner(tmp_path / "missing")
    with pytest.raises(WeightsError, match="neither a folder nor a hub id"):
        load_captioner("C:\\models\\llava", allow_download=True)
    for name in ("x" * 5000, "~nosuchuser/llava", "a\0b"):
        with pytest.raises(WeightsError, match="neither a folder nor a hub id") as caught:
            load_captioner(name, allow_download=True)
        assert len(str(caught.value)) < 500
    with pytest.raises(WeightsError, match=r"no config\.json"):
        load_captioner(tmp_path)
    assert not calls


def test_download_is_tried_only_when_allowed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, calls: list[Any]) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between the hub client's tries
    with pytest.raises(WeightsError, match="nobody/no-such-model-here"):
        load_captioner("nobody/no-such-model-here", allow_download=True)
    assert calls


def test_hub_id_on_this_machine(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: list[Any]
) -> None:
    """What was downloaded earlier is found without the network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--somebody--tiny-llava"
    commit = "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(folders["llava"], repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    captioner = load_captioner("somebody/tiny-llava")
    assert captioner.name == "somebody/tiny-llava"
    assert captioner.caption(image(), PROMPT, TOKENS) == load_captioner(folders["llava"]).caption(
        image(), PROMPT, TOKENS
    )
    assert not calls


def broken(folder: Path, copy: Path, breaking: Callable[[Path], Any]) -> Path:
    shutil.copytree(folder, copy)
    breaking(copy)
    return copy


def set_config(**values: Any) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def drop_a_weight(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    name = next(key for key in sorted(weights) if key.endswith("mlp.up_proj.weight"))
    del weights[name]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def remove(*patterns: str) -> Callable[[Path], Any]:
    def from_folder(folder: Path) -> None:
        for pattern in patterns:
            for path in folder.glob(pattern):
                path.unlink()

    return from_folder


PROCESSOR = "*processor_config.json"


@pytest.mark.parametrize(("breaking", "message"), [
    (remove("model.safetensors"), "cannot be loaded: .*download it again"),
    (lambda folder: (folder / "model.safetensors").write_bytes(b"broken"), "cannot be loaded"),
    (lambda folder: (folder / "config.json").write_text("{"), "cannot read its config.json"),
    (set_config(model_type="nothing_known"), "does not know its architecture"),
    (set_config(model_type="bert", architectures=["BertModel"]), "of the type `bert`.*image-to-text"),
    (set_config(model_type="own", auto_map={"AutoConfig": "own.Config"}), "own code are not run"),
    (drop_a_weight, "lacks 1 weights"),
    (remove(PROCESSOR, "tokenizer*"), "cannot be loaded|both images and text"),
    (remove(PROCESSOR), "cannot be loaded|both images and text"),
])  # fmt: skip
def test_broken_folders(
    folders: dict[str, Path], tmp_path: Path, calls: list[Any], breaking: Callable[[Path], Any], message: str
) -> None:
    folder = broken(folders["llava"], tmp_path / "broken", breaking)
    with pytest.raises(WeightsError, match=message):
        load_captioner(folder)
    assert not calls


def test_without_transformers(monkeypatch: pytest.MonkeyPatch, folders: dict[str, Path]) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingPackageError, match="install the extra"):
        load_captioner(folders["llava"])


@pytest.mark.parametrize("version", ["4.49.0", "4.9.2", "3.5.1"])
def test_with_an_old_transformers(monkeypatch: pytest.MonkeyPatch, folders: dict[str, Path], version: str) -> None:
    monkeypatch.setattr("transformers.__version__", version)
    with pytest.raises(MissingPackageError, match=rf"4\.50 or later.*{version}.*\.\[engine\]"):
        load_captioner(folders["llava"])


def test_import_is_light() -> None:
    heavy = ("transformers", "PIL", "huggingface_hub")
    code = f"import sys, faithdiff_core.captions.captioner; print([name for name in {heavy} if name in sys.modules])"
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
