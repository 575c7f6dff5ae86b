"""Options of evaluation: samples, the fixed-noise loss and validation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt, MinLen, MultipleOf

Side = Annotated[int, Ge(8), MultipleOf(8)]

Scheduler = Literal[
    "ddim", "pndm", "ddpm", "lms", "euler", "euler_a", "kdpm2", "dpm++", "dpm++_2s", "dpm++_2m", "dpm++_sde",
    "dpm++_2m_sde", "dpm++_2s_k", "dpm++_2m_k", "dpm++_sde_k", "dpm++_2m_sde_k",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """Samples drawn during training."""

    sample_prompts: str | None = None
    """A .txt file with one prompt a line, or a .json file with prompts, seeds, guidance scales and more; null
    takes two captions of the data and two unrelated prompts, which show drift and burning."""

    sample_steps: Annotated[int, Ge(1)] | Literal["auto"] = 250
    """Draw samples every n optimizer steps, besides before the first and after the last; auto draws ten times
    a run."""


@dataclass(frozen=True, kw_only=True)
class SamplePrompt:
    """One entry of `samples` in a .json file of prompts."""

    prompt: str = ""
    """The text to draw."""

    negative_prompt: str = ""
    """The text to keep away from."""

    seed: Annotated[int, Ge(-1)] | None = None
    """The seed of the sample's noise; -1 draws a new one each time, null takes the file's."""

    size: tuple[Side, Side] | None = None
    """Width and height in pixels; null goes by aspect_ratio."""

    aspect_ratio: Annotated[float, Ge(0.1), Le(10)] = 1.0
    """Width over height, at the area of the resolution's square."""

    random_caption: bool = False
    """Draw a caption of the data instead, another one each time."""


@dataclass(frozen=True, kw_only=True)
class SamplePrompts:
    """The keys of a .json file of prompts. A .txt file sets the prompts only.

    By default each prompt is drawn at three guidance scales, as in EveryDream2: 7, which people will use, 4,
    and 1.01, which shows what the model itself has learned.
    """

    resolution: Annotated[int, Ge(64), MultipleOf(8)] | None = None
    """The side of a square sample; null takes the training's."""

    seed: Annotated[int, Ge(-1)] | None = None
    """The seed of prompts without their own; null takes the training's, -1 draws a new one each time."""

    cfgs: Annotated[tuple[Annotated[float, Ge(1)], ...], MinLen(1)] = (7.0, 4.0, 1.01)
    """Guidance scales, one column of the grid each; 1 is without guidance."""

    batch_size: Annotated[int, Ge(1)] | None = None
    """Samples drawn at a time; null takes half the training's batch size."""

    scheduler: Scheduler = "ddim"
    """The sampler."""

    num_inference_steps: Annotated[int, Ge(1), Le(1000)] = 30
    """The sampler's steps."""

    show_progress_bars: bool = False
    """Show a progress bar for every batch of samples, in a terminal."""

    generate_pretrain_samples: bool = True
    """Also draw before the first step, for comparison."""

    generate_samples_every_n_steps: Annotated[int, Ge(1)] | None = None
    """Draw every n optimizer steps; null takes sample_steps of the training."""

    samples: tuple[SamplePrompt, ...] | None = None
    """The prompts; null or an empty list takes two captions of the data and two unrelated prompts."""


@dataclass(frozen=True, kw_only=True)
class FixedLossOptions:
    """The fixed-noise loss, logged as loss/stabilize-train from step 0."""

    fixed_loss_images: Annotated[int, Ge(0)] = 16
    """Training images that the fixed-noise loss is measured on, each at 4 timesteps; 0 turns it off."""


@dataclass(frozen=True, kw_only=True)
class ValidationOptions:
    """Validation images: their loss shows how the model does on images it was not trained on."""

    validation_config: str | None = None
    """A .json file that chooses validation images and how often their loss is measured, as loss/val; null
    chooses none."""

    stop_on_overfit: bool = False
    """Save and end the run when the validation loss has risen for three measurements while that of training
    images fell. Needs validation_config."""


@dataclass(frozen=True, kw_only=True)
class ValidationFile:
    """The keys of the file that validation_config names.

    Losses are measured before the first step, as often as `every_n_epochs` says, and after the last.
    """

    batch_size: Annotated[int, Ge(1)] | None = None
    """Image-timestep pairs measured at a time, at least 4; null takes the training's."""

    every_n_epochs: Annotated[float, Gt(0)] = 1.0
    """Epochs between two measurements; 0.25 measures four times in each."""

    seed: Annotated[int, Ge(0)] = 555
    """Draws the automatic split and the fixed noise."""

    validate_training: bool = True
    """Measure loss/val, on the images of val_split_mode. extra_manual_datasets are measured either way."""

    val_split_mode: Literal["automatic", "manual", "none"] = "automatic"
    """The images of loss/val: a split of data_root, manual_data_root, or none."""

    auto_split_proportion: Annotated[float, Gt(0), Lt(1)] = 0.15
    """The share of images in an automatic split, chosen by the content of their files."""

    manual_data_root: str | None = None
    """A folder of captioned images for loss/val, not trained where it lies inside data_root."""

    extra_manual_datasets: dict[str, str] | None = None
    """More folders of captioned images by name, measured as loss/val and the name, not trained either."""

    stabilize_training_loss: bool = False
    """Measure the fixed-noise loss on stabilize_split_proportion of the training images instead of on
    fixed_loss_images."""

    stabilize_split_proportion: Annotated[float, Gt(0), Lt(1)] = 0.15
    """The share of training images for it."""
