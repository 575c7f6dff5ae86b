"""A run's outputs of its model: samples, fixed images, the model card."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from trainer.checkpoints.format import TrainState
from trainer.config import without_folders
from trainer.evaluation.fixed_noise import choose_images
from trainer.models.ema import SUFFIX
from trainer.models.pipeline import Models
from trainer.networks import NETWORKS
from trainer.output import shown_path
from trainer.planning.plan import Plan
from trainer.reporting.curves import Curves
from trainer.reporting.model_card import Card, origin_of
from trainer.reporting.tags import FIXED_LOSS, LOSS, RATE, VALIDATION_LOSS
from trainer.training.run import Run
from trainer.transfer import visiting

CARD_ROWS = (*NETWORKS, "batch", "ema", "precision", "seed")
"""Rows of the plan that the model card shows."""


def make_card(plan: Plan, state: TrainState) -> Card:
    """Return the writer of model cards, with their curves."""
    config = plan.config
    losses = {FIXED_LOSS: "fixed-noise loss", VALIDATION_LOSS: "validation loss"}
    trained = [network for network, part in plan.counts.items() if part.trained]
    rates = {network: f"{RATE}{network}" for network in trained}
    names = {tag: network for network, tag in rates.items()}
    return Card(
        project=config.logging.project_name,
        origin=origin_of(plan.start.model, config.model.revision),
        curves=Curves({**losses, LOSS: "loss of the batches"}, names, noisy=LOSS),
        state=state,
        total_steps=plan.total_steps,
        losses=losses,
        rates=rates,
        plan=[(name, text) for name, text in plan.rows() if name in CARD_ROWS],
        files=without_folders(config),
        artifact=plan.artifact,
    )


def fixed_images(plan: Plan) -> list[int]:
    """Return the training images that the fixed-noise loss is measured on, by record."""
    records, validation = plan.split.train.records, plan.validation
    shown = [identity for identity, record in enumerate(records) if record.multiply > 0]
    count = plan.config.fixed_loss.fixed_loss_images
    if validation.stabilize_training_loss:
        count = max(1, round(validation.stabilize_split_proportion * len(shown)))
    return [shown[place] for place in choose_images(len(shown), count, plan.config.loop.seed)]


def make_sample(plan: Plan, models: Models, run: Run, waiting: Sequence[nn.Module]) -> Callable[[int], None]:
    """Return the function that samples at a step, saves and logs; `waiting` networks are on the CPU."""
    sampler, options = plan.sampler(), plan.config.ema
    precision, console, ema = run.learner.precision, run.records.console, run.learner.ema

    def draw(step: int, suffix: str) -> None:
        with visiting(waiting, precision.device):
            samples = sampler.draw(
                models,
                step=step,
                device=precision.device,
                autocast=precision.autocast,
                check=run.signals.check,
            )
        for problem in samples.problems:
            console.event(f"Note: {problem}.")
        try:
            path = samples.save(run.folder / "samples", step, suffix)
            console.event(f"step {step}: samples in {shown_path(path)}")
        except OSError as error:
            reason = error.strerror or error
            console.event(
                f"Note: the samples of step {step} could not be saved ({reason}); training continues."
            )
        for tag, image in samples.rows:
            run.records.loggers.image(f"{tag} ({suffix})" if suffix else tag, image, step)

    def sample(step: int) -> None:
        averaged = ema is not None and options.ema_sample_ema_model
        if not averaged or options.ema_sample_nonema_model:
            draw(step, "")
        if ema is not None and averaged:
            with ema.applied():
                draw(step, SUFFIX)

    return sample
