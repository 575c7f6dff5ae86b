"""D-Adaptation: optimizers that find their own learning rate (Defazio & Mishchenko 2023, arXiv 2301.07733)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge, Gt

from trainer.optim.adamw import MomentOptions

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer


@dataclass(frozen=True, kw_only=True)
class DAdaptAdamOptions(MomentOptions):
    """Adam whose rate is d*lr, d being D-Adaptation's growing estimate of the distance to the solution."""

    optimizer: Literal["dadapt_adam"] = "dadapt_adam"
    """The optimizer's name."""

    decouple: bool = True
    """Decay the weights beside the gradient, as AdamW does, instead of adding to the gradient."""

    use_bias_correction: bool = False
    """Correct the moments' start at zero, as Adam does."""

    d0: Annotated[float, Gt(0)] = 1e-6
    """Where the estimate d starts."""

    growth_rate: Annotated[float, Ge(1)] = math.inf
    """The most that d may grow by in one step, as a factor; 1.02 is gentle."""

    def build(self, params: Iterable[nn.Parameter], lr: float) -> Optimizer:
        """Return the optimizer over `params`, its rate being d times `lr`."""
        from dadaptation import DAdaptAdam

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
        )
