"""D-Adaptation: optimizers that find their own learning rate (Defazio & Mishchenko, arXiv 2301.07733)."""

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
    """Options of every optimizer with an estimate d of the distance to the solution: its start."""

    d0: Annotated[float, Gt(0)] | Literal["resume"] = 1e-6
    """Start of the estimate d; resume: the d of the checkpoint that --resume_weights_only starts from."""

    adapts: ClassVar[bool] = True

    @property
    def first_d(self) -> float:
        """d0 as the number that a planned run has for it."""
        if isinstance(self.d0, str):
            raise ValueError("d0 is resolved when the run is planned")
        return self.d0

    def rate(self, optimizer: Optimizer) -> Any:
        """Return d * lr, the rate of the coming step, a number or a 0-d tensor on the device."""
        group = optimizer.param_groups[0]
        return group["d"] * group["lr"]


@dataclass(frozen=True, kw_only=True)
class GrowthOptions(EstimateOptions):
    """Options of the start and the growth of d."""

    growth_rate: Annotated[float, Ge(1)] = math.inf
    """The most that d may grow by in one step, as a factor; 1.02 is gentle."""


@dataclass(frozen=True, kw_only=True)
class AdaptedMomentOptions(MomentOptions, GrowthOptions):
    """Options of every Adam with an estimate d: the kind of weight decay, and bias correction."""

    decouple: bool = True
    """Decay the weights beside the gradient, as AdamW does, instead of adding to the gradient."""

    use_bias_correction: bool = False
    """Correct the moments' start at zero, as Adam does."""

    def rate(self, optimizer: Optimizer) -> Any:
        """Return the effective rate of the coming step, d * lr * bias correction."""
        return super().rate(optimizer) * self.correction(optimizer.param_groups[0]["k"])

    def decay(self, optimizer: Optimizer) -> Any:
        """Return the share of every weight that decoupled weight decay takes in the coming step."""
        return self.weight_decay * self.rate(optimizer) if self.decouple else 0.0

    def correction(self, steps: int) -> float:
        """Return the bias correction, a factor on the rate, after `steps` steps; 1 without it."""
        beta1, beta2 = self.betas
        return (
            math.sqrt(1 - beta2 ** (steps + 1)) / (1 - beta1 ** (steps + 1))
            if self.use_bias_correction
            else 1.0
        )


@dataclass(frozen=True, kw_only=True)
class AdaptationOptions(AdaptedMomentOptions):
    """Options of every Adam with D-Adaptation."""

    layer_scale: Annotated[float, Gt(0)] = 1.0
    """A factor on this network's steps only; lr also scales the estimate of d and weight decay."""

    def rate(self, optimizer: Optimizer) -> Any:
        """Return the effective rate of the coming step, d * lr * layer_scale * bias correction."""
        return super().rate(optimizer) * self.layer_scale

    def decay(self, optimizer: Optimizer) -> Any:
        """Return the share of every weight that decoupled decay takes; layer_scale does not count."""
        return super().decay(optimizer) / self.layer_scale


