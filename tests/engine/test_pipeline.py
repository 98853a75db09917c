"""The engine from files to images, on tiny models."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.golden import Golden
from tiny_models.checkpoints import make_lora, make_single_file
from torch import Tensor

from faithdiff_core import SettingsError, WeightsError, fix_colors, read_faithdiff
from faithdiff_core.engine import SCHEDULERS, FaithDiffPipeline, RestoreSettings, TextConditioning, make_scheduler
from faithdiff_core.engine.schedulers import fresh_scheduler, initial_latent
from faithdiff_core.errors import NotFiniteError
from faithdiff_core.images.color import ColorFix
from faithdiff_core.images.geometry import crop_to, pad_to_multiple, resize_lanczos
from faithdiff_core.sampling.schedule import start_latent

QUICK: dict[str, Any] = {"steps": 2, "tile": 128, "prompt": "a stone wall"}


def photo(height: int, width: int, seed: int = 0) -> Tensor:
    small = torch.rand((1, 3, 5, 5), generator=torch.Generator().manual_seed(seed))
    return resize_lanczos(small, height, width)[0]


def load(tiny_sdxl: Path, golden: Golden, **kwargs: Any) -> FaithDiffPipeline:
    return FaithDiffPipeline.from_files(tiny_sdxl, golden.model, **{"dtype": "fp32", "device": "cpu", **kwargs})


@pytest.fixture(scope="module")
def shared(tiny_sdxl: Path, golden: Golden) -> FaithDiffPipeline:
    return load(tiny_sdxl, golden)


@pytest.fixture
def pipeline(shared: FaithDiffPipeline) -> Iterator[FaithDiffPipeline]:
    """The shared pipeline; every test must leave it as it was."""
    yield shared
    assert not shared.base.unet.conv_in._forward_hooks
    assert not shared.base.vae.use_tiling
    shared.base.scheduler = make_scheduler()


@pytest.fixture(scope="module")
def text(golden: Golden) -> TextConditioning:
    return TextConditioning(*(golden.tensors[name] for name in ("pos", "pos_pooled", "neg", "neg_pooled")))


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-5) -> bool:
    return got.shape == expected.shape and float((got - expected).abs().max() / expected.abs().max()) < tolerance


# Batching


def sample(pipeline: FaithDiffPipeline, golden: Golden, text: TextConditioning, rows: list[int], batch: int) -> Tensor:
    """Two steps on three 26 x 18 latents cut out of the recorded tensors; 6 tiles each."""
    t = golden.tensors

    def cut(name: str) -> Tensor:
        x = t[f"tiles_lr.{name}"]
        return torch.cat([x[..., i : i + 18, 3 * i : 3 * i + 26] for i in rows])

    generators = [torch.Generator().manual_seed(i) for i in rows]
    return pipeline.sample(
        cut("lq_features"),
        text,
        cut("noise"),
        lq_latent=cut("lr_latent"),
        steps=2,
        tile=128,
        overlap=0.5,
        tile_batch=batch,
        generators=generators,
    )


@pytest.mark.parametrize("scheduler", ["euler", "dpmpp_2m_sde"])
def test_batching_changes_nothing(
    pipeline: FaithDiffPipeline, golden: Golden, text: TextConditioning, scheduler: str
) -> None:
    pipeline.base.scheduler = make_scheduler(scheduler)
    apart = torch.cat([sample(pipeline, golden, text, [i], 1) for i in (0, 1, 2)])
    assert not close(apart[:1], apart[1:2], 0.1)
    for tiles in (4, 100):
        assert close(sample(pipeline, golden, text, [0, 1, 2], tiles), apart)
    assert close(sample(pipeline, golden, text, [2, 0, 1], 5), apart[[2, 0, 1]])
    assert close(sample(pipeline, golden, text, [1], 100), apart[1:2])


def test_conditions_over_the_budget_are_recomputed(
    pipeline: FaithDiffPipeline, golden: Golden, text: TextConditioning
) -> None:
    kept = sample(pipeline, golden, text, [0], 4)
    calls: list[int] = []
    handle = pipeline.alignment.condition_embedding.register_forward_hook(lambda *_: calls.append(1))
    try:
        for budget, expected in ((2**30, 6), (0, 12), (32 * 16 * 16 * 4 * 2, 2 + 4 + 4)):
            pipeline.condition_budget = budget
            calls.clear()
            assert torch.equal(sample(pipeline, golden, text, [0], 4), kept)
            assert len(calls) == expected
    finally:
        handle.remove()
        pipeline.condition_budget = 2**30


def test_alignment_runs_once_for_both_guidance_halves(
    pipeline: FaithDiffPipeline, golden: Golden, text: TextConditioning
) -> None:
    rows: list[tuple[int, int]] = []
    alignment = pipeline.alignment.blocks[0].register_forward_hook(lambda _m, args, _o: rows.append((len(args[0]), 0)))
    unet = pipeline.base.unet.register_forward_hook(lambda _m, args, _o: rows.append((0, len(args[0]))))
    try:
        sample(pipeline, golden, text, [0], 4)
    finally:
        alignment.remove()
        unet.remove()
    assert rows == [(4, 0), (0, 8), (2, 0), (0, 4)] * 2


# Strength and guidance


def plain_sdxl(pipeline: FaithDiffPipeline, text: TextConditioning, noise: Tensor, steps: int, cfg: float) -> Tensor:
    """Sampling with diffusers alone."""
    size = noise.shape[-1] * 8
    pipeline.base.set_progress_bar_config(disable=True)
    scheduler = pipeline.base.scheduler
    result: Tensor = pipeline.base(
        prompt_embeds=text.embeds,
        pooled_prompt_embeds=text.pooled,
        negative_prompt_embeds=text.negative_embeds,
        negative_pooled_prompt_embeds=text.negative_pooled,
        latents=noise.clone(),
        num_inference_steps=steps,
        guidance_scale=cfg,
        height=size,
        width=size,
        original_size=(size, size),
        target_size=(size, size),
        generator=torch.Generator().manual_seed(3),
        output_type="latent",
    ).images
    pipeline.base.scheduler = scheduler
    return result


@pytest.mark.parametrize(
    ("name", "cfg"),
    [("euler", 1.0), *((name, 5.0) for name in SCHEDULERS if name != "dpmpp_2m_sde")],  # whose noise is its own
)
def test_strength_zero_is_diffusers_own_sdxl(
    pipeline: FaithDiffPipeline, golden: Golden, text: TextConditioning, name: str, cfg: float
) -> None:
    pipeline.base.scheduler = make_scheduler(name)
    noise = golden.tensors["one_tile_noise.noise"]
    expected = plain_sdxl(pipeline, text, noise, 3, cfg)

    def sample(**settings: Any) -> Tensor:
        generators = [torch.Generator().manual_seed(3)]
        common: dict[str, Any] = {"steps": 3, "cfg": cfg, "start": "noise", "tile": 128, "generators": generators}
        return pipeline.sample(settings.pop("features", None), text, noise, **common, **settings)

    assert close(sample(strength=0), expected)
    assert not close(sample(features=golden.tensors["one_tile_noise.lq_features"]), expected, 0.01)


def test_strength_zero_is_exactly_the_unet(pipeline: FaithDiffPipeline, golden: Golden, text: TextConditioning) -> None:
    seen: list[tuple[Any, ...]] = []
    handle = pipeline.base.unet.register_forward_hook(lambda _m, a, k, o: seen.append((a, k, o)), with_kwargs=True)
    try:
        noise = golden.tensors["one_tile_noise.noise"]
        pipeline.sample(golden.tensors["one_tile_noise.lq_features"], text, noise, steps=1, start="noise", strength=0)
    finally:
        handle.remove()
    args, kwargs, output = seen[0]
    with torch.no_grad():
        assert torch.equal(pipeline.base.unet(*args, **kwargs)[0], output[0])


def test_cfg_one_is_one_row_and_needs_no_negative_text(
    pipeline: FaithDiffPipeline, golden: Golden, text: TextConditioning
) -> None:
    rows: list[int] = []
    handle = pipeline.base.unet.register_forward_hook(lambda _m, args, _o: rows.append(len(args[0])))
    t = golden.tensors
    try:
        pipeline.sample(
            t["one_tile_noise.lq_features"],
            TextConditioning(text.embeds, text.pooled),
            t["one_tile_noise.noise"],
            steps=1,
            cfg=1,
            start="noise",
            tile=128,
        )
    finally:
        handle.remove()
    assert rows == [1]


def test_empty_negative_prompt_is_encoded(pipeline: FaithDiffPipeline) -> None:
    text = pipeline.encode_text(["a cat", "a dog"])
    empty = pipeline.encode_text([""])
    assert text.negative_embeds is not None
    assert text.negative_pooled is not None
    assert empty.pooled is not None
    for row in range(2):
        assert close(text.negative_embeds[row], empty.embeds[0])
        assert close(text.negative_pooled[row], empty.pooled[0])
    assert text.negative_embeds.abs().max() > 0
    pipeline.base.register_to_config(force_zeros_for_empty_prompt=True)
    try:
        zeros_not_wanted = pipeline.encode_text(["a cat"]).negative_embeds
    finally:
        pipeline.base.register_to_config(force_zeros_for_empty_prompt=False)
    assert zeros_not_wanted is not None
    assert close(zeros_not_wanted, empty.embeds)


# Schedulers


@pytest.mark.parametrize("name", [*SCHEDULERS, "DDPMScheduler", "DEISMultistepScheduler", "KDPM2DiscreteScheduler"])
def test_every_scheduler_starts_at_the_published_input(golden: Golden, name: str) -> None:
    """The U-Net's first input depends on the first noise level alone, not on the space a scheduler works in."""
    noise, z = golden.tensors["one_tile_lr_20.noise"], golden.tensors["one_tile_lr_20.lr_latent"]
    scheduler = fresh_scheduler(make_scheduler(name))
    scheduler.set_timesteps(8)
    first = scheduler.timesteps[0]
    x = initial_latent(scheduler, "lr", noise, z)
    # Each scheduler's own forward process says what noise level it begins at, and in which space.
    zero, one = torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1)
    signal = float(scheduler.add_noise(one, zero, first.view(1)))
    sigma = float(scheduler.add_noise(zero, one, first.view(1))) / signal
    expected = start_latent("lr", noise, sigma, z) * signal
    assert close(x, expected)
    seen = scheduler.scale_model_input(x, first)
    assert close(seen, start_latent("lr", noise, sigma, z) / (sigma**2 + 1) ** 0.5)


