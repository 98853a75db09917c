"""Make the demo model from nothing: `python demo/make_model.py`.

Steps, each skipped if its result is in the work folder already:
  1. images: photographs of installed packages and generated images, with captions, into WORK/images;
  2. vae: a small VAE, trained to reproduce crops, and its decoder for longer;
  3. base: text encoders with fixed random weights, and a small SDXL U-Net, trained on the images' latents;
  4. train: stages 1 and 2 with `faithdiff_core.training`, as demo/train.yaml has it;
  5. model: everything in half precision into demo/model.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from photographs import find_photographs, generated_image, load_photograph
from torch import Tensor, nn

from faithdiff_core.backbone import SDXL, TRAIN_STEPS
from faithdiff_core.cli.train import read_config
from faithdiff_core.engine import make_scheduler
from faithdiff_core.images.color import wavelet
from faithdiff_core.sampling.schedule import alphas_cumprod
from faithdiff_core.training.data import list_images, open_image
from faithdiff_core.training.model import time_ids
from faithdiff_core.training.start import train
from faithdiff_core.training.yaml_config import read_yaml

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "tools"))

from tiny_models.text_encoders import byte_tokenizer, text_encoder  # noqa: E402

PHOTO_CAPTION, DRAWING_CAPTION = "A photograph.", "A drawing."

logger = logging.getLogger("make_model")


def make_images(config: dict[str, Any], share: str, folder: Path) -> None:
    """Write the training images with their captions."""
    unfinished = folder.with_name("." + folder.name)
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)

    def write(image: Any, name: str, caption: str) -> None:
        image.save(unfinished / f"{name}.png")
        (unfinished / f"{name}.txt").write_text(caption)

    for index, path in enumerate(find_photographs(config["photographs"], share)):
        for side in config["long_sides"]:
            write(load_photograph(path, side), f"photo-{index:03d}-{side}", PHOTO_CAPTION)
    for index in range(config["generated"]):
        write(generated_image(config["seed"] + index), f"drawing-{index:03d}", DRAWING_CAPTION)
    unfinished.rename(folder)


def crops(images: list[np.ndarray], size: int, batch: int, seed: int) -> Iterator[Tensor]:
    """Random crops without end, (batch, 3, size, size) in [-1, 1]; large images come more often."""
    rng = np.random.default_rng(seed)
    weights = np.array([math.sqrt(p.shape[0] * p.shape[1]) for p in images])
    while True:
        out = []
        for index in rng.choice(len(images), batch, p=weights / weights.sum()):
            image = images[index]
            top, left = (int(rng.integers(0, side - size + 1)) for side in image.shape[:2])
            crop = image[top : top + size, left : left + size]
            out.append(crop[:, ::-1] if rng.random() < 0.5 else crop)
        yield torch.from_numpy(np.stack(out)).permute(0, 3, 1, 2).float() / 127.5 - 1


def fit(
    module: nn.Module, settings: dict[str, Any], loss_of: Callable[[], Tensor], name: str
) -> list[tuple[int, float]]:
    """Minimise a loss with AdamW, a short warm-up and a cosine.

    Returns:
        (step, mean loss since the last entry) every 100 steps.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings["learning_rate"], betas=(0.9, 0.99), weight_decay=0.0)
    steps = settings["steps"]
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1, (s + 1) / 50) * (0.51 + 0.49 * math.cos(math.pi * s / steps))
    )
    log, recent, start = [], [], time.monotonic()
    for step in range(1, steps + 1):
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        recent.append(float(loss.detach()))
        if step % 100 == 0 or step == steps:
            log.append((step, float(np.mean(recent))))
            logger.info("%s: step %d, loss %.4f, %.0f s", name, step, log[-1][1], time.monotonic() - start)
            recent.clear()
    return log


def precision(settings: dict[str, Any]) -> AbstractContextManager[Any]:
    """Autocasting as configured."""
    return torch.autocast("cpu", torch.bfloat16, enabled=settings["precision"] == "bf16")


def make_vae(config: dict[str, Any], images: list[np.ndarray], folder: Path) -> list[tuple[int, float]]:
    """Train the VAE, and make its latents' channels uncorrelated with SDXL's scale."""
    from diffusers import AutoencoderKL

    settings = config["vae"]
    levels = len(settings["block_out_channels"])
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        block_out_channels=settings["block_out_channels"],
        layers_per_block=settings["layers_per_block"],
        latent_channels=4,
        sample_size=256,
        scaling_factor=SDXL.vae_scaling_factor,
        force_upcast=False,
    )
    source = crops(images, settings["crop"], settings["batch"], config["seed"])

    def loss_of() -> Tensor:
        pixels = next(source)
        with precision(settings):
            posterior = vae.encode(pixels).latent_dist
            result = vae.decode(posterior.sample()).sample.float()
        return reconstruction_loss(result, pixels) + settings["kl"] * posterior.kl().mean()

    log = fit(vae, settings, loss_of, "vae")
    whiten(vae, torch.cat([next(source) for _ in range(32)]))
    vae.save_pretrained(folder)
    return log


