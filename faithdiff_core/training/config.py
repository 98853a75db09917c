"""What a training configuration says, with the paper's figures as defaults."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ..errors import SettingsError
from .degradation import DegradationConfig

EnlargeMode = Literal["nearest", "bilinear", "bicubic", "lanczos"]

LARGEST_SEED = 2**32 - 1
"""NumPy's global generator, which libraries draw from, takes no larger one."""


def check_number(name: str, value: float, low: float = 0.0, high: float = math.inf) -> None:
    """Refuse a number that is not finite or lies outside a range, ends included.

    Raises:
        SettingsError: it does; the text names the setting.
    """
    if not math.isfinite(value) or not low <= value <= high:
        bounds = f"of {low:g} or more" if high == math.inf else f"from {low:g} to {high:g}"
        raise SettingsError(f"{name} must be a finite number {bounds}, got {value}.")


@dataclass(frozen=True)
class DataConfig:
    """Where the images come from, and what is made of them.

    Attributes:
        folder: high-quality images, sub-folders included.
        lq_folder: their low-quality partners under the same names (any suffix), for given pairs.
        huggingface: instead of a folder, a data set of the `datasets` library: a folder that `save_to_disk` wrote,
        or a name. split, image_column, caption_column: where in that data set things are.
        captions: `text` (NAME.txt), `json` (NAME.json, key `caption`), `auto` (either), or `none` (all empty).
        on_bad: `raise` stops before training and names what is bad; `skip` leaves it out and says how many.
        check: decode every image before training starts. Without it only names and captions are looked at.
        max_bad: with `skip`, the largest share of the images that may turn out bad while the run goes on, 0 to 1.
        size: side of the square crops in pixels, a multiple of 8.
        small: what happens to images below that size: `refuse` takes them for bad, `pad` reflects them at the right
            and the bottom as the published code does.
        flip: mirror half of the crops.
        margin: pixels around a crop that are degraded with it, so that neither blur nor JPEG blocks begin at its
            corner. null degrades the whole image, as the published code does beforehand; 0 degrades the crop alone.
        enlarge: the ways to bring a low-quality crop to the size, of which one is drawn for each sample.
        size_conditioning: SDXL's six numbers: `image` gives the image's size and the crop's place (published), `crop`
            always those of an image of the crop's size.
        trim_captions: shorten captions as the published code does with its generated ones: without the first three
            words, two sentences. Set it to false for captions that a person wrote.
        degradation: how low-quality images are made; unused with `lq_folder`.
    """

    folder: Path | None = None
    lq_folder: Path | None = None
    huggingface: str | None = None
    split: str = "train"
    image_column: str = "image"
    caption_column: str = "caption"
    captions: Literal["auto", "text", "json", "none"] = "auto"
    on_bad: Literal["raise", "skip"] = "raise"
    check: bool = True
    max_bad: float = 0.01
    size: int = 512
    small: Literal["refuse", "pad"] = "refuse"
    flip: bool = True
    margin: int | None = 64
    enlarge: tuple[EnlargeMode, ...] = ("nearest", "bilinear", "bicubic")
    size_conditioning: Literal["image", "crop"] = "image"
    trim_captions: bool = True
    degradation: DegradationConfig = field(default_factory=DegradationConfig)

    def __post_init__(self) -> None:
        if (self.folder is None) == (self.huggingface is None):
            raise SettingsError("set exactly one of `folder` and `huggingface`.")
        if self.lq_folder is not None and self.folder is None:
            raise SettingsError("`lq_folder` holds the partners of the images in `folder`; give both.")
        if self.size % 8 or self.size < 32:
            raise SettingsError(f"size must be a multiple of 8 of at least 32 pixels, got {self.size}.")
        check_number("max_bad", self.max_bad, high=1)
        check_number("margin", self.margin or 0, high=4096)
        if not self.enlarge:
            raise SettingsError("enlarge must name at least one way.")
        scale = self.degradation.scale
        if self.lq_folder is None and self.size % scale and (self.margin != 0 or self.small == "pad"):
            raise SettingsError(
                f"size {self.size} is not a multiple of the degradation's scale {scale}. Change one of them, or set "
                "`margin: 0` and `small: refuse`."
            )


@dataclass(frozen=True)
class StageConfig:
    """One stage of Algorithm 1.

    Attributes:
        stage: 1 trains the alignment parts alone; 2 the LQ encoder, the U-Net and the alignment jointly.
        steps: number of optimizer steps.
        learning_rate: of the alignment, and in stage 2 of the U-Net (or its LoRA).
        lq_learning_rate: of the LQ encoder, in stage 2.
        warmup: steps over which the rates rise; then they fall along a cosine.
    """

    stage: Literal[1, 2]
    steps: int
    learning_rate: float = 5e-5
    lq_learning_rate: float = 5e-6
    warmup: int = 300

    def __post_init__(self) -> None:
        if self.steps < 1 or self.warmup < 0:
            raise SettingsError(f"steps must be 1 or more and warmup 0 or more, got {self.steps} and {self.warmup}.")
        check_number("learning_rate", self.learning_rate)
        check_number("lq_learning_rate", self.lq_learning_rate)


PAPER_STAGES = (StageConfig(1, 6000), StageConfig(2, 40000))


