"""AdamW, torch's fused one and bitsandbytes' with 8-bit state."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, cast

from annotated_types import Ge, Gt, Lt

from trainer.optim.library import does_not_load
from trainer.optim.schedules import ScheduleOptions

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

Beta = Annotated[float, Ge(0), Lt(1)]


@dataclass(frozen=True, kw_only=True)
class MomentOptions(ScheduleOptions):
    """Options of every Adam: decays of the two moments, epsilon, weight decay."""

    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Decay of the running means of the gradient and of its square."""

    epsilon: Annotated[float, Gt(0)] = 1e-8
    """Added to the root of the second moment."""

    weight_decay: Annotated[float, Ge(0)] = 0.01
    """Decoupled weight decay: each step shrinks weights by weight_decay * rate (d*lr for D-Adaptation)."""


@dataclass(frozen=True, kw_only=True)
class AdamWOptions(MomentOptions):
    """torch's AdamW, fused (Loshchilov & Hutter, arXiv 1711.05101)."""

    optimizer: Literal["adamw"] = "adamw"
    """The optimizer's name."""

    def build(self, params: Iterable[nn.Parameter], lr: float) -> Optimizer:
        """Return the optimizer over `params` at rate `lr`."""
        from torch.optim import AdamW

        return AdamW(
            params, lr=lr, betas=self.betas, eps=self.epsilon, weight_decay=self.weight_decay, fused=True
        )


@dataclass(frozen=True, kw_only=True)
class AdamW8bitOptions(MomentOptions):
    """bitsandbytes' AdamW with block-wise 8-bit state (Dettmers et al., arXiv 2110.02861)."""

    optimizer: Literal["adamw8bit"] = "adamw8bit"
    """The optimizer's name."""

    def build(self, params: Iterable[nn.Parameter], lr: float) -> Optimizer:
        """Return the optimizer over `params` at rate `lr`.

        Raises:
            UserError: bitsandbytes is not installed or does not load.
        """
        try:
            from trainer.optim.strided import AdamW8bit
        except Exception as error:  # a broken CUDA set-up raises anything at import
            raise does_not_load(self.optimizer, "bitsandbytes", error, "adamw or dadapt_adam") from error
        return AdamW8bit(params, lr=lr, betas=self.betas, eps=self.epsilon, weight_decay=self.weight_decay)


@dataclass(frozen=True, kw_only=True)
class AdamW8bitFusedOptions(MomentOptions):
    """AdamW by this program's kernel: 8-bit state, stochastically rounded bf16 weights, fused backward."""

    optimizer: Literal["adamw8bit_fused"] = "adamw8bit_fused"
    """The optimizer's name."""

    fused_backward: bool = False
    """Update each weight inside the backward pass and drop its gradient: the same steps without memory for
    gradients. Not with grad_accum above 1, clip_grad_norm, fp16 or several processes, which need all
    gradients after backward."""

    rounds_bf16: ClassVar[bool] = True

    def build(self, params: Iterable[nn.Parameter], lr: float) -> Optimizer:
        """Return the optimizer over `params` at rate `lr`."""
        from trainer.optim.dadapt.optimizer import TiledAdamW

        return TiledAdamW(
            params,
            lr=lr,
            betas=self.betas,
            eps=self.epsilon,
            weight_decay=self.weight_decay,
            fused_backward=self.fused_backward,
        )

    def measure(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return `rate`; with fused backward also `not finite`, skipped gradients since start or resume."""
        found, own = super().measure(optimizer), cast(Any, optimizer)
        return {**found, "not finite": own.not_finite} if self.fused_backward else found
