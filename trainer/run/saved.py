"""The parts of a run whose state is checkpointed: made, restored, and given to the saver."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from data.loader import StepLoader
from trainer.checkpoints.artifact import Artifact
from trainer.checkpoints.format import TrainState
from trainer.checkpoints.saver import Saver, Stateful
from trainer.config import without_folders
from trainer.errors import UserError
from trainer.evaluation.loss_watch import LossWatch
from trainer.models.ema import Ema
from trainer.models.pipeline import TrainedParts
from trainer.networks import NETWORKS, by_network
from trainer.optim.dadapt import EstimateOptions
from trainer.optim.optimizer_set import OptimizerSet
from trainer.optim.watch import AdaptationWatch
from trainer.planning.plan import Plan
from trainer.planning.resume import restore_state
from trainer.reporting.console import Console
from trainer.reporting.metrics import Meter
from trainer.reporting.model_card import Card
from trainer.reporting.tags import EPOCH_LOSS, LOSS, VALIDATION_LOSS
from trainer.run.networks import make_ema
from trainer.run.outputs import make_card
from trainer.training.precision import Precision
from trainer.training.ranks import Processes


@dataclass(frozen=True)
class Saved:
    """Counters, optimizers, meters and watches of a run."""

    state: TrainState
    optimizers: OptimizerSet
    meter: Meter
    watch: AdaptationWatch
    loss_watch: LossWatch
    card: Card
    ema: Ema | None
    scaler: torch.amp.GradScaler | None

    def parts(self) -> dict[str, Stateful]:
        """Return the parts by their names in a checkpoint."""
        parts: dict[str, Stateful | None] = {
            "optimizers": self.optimizers,
            "meter": self.meter,
            "watch": self.watch,
            "loss watch": self.loss_watch,
            "curves": self.card.curves,
            "card": self.card,
            "ema": self.ema,
            "scaler": self.scaler,
        }
        return {name: part for name, part in parts.items() if part is not None}


def make_saved(plan: Plan, parts: TrainedParts, precision: Precision, processes: Processes) -> Saved:
    """Make the parts for the trained networks; EMA weights on rank 0 alone."""
    optimizers = OptimizerSet(
        by_network(plan.config.optimizers),
        {network: [parameter for _, parameter in named] for network, named in parts.parameters.items()},
        total_steps=plan.total_steps,
    )
    adaptive = {
        member.network: member.options
        for member in optimizers.members
        if isinstance(member.options, EstimateOptions)
    }
    measured_on = [held.index.fingerprint() for held in plan.split.held_out if held.tag == VALIDATION_LOSS]
    state = plan.start.state or TrainState()
    return Saved(
        state=state,
        optimizers=optimizers,
        meter=Meter(epoch_tags={LOSS: EPOCH_LOSS}),
        watch=AdaptationWatch(
            adaptive, {name: network.section for name, network in NETWORKS.items()}, plan.learned_d
        ),
        loss_watch=LossWatch(tuple(adaptive), " ".join(measured_on)),
        card=make_card(plan, state),
        ema=make_ema(plan, parts, precision.device) if processes.main else None,
        scaler=precision.scaler,
    )


def restore(saved: Saved, checkpoint: Path, loader: StepLoader) -> None:
    """Restore the parts from a checkpoint of such parts, and of a run on these images."""
    restore_state(saved.parts(), checkpoint)
    if 0 < loader.steps_in(saved.state.epoch) <= saved.state.step_in_epoch:
        raise UserError(
            f"{checkpoint}: its counts are not those of a run on these images; choose another checkpoint."
        )


def make_saver(
    plan: Plan, saved: Saved, artifact: Artifact, folder: Path, processes: Processes, console: Console
) -> Saver:
    """Return the writer of the run's checkpoints."""
    config = plan.config
    return Saver(
        config.saving,
        run=folder,
        project=config.logging.project_name,
        artifact=artifact,
        state=saved.state,
        parts=saved.parts(),
        about=plan.about,
        metadata={
            "modelspec.resolution": "x".join([str(max(config.data.resolutions))] * 2),
            **{f"sd_dadapt.{name}": text for name, text in without_folders(config).items()},
        },
        say=console.event,
        ema=saved.ema,
        branch=plan.start.branch,
        writes=processes.main,
        describe=lambda checkpoint: saved.card.write(checkpoint, folder / "samples"),
    )
