"""From a configuration to a `Plan`: everything about a run that is decided before weights load."""

from __future__ import annotations

import math
import os
import secrets
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from data.errors import DataError
from data.index import refuse_bad
from data.plan import steps_before, steps_per_epoch
from data.saved_index import FEWEST, remembered_index
from trainer.checkpoints.artifact import artifact_of
from trainer.config import TrainConfig, check_fused_backward, check_rates, check_schedules
from trainer.config.sample_file import load_sample_prompts
from trainer.config.validation_file import load_validation
from trainer.diffusion.schedule import with_zero_terminal_snr
from trainer.errors import UserError
from trainer.evaluation.options import SamplePrompts, ValidationFile
from trainer.evaluation.schedulers import check_scheduler
from trainer.evaluation.validation import Split, split_images
from trainer.models.ema import plan_ema
from trainer.models.load import describe
from trainer.models.options import ModelOptions
from trainer.models.pipeline import Models
from trainer.models.trainable import apply_freezing
from trainer.networks import TEXT_ENCODER
from trainer.planning.first_d import with_first_d
from trainer.planning.plan import Plan, images_per_step
from trainer.planning.resume import (
    Start,
    about_run,
    changes,
    check_same_run,
    find_start,
    with_recorded_revisions,
)
from trainer.planning.speed import slow_on_cpu
from trainer.training.latent_cache import cache_folder, plan_latents
from trainer.training.precision import Precision
from trainer.training.ranks import Processes


def prepare(
    config: TrainConfig,
    processes: Processes,
    precision: Precision,
    *,
    weights_only: bool,
    claim: Callable[[Path], object] | None = None,
) -> Plan:
    """Decide everything about a run that needs no weights.

    Args:
        weights_only: start a new run from a checkpoint's weights instead of resuming its run.
        claim: locks the folder of a resumed run before it is read; None for a check, which writes nothing
            that a small data set does not need.

    Raises:
        UserError: the model, the checkpoint, the environment or the images do not allow the run.
    """
    check_fused_backward(config, processes=processes.count)
    check_fused_backward(config, precision)
    start = find_start(config, weights_only=weights_only)
    if start.run is not None and claim is not None:
        claim(start.run)
    if start.run is None and (problem := _log_folder_problem(Path(config.logging.logdir))):
        raise UserError(problem)
    config, prompts = _read_prompts(config)
    config = replace(config, loop=replace(config.loop, seed=_choose_seed(config.loop.seed, start)))
    validation = _read_validation_file(config)
    split = _scan(config, validation, for_run=claim is not None)
    total_steps = _count_steps(config, split, processes.count)
    notes = check_schedules(config, total_steps)
    plan_ema(config.ema, total_steps)  # refuses an average that would never be updated

    if start.about is not None:
        config = with_recorded_revisions(config, start.about)
    models = describe(replace(config.model, resume_ckpt=start.model, revision=start.revision))
    config = _pin(config, start, models)
    set_noise_schedule(config, prompts, models)
    if precision.device.type == "cpu":
        images = total_steps * images_per_step(config, processes.count)
        notes = [*notes, *filter(None, [slow_on_cpu(config, models, images)])]
    artifact = artifact_of(config.parts, models)
    # diffusers puts a local function on networks with gradient checkpointing; the plan must pickle.
    trained = replace(config.parts, gradient_checkpointing=False)
    parts = apply_freezing(models, trained, config.optimizers.freezing)
    check_rates(config, {network: part.trained for network, part in parts.counts.items()})
    config, learned = with_first_d(config, start, parts.parameters)
    about = about_run(config, split.train, parts, total_steps, processes.count)
    text_stop = _count_text_steps(config.parts.stop_textenc_after_n_epochs, config, split, processes.count)
    if start.about is not None:
        check_same_run(about, start.about, str(start.checkpoint))
        epochs = start.about["config"].get("stop_textenc_after_n_epochs")
        _check_stopped(text_stop, _count_text_steps(epochs, config, split, processes.count), epochs, start)
    artifact.take(parts, start.adapter)
    latents = plan_latents(
        config.cache,
        config.data,
        split.train,
        models.vae.config,
        epochs=config.loop.max_epochs,
        processes=processes.on_machine,
    )
    return Plan(
        config=config,
        start=start,
        prompts=prompts,
        validation=validation,
        split=split,
        models=models,
        artifact=artifact,
        counts=parts.counts,
        total_steps=total_steps,
        steps_of_epoch=steps_per_epoch(split.train, epoch=0, **_planned(config, processes.count)),
        text_stop=text_stop if parts.counts[TEXT_ENCODER].trained else None,
        ranks=processes.count,
        latents=latents,
        about=about,
        learned_d=learned,
        changed=() if start.about is None else tuple(changes(about, start.about)),
        notes=(*start.notes, *split.notes, *notes, *models.notes),
        computes=f"{precision.name} on {precision.device}",
    )