@dataclass(frozen=True)
class LoraConfig:
    """LoRA on the U-Net's attention instead of training all of it.

    Attributes:
        rank: of the update matrices.
        alpha: the update is scaled by alpha / rank.
        dropout: on the update's input.
        targets: the ends of the names of the layers that get one.
    """

    rank: int = 64
    alpha: float = 64.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")

    def __post_init__(self) -> None:
        if self.rank < 1 or not 0 <= self.dropout < 1:
            raise SettingsError(
                f"LoRA rank must be 1 or more and dropout 0 to below 1, got {self.rank}, {self.dropout}."
            )
        check_number("LoRA alpha", self.alpha)
        if not self.targets:
            raise SettingsError("LoRA targets must name at least one layer.")


@dataclass(frozen=True)
class ValidationConfig:
    """Sample images during training.

    Attributes:
        folder: high-quality images; each is cropped at the centre and degraded with its own seed.
        every: steps between two samplings.
        count: how many of the images.
        steps: Euler steps of a sampling.
    """

    folder: Path
    every: int = 1000
    count: int = 4
    steps: int = 20

    def __post_init__(self) -> None:
        if min(self.every, self.count, self.steps) < 1:
            raise SettingsError("every, count and steps must be 1 or more.")


@dataclass(frozen=True)
class TrainConfig:
    """A training run.

    Attributes:
        base: an SDXL, SD 2.1 or SD 1.5 model as a diffusers folder (unet, vae, text encoders, tokenizers). A U-Net that
            predicts v, as its scheduler's configuration says, goes on to do so.
        output: folder for checkpoints, logs, samples and the finished files.
        data: the training images.
        init: a FaithDiff file to start from (full or adapter); without it, the LQ encoder is copied from the VAE's.
        stages: what is trained, in this order.
        batch: images on each device at a time; the published total is 256.
        draws: timesteps and noises drawn for each image of a batch, spread over the schedule; more than the
            published 1 give a steadier gradient for little, where encoding images is what costs.
        accumulate: batches whose gradients are added up for one step. Defaults to accelerate's, which is 1 where
            nothing is said.
        workers: processes that make samples; 0 makes them in the training process.
        seed: of everything that is drawn.
        precision: of the computation; parameters that learn stay in float32. Defaults to accelerate's, which is `no`
            where nothing is said.
        frozen_precision: of the weights that never learn (text encoders, VAE, with LoRA the U-Net): `run` for the
            computation's, or fp32.
        save_precision: of the finished files.
        noise_offset: standard deviation of a constant that is added to the noise of each channel.
        text_dropout: how often a caption is replaced with the empty one.
        weight_decay, clip: AdamW's decay, and the norm that gradients are clipped to.
        ema: decay of the averaged weights; 0 turns averaging off.
        weights: which are finished, sampled and taken into the next stage: `averaged`, or `raw` ones as in the
            published code; `both` is `averaged` with the raw ones in files beside them.
        gradient_checkpointing: compute activations of the U-Net and the LQ encoder twice instead of keeping them.
        lora: train LoRA instead of the whole U-Net in stage 2.
        checkpoint_every, keep: steps between checkpoints, and how many of them stay.
        resume: continue from the newest checkpoint in `output`, if there is one.
        log_every: steps between two log lines; `tensorboard` writes them for TensorBoard too.
        validation: sample images during training.
    """

    base: Path
    output: Path
    data: DataConfig
    init: Path | None = None
    stages: tuple[StageConfig, ...] = PAPER_STAGES
    batch: int = 8
    draws: int = 1
    accumulate: int | None = None
    workers: int = 4
    seed: int = 0
    precision: Literal["no", "fp16", "bf16"] | None = None
    frozen_precision: Literal["run", "fp32"] = "run"
    save_precision: Literal["fp32", "fp16", "bf16"] = "fp16"
    noise_offset: float = 0.02
    text_dropout: float = 0.2
    weight_decay: float = 1e-2
    clip: float = 1.0
    ema: float = 0.9999
    weights: Literal["averaged", "raw", "both"] = "averaged"
    gradient_checkpointing: bool = False
    lora: LoraConfig | None = None
    checkpoint_every: int = 1000
    keep: int = 2
    resume: bool = True
    log_every: int = 10
    tensorboard: bool = True
    validation: ValidationConfig | None = None

    def __post_init__(self) -> None:
        if not self.stages:
            raise SettingsError("stages must name at least one stage.")
        for name in ("batch", "draws", "accumulate", "checkpoint_every", "keep", "log_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SettingsError(f"{name} must be 1 or more, got {value}.")
        if self.workers < 0:
            raise SettingsError(f"workers must be 0 or more, got {self.workers}.")
        if not 0 <= self.seed <= LARGEST_SEED:
            raise SettingsError(f"seed must be a whole number from 0 to {LARGEST_SEED}, got {self.seed}.")
        check_number("noise_offset", self.noise_offset)
        check_number("weight_decay", self.weight_decay)
        check_number("text_dropout", self.text_dropout, high=1)
        if not (math.isfinite(self.clip) and self.clip > 0):
            raise SettingsError(f"clip must be a finite number above 0, got {self.clip}.")
        if not 0 <= self.ema < 1:
            raise SettingsError(f"ema must be from 0 (off) to below 1 (which would never learn), got {self.ema}.")