def reconstruction_loss(result: Tensor, pixels: Tensor) -> Tensor:
    """Absolute and squared error of everything but the lowest frequencies, and a little of those.

    The lowest frequencies come from the low-quality image in the wavelet colour correction, and would be lost: at 32
    channels, the decoder's last norm has one channel in each group, and takes away its mean.
    """
    error = wavelet(result, pixels) - pixels
    return error.abs().mean() + 3 * error.square().mean() + 0.05 * (result - pixels).abs().mean()


def refine_decoder(config: dict[str, Any], images: list[np.ndarray], folder: Path) -> list[tuple[int, float]]:
    """Train the VAE's decoder on, with a little noise such as sampling leaves; the latents stay as they are."""
    from diffusers import AutoencoderKL

    settings = config["vae"]
    vae = AutoencoderKL.from_pretrained(folder)
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    source = crops(images, settings["crop"], settings["batch"], config["seed"] + 77)

    def loss_of() -> Tensor:
        pixels = next(source)
        with precision(settings):
            with torch.no_grad():
                mean = vae.encode(pixels).latent_dist.mean.float()
            result = vae.decode(mean + 0.05 / SDXL.vae_scaling_factor * torch.randn_like(mean)).sample.float()
        return reconstruction_loss(result, pixels)

    log = fit(vae, settings["decoder"], loss_of, "decoder")
    vae.save_pretrained(folder)
    return log


@torch.no_grad()
def whiten(vae: Any, pixels: Tensor) -> None:
    """Change the 1 x 1 convolutions around the latents so that they have mean 0, no correlation, and SDXL's deviation.

    What the VAE computes from end to end stays the same.
    """
    channels = vae.config.latent_channels
    mean = vae.encode(pixels).latent_dist.mean.movedim(1, -1).reshape(-1, channels).double()
    values, vectors = torch.linalg.eigh(torch.cov(mean.T))
    to_white = (vectors / values.sqrt()).T / SDXL.vae_scaling_factor
    centre = mean.mean(0)
    quant, post = vae.quant_conv, vae.post_quant_conv
    weight, bias = quant.weight[:, :, 0, 0].double(), quant.bias.double()
    new_weight, new_bias = weight.clone(), bias.clone()
    new_weight[:channels] = to_white @ weight[:channels]
    new_bias[:channels] = to_white @ (bias[:channels] - centre)
    # The posterior's deviation is isotropic enough after a tiny KL term that its mean scale will do.
    new_bias[channels:] += 2 * math.log(float(torch.linalg.det(to_white).abs()) ** (1 / channels))
    back = torch.linalg.inv(to_white)
    post_weight = post.weight[:, :, 0, 0].double()
    post.bias.copy_(post.bias.double() + post_weight @ centre)
    post.weight.copy_((post_weight @ back)[:, :, None, None])
    quant.weight.copy_(new_weight[:, :, None, None])
    quant.bias.copy_(new_bias)