def set_noise_schedule(config: TrainConfig, prompts: SamplePrompts, models: Models) -> None:
    """Set the noise schedule that the model is trained, sampled and saved with, if everything supports it."""
    if config.objective.enable_zero_terminal_snr and not models.assumed:
        models.scheduler_config = with_zero_terminal_snr(models.scheduler_config, models.source)
    check_scheduler(prompts, models.scheduler_config)


def _pin(config: TrainConfig, start: Start, models: Models) -> TrainConfig:
    """Return the configuration with the commits of its models on the hub, as far as they are known yet."""
    model = replace(
        config.model,
        revision=models.revision or start.revision,
        vae_revision=models.vae_revision or config.model.vae_revision,
    )
    ema, named = config.ema, config.ema.ema_resume_model
    new = ema.active and start.checkpoint is None
    if new and named is not None and not Path(named).is_absolute():
        options = ModelOptions(resume_ckpt=named, revision=ema.ema_resume_revision)
        commit = describe(options, key="ema_resume_model").revision
        ema = replace(ema, ema_resume_revision=commit or ema.ema_resume_revision)
    return replace(config, model=model, ema=ema)


def _scan(config: TrainConfig, validation: ValidationFile, *, for_run: bool) -> Split:
    remembered = cache_folder(config.cache, config.logging.logdir)
    index = remembered_index(config.data, remembered)
    if for_run and config.data.on_bad_image == "error":
        refuse_bad(index)
    save = for_run or len(index.records) >= FEWEST
    return split_images(validation, config.data, index, remembered, save=save)


def _planned(config: TrainConfig, ranks: int) -> dict[str, Any]:
    return {
        "resolution": config.data.resolution,
        "seed": config.loop.seed,
        "images_per_step": images_per_step(config, ranks),
    }


def _count_steps(config: TrainConfig, split: Split, ranks: int) -> int:
    epochs = config.loop.max_epochs
    total = steps_before(split.train, epoch=epochs, **_planned(config, ranks))
    if total == 0:
        raise DataError(f"data_root: in {epochs} epochs no image is due: raise its multiply, or max_epochs")
    return total


def _count_text_steps(epochs: float | None, config: TrainConfig, split: Split, ranks: int) -> int | None:
    """Return the optimizer steps of a number of epochs, the last one begun counted in whole steps."""
    if epochs is None:
        return None
    whole, planned = int(epochs), _planned(config, ranks)
    last = (epochs - whole) * steps_per_epoch(split.train, epoch=whole, **planned)
    return max(1, steps_before(split.train, epoch=whole, **planned) + math.ceil(last - 1e-9))


def _check_stopped(now: int | None, before: int | None, epochs: float | None, start: Start) -> None:
    """Refuse to train a text encoder again that the resumed run has frozen."""
    step = start.state.step if start.state is not None else 0
    if before is not None and before <= step and (now is None or now > step):
        raise UserError(
            f"stop_textenc_after_n_epochs: the run has frozen the text encoder after step {before} and "
            f"dropped its optimizer; set it back to {epochs:g}, or start a new run with "
            "--resume_weights_only."
        )


def _choose_seed(seed: int, start: Start) -> int:
    """Return the configured seed; for -1 the resumed run's, else a random one."""
    if seed != -1:
        return seed
    return int(start.about["same"]["seed"]) if start.about is not None else secrets.randbelow(2**31)


def _read_prompts(config: TrainConfig) -> tuple[TrainConfig, SamplePrompts]:
    """Return the sample prompts, and the configuration with their file's sample interval, if it sets one."""
    named = config.samples.sample_prompts
    prompts = load_sample_prompts(Path(named) if named else None)
    steps = prompts.generate_samples_every_n_steps or config.samples.sample_steps
    return replace(config, samples=replace(config.samples, sample_steps=steps)), prompts


def _read_validation_file(config: TrainConfig) -> ValidationFile:
    """Return the validation file's values, if keep_best and stop_on_overfit find what they need in it."""
    named = config.validation.validation_config
    file = load_validation(Path(named) if named else None)
    needs_loss = {
        "keep_best": config.saving.keep_best,
        "stop_on_overfit": config.validation.stop_on_overfit,
    }
    wanted = [key for key, value in needs_loss.items() if value]
    if wanted and (not file.validate_training or file.val_split_mode == "none"):
        raise UserError(
            f"{' and '.join(wanted)}: there is no loss/val, since validation_config sets validate_training "
            "to false or val_split_mode to none; change that, or set what needs it to false."
        )
    measured = config.fixed_loss.fixed_loss_images or file.stabilize_training_loss
    if "stop_on_overfit" in wanted and not measured:
        raise UserError(
            "stop_on_overfit: fixed_loss_images is 0, and without the fixed-noise loss of training images "
            "overfitting cannot be seen; set it to 16 again, or stop_on_overfit to false."
        )
    return file


def _log_folder_problem(logdir: Path) -> str | None:
    """Return why run folders cannot be made in `logdir`, in one sentence; None if they can."""
    place = logdir.resolve()
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        return f"logdir: {place} is a file, not a folder; choose another logdir."
    if not os.access(place, os.W_OK | os.X_OK):
        advice = "choose another logdir or change its permissions"
        return f"logdir: the folder {place} cannot be written to; {advice}."
    return None
