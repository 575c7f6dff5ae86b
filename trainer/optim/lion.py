"""Lion, which steps along the sign of the momentum (Chen et al. 2023, arXiv 2302.06675)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from annotated_types import Ge

from trainer.optim.adamw import Beta
from trainer.optim.library import does_not_load
from trainer.optim.schedules import ScheduleOptions

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer


@dataclass(frozen=True, kw_only=True)
class SignOptions(ScheduleOptions):
    """Options of every Lion: two decays of one running mean, and weight decay."""

    betas: tuple[Beta, Beta] = (0.9, 0.99)
    """Share of the running mean of the gradient in the step, and decay of that mean."""

    weight_decay: Annotated[float, Ge(0)] = 0.01
    """Decoupled weight decay: each step shrinks weights by weight_decay * rate (d*lr for D-Adaptation)."""


@dataclass(frozen=True, kw_only=True)
class LionOptions(SignOptions):
    """bitsandbytes' Lion, state in fp32: 4 bytes for a parameter."""

    optimizer: Literal["lion"] = "lion"
    """The optimizer's name."""

    state_bits: ClassVar[int] = 32

    def build(self, params: Iterable[nn.Parameter], lr: float) -> Optimizer:
        """Return the optimizer over `params` at rate `lr`.

        Raises:
            UserError: bitsandbytes is not installed or does not load.
        """
        try:
            from trainer.optim.strided import Lion
        except Exception as error:  # a broken CUDA set-up raises anything at import
            raise does_not_load(self.optimizer, "bitsandbytes", error, "adamw or dadapt_adam") from error
        decay: Any = self.weight_decay  # the library annotates its default, 0, as int
        return Lion(params, lr=lr, betas=self.betas, weight_decay=decay, optim_bits=self.state_bits)


@dataclass(frozen=True, kw_only=True)
class Lion8bitOptions(LionOptions):
    """bitsandbytes' Lion with block-wise 8-bit state in tensors of 4096 elements or more: 1 byte a weight."""

    optimizer: Literal["lion8bit"] = "lion8bit"  # type: ignore[assignment]
    """The optimizer's name."""

    state_bits: ClassVar[int] = 8