def test_ddim_is_euler_for_small_steps(pipeline: FaithDiffPipeline, golden: Golden, text: TextConditioning) -> None:
    """Both are the same first-order solver, one in each space."""
    t = golden.tensors
    results = []
    for name in ("euler", "ddim"):
        pipeline.base.scheduler = make_scheduler(name)
        results.append(
            pipeline.sample(
                t["one_tile_lr_20.lq_features"],
                text,
                t["one_tile_lr_20.noise"],
                lq_latent=t["one_tile_lr_20.lr_latent"],
                steps=10,
                tile=128,
            )
        )
    # They differ in the very last step alone: to sigma 0, or to the table's first entry.
    assert close(results[1], results[0], 0.02)


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "EDMEulerScheduler"])
def test_other_models_schedulers_are_refused(pipeline: FaithDiffPipeline, name: str) -> None:
    pipeline.base.scheduler = make_scheduler(name)
    with pytest.raises(SettingsError, match=f"{name} is not made for SDXL's noise schedule"):
        pipeline(photo(16, 16)[None], **QUICK)


def test_a_step_past_the_table(pipeline: FaithDiffPipeline) -> None:
    pipeline.base.scheduler = make_scheduler("ddim")
    with pytest.raises(SettingsError, match="timestep 1000, one past its table"):
        pipeline(photo(16, 16)[None], **QUICK | {"steps": 1000})


