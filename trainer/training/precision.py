"""Numeric precision of the forward and backward pass, and memory layout."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from trainer.errors import UserError
from trainer.training.options import PrecisionOptions

_SCALE_GROWTH = (
    (4000, (1.15, 2000)),
    (2000, (1.3, 500)),
    (1000, (1.6, 200)),
    (500, (1.8, 100)),
    (0, (2.0, 25)),
)


@dataclass(frozen=True)
class Precision:
    """Dtypes and loss scaler on a device."""

    device: torch.device
    dtype: torch.dtype | None
    """The autocast type, or None for fp32 throughout."""
    scaler: torch.amp.GradScaler | None
    """The loss scaler that fp16 needs."""
    weights: torch.dtype
    """Dtype of UNet and text encoder."""
    paced: bool = True
    """Make the loss scale change more gently over the run."""

    def pace(self, step: int) -> None:
        """Set the growth of the loss scale, if there is one, in optimizer step `step`, counted from 0."""
        if self.scaler is not None and self.paced:
            factor, steps = scale_growth(step)
            self.scaler.set_growth_factor(factor)
            self.scaler.set_backoff_factor(1 / factor)
            self.scaler.set_growth_interval(steps)

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context in which the networks compute.

        It has no cache of cast weights: every weight is used once in a forward pass, so the cache would save
        nothing and, under gradient checkpointing, hold a second copy of all weights until the pass ends.
        """
        if self.dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype, cache_enabled=False)

    @property
    def name(self) -> str:
        """The precision in one word: bf16, fp16 or fp32."""
        return {"torch.bfloat16": "bf16", "torch.float16": "fp16"}.get(str(self.dtype), "fp32")


def scale_growth(step: int) -> tuple[float, int]:
    """Return the factor of fp16's loss scale, growing or after an overflow, and the good steps between.

    As in EveryDream2: the scale is found quickly and then disturbed less and less.
    """
    return next(growth for start, growth in _SCALE_GROWTH if step >= start)


def resolve_precision(options: PrecisionOptions, device: torch.device) -> Precision:
    """Decide the precision on `device`; on CUDA also allow TF32 for what stays in fp32.

    Emulated bf16, which torch reports as supported on GPUs such as the T4, does not count: fp16 is many times
    faster there.

    Raises:
        UserError: fp16 on the CPU, or bf16 on a GPU without it.
    """
    kind = "no" if options.disable_amp else options.mixed_precision
    native_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if kind == "auto" and options.weights_dtype == "bf16":
        kind = "bf16"
    if kind == "auto":
        kind = "no" if device.type != "cuda" else "bf16" if native_bf16 else "fp16"
    if kind == "fp16" and device.type != "cuda":
        raise UserError(
            "mixed_precision: fp16 needs a CUDA device and this run is on the CPU; use auto, bf16 or no."
        )
    if kind == "bf16" and device.type == "cuda" and not native_bf16:
        name = torch.cuda.get_device_name(device)
        advice = "use auto or fp16, and weights_dtype fp32"
        raise UserError(f"mixed_precision: {name} does not compute bf16 natively; {advice}.")
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "no": None}[kind]
    weights = torch.bfloat16 if options.weights_dtype == "bf16" else torch.float32
    return Precision(device, dtype, torch.amp.GradScaler("cuda") if kind == "fp16" else None, weights)


def imagined_precision(options: PrecisionOptions) -> Precision:
    """Return the precision on an absent CUDA GPU that computes bf16 natively; without a scaler."""
    kind = "no" if options.disable_amp else options.mixed_precision
    dtype = {"auto": torch.bfloat16, "bf16": torch.bfloat16, "fp16": torch.float16, "no": None}[kind]
    weights = torch.bfloat16 if options.weights_dtype == "bf16" else torch.float32
    return Precision(torch.device("cuda"), dtype, None, weights)
