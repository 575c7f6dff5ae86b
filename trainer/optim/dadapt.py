"""D-Adaptation: optimizers that find their own learning rate (Defazio & Mishchenko 2023, arXiv 2301.07733)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Lt

from trainer.optim.adamw import MomentOptions
from trainer.optim.library import does_not_load
from trainer.optim.lion import SignOptions
from trainer.optim.schedules import ScheduleOptions

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer


@dataclass(frozen=True, kw_only=True)
class EstimateOptions(ScheduleOptions):
    """What every optimizer with an estimate d of the distance to the solution has: where d starts."""

    d0: Annotated[float, Gt(0)] = 1e-6
    """Where the estimate d starts."""

    adapts: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class GrowthOptions(EstimateOptions):
    """Where d starts, and how fast it grows."""

    growth_rate: Annotated[float, Ge(1)] = math.inf
    """The most that d may grow by in one step, as a factor; 1.02 is gentle."""


@dataclass(frozen=True, kw_only=True)
class AdaptedMomentOptions(MomentOptions, GrowthOptions):
    """What every Adam with an estimate d has: how weights decay, and whether the moments are corrected."""

    decouple: bool = True
    """Decay the weights beside the gradient, as AdamW does, instead of adding to the gradient."""

    use_bias_correction: bool = False
    """Correct the moments' start at zero, as Adam does."""

    def correction(self, steps: int) -> float:
        """Return the factor of the bias correction on the rate of the step after `steps` others; 1 without it."""
        beta1, beta2 = self.betas
        return math.sqrt(1 - beta2 ** (steps + 1)) / (1 - beta1 ** (steps + 1)) if self.use_bias_correction else 1.0


@dataclass(frozen=True, kw_only=True)
class AdaptationOptions(AdaptedMomentOptions):
    """What every Adam with D-Adaptation has."""

    layer_scale: Annotated[float, Gt(0)] = 1.0
    """A factor on the steps of this network that the estimate of d does not see, nor weight decay; lr changes all three."""


