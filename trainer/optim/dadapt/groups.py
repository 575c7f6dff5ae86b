"""Parameter groups: what must hold of them, and their learned numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

LEARNED = ("d", "k", "numerator_weighted")
_SHARED = ("betas", "decouple", "use_bias_correction", "d0", "growth_rate", "d_max", "rate_max")


class Group(dict[str, Any]):
    """A parameter group whose learned numbers are tensors on the device that read as plain numbers."""

    def __getitem__(self, key: str) -> Any:
        value = super().__getitem__(key)
        return value.item() if key in LEARNED and isinstance(value, Tensor) else value

    def __setitem__(self, key: str, value: Any) -> None:
        own = super().get(key)
        if key in LEARNED and isinstance(own, Tensor):
            own.fill_(value)
        else:
            super().__setitem__(key, value)


def check_group(group: Mapping[str, Any], first: Mapping[str, Any], state_bits: int) -> None:
    """Raise ValueError if a group is out of range, or differs from the first in what all share."""
    beta1, beta2 = group["betas"]
    if not 0 <= beta1 < 1 or not 0 <= beta2 < 1:
        raise ValueError(f"betas are {group['betas']}; both must be at least 0 and below 1")
    for key in ("eps", "d0"):
        if not 0 < group[key] < math.inf:
            raise ValueError(f"{key} is {group[key]}; it must be above 0")
    for key in ("lr", "weight_decay"):
        if not 0 <= group[key] < math.inf:
            raise ValueError(f"{key} is {group[key]}; it must be 0 or above")
    for key in ("layer_scale", "rate_max"):
        if not group[key] > 0:
            raise ValueError(f"{key} is {group[key]}; it must be above 0")
    if not group["growth_rate"] >= 1:
        raise ValueError(f"growth_rate is {group['growth_rate']}; d never falls, so it must be 1 or above")
    if not group["d_max"] >= group["d0"]:
        raise ValueError(f"d_max is {group['d_max']}, below d0, {group['d0']}, where d starts")
    for key in _SHARED:
        if group[key] != first[key]:
            raise ValueError(
                f"{key} is {group[key]} in one group and {first[key]} in another; all groups share it"
            )
    for parameter in group["params"]:
        if parameter.dtype not in (torch.float32, torch.float64, torch.bfloat16):
            raise ValueError(
                f"a parameter is {parameter.dtype}; DAdaptAdam trains fp32, fp64 and bf16 parameters"
            )
        if not parameter.permute(
            sorted(range(parameter.dim()), key=parameter.stride, reverse=True)
        ).is_contiguous():
            raise ValueError(
                f"a parameter of shape {tuple(parameter.shape)} does not fill its memory, "
                "in which its state is laid out"
            )
        if parameter.dtype == torch.float64 and state_bits == 8:
            raise ValueError(
                "a parameter is torch.float64, whose state cannot be kept in 8 bits; use state_bits=32"
            )
