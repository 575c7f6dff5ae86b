"""The numbers that D-Adaptation learns, and the coefficients of a step, on the parameters' device."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trainer.optim.dadapt.adam import Coefficients, adapt
from trainer.optim.dadapt.device import launch
from trainer.optim.dadapt.groups import LEARNED
from trainer.transfer import to_device

_KINDS = {
    "d": torch.float64,
    "k": torch.int64,
    "numerator_weighted": torch.float64,
    "d_hat": torch.float64,
    "l1": torch.float64,
}
_DECAY, _GATE, _UNSCALE = map(Coefficients._fields.index, ("decay", "gate", "unscale"))


class Learned:
    """d, k, W, d_hat and |s|_1, and the coefficients of the coming step.

    Args:
        rows: the coefficients of a group, and their factors on the corrected rate, on d * lr and on the root
            of the second moment's correction.
        adapts: d is estimated.
    """

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        rows: Callable[[Mapping[str, Any]], Sequence[Coefficients]],
        adapts: bool,
        device: torch.device,
    ) -> None:
        self._groups, self._rows, self._adapts, self._device = groups, rows, adapts, device
        first = dict(groups[0])
        self.scalars = {
            key: torch.full((), first.get(key, 0), dtype=kind, device=device) for key, kind in _KINDS.items()
        }
        for group in groups:
            group.update({key: self.scalars[key] for key in LEARNED if key in group})
        self.coefficients = torch.zeros(len(groups), 16, device=device)
        self.launches = 0
        self._dlr = torch.zeros((), dtype=torch.float64, device=device)
        self._hypers: tuple[list[float], Tensor] | None = None
        self._handles: dict[str, Any] = {}

    def rates(self, lr: float, capped: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """Return d * lr, the root of the second moment's correction, and the rate capped by rate_max."""
        hyper = self._hyper(lr)
        rate = self.scalars["d"] * hyper[0]
        steps = (self.scalars["k"] + 1).double()
        root = (1 - (steps * hyper[3]).exp()).sqrt()
        corrected = rate * root / (1 - (steps * hyper[2]).exp())
        return rate, root, corrected.minimum(hyper[1]) if capped else corrected

    def begin(self, lr: float, blocked: Tensor, scale: Tensor) -> Tensor:
        """Write the coefficients of a step, and return them: (groups, 16), fp64.

        On the CPU the gate stays open, and decay acts in the first step too: there both are decided by
        looking at the numbers.
        """
        rate, root, dlr = self.rates(lr)
        rows = self._hyper(lr)[8:].view(-1, 4, 16)
        values = rows[:, 0] + rows[:, 1] * dlr + rows[:, 2] * rate + rows[:, 3] * root
        values[:, _UNSCALE] = 1 / scale
        if on_device(self._device):
            values[:, _DECAY] *= self.scalars["l1"] > 0
            values[:, _GATE] = blocked == 0
        self._dlr.copy_(dlr)
        self.coefficients.copy_(values)
        return values

    def end(self, num: Tensor, l1: Tensor, blocked: Tensor) -> None:
        """Learn from a step's sums, which are without their factor dlr."""
        if self._adapts:
            new = adapt(self.scalars, num * self._dlr, l1, self._groups[0])
        else:
            new = {"k": self.scalars["k"] + 1, "learns": torch.ones_like(l1, dtype=torch.bool)}
        learns = new.pop("learns") & (blocked == 0)
        for key, value in new.items():
            self.scalars[key].copy_(torch.where(learns, value, self.scalars[key]))

    def begin_in_kernel(self, lr: float, blocked: Tensor, scale: Tensor) -> None:
        """Do as `begin`, in one launch."""
        s = self.scalars
        state = s["d"], s["k"], s["l1"], blocked, scale, self._dlr, self.coefficients
        self._launch("begin", len(self._groups), (self._hyper(lr), *state))

    def end_in_kernel(self, lr: float, sums: Tensor, blocked: Tensor, not_finite: Tensor) -> None:
        """Do as `end`, in one launch, and count tiles that are not finite."""
        learned = [self.scalars[key] for key in ("d", "numerator_weighted", "d_hat", "l1", "k")]
        arguments = (self._hyper(lr), sums, self._dlr, blocked, *learned, not_finite)
        self._launch("finish", 1, arguments, {"ADAPTS": self._adapts})

    def _launch(
        self, name: str, programs: int, arguments: tuple[Any, ...], constants: Mapping[str, Any] | None = None
    ) -> None:
        self.launches += 1
        if self._device.type != "meta":
            launch(self._handles, name, programs, arguments, constants or {})

    def _hyper(self, lr: float) -> Tensor:
        """Return 8 numbers of all groups, and for each group its rows, of 16 each, as fp64.

        The numbers: lr, rate_max, logarithms of beta1 and beta2 (-inf without correction), sqrt(beta2),
        growth_rate, d_max.
        """
        first = self._groups[0]
        corrects, betas = first["use_bias_correction"], first["betas"]
        logarithms = [math.log(beta) if corrects and beta else -math.inf for beta in betas]
        values = [lr, first["rate_max"], *logarithms, math.sqrt(betas[1])]
        values += [first["growth_rate"], first["d_max"], 0.0]
        for row in (row for group in self._groups for row in self._rows(group)):
            values += [*row, *[0.0] * (16 - len(row))]
        if self._hypers is None or self._hypers[0] != values:
            self._hypers = values, to_device(torch.tensor(values, dtype=torch.float64), self._device)
        return self._hypers[1]


def on_device(device: torch.device) -> bool:
    """Return True if reading a number there waits for the device."""
    return device.type != "cpu"
