"""Restoring saved state, including that of earlier versions."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trainer.optim.dadapt.quantized import BLOCK, decode
from trainer.optim.dadapt.state import TILE, Segment

_MOMENTS = ("exp_avg", "exp_avg_sq", "s")

Own = Sequence[tuple[Segment, Tensor, Mapping[str, Tensor]]]


def restore(
    own: Own, state: Mapping[Any, Any], scalars: Mapping[str, Tensor], adaptation: Mapping[str, Any]
) -> None:
    """Copy saved state into an optimizer's own tensors.

    8-bit state of versions without `tiled` has an s for every element, and blocks in the order of indices:
    it is converted, with a warning.

    Args:
        own: the place of each parameter's state, the parameter, and its state by name.
        adaptation: the saved scalars.

    Raises:
        ValueError: the state is of other parameters or of another precision; nothing is changed then.
    """
    if sorted(state) != list(range(len(own))):
        raise ValueError(f"the state is of {len(state)} parameters, this optimizer has {len(own)}")
    eight = {f"{name}{ending}" for name in _MOMENTS for ending in ("", "_exponent")}
    earlier = "tiled" not in adaptation and all(set(saved) == eight for saved in state.values())
    converts = earlier and all(segment.bank.bits == 8 and segment.bank.every for segment, _, _ in own)
    copies = [(f"adaptation.{key}", target, adaptation[key]) for key, target in scalars.items()]
    for number, (_, parameter, kept) in enumerate(own):
        if converts:
            targets = {
                name: state[number][name].new_empty(parameter.shape, device="meta") for name in _MOMENTS
            }
        else:
            targets = dict(kept)
            if set(kept) != set(state[number]):
                raise ValueError(
                    f"the state of parameter {number} has {sorted(state[number])}, "
                    f"this optimizer keeps {sorted(kept)}"
                )
        copies += [(f"{number}.{key}", target, state[number][key]) for key, target in targets.items()]
    for name, target, source in copies:
        if target.shape != source.shape or target.dtype != source.dtype:
            raise ValueError(
                f"state {name} is {source.dtype} {tuple(source.shape)}, this optimizer keeps {target.dtype} "
                f"{tuple(target.shape)}"
            )
    for _, target, source in copies:
        if target.device.type != "meta":
            target.copy_(source)
    if converts:
        for number, (segment, parameter, _) in enumerate(own):
            _convert(segment, parameter, state[number])
        warnings.warn(
            "the optimizer state of an earlier version was converted: s is kept for one element in 16 of "
            "each large tensor from now on, so d stays within some percent of its course before",
            stacklevel=3,
        )


def _convert(segment: Segment, parameter: Tensor, saved: Mapping[str, Tensor]) -> None:
    """Store state whose blocks follow the order of indices, rounded to nearest."""
    bank = segment.bank
    values: dict[str, Tensor] = {}
    for name in _MOMENTS:
        codes = torch.nn.functional.pad(saved[name].reshape(-1), (0, -segment.numel % BLOCK)).view(-1, BLOCK)
        whole = (
            decode(codes, saved[f"{name}_exponent"].view(-1, 1))
            .view(-1)[: segment.numel]
            .view(parameter.shape)
        )
        flat = torch.nn.functional.pad(segment.flat(whole), (0, -segment.numel % TILE))
        values[name] = flat.view(-1, TILE).to(bank.device)
    if bank.every > 1:
        values["s"] = values["s"].gather(1, bank.drawn(segment.first, segment.tiles))
    nearest = torch.full((segment.tiles, TILE), 0.5, device=bank.device)
    for name, value in values.items():
        bank.store(name, segment.first, value, nearest, None)
