"""Optimizers of libraries for the memory trace: a measured small one stands in for each."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from trainer.networks import UNET
from trainer.optim import OptimizerOptions
from trainer.optim.schedules import ScheduleOptions
from trainer.planning.memory_ledger import META, WEIGHTS, Ledger
from trainer.training.precision import Precision

_MEASURED = 1 << 16
"""Elements of the largest measured weight; larger weights are extrapolated."""

_BITSANDBYTES = 20
"""Bytes per stepped element that bitsandbytes' optimizers take on the CPU, as torch.profiler saw it in
version 0.50; on CUDA its kernels work in place."""


@dataclass(frozen=True, kw_only=True)
class _Alike(ScheduleOptions):
    """A stand-in for a library's optimizer, with as much state and work memory."""

    keeps: Callable[[int], int]
    """Bytes of state by number of elements."""
    takes: Callable[[int], int]
    """Bytes of work memory in a step by number of elements."""

    def build(self, params: Iterable[nn.Parameter], lr: float) -> Optimizer:
        return _Standing(params, self)


class _Standing(Optimizer):
    _step_supports_amp_scaling = True

    def __init__(self, params: Iterable[nn.Parameter], options: _Alike) -> None:
        super().__init__(params, {})
        self._options = options
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["state"] = torch.empty(
                    options.keeps(parameter.numel()), dtype=torch.uint8, device=META
                )

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                torch.empty(self._options.takes(parameter.numel()), dtype=torch.uint8, device=META)


def traceable(options: OptimizerOptions) -> bool:
    """Return whether an optimizer of the project runs on the meta device."""
    return options.optimizer in ("dadapt_adam", "dadapt_adam8bit", "adamw8bit_fused")


def stand_in(options: OptimizerOptions, precision: Precision) -> _Alike:
    """Return options that take as much memory as a library's optimizer, measured on a small weight."""
    # Python code does the same everywhere; the kernels of torch and bitsandbytes cannot be traced.
    by_kernel = {"adamw": 0, **dict.fromkeys(("adamw8bit", "lion", "lion8bit"), _BITSANDBYTES)}.get(
        options.optimizer
    )
    if by_kernel and precision.device.type == "cuda":
        by_kernel = 0
    plain = replace(options, lr=1.0, lr_scheduler="constant")

    def of(elements: int, which: int) -> int:
        if elements <= _MEASURED:
            return _of_one_weight(plain, elements, precision.weights)[which]
        once, twice = (_of_one_weight(plain, times * _MEASURED, precision.weights)[which] for times in (1, 2))
        return twice + (twice - once) * (elements - 2 * _MEASURED) // _MEASURED

    return _Alike(
        lr=1.0,
        lr_scheduler="constant",
        keeps=lambda elements: of(elements, 0),
        takes=lambda elements: of(elements, 1) if by_kernel is None else by_kernel * elements,
    )


@cache
def _of_one_weight(options: OptimizerOptions, elements: int, dtype: torch.dtype) -> tuple[int, int]:
    """Return the bytes of a library optimizer's state, and of its second step's work, for one weight."""
    parameter = nn.Parameter(torch.ones(elements, dtype=dtype))
    optimizer = options.build([parameter], 1.0)
    ledger = Ledger(torch.device("cpu"))

    def step() -> int:
        parameter.grad = torch.full_like(parameter, 1e-3)
        with ledger:
            ledger.put([parameter, parameter.grad, *state()], (WEIGHTS, UNET))
            ledger.begin()
            before = sum(ledger.at_peak.values())
            optimizer.step()
        return sum(ledger.at_peak.values()) - before

    def state() -> list[Tensor]:
        values = (value for state in optimizer.state.values() for value in state.values())
        tensors = [value for value in values if isinstance(value, Tensor)]
        return list({tensor.untyped_storage()._cdata: tensor for tensor in tensors}.values())

    step()
    taken = step()
    return sum(tensor.numel() * tensor.element_size() for tensor in state()), taken


def compiles() -> bool:
    """Return whether D-Adaptation's step will be compiled on CUDA; assumed without a CUDA device."""
    if os.environ.get("TORCH_COMPILE_DISABLE") == "1":
        return False
    return not torch.cuda.is_available() or importlib.util.find_spec("triton") is not None