# Images


def test_call_is_the_sum_of_its_parts(pipeline: FaithDiffPipeline) -> None:
    image = photo(37, 50)[None]
    got = pipeline(image, seed=7, color_fix="wavelet", encoder_tile=64, **QUICK)
    enlarged = resize_lanczos(image, 74, 100)
    padded = pad_to_multiple(enlarged, 8) * 2 - 1
    noise = torch.randn((1, 4, 10, 13), generator=torch.Generator().manual_seed(7))
    latent = pipeline.sample(
        pipeline.encode_lq(padded, 64),
        pipeline.encode_text(["a stone wall"], [""]),
        noise,
        lq_latent=pipeline.encode_latent(padded),
        steps=2,
        tile=128,
    )
    expected = fix_colors(crop_to(pipeline.decode(latent), 74, 100), enlarged, ColorFix.WAVELET).clamp(0, 1)
    assert got.shape == (1, 3, 74, 100)
    assert torch.equal(got, expected)


def test_seeds_texts_and_sizes_belong_to_images(pipeline: FaithDiffPipeline) -> None:
    images = [photo(24, 32, 1), photo(40, 24, 2), photo(24, 32, 3)]
    prompts = ["one", "two", "three"]
    quick: dict[str, Any] = {"steps": 2, "tile": 128}
    together = pipeline(images, seed=[5, 6, 5], prompt=prompts, tile_batch=3, **quick)
    assert isinstance(together, list)
    for image, seed, prompt, got in zip(images, (5, 6, 5), prompts, together, strict=True):
        alone = pipeline(image[None], seed=[seed], prompt=prompt, **quick)
        assert close(got, alone[0])
    counted = pipeline(torch.stack([images[0], images[2]]), seed=5, prompt=["one", "three"], **quick)
    assert close(counted[0], together[0])
    assert not close(counted[1], together[2])
    assert not torch.equal(pipeline(images[:1], **quick)[0], pipeline(images[:1], **quick)[0])


