"""D-Adaptation: optimizers that find their own learning rate (Defazio & Mishchenko 2023, arXiv 2301.07733)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt

from trainer.optim.adamw import MomentOptions

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer


@dataclass(frozen=True, kw_only=True)
class AdaptationOptions(MomentOptions):
    """What every Adam with D-Adaptation has: where d starts, how fast it grows, how weights decay."""

    decouple: bool = True
    """Decay the weights beside the gradient, as AdamW does, instead of adding to the gradient."""

    use_bias_correction: bool = False
    """Correct the moments' start at zero, as Adam does."""

    d0: Annotated[float, Gt(0)] = 1e-6
    """Where the estimate d starts."""

    growth_rate: Annotated[float, Ge(1)] = math.inf
    """The most that d may grow by in one step, as a factor; 1.02 is gentle."""

    adapts: ClassVar[bool] = True

    def correction(self, steps: int) -> float:
        """Return the factor of the bias correction on the rate of the step after `steps` others; 1 without it."""
        beta1, beta2 = self.betas
        return math.sqrt(1 - beta2 ** (steps + 1)) / (1 - beta1 ** (steps + 1)) if self.use_bias_correction else 1.0


@dataclass(frozen=True, kw_only=True)
class DAdaptAdamOptions(AdaptationOptions):
    """Adam whose rate is d*lr, d being D-Adaptation's growing estimate of the distance to the solution; state in fp32."""

    optimizer: Literal["dadapt_adam"] = "dadapt_adam"
    """The optimizer's name."""

    d_max: Annotated[float, Gt(0)] = math.inf
    """d does not grow beyond this; d_max * lr is the largest rate that can act."""

    state_bits: ClassVar[int] = 32

    def build(self, params: Iterable[nn.Parameter], lr: float) -> Optimizer:
        """Return the optimizer over `params`, its rate being d times `lr`."""
        from trainer.optim.dadapt_adam import DAdaptAdam

        return DAdaptAdam(
            params,
            lr=lr,
            betas=self.betas,
            eps=self.epsilon,
            weight_decay=self.weight_decay,
            decouple=self.decouple,
            use_bias_correction=self.use_bias_correction,
            d0=self.d0,
            growth_rate=self.growth_rate,
            d_max=self.d_max,
            state_bits=self.state_bits,
            compile=False,  # the eager path is the one that whole fine-tunes were measured with
        )

    def measure(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return `d`, the estimate `d_hat` that d follows upwards, and `rate` = d * lr * bias correction; 0-d tensors on the device."""
        lr = optimizer.param_groups[0]["lr"]
        d: Tensor = optimizer.d  # type: ignore[attr-defined]
        steps = int(optimizer.param_groups[0]["k"]) if self.use_bias_correction else 0
        return {"rate": d * (lr * self.correction(steps)), "d": d, "d_hat": optimizer.d_hat}  # type: ignore[attr-defined]


@dataclass(frozen=True, kw_only=True)
class DAdaptAdam8bitOptions(DAdaptAdamOptions):
    """dadapt_adam with its state in 8 bits: 3 bytes for a parameter instead of 12."""

    optimizer: Literal["dadapt_adam8bit"] = "dadapt_adam8bit"  # type: ignore[assignment]
    """The optimizer's name."""

    state_bits: ClassVar[int] = 8


@dataclass(frozen=True, kw_only=True)
class DAdaptAdamReferenceOptions(AdaptationOptions):
    """The dadaptation library's DAdaptAdam, to compare with: the same steps, with numbers read back for every tensor."""

    optimizer: Literal["dadapt_adam_reference"] = "dadapt_adam_reference"
    """The optimizer's name."""

    learned_keys: ClassVar[tuple[str, ...]] = ("d", "k", "numerator_weighted")

    def build(self, params: Iterable[nn.Parameter], lr: float) -> Optimizer:
        """Return the optimizer over `params`, its rate being d times `lr`."""
        from dadaptation import DAdaptAdam

        with redirect_stdout(StringIO()):  # the library prints a line about decoupled weight decay
            return DAdaptAdam(
                params,
                lr=lr,
                betas=self.betas,
                eps=self.epsilon,
                weight_decay=self.weight_decay,  # type: ignore[arg-type]  # the library annotates its default, 0, as int
                decouple=self.decouple,
                use_bias_correction=self.use_bias_correction,
                d0=self.d0,
                growth_rate=self.growth_rate,
            )

    def measure(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return `d`, the estimate `d_hat` that d follows upwards, and `rate` = d * lr * bias correction, which really acts.

        d_hat = W / ((1 - sqrt(beta2)) * |s|_1), with the weighted numerator W (arXiv 2301.07733, algorithm 5).
        """
        import torch

        group = optimizer.param_groups[0]
        s_l1 = sum((state["s"].abs().sum(dtype=torch.float64) for state in optimizer.state.values() if "s" in state), start=0.0)
        numerator = group["numerator_weighted"]
        d_hat = numerator / ((1 - math.sqrt(self.betas[1])) * float(s_l1)) if float(s_l1) > 0 else 0.0
        return {"rate": group["d"] * group["lr"] * self.correction(group["k"]), "d": group["d"], "d_hat": d_hat}
