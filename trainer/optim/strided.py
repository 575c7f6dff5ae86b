"""bitsandbytes' optimizers for weights in any memory format."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bitsandbytes.optim import adamw, lion

if TYPE_CHECKING:
    from bitsandbytes.optim.optimizer import Optimizer8bit
    from torch import Tensor
else:
    Optimizer8bit = object

_LIKE_THE_WEIGHTS = ("state1", "state2")


class _InMemoryOrder(Optimizer8bit):
    """Passes the library weights, gradients and state with their dimensions in the order of memory.

    By itself it makes every weight contiguous in its first step, which undoes channels last, and leaves the
    state's strides as they were, so that they no longer say how the state lies in memory.
    """

    def update_step(self, group: dict[str, Any], p: Tensor, gindex: int, pindex: int) -> None:
        if p.grad is None or p.is_contiguous():
            super().update_step(group, p, gindex, pindex)
            return
        order = sorted(range(p.dim()), key=p.stride, reverse=True)
        if not p.permute(order).is_contiguous():
            super().update_step(group, p, gindex, pindex)
            return
        weights, gradient, state = p.data, p.grad, self.state[p]
        kept = {name: state[name] for name in _LIKE_THE_WEIGHTS if name in state}
        p.grad = None
        p.data, p.grad = weights.permute(order), gradient.permute(order)
        state.update({name: value.permute(order) for name, value in kept.items()})
        super().update_step(group, p, gindex, pindex)
        p.grad = None
        p.data, p.grad = weights, gradient
        state.update(kept)


class AdamW8bit(_InMemoryOrder, adamw.AdamW8bit):
    """AdamW with block-wise 8-bit state."""


class Lion(_InMemoryOrder, lion.Lion):
    """Lion with 32 or 8 bits of state."""