def make_base(config: dict[str, Any], images: dict[str, np.ndarray], vae_folder: Path, folder: Path) -> list[Any]:
    """Train the plain U-Net, and write an SDXL model as a diffusers folder."""
    from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel

    settings, text = config["unet"], config["text"]
    vae = AutoencoderKL.from_pretrained(vae_folder).eval().requires_grad_(False)
    torch.manual_seed(config["seed"])
    unet = UNet2DConditionModel(
        sample_size=32,
        block_out_channels=settings["block_out_channels"],
        layers_per_block=settings["layers_per_block"],
        down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        transformer_layers_per_block=settings["transformer_layers_per_block"],
        # SDXL's heads have 64 channels; diffusers calls their number attention_head_dim.
        attention_head_dim=[max(1, c // 64) for c in settings["block_out_channels"]],
        cross_attention_dim=2 * text["hidden_size"],
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=text["projection"] + 6 * 256,
    )

    def encoder(number: int, projected: bool) -> Any:
        torch.manual_seed(config["seed"] + number)
        return text_encoder(text["hidden_size"], text["projection"], projected)

    pipeline = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=encoder(1, projected=False),
        text_encoder_2=encoder(2, projected=True),
        tokenizer=byte_tokenizer(folder / "tokenizer", "<|endoftext|>"),
        tokenizer_2=byte_tokenizer(folder / "tokenizer_2", "!"),
        unet=unet,
        scheduler=make_scheduler(),
        add_watermarker=False,
        force_zeros_for_empty_prompt=False,
    )
    captions = ["", PHOTO_CAPTION, DRAWING_CAPTION]
    with torch.no_grad():
        context, _, pooled, _ = pipeline.encode_prompt(
            captions, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        latents = []
        for name, array in images.items():
            pixels = torch.tensor(array[: array.shape[0] // 8 * 8, : array.shape[1] // 8 * 8]).permute(2, 0, 1)
            encoded = vae.encode(pixels[None].float() / 127.5 - 1).latent_dist.mean[0] * SDXL.vae_scaling_factor
            latents.append((encoded, 1 if name.startswith("photo") else 2))
    rng = np.random.default_rng(config["seed"])
    abar = alphas_cumprod()
    size = settings["crop"] // 8

    def loss_of() -> Tensor:
        batch, words = [], []
        for index in rng.integers(0, len(latents), settings["batch"]):
            plane, word = latents[index]
            top, left = (int(rng.integers(0, side - size + 1)) for side in plane.shape[1:])
            batch.append(plane[:, top : top + size, left : left + size])
            words.append(0 if rng.random() < 0.2 else word)
        clean = torch.stack(batch)
        noise = torch.randn_like(clean) + 0.02 * torch.randn(len(clean), 4, 1, 1)
        steps = torch.randint(0, TRAIN_STEPS, (len(clean),))
        level = abar[steps].view(-1, 1, 1, 1)
        ids = time_ids(len(clean), settings["crop"], clean.device)
        predicted = unet(
            level.sqrt() * clean + (1 - level).sqrt() * noise,
            steps,
            encoder_hidden_states=context[words],
            added_cond_kwargs={"text_embeds": pooled[words], "time_ids": ids},
        ).sample
        return (predicted - noise).abs().mean()

    log = fit(unet, settings, loss_of, "unet")
    pipeline.save_pretrained(folder)
    return log


def assemble(base: Path, trained: Path, folder: Path, config: dict[str, Any], logs: dict[str, Any]) -> None:
    """Put the finished model together in half precision."""
    from diffusers import StableDiffusionXLPipeline

    shutil.rmtree(folder, ignore_errors=True)
    pipeline = StableDiffusionXLPipeline.from_pretrained(str(base), torch_dtype=torch.float16)
    pipeline.save_pretrained(folder)
    shutil.copy(trained, folder / "faithdiff.safetensors")
    (folder / "training_log.json").write_text(json.dumps({"config": config, **logs}, indent=1))
    for file in folder.rglob("*.json"):
        values = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(values, dict) and values.pop("_name_or_path", None):  # where it lay on this machine
            file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    for file in folder.rglob("*.safetensors"):
        file.chmod(0o644)
    size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    logger.info("%s: %.2f MB", folder, size / 1e6)


def main() -> int:
    """Run the steps that are still to do."""
    parser = argparse.ArgumentParser(description="Make demo/model from nothing.")
    parser.add_argument("--config", type=Path, default=HERE / "model.yaml", help="images, VAE and U-Net")
    parser.add_argument("--train", type=Path, default=HERE / "train.yaml", help="stages 1 and 2")
    parser.add_argument("--work", type=Path, default=HERE / "work", help="folder for what the steps leave behind")
    parser.add_argument("--share", default="/usr/share", help="folder of the installed desktop backgrounds")
    parser.add_argument("--output", type=Path, default=HERE / "model", help="the finished model")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    config, work = read_yaml(args.config), args.work
    work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(config["seed"])
    if not (work / "images").is_dir():
        make_images(config, args.share, work / "images")

    def logged(name: str, step: Callable[[], list[Any]]) -> list[Any]:
        """Run a step unless its log is there, which is written last."""
        path = work / f"{name}.json"
        if not path.is_file():
            path.write_text(json.dumps(step()))
        entries: list[Any] = json.loads(path.read_text())
        return entries

    def arrays() -> dict[str, np.ndarray]:
        return {f.stem: np.asarray(open_image(f)) for f in list_images(work / "images")}

    logs = {"vae": logged("vae", lambda: make_vae(config, list(arrays().values()), work / "vae"))}
    logs["decoder"] = logged("decoder", lambda: refine_decoder(config, list(arrays().values()), work / "vae"))
    logs["unet"] = logged("base", lambda: make_base(config, arrays(), work / "vae", work / "base"))
    settings = read_config(args.train)
    settings = dataclasses.replace(
        settings,
        base=work / "base",
        output=work / "train",
        data=dataclasses.replace(settings.data, folder=work / "images"),
    )

    def stages() -> list[Any]:
        outcome = train(settings)
        if not outcome.finished:
            raise SystemExit("stopped; run the command again to continue")
        every = 50
        return [
            (i + len(c), float(np.mean(c)))
            for i in range(0, outcome.steps, every)
            if (c := outcome.losses[i : i + every])
        ]

    logs["train"] = logged("train", stages)
    assemble(work / "base", work / "train" / "stage2.safetensors", args.output, config, logs)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