@dataclass(frozen=True, kw_only=True)
class DAdaptAdamOptions(AdaptationOptions):
    """Adam at the rate d*lr, d being D-Adaptation's estimate of the distance to the solution; fp32 state."""

    optimizer: Literal["dadapt_adam"] = "dadapt_adam"
    """The optimizer's name."""

    d_max: Annotated[float, Gt(0)] = math.inf
    """d does not grow beyond this; d_max * lr * layer_scale is the largest rate that can act."""

    rate_max: Annotated[float, Gt(0)] = math.inf
    """The largest effective rate d*lr*layer_scale: a safety net that, unlike d_max, does not stop d."""

    fused_backward: bool = False
    """Update each weight inside the backward pass and drop its gradient: the same steps without memory for
    gradients. Not with grad_accum above 1, clip_grad_norm, fp16 or several processes, which need all
    gradients after backward."""

    state_bits: ClassVar[int] = 32
    rounds_bf16: ClassVar[bool] = True

    def build(self, params: Iterable[nn.Parameter], lr: float) -> Optimizer:
        """Return the optimizer over `params`, its rate being d times `lr`."""
        from trainer.optim.dadapt.optimizer import DAdaptAdam

        return DAdaptAdam(
            _scaled(params, self.layer_scale),
            lr=lr,
            betas=self.betas,
            eps=self.epsilon,
            weight_decay=self.weight_decay,
            decouple=self.decouple,
            use_bias_correction=self.use_bias_correction,
            d0=self.first_d,
            growth_rate=self.growth_rate,
            d_max=self.d_max,
            rate_max=self.rate_max / self.layer_scale,
            state_bits=self.state_bits,
            fused_backward=self.fused_backward,
        )

    def rate(self, optimizer: Optimizer) -> Tensor:
        """Return the effective rate of the coming step, at most rate_max: 0-d, fp64, on the device."""
        return optimizer.rate() * self.layer_scale  # type: ignore[attr-defined]

    def measure(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return 0-d device tensors: `d`, the estimate `d_hat` that d follows upwards, and `rate`.

        With rate_max also `d*lr`, the rate without that cap. With fused backward also `not finite`, the
        gradients that were skipped since the start or the last resume.
        """
        own: Any = optimizer
        found = {"rate": self.rate(optimizer), "d": own.d, "d_hat": own.d_hat}
        if self.rate_max < math.inf:
            found["d*lr"] = own.rate(capped=False) * self.layer_scale
        return {**found, "not finite": own.not_finite} if self.fused_backward else found


@dataclass(frozen=True, kw_only=True)
class DAdaptAdam8bitOptions(DAdaptAdamOptions):
    """dadapt_adam with its state in 8 bits: 2.1 bytes for a parameter instead of 12."""

    optimizer: Literal["dadapt_adam8bit"] = "dadapt_adam8bit"  # type: ignore[assignment]
    """The optimizer's name."""

    state_bits: ClassVar[int] = 8


@dataclass(frozen=True, kw_only=True)
class DAdaptAdamReferenceOptions(AdaptationOptions):
    """The dadaptation library's DAdaptAdam, for comparison: the same steps, with two syncs a tensor."""

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
                _scaled(params, self.layer_scale),
                lr=lr,
                betas=self.betas,
                eps=self.epsilon,
                weight_decay=self.weight_decay,  # type: ignore[arg-type]  # the default, 0, reads as int
                decouple=self.decouple,
                use_bias_correction=self.use_bias_correction,
                d0=self.first_d,
                growth_rate=self.growth_rate,
            )

    def measure(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return `d`, its new estimate `d_hat`, and `rate`, the effective learning rate.

        layer_scale weighs both sums of d_hat and cancels.
        """
        group = optimizer.param_groups[0]
        return {"rate": self.rate(optimizer), "d": group["d"], "d_hat": _estimate(optimizer)}


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
        return DAdaptLion(params, lr=lr, betas=self.betas, weight_decay=self.weight_decay, d0=self.first_d)

    def decay(self, optimizer: Optimizer) -> float:
        """Return the share of every weight that weight decay takes in the coming step."""
        return self.weight_decay * self.rate(optimizer)

    def measure(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return `d`, its new estimate `d_hat`, and `rate`, the effective learning rate."""
        return {
            "rate": self.rate(optimizer),
            "d": optimizer.param_groups[0]["d"],
            "d_hat": _estimate(optimizer),
        }


@dataclass(frozen=True, kw_only=True)
class DAdaptSGDOptions(GrowthOptions):
    """The dadaptation library's DAdaptSGD: steps of d*lr * gradient / norm of the first gradient."""

    optimizer: Literal["dadapt_sgd"] = "dadapt_sgd"
    """The optimizer's name."""

    momentum: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Share of the old weights in the new ones, which averages the path; 0.9 is usual."""

    weight_decay: Annotated[float, Ge(0)] = 0.0
    """Added to the gradient as weight_decay * weights, which outweighs small gradients."""

    learned_keys: ClassVar[tuple[str, ...]] = ("d", "k", "numerator_weighted", "g0_norm")
    groups_decay: ClassVar[bool] = False

    def build(self, params: Iterable[nn.Parameter], lr: float) -> Optimizer:
        """Return the optimizer over `params`; its rate is d * lr / norm of the first gradient.

        Raises:
            UserError: dadaptation is not installed.
        """
        try:
            from trainer.optim.dadapt_sgd import DAdaptSGD
        except ImportError as error:
            raise does_not_load(self.optimizer, "dadaptation", error, "dadapt_adam") from error
        return DAdaptSGD(
            params,
            lr=lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            d0=self.first_d,
            growth_rate=self.growth_rate,
        )

    def rate(self, optimizer: Optimizer) -> float:
        """Return the rate of the coming step, d * lr / norm of the first gradient; at first 0."""
        norm = optimizer.param_groups[0]["g0_norm"]
        return super().rate(optimizer) / norm if norm > 0 else 0.0

    def measure(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return `d`, `rate` and the estimate d_hat = 2 W / |s| (arXiv 2301.07733, algorithm 4)."""
        group = optimizer.param_groups[0]
        length = math.sqrt(_sum_over_s(optimizer, lambda s: s * s))
        d_hat = 2 * group["numerator_weighted"] / length if length > 0 else 0.0
        return {"rate": self.rate(optimizer), "d": group["d"], "d_hat": d_hat}


def _scaled(params: Iterable[Any], layer_scale: float) -> list[dict[str, Any]]:
    """Return parameters, or groups of them, as groups of this `layer_scale`."""
    given = list(params)
    groups = given if isinstance(given[0], dict) else [{"params": given}]
    return [{**group, "layer_scale": layer_scale} for group in groups]


def _estimate(optimizer: Optimizer) -> float:
    """Return d_hat = W / ((1 - sqrt(beta2)) * |s|_1), W the weighted numerator (arXiv 2301.07733, alg. 5)."""
    group = optimizer.param_groups[0]
    s_l1 = _sum_over_s(optimizer, lambda s: s.abs())
    return group["numerator_weighted"] / ((1 - math.sqrt(group["betas"][1])) * s_l1) if s_l1 > 0 else 0.0


def _sum_over_s(optimizer: Optimizer, of: Callable[[Tensor], Tensor]) -> float:
    import torch

    return float(
        sum(
            (of(state["s"]).sum(dtype=torch.float64) for state in optimizer.state.values() if "s" in state),
            start=0.0,
        )
    )
