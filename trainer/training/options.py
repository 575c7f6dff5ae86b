"""Options of training: length of a run, dtypes, cached latents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le


@dataclass(frozen=True, kw_only=True)
class LoopOptions:
    """Length, seed and device of a run."""

    max_epochs: Annotated[int, Ge(1), Le(100_000)] = 300
    """Number of times that every image is trained."""

    grad_accum: Annotated[int, Ge(1)] = 1
    """Batches of each rank that are averaged into one optimizer step."""

    seed: Annotated[int, Ge(-1)] = 555
    """The seed of everything random; -1 draws one, logs it and saves it."""

    stop_after_steps: Annotated[int, Ge(1)] | None = None
    """Save a checkpoint and stop with exit code 0 after this many optimizer steps of the run in all,
    counted over all its starts."""

    max_train_time: Annotated[float, Gt(0)] | None = None
    """Save a checkpoint and stop with exit code 0 after the first step with which the run has trained for
    this many minutes in all, over all its starts; time for loading, samples, validation and checkpoints does
    not count."""

    gpuid: Annotated[int, Ge(0)] = 0
    """The CUDA device to train on; of several ranks each takes the one of its number on its machine."""


@dataclass(frozen=True, kw_only=True)
class PrecisionOptions:
    """Dtypes of computation and weights."""

    mixed_precision: Literal["auto", "bf16", "fp16", "no"] = "auto"
    """Autocast dtype: auto is bf16 where the device computes it natively, else fp16 on CUDA and no on CPU."""

    weights_dtype: Literal["fp32", "bf16"] = "fp32"
    """Dtype of UNet and text encoder. bf16 halves weights and gradients; D-Adaptation Adam
    rounds them stochastically, so that small steps are not lost. Computes in bf16."""

    disable_amp: bool = False
    """Compute in fp32; the same as mixed_precision: no."""

    channels_last: bool = True
    """Store convolution weights and images channels last, which convolutions run faster with."""


@dataclass(frozen=True, kw_only=True)
class CacheOptions:
    """Caching of frozen networks' outputs."""

    cache_latents: Literal["auto", "disk", "memory", "no"] = "auto"
    """Encode each image once, before training, and the captions too where the text encoder is frozen: memory
    keeps that for this run, disk keeps latents for later runs as well, no encodes anew in every step; auto is
    memory where it takes at most a quarter of what is free and crop_jitter is 0, else no."""

    cache_dir: str | None = None
    """Folder of files that later runs use again: latents, and the index of a large data set. Null is
    the folder cache in logdir."""