@dataclass(frozen=True, kw_only=True)
class DAdaptAdamOptions(AdaptationOptions):
    """Adam whose rate is d*lr, d being D-Adaptation's growing estimate of the distance to the solution; state in fp32."""

    optimizer: Literal["dadapt_adam"] = "dadapt_adam"
    """The optimizer's name."""

    d_max: Annotated[float, Gt(0)] = math.inf
    """d does not grow beyond this; d_max * lr * layer_scale is the largest rate that can act."""

    state_bits: ClassVar[int] = 32

    def build(self, params: Iterable[nn.Parameter], lr: float) -> Optimizer:
        """Return the optimizer over `params`, its rate being d times `lr`."""
        from trainer.optim.dadapt_adam import DAdaptAdam

        return DAdaptAdam(
            [{"params": list(params), "layer_scale": self.layer_scale}],
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
        """Return `d`, the estimate `d_hat` that d follows upwards, and `rate`, which really acts: 0-d tensors on the device.

        rate = d * lr * layer_scale * bias correction.
        """
        lr = optimizer.param_groups[0]["lr"] * self.layer_scale
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
        try:
            from dadaptation import DAdaptAdam
        except ImportError as error:
            raise does_not_load(self.optimizer, "dadaptation", error, "dadapt_adam") from error
        with redirect_stdout(StringIO()):  # the library prints a line about decoupled weight decay
            return DAdaptAdam(
                [{"params": list(params), "layer_scale": self.layer_scale}],
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
        """Return `d`, the estimate `d_hat` that d follows upwards, and `rate`, which really acts.

        rate = d * lr * layer_scale * bias correction; layer_scale weighs both sums of d_hat and cancels.
        """
        group = optimizer.param_groups[0]
        rate = group["d"] * group["lr"] * self.layer_scale * self.correction(group["k"])
        return {"rate": rate, "d": group["d"], "d_hat": _estimate(optimizer)}


@dataclass(frozen=True, kw_only=True)
class DAdaptLionOptions(SignOptions, EstimateOptions):
    """The dadaptation library's DAdaptLion: steps of d*lr along a sign; experimental, as its authors say."""

    optimizer: Literal["dadapt_lion"] = "dadapt_lion"
    """The optimizer's name."""

    learned_keys: ClassVar[tuple[str, ...]] = ("d", "k", "numerator_weighted")

    def build(self, params: Iterable[nn.Parameter], lr: float) -> Optimizer:
        """Return the optimizer over `params`, its rate being d times `lr`.

        Raises:
            UserError: dadaptation is not installed.
        """
        try:
            from dadaptation import DAdaptLion
        except ImportError as error:
            raise does_not_load(self.optimizer, "dadaptation", error, "lion or dadapt_adam") from error
        return DAdaptLion(params, lr=lr, betas=self.betas, weight_decay=self.weight_decay, d0=self.d0)

    def measure(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return `d`, the estimate `d_hat` that d follows upwards, and `rate` = d * lr, which really acts."""
        group = optimizer.param_groups[0]
        return {"rate": group["d"] * group["lr"], "d": group["d"], "d_hat": _estimate(optimizer)}


@dataclass(frozen=True, kw_only=True)
class DAdaptSGDOptions(GrowthOptions):
    """The dadaptation library's DAdaptSGD: steps of d*lr along the gradient over the norm of the first one."""

    optimizer: Literal["dadapt_sgd"] = "dadapt_sgd"
    """The optimizer's name."""

    momentum: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Share of the old weights in the new ones, which averages the path; 0.9 is usual."""

    weight_decay: Annotated[float, Ge(0)] = 0.0
    """Added to the gradient as weight_decay * weights, which outweighs small gradients."""

    learned_keys: ClassVar[tuple[str, ...]] = ("d", "k", "numerator_weighted", "g0_norm")

    def build(self, params: Iterable[nn.Parameter], lr: float) -> Optimizer:
        """Return the optimizer over `params`, its rate being d times `lr` over the norm of the first gradient.

        Raises:
            UserError: dadaptation is not installed.
        """
        try:
            from trainer.optim.dadapt_sgd import DAdaptSGD
        except ImportError as error:
            raise does_not_load(self.optimizer, "dadaptation", error, "dadapt_adam") from error
        return DAdaptSGD(params, lr=lr, momentum=self.momentum, weight_decay=self.weight_decay, d0=self.d0, growth_rate=self.growth_rate)

    def measure(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return `d`, the estimate `d_hat` that d follows upwards, and `rate`, which really acts.

        d_hat = 2 W / |s| (arXiv 2301.07733, algorithm 4); rate = d * lr over the norm of the first gradient.
        """
        group = optimizer.param_groups[0]
        length = math.sqrt(_sum_over_s(optimizer, lambda s: s * s))
        rate = group["d"] * group["lr"] / group["g0_norm"] if group["g0_norm"] > 0 else 0.0
        return {"rate": rate, "d": group["d"], "d_hat": 2 * group["numerator_weighted"] / length if length > 0 else 0.0}


def _estimate(optimizer: Optimizer) -> float:
    """Return d_hat = W / ((1 - sqrt(beta2)) * |s|_1), W being the weighted numerator (arXiv 2301.07733, algorithm 5)."""
    group = optimizer.param_groups[0]
    s_l1 = _sum_over_s(optimizer, lambda s: s.abs())
    return group["numerator_weighted"] / ((1 - math.sqrt(group["betas"][1])) * s_l1) if s_l1 > 0 else 0.0


def _sum_over_s(optimizer: Optimizer, of: Callable[[Tensor], Tensor]) -> float:
    import torch

    return float(sum((of(state["s"]).sum(dtype=torch.float64) for state in optimizer.state.values() if "s" in state), start=0.0))
