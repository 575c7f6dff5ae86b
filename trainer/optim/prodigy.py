"""Prodigy, an Adam that estimates the distance to the solution (Mishchenko & Defazio, arXiv 2306.06101)."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt

from trainer.optim.dadapt import AdaptedMomentOptions
from trainer.optim.library import does_not_load

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer


@dataclass(frozen=True, kw_only=True)
class ProdigyOptions(AdaptedMomentOptions):
    """prodigyopt's Prodigy: D-Adaptation's Adam with a faster growing d; 16 bytes of state a weight."""

    optimizer: Literal["prodigy"] = "prodigy"
    """The optimizer's name."""

    # As Prodigy's authors advise for diffusion models, like the next key.
    use_bias_correction: bool = True

    safeguard_warmup: bool = True
    """Leave lr out of the denominator of d's estimate, so that a warm-up from 0 does not make d too large."""

    d_coef: Annotated[float, Gt(0)] = 1.0
    """Factor on the estimate d, 0.5 or 2 for a lower or higher rate; its authors advise this, not lr."""

    slice_p: Annotated[int, Ge(1)] = 1
    """Estimate d from every n-th element of each tensor: 11 takes 8.7 bytes of state a weight, not 16."""

    learned_keys: ClassVar[tuple[str, ...]] = ("d", "d_max", "d_numerator", "d_hat", "k")

    def build(self, params: Iterable[nn.Parameter], lr: float) -> Optimizer:
        """Return the optimizer over `params`, its rate being d times `lr`.

        Raises:
            UserError: prodigyopt is not installed.
        """
        try:
            from prodigyopt import Prodigy
        except ImportError as error:
            raise does_not_load(self.optimizer, "prodigyopt", error, "dadapt_adam") from error
        with redirect_stdout(StringIO()):  # the library prints a line about decoupled weight decay
            optimizer = Prodigy(
                params,
                lr=lr,
                betas=self.betas,
                eps=self.epsilon,
                weight_decay=self.weight_decay,  # type: ignore[arg-type]  # the default, 0, reads as int
                decouple=self.decouple,
                use_bias_correction=self.use_bias_correction,
                safeguard_warmup=self.safeguard_warmup,
                d0=self.first_d,
                d_coef=self.d_coef,
                growth_rate=self.growth_rate,
                slice_p=self.slice_p,
            )
        for group in optimizer.param_groups:
            group["d_hat"] = 0.0  # which the library adds in its first step
        return optimizer

    def measure(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return `d`, its new estimate `d_hat`, and `rate`, the effective learning rate."""
        group = optimizer.param_groups[0]
        return {"rate": self.rate(optimizer), "d": group["d"], "d_hat": group["d_hat"]}
