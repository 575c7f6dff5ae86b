"""The optimizers over tiled state: Adam with D-Adaptation, and AdamW."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from trainer.optim.dadapt.adam import Coefficients
from trainer.optim.dadapt.tiled import TiledAdam


class DAdaptAdam(TiledAdam):
    """Adam whose rate is d * lr, d being a lower bound of the distance to the solution that only grows.

    A drop-in for `dadaptation.DAdaptAdam`, with the same defaults. Scalars are fp64 tensors on the device of
    the parameters; `group["d"]`, `group["k"]` and `group["numerator_weighted"]` become numbers when they are
    read. State is fp32 (fp64 for fp64 parameters, or 8 bits) whatever the parameters' dtype. bf16 parameters
    are rounded stochastically, since most steps are smaller than the spacing of their values; weights decay
    before that, in fp32. The noise depends on the step number and the element's place only. (Against keeping
    the lower 16 bits in the state, which trains as fp32 does: two bytes less a parameter, steps 5 to 20%
    shorter, and 0.3% more loss on a regression of steps far below that spacing, where rounding to nearest
    gives 370% more. On the bundled model both end at the loss of fp32.)

    Args:
        params: parameters, or groups of them. A group may have its own `eps`, `weight_decay` and
            `layer_scale`, a fixed factor on its rate; everything else holds for all groups.
        lr: a factor on d; 1.0 is the method's own.
        weight_decay: decay by weight_decay * d * lr a step if decoupled, else added to the gradient.
        growth_rate: the largest growth of d in one step, as a factor.
        d_max: the largest d.
        rate_max: the largest rate d * lr * bias correction that acts; d is not capped by it.
        compile: on a CPU, run through torch.compile, True or False; on a GPU, False replaces the Triton
            kernel by torch operations. None compiles from sixteen million parameters on, with 8 bits from a
            million: below that the 12 s before the first step (measured; torch keeps the result on disk)
            take long to win back. If compiling fails, and for fp64, the step runs eagerly, with the same
            results but for the last bits. The way is saved with the state, and None takes that of a loaded
            state.
        state_bits: 32, or 8 for one byte a number (trainer.optim.dadapt.quantized).
        every: keep s of every element (1), or of one drawn in each `every`, in parameters of `SMALL` elements
            or more. None is 1 with 32 bits, 12 bytes a parameter, and 16 with 8, 2.07 instead of 3.01.
        fused_backward: update each parameter inside `loss.backward()` and drop its gradient, bit-equal to the
            plain step; `step()` then moves d. It needs one backward pass a step and rates set before it.
            Gradient accumulation, clipping by norm, a loss scaler and several processes need the gradients
            after backward. A non-finite gradient skips its own parameter only, and counts in `not_finite`;
            `gate` skips the whole step.

    Raises:
        ValueError: an argument is out of range, groups differ in what they must share, or a parameter is
        neither fp32, fp64 nor bf16.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decouple: bool = False,
        use_bias_correction: bool = False,
        d0: float = 1e-6,
        growth_rate: float = math.inf,
        d_max: float = math.inf,
        rate_max: float = math.inf,
        state_bits: int = 32,
        every: int | None = None,
        fused_backward: bool = False,
        compile: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "layer_scale": 1.0,
            "decouple": decouple, "use_bias_correction": use_bias_correction, "d0": d0,
            "growth_rate": growth_rate, "d_max": d_max, "rate_max": rate_max,
            "d": d0, "k": 0, "numerator_weighted": 0.0,
        }  # fmt: skip
        every = (16 if state_bits == 8 else 1) if every is None else every
        super().__init__(
            params, defaults, bits=state_bits, every=every, fused_backward=fused_backward, compile=compile
        )

    @property
    def d(self) -> Tensor:
        """The estimate d: 0-d, fp64, on the parameters' device."""
        self._ready()
        return self._learned.scalars["d"]

    @property
    def d_hat(self) -> Tensor:
        """The last estimate, which d follows upwards: 0-d, fp64, on the parameters' device."""
        self._ready()
        return self._learned.scalars["d_hat"]

    @property
    def l1(self) -> Tensor:
        """|s|_1 of the last step, weighted by the groups' layer_scale: 0-d, fp64, on the device."""
        self._ready()
        return self._learned.scalars["l1"]

    def rate(self, capped: bool = True) -> Tensor:
        """Return d * lr * bias correction of the coming step, `capped` by rate_max: 0-d, on the device."""
        self._ready()
        return self._learned.rates(self.param_groups[0]["lr"], capped)[2]

    def rows(self, group: Mapping[str, Any]) -> list[Any]:  # noqa: D102
        beta1, beta2 = group["betas"]
        q, decay = math.sqrt(beta2), group["weight_decay"]
        fixed = _row(
            keep_m=beta1, keep_v=beta2, gain_v=1 - beta2, keep_s=q, eps=group["eps"], unscale=1.0,
            coupled=0.0 if group["decouple"] else decay, gate=1.0, weight=group["layer_scale"], out=1.0,
        )  # fmt: skip
        by_rate = _row(
            gain_m=(1 - beta1) * group["layer_scale"], gain_s=1 - q, decay=decay if group["decouple"] else 0.0
        )
        return [fixed, by_rate, _row(), _row()]


class TiledAdamW(TiledAdam):
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101) with the state, kernel and rounding of `DAdaptAdam`.

    Args:
        params: parameters, or groups of them, which may have their own `eps` and `weight_decay`.
        weight_decay: the weights shrink by weight_decay * lr a step.

    Raises:
        ValueError: an argument is out of range, or a parameter is neither fp32, fp64 nor bf16.
    """

    adapts = False

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        state_bits: int = 8,
        fused_backward: bool = False,
        compile: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "layer_scale": 1.0,
            "decouple": True, "use_bias_correction": True, "growth_rate": 1.0, "d0": 1.0, "d_max": 1.0,
            "rate_max": math.inf, "d": 1.0, "k": 0, "l1": 1.0,
        }  # fmt: skip
        super().__init__(
            params, defaults, bits=state_bits, every=0, fused_backward=fused_backward, compile=compile
        )

    def rows(self, group: Mapping[str, Any]) -> list[Any]:  # noqa: D102
        beta1, beta2 = group["betas"]
        fixed = _row(
            keep_m=beta1, gain_m=1 - beta1, keep_v=beta2, gain_v=1 - beta2, unscale=1.0, gate=1.0, weight=1.0
        )
        return [fixed, _row(out=1.0), _row(decay=group["weight_decay"]), _row(eps=group["eps"])]


def _row(**values: float) -> Any:
    numbers: Any = {name: values.get(name, 0.0) for name in Coefficients._fields}
    return Coefficients(**numbers)
