"""Updating parameters inside the backward pass, as soon as their gradients are complete."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from trainer.optim.dadapt.device import TritonEngine
from trainer.optim.dadapt.eager import Arrival, TorchEngine
from trainer.optim.dadapt.state import Bank, Layout, Segment


@dataclass
class Pass:
    """The state of one step between its first gradient and its end."""

    lr: float
    blocked: Tensor
    """Not 0: the step changes nothing."""
    tables: dict[Bank, tuple[list[Tensor], list[Tensor]]] = field(default_factory=dict)
    """By group, coefficients, and those without decay."""
    seen: set[int] = field(default_factory=set)
    waiting: list[Arrival] = field(default_factory=list)
    """Parameters that are advanced in `step()`."""
    undecided: list[tuple[Segment, Tensor]] = field(default_factory=list)
    """Parameters that decay at the end if any has moved."""


class FusedBackward:
    """The part of an optimizer that updates parameters inside backward."""

    _pass: Pass | None
    _gate: Tensor | None
    _not_finite: Tensor
    _squares: Tensor
    _host: bool
    _segment_of: dict[Tensor, Segment]
    _engines: dict[Bank, TorchEngine | TritonEngine]
    _ready: Callable[[], Layout]
    _begin: Callable[[Tensor | None], Pass]
    _arrival: Callable[[Segment, Tensor, Tensor, Tensor | None], Arrival]

    @property
    def not_finite(self) -> Tensor:
        """Skipped non-finite gradients since this optimizer was built (fused backward): 0-d, int64.

        On a GPU, tiles of 2,048 elements.
        """
        self._ready()
        return self._not_finite

    @property
    def grad_norm(self) -> Tensor:
        """The 2-norm of the last gradient over all parameters (fused backward): 0-d, fp32."""
        self._ready()
        return self._squares.sqrt().float()

    def gate(self, finite: Tensor) -> None:
        """Before a fused backward: skip the whole step unless the loss is `finite`, 0-d, bool or number."""
        self._gate = (finite == 0).float()

    def arrive(self, parameter: Tensor) -> None:
        """Take the gradient of one parameter, in any order, and drop it."""
        self._ready()
        segment = self._segment_of[parameter]
        gradient, parameter.grad = parameter.grad, None
        if gradient is None:
            return
        if self._pass is None:
            self._pass = self._begin(self._gate)
            self._squares.zero_()
        now, engine = self._pass, self._engines[segment.bank]
        if segment.index in now.seen:
            raise RuntimeError(
                "a parameter got a second gradient before step(): fused backward takes one backward pass a "
                "step"
            )
        now.seen.add(segment.index)
        if now.lr == 0:
            return
        live = None
        if isinstance(engine, TorchEngine):
            norm = torch.linalg.vector_norm(gradient)
            finite, open_ = norm.isfinite(), now.blocked == 0
            self._not_finite.add_(open_ & ~finite)
            self._squares.add_(norm.double().square())
            live = finite & open_
            if self._host:
                if not live:
                    return
                live = None
        arrival = self._arrival(segment, parameter, gradient, live)
        if engine.waits(segment.numel):
            now.waiting.append(arrival)
        else:
            engine.advance([arrival])


def arrival_hook(optimizer: FusedBackward) -> Callable[[Tensor], None]:
    """Return the hook for parameters whose gradient is complete; it does not keep the optimizer alive."""
    reference = weakref.ref(optimizer)

    @torch.no_grad()
    def arrive(parameter: Tensor) -> None:
        optimizer = reference()
        if optimizer is not None:
            optimizer.arrive(parameter)

    return arrive
