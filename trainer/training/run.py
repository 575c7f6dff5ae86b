"""A run: the objects that `trainer.run.build` puts together and the loop moves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from data.loader import StepLoader
from trainer.checkpoints.format import TrainState
from trainer.checkpoints.saver import Saver
from trainer.diffusion.conditioning import Contexts
from trainer.diffusion.objective import Networks, Objective
from trainer.evaluation.fixed_noise import FixedLoss, Validation
from trainer.evaluation.loss_watch import LossWatch
from trainer.models.ema import Ema
from trainer.optim.optimizer_set import OptimizerSet
from trainer.optim.watch import AdaptationWatch
from trainer.reporting.console import Console
from trainer.reporting.loggers import Loggers
from trainer.reporting.metrics import Meter
from trainer.training.cadence import Cadence
from trainer.training.precision import Precision
from trainer.training.ranks import Processes
from trainer.training.signals import StopSignals


@dataclass(frozen=True, kw_only=True)
class Learner:
    """All that a step changes, and how it computes."""

    networks: Networks
    objective: Objective
    optimizers: OptimizerSet
    precision: Precision
    images_per_step: int
    """Images of a full step over all ranks."""
    clip: float | None
    ema: Ema | None
    dropout: bool = False
    """The networks draw from torch's global generator in training."""


@dataclass(kw_only=True)
class Evaluation:
    """Samples and losses that are compared over time."""

    fixed_loss: FixedLoss | None
    validation: Validation
    loss_watch: LossWatch
    stop_on_overfit: bool
    sample_first: bool
    """Draw samples before the first step too."""
    sample: Callable[[int], None] = lambda step: None
    """Draw, save and record the samples of a step."""
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    """Makes compiled networks run eagerly during an evaluation."""


@dataclass(frozen=True, kw_only=True)
class Records:
    """Console, logs and the meters that feed them."""

    console: Console
    loggers: Loggers
    meter: Meter
    watch: AdaptationWatch
    log_grad_norm: bool


@dataclass(kw_only=True)
class Health:
    """Signs that a run has stopped learning."""

    named_files: int = 0
    """Unreadable files that were reported."""
    latest: Sequence[tuple[Sequence[str], Tensor]] = ()
    """Image names and timesteps (B,) on the CPU, of each micro-batch of the last step."""
    before_unread: TrainState | None = None
    """State before the current streak of steps without a readable image; None outside a streak."""


@dataclass(frozen=True)
class TextStop:
    """The last step of the text encoder."""

    step: int
    """Optimizer steps that it trains for."""
    encode: Callable[[], Contexts | None]
    """Encode the captions once, if the run caches latents and there is memory."""
    waiting: list[nn.Module]
    """Networks that are on the CPU between samples."""


@dataclass(kw_only=True)
class Run:
    """A run and where it is."""

    folder: Path
    state: TrainState
    learner: Learner
    evaluation: Evaluation
    records: Records
    loader: StepLoader
    cadence: Cadence
    epochs: int
    steps_in: Callable[[int], int]
    """Optimizer steps of an epoch."""
    saver: Saver
    signals: StopSignals
    processes: Processes
    max_seconds: float | None = None
    """Training time after which the run ends."""
    text_stop: TextStop | None = None
    """None if the text encoder is never frozen during the run."""
    overfits: bool = False
    """Ended by stop_on_overfit."""
    health: Health = field(default_factory=Health)

    @property
    def ends(self) -> bool:
        """True if no step follows."""
        return self.overfits or self.out_of_time or self.cadence.ends(self.state.step)

    @property
    def out_of_time(self) -> bool:
        """True if max_train_time is over."""
        return self.max_seconds is not None and self.state.seconds >= self.max_seconds

    @property
    def progress(self) -> float:
        """Epochs trained."""
        state = self.state
        return state.epoch + (state.step_in_epoch / self.steps_in(state.epoch) if state.step_in_epoch else 0)