def test_sizes(pipeline: FaithDiffPipeline) -> None:
    assert pipeline(photo(9, 1)[None], scale=3, **QUICK).shape == (1, 3, 27, 3)
    assert pipeline(photo(20, 30)[None], size=(33, 71), **QUICK).shape == (1, 3, 33, 71)
    assert RestoreSettings(scale=4, passes=2).sizes(100, 75) == [(200, 150), (400, 300)]
    assert RestoreSettings(scale=8, passes=3).sizes(10, 11) == [(20, 22), (40, 44), (80, 88)]
    assert RestoreSettings(scale=3).sizes(10, 11) == [(30, 33)]


def test_progressive_passes(pipeline: FaithDiffPipeline) -> None:
    image = photo(16, 24)[None]
    stages: list[str] = []

    def progress(stage: str, done: int, total: int) -> None:
        assert 0 <= done <= total
        stages.append(stage)

    got = pipeline(image, scale=4, passes=2, seed=3, progress=progress, **QUICK)
    assert stages == (["encode"] + ["sample"] * 2 + ["decode"]) * 2
    generator = torch.Generator().manual_seed(3)
    result = image
    for size in ((32, 48), (64, 96)):
        noise = torch.randn((1, 4, size[0] // 8, size[1] // 8), generator=generator)
        result = pipeline(result, size=size, noise=noise, **QUICK)
    assert torch.equal(got, result)


def test_own_embeddings(pipeline: FaithDiffPipeline) -> None:
    images = torch.stack([photo(16, 16, 1), photo(16, 16, 2)])
    text = pipeline.encode_text(["a cat"], ["blurred"])
    embeddings: dict[str, Any] = {
        "prompt_embeds": text.embeds,
        "pooled_prompt_embeds": text.pooled,
        "negative_prompt_embeds": text.negative_embeds,
        "negative_pooled_prompt_embeds": text.negative_pooled,
    }
    quick: dict[str, Any] = {"steps": 2, "tile": 128, "seed": 1}
    typed = pipeline(images, prompt="a cat", negative_prompt="blurred", **quick)
    assert close(pipeline(images, **embeddings, **quick), typed)
    assert not close(pipeline(images, prompt="a cat", **quick), typed)


def test_vae_tiles(pipeline: FaithDiffPipeline) -> None:
    image = photo(120, 136)[None]
    whole = pipeline(image, seed=1, **QUICK)
    seen: list[str] = []
    tiled = pipeline(image, seed=1, vae_tile=128, progress=lambda stage, *_: seen.append(stage), **QUICK)
    assert tiled.shape == whole.shape
    assert not torch.equal(tiled, whole)
    # Measured: 0.006; the image's values spread over 0.26.
    assert float((tiled - whole).abs().max()) < 0.012
    assert seen.count("decode") > 1


def test_half_precision(tiny_sdxl: Path, golden: Golden, pipeline: FaithDiffPipeline) -> None:
    image = photo(32, 32)[None]
    full = pipeline(image, seed=1, cfg=2, **QUICK)
    half = load(tiny_sdxl, golden, dtype="bf16")
    assert {p.dtype for p in half.base.unet.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in [*half.alignment.parameters(), *half.lq_encoder.parameters()]} == {torch.bfloat16}
    result = half(image, seed=1, cfg=2, **QUICK)
    assert result.dtype == torch.float32
    # Measured: 0.020 and 0.0024; the image's values spread over 0.26.
    assert float((result - full).abs().max()) < 0.04
    assert float((result - full).abs().mean()) < 0.005


NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="accelerate's layer-wise hooks need a GPU")


@pytest.mark.parametrize("offload", ["model", pytest.param("sequential", marks=NEEDS_CUDA)])
def test_offloading_changes_nothing(
    tiny_sdxl: Path,
    golden: Golden,
    tmp_path: Path,
    pipeline: FaithDiffPipeline,
    monkeypatch: pytest.MonkeyPatch,
    offload: Any,
) -> None:
    """Without a GPU, the hooks that move whole models do not mind that both memories are the same."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        monkeypatch.setattr("faithdiff_core.engine.pipeline.check_offload", lambda *_: None)
    image = photo(72, 72)[None]
    kept = load(tiny_sdxl, golden, device=device)
    expected = [kept(image, seed=1, vae_tile=tile, **QUICK) for tile in (None, 128)]
    offloaded = load(tiny_sdxl, golden, device=device, offload=offload)
    hooked = offloaded.base.unet if offload == "model" else offloaded.base.unet.conv_in
    assert hasattr(hooked, "_hf_hook")
    for tile, result in zip((None, 128), expected, strict=True):
        assert torch.equal(offloaded(image, seed=1, vae_tile=tile, **QUICK), result)
    make_lora(pipeline.base.unet, tmp_path / "lora.safetensors")
    offloaded.load_lora(tmp_path / "lora.safetensors")
    assert not close(offloaded(image, seed=1, **QUICK), expected[0], 1e-3)
    offloaded.unload_loras()
    assert torch.equal(offloaded(image, seed=1, **QUICK), expected[0])
    hooked = offloaded.base.unet if offload == "model" else offloaded.base.unet.conv_in
    assert hasattr(hooked, "_hf_hook")


# Cancelling


class CancelError(Exception):
    """Raised by the tests' progress."""


@pytest.mark.parametrize("stage", ["encode", "sample", "decode"])
@pytest.mark.parametrize("name", ["euler", "dpmpp_2m"])
def test_cancelling_leaves_nothing_behind(pipeline: FaithDiffPipeline, stage: str, name: str) -> None:
    pipeline.base.scheduler = make_scheduler(name)
    image = photo(72, 72)[None]
    settings: dict[str, Any] = {"seed": 1, "encoder_tile": 64, "vae_tile": 128, **QUICK}
    expected = pipeline(image, **settings)
    before = dict(pipeline.base.scheduler.__dict__)

    def cancel(at: str, done: int, total: int) -> None:
        if at == stage and done >= min(2, total):
            raise CancelError

    with pytest.raises(CancelError):
        pipeline(image, progress=cancel, **settings)
    assert not pipeline.base.unet.conv_in._forward_hooks
    assert pipeline.base.scheduler.__dict__.keys() == before.keys()
    assert torch.equal(pipeline(image, **settings), expected)


# Files


def test_single_file_is_the_folder(tiny_sdxl: Path, golden: Golden, tmp_path: Path) -> None:
    checkpoint, configuration, whole = make_single_file(tiny_sdxl, tmp_path)
    from_folder = load(whole, golden)
    from_file = load(checkpoint, golden, config=configuration)
    image = photo(24, 24)[None]
    assert torch.equal(from_file(image, seed=1, **QUICK), from_folder(image, seed=1, **QUICK))


def test_adapter_alone_keeps_the_models_unet(tiny_sdxl: Path, golden: Golden, tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel
    from safetensors.torch import load_file, save_file

    tensors = load_file(golden.model)
    prefixes = ("denoise_encoder.", "condition_embedding.", "information_transformer_layes.", "spatial_ch_projs.")
    adapter, unet = tmp_path / "x_adapter.safetensors", tmp_path / "x_unet.safetensors"
    save_file({k: v for k, v in tensors.items() if k.startswith(prefixes)}, adapter)
    changed = {k: v * 1.5 for k, v in tensors.items() if not k.startswith(prefixes)}
    save_file(changed, unet)

    def weights(pipeline: FaithDiffPipeline) -> Tensor:
        value: Tensor = pipeline.base.unet.state_dict()["mid_block.resnets.0.conv1.weight"]
        return value

    own = UNet2DConditionModel.from_pretrained(tiny_sdxl, subfolder="unet")
    own_value = own.state_dict()["mid_block.resnets.0.conv1.weight"]
    assert torch.equal(weights(load(tiny_sdxl, golden, dtype="fp32")), own_value)
    kept = FaithDiffPipeline.from_files(tiny_sdxl, adapter, dtype="fp32", device="cpu")
    assert torch.equal(weights(kept), own_value)
    replaced = FaithDiffPipeline.from_files(tiny_sdxl, adapter, unet=unet, dtype="fp32", device="cpu")
    assert torch.equal(weights(replaced), changed["mid_block.resnets.0.conv1.weight"].float())
    with pytest.raises(WeightsError, match=r"x_adapter.safetensors holds no U-Net"):
        FaithDiffPipeline.from_files(tiny_sdxl, adapter, unet=adapter, device="cpu")
    with pytest.raises(WeightsError, match=r"x_unet.safetensors holds only unet"):
        FaithDiffPipeline.from_files(tiny_sdxl, unet, device="cpu")


def test_another_vae(tiny_sdxl: Path, golden: Golden, tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(tiny_sdxl, subfolder="vae")
    with torch.no_grad():
        vae.post_quant_conv.bias.add_(1)
    vae.save_pretrained(tmp_path / "vae")
    pipeline = load(tiny_sdxl, golden, vae=tmp_path / "vae")
    assert torch.equal(pipeline.base.vae.post_quant_conv.bias, vae.post_quant_conv.bias)
    with pytest.raises(WeightsError, match="There is no VAE"):
        load(tiny_sdxl, golden, vae=tmp_path / "nothing")


def test_loras_add_up(tiny_sdxl: Path, golden: Golden, tmp_path: Path, pipeline: FaithDiffPipeline) -> None:
    path = tmp_path / "tiny.v1.safetensors"
    with_lora = load(tiny_sdxl, golden)
    delta = make_lora(with_lora.base.unet, path)
    assert delta
    merged = load(tiny_sdxl, golden)
    state = merged.base.unet.state_dict()
    image = photo(24, 24)[None]
    with_lora.load_lora(path, weight=0.5)
    with_lora.load_lora(path, weight=0.25, adapter_name="again")
    for name, value in delta.items():
        state[name] += 0.75 * value
    expected = merged(image, seed=1, **QUICK)
    assert close(with_lora(image, seed=1, **QUICK), expected, 1e-3)
    plain = pipeline(image, seed=1, **QUICK)
    assert not close(expected, plain, 1e-2)
    with pytest.raises(SettingsError, match="'again' is loaded already"):
        with_lora.load_lora(path, adapter_name="again")
    with_lora.unload_loras()
    assert torch.equal(with_lora(image, seed=1, **QUICK), plain)


def test_bad_loras(tiny_sdxl: Path, golden: Golden, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    pipeline = load(tiny_sdxl, golden)
    with pytest.raises(WeightsError, match="There is no LoRA file"):
        pipeline.load_lora(tmp_path / "nothing.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(WeightsError, match=r"other.safetensors (could not be read as a LoRA|has nothing in it)"):
        pipeline.load_lora(tmp_path / "other.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(WeightsError, match=r"broken.safetensors could not be read as a LoRA"):
        pipeline.load_lora(tmp_path / "broken.safetensors")
    assert torch.isfinite(pipeline(photo(16, 16)[None], **QUICK)).all()


def test_bad_models(tiny_sdxl: Path, golden: Golden, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="There is no SDXL checkpoint"):
        load(tmp_path / "nothing.safetensors", golden)
    with pytest.raises(WeightsError, match=r"has no model_index.json"):
        load(tmp_path, golden)
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(
        WeightsError, match=r"holds a StableDiffusionPipeline; FaithDiff works on .*, and faithdiff_tiny.* on SDXL"
    ):
        load(tmp_path, golden)
    with pytest.raises(WeightsError, match=r"faithdiff_tiny.safetensors could not be read as an SDXL checkpoint"):
        load(golden.model, golden, config=tiny_sdxl)


def test_parts_of_other_sizes(tiny_sdxl: Path, golden: Golden, tmp_path: Path, shared: FaithDiffPipeline) -> None:
    import shutil

    other = tmp_path / "other"
    shutil.copytree(tiny_sdxl, other)
    config = other / "unet" / "config.json"
    config.write_text(config.read_text().replace('"layers_per_block": 1', '"layers_per_block": 2'))
    with pytest.raises(WeightsError, match=r"does not fit the SDXL model: \d+ tensor\(s\) differ, such as"):
        load(other, golden)
    weights = read_faithdiff(golden.model)
    unet = shared.base.unet
    original = unet.config
    try:
        unet.register_to_config(block_out_channels=[64, 64, 64])
        with pytest.raises(WeightsError, match=r"begins with 64 channels .* made for 32 channels"):
            FaithDiffPipeline(shared.base, weights.build_lq_encoder(), weights.build_alignment(), device="cpu")
    finally:
        unet._internal_dict = original


def test_overflowing_vae_is_named(tiny_sdxl: Path, golden: Golden) -> None:
    pipeline = load(tiny_sdxl, golden)
    with torch.no_grad():
        pipeline.base.vae.decoder.conv_out.bias.fill_(float("nan"))
    with pytest.raises(NotFiniteError, match=r"while decoding in torch.float32.*fp16-fix"):
        pipeline(photo(16, 16)[None], **QUICK)
    with torch.no_grad():
        pipeline.base.vae.encoder.conv_in.bias.fill_(float("inf"))
    with pytest.raises(NotFiniteError, match=r"while encoding in torch.float32.*fp16-fix"):
        pipeline(photo(16, 16)[None], **QUICK)


def test_overflowing_lq_encoder_is_named(tiny_sdxl: Path, golden: Golden) -> None:
    pipeline = load(tiny_sdxl, golden, dtype="fp16")
    with torch.no_grad():
        pipeline.lq_encoder.get_parameter("mid_block.resnets.1.conv2.bias").fill_(6e4).mul_(6e4)
    with pytest.raises(NotFiniteError, match=r"LQ encoder's features are not finite .* in float16. Compute in bf16"):
        pipeline.encode_lq(torch.zeros(1, 3, 16, 16))


@pytest.mark.parametrize("tile", [None, 64])
def test_decode_progress_counts_over_the_batch(pipeline: FaithDiffPipeline, tile: int | None) -> None:
    counts: list[tuple[int, int]] = []
    latent = torch.randn((3, 4, 10, 12), generator=torch.Generator().manual_seed(0))
    together = pipeline.decode(latent, tile, lambda _stage, done, total: counts.append((done, total)))
    assert counts == sorted(counts)
    assert counts[-1][0] == counts[-1][1] >= 3
    assert close(together[1:2], pipeline.decode(latent[1:2], tile))


def test_sdxls_own_vae_stays_in_full_precision(tiny_sdxl: Path, golden: Golden, tmp_path: Path) -> None:
    import shutil

    own = tmp_path / "own"
    shutil.copytree(tiny_sdxl, own)
    config = own / "vae" / "config.json"
    config.write_text(config.read_text().replace('"force_upcast": false', '"force_upcast": true'))
    assert load(own, golden, dtype="fp16").base.vae.dtype == torch.float32
    assert load(tiny_sdxl, golden, dtype="fp16").base.vae.dtype == torch.float16


# Bad arguments


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps must be a whole number from 1 to 1000, got 0"),
        ({"cfg": 0.5}, "cfg must lie between 1 and 20, got 0.5"),
        ({"cfg": 20.5}, "cfg must lie between 1 and 20"),
        ({"start": "middle"}, r"start must be one of \['lr', 'noise'\], got 'middle'"),
        ({"color_fix": "lab"}, "color_fix must be one of"),
        ({"tile": 100}, "^tile must be a multiple of 8 pixels and at least 64, got 100"),
        ({"overlap": 1.0}, "overlap must lie between 0 and 0.9"),
        ({"tile_batch": 0}, "tile_batch must be a whole number from 1, got 0"),
        ({"encoder_tile": 8}, "encoder_tile must be a multiple"),
        ({"encoder_overlap": -1.0}, "encoder_overlap must lie"),
        ({"vae_tile": 65}, "vae_tile must be a multiple"),
        ({"strength": -1.0}, "strength must be 0 or more, got -1.0"),
        ({"strength": float("nan")}, "strength must be 0 or more"),
        ({"passes": 0}, "passes must be a whole number from 1 to 8, got 0"),
        ({"passes": 10**9}, "passes must be a whole number from 1 to 8, got 1000000000"),
        ({"size": (0, 5)}, r"size must be \(height, width\) in pixels, got \(0, 5\)"),
        ({"scale": 0}, "scale must be a positive number"),
        ({"scale": -3}, "^scale must be a positive number, got -3"),
        ({"seed": [1, 2]}, "seed: expected one number or 1, one for each image, got 2"),
        ({"prompt": ["a", "b"]}, "prompt: expected one text or 1, one for each image, got 2"),
        ({"noise": torch.zeros(1, 4, 3, 3)}, r"noise must have the shape \(1, 4, 4, 4\)"),
        ({"noise": torch.zeros(1, 4, 4, 4), "passes": 2}, "requires a batched tensor"),
        ({"prompt_embeds": torch.zeros(1, 77, 64)}, "belong together"),
        (
            {"prompt_embeds": torch.zeros(1, 77, 64), "pooled_prompt_embeds": torch.zeros(1, 64)},
            "needs both of the negative prompt's embeddings",
        ),
    ],
)
def test_bad_settings(pipeline: FaithDiffPipeline, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        pipeline(photo(16, 16)[None], **QUICK | settings)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(3, 8, 8), r"got \[\(3, 8, 8\)\]"),
        (torch.zeros(1, 4, 8, 8), r"got \[\(1, 4, 8, 8\)\]"),
        ([torch.zeros(1, 3, 8, 8)], r"list of \(3, height, width\)"),
        ([], "images must be RGB"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "floating point in .* got torch.uint8; divide bytes by 255"),
    ],
)
def test_bad_images(pipeline: FaithDiffPipeline, images: Any, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        pipeline(images, **QUICK)


def test_bad_choices_of_machine(tiny_sdxl: Path, golden: Golden) -> None:
    with pytest.raises(SettingsError, match="dtype must be one of fp32, bf16 and fp16, got 'int8'"):
        load(tiny_sdxl, golden, dtype="int8")
    with pytest.raises(SettingsError, match="offload='model' needs an accelerator"):
        load(tiny_sdxl, golden, offload="model")
    with pytest.raises(SettingsError, match="offload must be one of"):
        load(tiny_sdxl, golden, offload="disk")
    with pytest.raises(SettingsError, match="scheduler must be one of"):
        load(tiny_sdxl, golden, scheduler="eula")


def test_features_of_another_size(pipeline: FaithDiffPipeline, golden: Golden, text: TextConditioning) -> None:
    t = golden.tensors
    with pytest.raises(SettingsError, match=r"Features must be \(1, channels, 16, 16\).* got \(1, 64, 25, 33\)"):
        pipeline.sample(t["tiles_lr.lq_features"], text, t["one_tile_noise.noise"], start="noise")
    with pytest.raises(SettingsError, match="got none"):
        pipeline.sample(None, text, t["one_tile_noise.noise"], start="noise")
