"""From a configuration to a run: the only module that sees all the parts."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import replace
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.checkpoints.lock import locked
from trainer.checkpoints.run_folder import mark
from trainer.errors import UserError, said
from trainer.planning.memory import (
    cheapest_key,
    estimate,
    is_out_of_memory,
    memory_table,
    size_of_device,
    work_of,
)
from trainer.planning.resume import (
    Start,
    changes,
    check_same_run,
    describe,
    find_start,
    restore_state,
    resume_command,
)
from trainer.training.ranks import Processes, connect

if TYPE_CHECKING:
    import torch
    from torch import nn

    from data.batch import Batch
    from data.index import Index
    from data.latents import Latents
    from data.loader import StepLoader
    from data.record import BadFile
    from trainer.checkpoints.format import TrainState
    from trainer.config.schema import TrainConfig
    from trainer.diffusion.conditioning import Tokenize
    from trainer.evaluation.options import SamplePrompts, ValidationFile
    from trainer.evaluation.sampling import Sampler
    from trainer.evaluation.validation import HeldOut, Split
    from trainer.models.ema import Ema
    from trainer.models.options import EmaOptions
    from trainer.models.pipeline import Models, TrainedParts
    from trainer.optim.optimizer_set import OptimizerSet
    from trainer.reporting.console import Console
    from trainer.reporting.loggers import Loggers
    from trainer.reporting.model_card import Card, Origin
    from trainer.training.loop import Run
    from trainer.training.precision import Precision
    from trainer.training.signals import StopSignals

UNET, TEXT_ENCODER = "unet", "text encoder"

SECTIONS = {UNET: "base", TEXT_ENCODER: "text_encoder_overrides"}

_NAMED = 20
"""Files that are named; the rest are counted."""


def run_training(
    config: TrainConfig,
    notes: Sequence[str],
    *,
    weights_only: bool,
    arguments: Sequence[str],
    signals: StopSignals,
) -> None:
    """Train as configured, from the first event to the last line that says where everything is; in several processes, with the others.

    Args:
        config: the checked configuration.
        notes: sentences to show first.
        weights_only: a checkpoint gives its weights to a new run instead of being continued.
        arguments: the command line, for the one that goes on with this run.
        signals: ask the run to end.

    Raises:
        UserError: something has to be put right before the run can begin, or the run has failed.
        DataError: likewise, about the images.
        Interrupted: a signal has ended the run.
        ToldElsewhere: another process says why this one ends.
    """
    from trainer.models.quiet import quiet_libraries

    quiet_libraries()
    processes = connect(config.loop.gpuid, signals)
    with processes.together(), ExitStack() as ending:
        _train(
            config, notes, processes, ending, weights_only=weights_only, arguments=arguments, signals=signals
        )


def _train(
    config: TrainConfig,
    notes: Sequence[str],
    processes: Processes,
    ending: ExitStack,
    *,
    weights_only: bool,
    arguments: Sequence[str],
    signals: StopSignals,
) -> None:
    from trainer.environment import check_cuda
    from trainer.reporting.console import Console
    from trainer.run.learned_rate import hand_over
    from trainer.training.loop import out_of_time, train

    console = Console(enabled=processes.main)
    for note in [*notes, *check_cuda(), *processes.notes]:
        console.event(f"Note: {note}")
    try:
        run = build_run(config, console, processes, ending, weights_only=weights_only, signals=signals)
    except Exception as error:
        if _is_of_killed_reader(error):
            raise UserError(_reader_killed(error)) from error
        if not is_out_of_memory(error):
            raise
        raise UserError(
            [f"Memory has run out before the first step ({said(error)}).", cheapest_key(config)]
        ) from error
    console.start(total_steps=run.cadence.total_steps, first_step=run.state.step)
    failed = False
    try:
        train(run)
    except Exception as error:
        failed = True
        if _is_of_killed_reader(error):
            raise UserError(_reader_killed(error), exit_code=1) from error
        if not is_out_of_memory(error):
            raise
        sentence = f"Memory has run out in step {run.state.step + 1} ({said(error)}). Where it is:"
        raise UserError([sentence, *memory_table(run), cheapest_key(config)], exit_code=1) from error
    finally:
        console.close()
        run.loader.close()
        run.loggers.close()
        changed = {"stop_after_steps": "null"} if config.loop.stop_after_steps is not None else {}
        changed |= {"max_train_time": "null"} if out_of_time(run) else {}
        changed |= (
            {}
            if run.state.step < run.cadence.total_steps or run.state.owed
            else {"max_epochs": str(2 * run.epochs)}
        )
        if processes.main:
            for sentence in closing(
                run, resume_command(arguments, run.folder, changed=changed, launcher=processes.launcher)
            ):
                console.event(sentence)
            for sentence in (
                [] if failed or run.state.step == 0 else hand_over(run, config)
            ):  # a run that failed is gone on with, or its rate was no good
                console.event(sentence)


def _is_of_killed_reader(error: Exception) -> bool:
    """Return whether an error says that a process that reads images was killed. torch raises it wherever the main process is just then."""
    # Its words, and no class of its own; and those of a worker that finds no shared memory.
    return isinstance(error, RuntimeError) and (
        str(error).startswith("DataLoader worker") or "shared memory" in str(error)
    )


def _reader_killed(error: Exception) -> str:
    last = str(error).strip().splitlines()[-1]
    return (
        "a process that reads images was killed or could not hand an image over, most likely because memory ran out, main memory or a "
        f"container's shared memory: set num_workers lower, 0 reads without such processes ({last})."
    )


def closing(run: Run, command: str) -> list[str]:
    """Return what a person wants to know when a run has ended.

    Args:
        run: the run, at its end or wherever it stopped.
        command: the command line that goes on with it.
    """
    from trainer.checkpoints.format import RESUME, checkpoints

    state, total = run.state, run.cadence.total_steps
    if state.step == 0:
        return ["Stopped before the first step: nothing is kept of this run."]
    minutes = state.seconds / 60
    ended = "Done" if state.step >= total else f"Stopped after step {state.step} of {total}"
    lines = [f"{ended}: {state.step} steps, {state.images} images in {minutes:.1f} minutes of training."]
    if bad := run.loader.left_out:
        files = "1 file" if len(bad) == 1 else f"{len(bad)} files"
        more = f" and {len(bad) - _NAMED} more" if len(bad) > _NAMED else ""
        lines.append(
            f"Left out, for it could not be used: {files}: {', '.join(file.name for file in bad[:_NAMED])}{more}."
        )
    if not any((folder / RESUME).is_dir() for folder in checkpoints(run.folder)):
        lines.append("No checkpoint was saved.")
    elif state.step < total or state.owed:
        lines.append(f"Go on with:  {command}")
    else:
        lines.append(f"To train on, raise max_epochs (it is {run.epochs}):  {command}")
    return [
        *lines,
        f"Checkpoints: {run.folder / 'ckpts'}",
        f"Samples:     {run.folder / 'samples'}",
        f"Log:         {run.folder / 'run.log'}",
        f"Curves:      tensorboard --logdir {run.folder.parent}",
    ]


def build_run(
    config: TrainConfig,
    console: Console,
    processes: Processes,
    ending: ExitStack,
    *,
    weights_only: bool,
    signals: StopSignals,
) -> Run:
    """Load everything that a run needs and make, or go on in, its folder.

    Args:
        config: the checked configuration.
        console: where events are shown.
        processes: this one and those that it trains with.
        ending: takes what is to be done when the run has ended, however far it came.
        weights_only: a checkpoint gives its weights to a new run instead of being continued.
        signals: ask the run to end.

    Raises:
        UserError: the model, the environment or the checkpoint does not allow the run.
        DataError: the images do not.
    """
    from data.dataset import shown_captions
    from data.index import refuse_bad
    from data.record import BadFile
    from data.saved_index import remembered_index
    from trainer.checkpoints.atomic import tidy
    from trainer.checkpoints.format import TrainState
    from trainer.checkpoints.saver import Saver, Stateful
    from trainer.config import check_fused_backward, check_rates, check_schedules, without_folders
    from trainer.diffusion.objective import Networks, make_objective
    from trainer.evaluation.fixed_noise import FixedLoss, Validation
    from trainer.evaluation.loss_watch import LossWatch
    from trainer.evaluation.validation import VALIDATION_LOSS, split_images
    from trainer.models.compiled import compile_networks, require_compiler, uncompiled
    from trainer.models.ema import plan_ema
    from trainer.models.load import describe as describe_model
    from trainer.models.load import load_models
    from trainer.models.lora import Lora, base_of, begin, read_adapter
    from trainer.models.placement import place, skipped_layers
    from trainer.models.trainable import apply_freezing
    from trainer.optim.dadapt import EstimateOptions
    from trainer.optim.watch import AdaptationWatch
    from trainer.planning.check import aligned, batch_line, plan_rows
    from trainer.reporting.loggers import Loggers, open_loggers
    from trainer.reporting.metrics import Meter
    from trainer.reporting.model_card import origin_of
    from trainer.training.due import Cadence
    from trainer.training.latent_cache import cache_folder, encode_captions, encode_images, plan_latents
    from trainer.training.loop import EPOCH_LOSS, LOSS, Run
    from trainer.training.precision import resolve_precision

    def find() -> Start:
        start = find_start(config, weights_only=weights_only)
        if start.run is not None:
            ending.enter_context(locked(start.run))
        return start

    start = processes.first(find)
    if start.run is None and (problem := log_folder_problem(Path(config.logging.logdir))):
        raise UserError(problem)
    check_fused_backward(config, processes=processes.count)
    seed = processes.first(lambda: choose_seed(config.loop.seed, start))
    config = replace(config, loop=replace(config.loop, seed=seed))
    config, prompts = read_prompts(config)
    kept = cache_folder(config.cache, config.logging.logdir)
    validation_file = read_validation_file(config)

    def scan() -> Split:
        index = remembered_index(config.data, kept)
        if config.data.on_bad_image == "error":
            refuse_bad(index)
        return split_images(validation_file, config.data, index, kept)

    split = processes.first(scan)
    index = split.train
    precision = resolve_precision(config.precision, processes.device)
    precision = replace(precision, paced=config.optimizers.apply_grad_scaler_step_tweaks)
    device = precision.device
    if config.parts.compile:
        require_compiler(device)
    check_fused_backward(config, precision)
    total_steps = count_steps(config, index, processes)
    notes = check_schedules(config, total_steps)
    plan_ema(config.ema, total_steps)  # refuses what cannot be reached, before anything loads

    if config.objective.enable_zero_terminal_snr:  # gigabytes later it would be refused all the same
        set_noise_schedule(
            config,
            prompts,
            describe_model(replace(config.model, resume_ckpt=start.model, revision=start.revision)),
        )
    models = load_models(replace(config.model, resume_ckpt=start.model, revision=start.revision))
    config = replace(
        config, model=replace(config.model, revision=models.revision or start.revision)
    )  # recorded with the run
    set_noise_schedule(config, prompts, models)
    base = (
        base_of(models, start.model, start.adapter) if config.parts.lora is not None else None
    )  # before anything is put on it
    parts = apply_freezing(models, config.parts, config.optimizers.freezing)
    check_rates(config, {network: part.trained for network, part in parts.counts.items()})
    about = describe(config, index, parts, total_steps, processes.count)
    if start.about is not None:
        check_same_run(about, start.about, str(start.checkpoint))
    matrices = read_adapter(start.adapter, parts, config.parts.lora) if start.adapter is not None else None
    place(models, device, channels_last=config.precision.channels_last, weights=precision.weights)
    lora = None
    if config.parts.lora is not None and base is not None:
        lora = Lora(config.parts.lora, base, parts)
        begin(parts, config.loop.seed, matrices)

    tokenize = make_tokenize(config, models.tokenizer)
    latent_plan = processes.first(
        lambda: plan_latents(
            config.cache,
            config.data,
            index,
            models.vae.config,
            epochs=config.loop.max_epochs,
            processes=processes.on_machine,
        )
    )
    with processes.first_before_others() if latent_plan.mode == "disk" else nullcontext():
        latents = encode_images(
            latent_plan,
            index,
            config.data,
            models.vae,
            precision,
            folder=kept,
            tell=console.event,
        )
    if latents is not None and config.data.on_bad_image == "error":
        damaged = [BadFile(index.records[record].name, reason) for record, reason in latents.bad.items()]
        refuse_bad(replace(index, bad=tuple(damaged)))
    contexts = None
    if latents is not None and TEXT_ENCODER not in parts.parameters:
        captions = shown_captions(index, config.data)
        if captions is not None:
            captions += [record.caption.text for held in split.held_out for record in held.index.records]
        contexts = encode_captions(
            captions,
            tokenize,
            models.text_encoder,
            precision,
            clip_skip=config.objective.clip_skip,
            processes=processes.on_machine,
        )
    held_size = validation_file.batch_size or config.data.batch_size
    nothing: tuple[list[Batch], list[BadFile]] = ([], [])  # the first process measures for all
    held_out = [
        (
            held,
            *(
                read_held_out(config, held, tokenize, models, precision, size=held_size)
                if processes.main
                else nothing
            ),
        )
        for held in split.held_out
    ]
    # Networks that nothing but samples needs any more wait on the CPU.
    waiting: list[nn.Module] = [
        network
        for network, made in ((models.vae, latents), (models.text_encoder, contexts))
        if made is not None
    ]
    for network in waiting:
        network.to("cpu")

    if config.parts.compile:
        compile_networks([models.unet, *([models.text_encoder] if TEXT_ENCODER in parts.parameters else [])])
    loader = make_loader(config, index, tokenize, processes, pin=device.type == "cuda", latents=latents)
    optimizers = make_optimizers(config, parts, total_steps)
    objective = make_objective(
        config.objective,
        models,
        seed=config.loop.seed,
        train_text_encoder=TEXT_ENCODER in parts.parameters,
        contexts=contexts,
    )
    meter = Meter(epoch_tags={LOSS: EPOCH_LOSS})
    adaptive = {
        member.network: member.options
        for member in optimizers.members
        if isinstance(member.options, EstimateOptions)
    }
    watch = AdaptationWatch(adaptive, SECTIONS)
    loss_watch = LossWatch(
        tuple(adaptive),
        " ".join(held.index.fingerprint() for held in split.held_out if held.tag == VALIDATION_LOSS),
    )
    sampler = choose_samples(config, prompts, index)
    state = start.state or TrainState()
    ema = (
        make_ema(config, parts, total_steps, device, begins=start.checkpoint is None)
        if processes.main
        else None
    )
    batch = batch_line(config, processes)
    steps_of_epoch, held_out_lines = loader.steps_in(0), split.lines()
    about_run = (
        config,
        models.source,
        parts.counts,
        precision,
        steps_of_epoch,
        total_steps,
        batch,
        latent_plan,
        held_out_lines,
    )
    plan = plan_rows(*about_run, run=start.run)
    card = make_card(
        config,
        origin_of(start.model, config.model.revision),
        state,
        total_steps,
        list(optimizers.parameters),
        plan,
    )
    stateful: dict[str, Stateful] = {
        "optimizers": optimizers,
        "meter": meter,
        "watch": watch,
        "loss watch": loss_watch,
    }
    stateful |= {"curves": card.curves, "card": card}
    if ema is not None:
        stateful["ema"] = ema
    if precision.scaler is not None:
        stateful["scaler"] = precision.scaler
    if start.checkpoint is not None:
        restore_state(stateful, start.checkpoint)
        if 0 < loader.steps_in(state.epoch) <= state.step_in_epoch:
            raise UserError(
                f"{start.checkpoint}: its counts are not those of a run on these images; choose another checkpoint."
            )

    folder = start.run or processes.first(lambda: make_folder(config))
    loggers, beside_notes = Loggers([]), []
    if processes.main:
        ending.callback(drop_unbegun, folder, state)
        ending.enter_context(locked(folder))
        mark(folder)  # also a run that is older than the marker
        tidy(folder / "ckpts")
        beside_notes = keep_beside(models, folder) if lora is None else []
        recorders = open_loggers(
            folder,
            warn=console.event,
            networks=list(optimizers.parameters),
            adaptive=list(adaptive),
            first_step=state.step + 1 if start.run else None,
            last_report=state.last_report,
            wandb_project=config.logging.project_name if config.logging.wandb else None,
        )
        loggers = Loggers([recorders, card.curves])
        ending.callback(loggers.close)
        record_configuration(config, folder, loggers, state.step)
        console.record_to(folder / "run.log")
    for note in [*start.notes, *notes, *models.notes, *split.notes, *beside_notes]:
        console.event(f"Note: {note}")
    for held, _, bad in held_out:
        for file in bad:
            console.event(f"{file}; the image is left out of {held.tag}")
    tell_data(config, index, tokenize, console, images_per_step(config, processes))
    for line in aligned(plan):
        console.event(line)
    if device.type == "cuda":
        work = work_of(
            config,
            index,
            sampler,
            latents_kept=latents is not None,
            trains_text=TEXT_ENCODER in parts.parameters,
            held_out=held_size if held_out else 0,
        )
        for line in estimate(config, models, precision, work, holds=size_of_device(precision)).lines():
            console.event(line)
    if start.about is not None:
        console.event(f"Going on after step {state.step} in {folder}.")
        for sentence in [
            *changes(about, start.about),
            *rate_jumps(optimizers, state.step, total_steps, start.about["total_steps"]),
        ]:
            console.event(f"Changed: {sentence}")

    fixed = fixed_images(config, index, validation_file)
    unused = skipped_layers(models, config.objective.clip_skip)
    run = Run(
        folder=folder,
        state=state,
        networks=Networks(
            processes.wrap(models.unet) if UNET in parts.parameters else models.unet,
            processes.wrap(models.text_encoder, unused)
            if TEXT_ENCODER in parts.parameters
            else models.text_encoder,
            models.vae,
        ),
        objective=objective,
        optimizers=optimizers,
        loader=loader,
        precision=precision,
        cadence=Cadence(
            log_step=config.logging.log_step,
            sample_steps=config.samples.sample_steps,
            save_every_n_epochs=config.saving.save_every_n_epochs,
            save_ckpts_from_n_epochs=config.saving.save_ckpts_from_n_epochs,
            total_steps=total_steps,
            stop_after_steps=config.loop.stop_after_steps,
        ),
        images_per_step=images_per_step(config, processes),
        epochs=config.loop.max_epochs,
        steps_in=cache(loader.steps_in),
        clip=config.gradients.clip_grad_norm,
        log_grad_norm=config.optimizers.log_grad_norm,
        console=console,
        loggers=loggers,
        meter=meter,
        watch=watch,
        ema=ema,
        fixed_loss=FixedLoss(loader.images.plain(fixed) if processes.main else [], objective)
        if fixed
        else None,
        validation=Validation(
            {held.tag: FixedLoss(batches, objective, held.keys) for held, batches, _ in held_out},
            validation_file.every_n_epochs,
        ),
        loss_watch=loss_watch,
        stop_on_overfit=config.validation.stop_on_overfit,
        max_seconds=None if config.loop.max_train_time is None else 60 * config.loop.max_train_time,
        sample=lambda step: None,
        sample_first=prompts.generate_pretrain_samples,
        saver=Saver(
            config.saving,
            run=folder,
            project=config.logging.project_name,
            models=models,
            state=state,
            parts=stateful,
            about=about,
            metadata={
                "modelspec.resolution": "x".join([str(max(config.data.resolutions))] * 2),
                **{f"sd_dadapt.{name}": text for name, text in without_folders(config).items()},
            },
            say=console.event,
            ema=ema,
            lora=lora,
            writes=processes.main,
            describe=lambda checkpoint: card.write(checkpoint, folder / "samples"),
        ),
        signals=signals,
        processes=processes,
        apart=uncompiled if config.parts.compile else nullcontext,
    )
    if processes.main:
        run.sample = make_sampler(sampler, models, run, config.ema, waiting)
    return run


def make_card(
    config: TrainConfig,
    origin: Origin,
    state: TrainState,
    total_steps: int,
    networks: Sequence[str],
    plan: Sequence[tuple[str, str]],
) -> Card:
    """Return what writes the model card of each checkpoint, with the curves that it draws.

    Args:
        config: the run's.
        origin: the model that it trains.
        state: where the run is.
        total_steps: optimizer steps of the run.
        networks: those that learn.
        plan: names and texts of the plan, of which the card tells some.
    """
    from trainer.config import without_folders
    from trainer.evaluation.validation import VALIDATION_LOSS
    from trainer.reporting.curves import Curves
    from trainer.reporting.model_card import Card
    from trainer.training.loop import FIXED_LOSS, LOSS

    losses = {FIXED_LOSS: "fixed-noise loss", VALIDATION_LOSS: "validation loss"}
    rates = {network: f"hyperparameter/lr {network}" for network in networks}
    return Card(
        project=config.logging.project_name,
        origin=origin,
        curves=Curves(
            {**losses, LOSS: "loss of the batches"},
            {tag: network for network, tag in rates.items()},
            noisy=LOSS,
        ),
        state=state,
        total_steps=total_steps,
        losses=losses,
        rates=rates,
        plan=[
            (name, text)
            for name, text in plan
            if name in ("unet", "text encoder", "batch", "ema", "precision", "seed")
        ],
        files=without_folders(config),
        lora=config.parts.lora is not None,
    )


def tell_data(
    config: TrainConfig, index: Index, tokenize: Tokenize, console: Console, images_per_step: int
) -> None:
    """Say what is remarkable about the images, and which files are left out."""
    from data.report import report

    for note in report(index, config.data, images_per_step=images_per_step, tokens=tokenize).notes():
        console.event(f"Note: {note}" if note.endswith("?") else f"Note: {note}.")
    for file in index.bad[:_NAMED]:
        console.event(f"Left out: {file}")
    if len(index.bad) > _NAMED:
        console.event(f"... and {len(index.bad) - _NAMED} more; train.py --check names them")


def fixed_images(config: TrainConfig, index: Index, validation: ValidationFile) -> list[int]:
    """Return the places in the index of the training images whose loss is measured at fixed noise."""
    from trainer.evaluation.fixed_noise import choose_images

    shown = [identity for identity, record in enumerate(index.records) if record.multiply > 0]
    count = config.fixed_loss.fixed_loss_images
    if validation.stabilize_training_loss:
        count = max(1, round(validation.stabilize_split_proportion * len(shown)))
    return [shown[place] for place in choose_images(len(shown), count, config.loop.seed)]


def rate_jumps(optimizers: OptimizerSet, step: int, total_steps: int, total_before: int) -> list[str]:
    """Return where another length of the run moves the rate at which it goes on, since schedules are stretched over the run."""
    from trainer.optim.schedules import rate_factor

    jumps = []
    for member in optimizers.members:
        before, now = rate_factor(member.options, total_before)(step), member.factor(step)
        if abs(now - before) > 0.01 * max(now, before):
            jumps.append(
                f"the run has {total_steps} steps instead of {total_before}, over which {member.options.lr_scheduler} stretches: the rate "
                f"of the {member.network} goes on at {now:.3g} of its full size instead of {before:.3g}"
            )
    return jumps


def read_prompts(config: TrainConfig) -> tuple[TrainConfig, SamplePrompts]:
    """Return the sample prompts, and the configuration with the number of steps between samples that their file may set.

    Raises:
        UserError: the file of prompts has mistakes.
    """
    from trainer.config.sample_file import load_sample_prompts

    prompts = load_sample_prompts(
        Path(config.samples.sample_prompts) if config.samples.sample_prompts else None
    )
    steps = prompts.generate_samples_every_n_steps or config.samples.sample_steps
    return replace(config, samples=replace(config.samples, sample_steps=steps)), prompts


def choose_samples(config: TrainConfig, prompts: SamplePrompts, index: Index) -> Sampler:
    """Return what draws the run's samples."""
    from trainer.evaluation.sampling import Sampler

    return Sampler(
        prompts,
        resolution=max(config.data.resolutions),
        seed=config.loop.seed,
        batch_size=config.data.batch_size,
        captions=[record.caption.text for record in index.records],
        clip_skip=config.objective.clip_skip,
        chunks=pieces_of(config),
    )


def choose_seed(seed: int, start: Start) -> int:
    """Return the seed of the run: the continued run's where it was drawn (-1), a new one where none is given."""
    if seed != -1:
        return seed
    return int(start.about["same"]["seed"]) if start.about is not None else secrets.randbelow(2**31)


def set_noise_schedule(config: TrainConfig, prompts: SamplePrompts, models: Models) -> None:
    """Give the model the noise schedule that it is trained with, sampled with and saved with.

    Raises:
        UserError: the configuration asks for one that does not go with what the model predicts, or samples
            with a sampler that does not know it.
    """
    from trainer.diffusion.schedule import with_zero_terminal_snr
    from trainer.evaluation.schedulers import check_scheduler

    if config.objective.enable_zero_terminal_snr and not models.assumed:
        models.scheduler_config = with_zero_terminal_snr(models.scheduler_config, models.source)
    check_scheduler(prompts, models.scheduler_config)


def make_tokenize(config: TrainConfig, tokenizer: Any) -> Tokenize:
    """Return what turns captions into tokens."""
    from trainer.diffusion.conditioning import Tokenize

    return Tokenize(tokenizer, pieces_of(config))


def pieces_of(config: TrainConfig) -> int:
    """Return the windows of 75 tokens that a caption is encoded in."""
    return config.data.max_tokens // 75


def images_per_step(config: TrainConfig, processes: Processes) -> int:
    """Return the images of a whole optimizer step, over all processes."""
    return config.data.batch_size * config.loop.grad_accum * processes.count


def read_validation_file(config: TrainConfig) -> ValidationFile:
    """Return what the validation file asks for.

    Raises:
        UserError: it has mistakes, or measures too little for what is asked for elsewhere.
    """
    from trainer.config.validation_file import load_validation

    named = config.validation.validation_config
    file = load_validation(Path(named) if named else None)
    wanted = [
        key
        for key, value in (
            ("keep_best", config.saving.keep_best),
            ("stop_on_overfit", config.validation.stop_on_overfit),
        )
        if value
    ]
    if wanted and (not file.validate_training or file.val_split_mode == "none"):
        raise UserError(
            f"{' and '.join(wanted)}: there is no loss/val, since validation_config sets validate_training to false or val_split_mode to "
            "none; change that, or set what needs it to false."
        )
    if "stop_on_overfit" in wanted and not (
        config.fixed_loss.fixed_loss_images or file.stabilize_training_loss
    ):
        raise UserError(
            "stop_on_overfit: fixed_loss_images is 0, and without the fixed-noise loss of training images overfitting cannot be told; set "
            "it to 16 again, or stop_on_overfit to false."
        )
    return file


def read_held_out(
    config: TrainConfig, held: HeldOut, tokenize: Tokenize, models: Models, precision: Precision, *, size: int
) -> tuple[list[Batch], list[BadFile]]:
    """Return held-out images as the VAE encodes them, kept in memory, and the files that cannot be read.

    Args:
        config: the run's.
        held: the images.
        tokenize: of the model.
        models: the VAE is on the precision's device.
        precision: in which it computes.
        size: images and timesteps that are measured at a time.

    Raises:
        UserError: none of the images can be read.
    """
    from data.dataset import Images
    from trainer.diffusion.moments import encode_pixels
    from trainer.evaluation.fixed_noise import TIMESTEPS, held_out_batches
    from trainer.transfer import to_device

    def encode(batch: Batch) -> Batch:
        assert batch.pixels_BCHW is not None, "images of a reader without latents"
        moments = encode_pixels(
            models.vae, to_device(batch.pixels_BCHW, precision.device), precision.autocast
        ).cpu()
        return replace(batch, pixels_BCHW=None, moments_BCHW=moments)

    images = Images(held.index, config.data, tokenize=tokenize, seed=config.loop.seed)
    batches = held_out_batches(images, len(held.index.records), max(1, size // TIMESTEPS), encode)
    bad = list(images.bad.values())
    if not batches:
        raise UserError(
            [f"validation_config: none of the images for {held.tag} can be read.", *map(str, bad[:10])]
        )
    return batches, bad


def make_loader(
    config: TrainConfig,
    index: Index,
    tokenize: Tokenize,
    processes: Processes,
    *,
    pin: bool,
    latents: Latents | None = None,
) -> StepLoader:
    """Return the reader of this process's share of the run's images, or of what was encoded of them."""
    from data.loader import StepLoader

    return StepLoader(
        index,
        config.data,
        tokenize=tokenize,
        seed=config.loop.seed,
        images_per_step=images_per_step(config, processes),
        rank=processes.rank,
        world=processes.count,
        pin=pin,
        latents=latents,
    )


def count_steps(config: TrainConfig, index: Index, processes: Processes) -> int:
    """Return the optimizer steps of the whole run.

    Raises:
        DataError: there are none.
    """
    from data.errors import DataError
    from data.plan import steps_before

    total = steps_before(
        index,
        resolution=config.data.resolution,
        seed=config.loop.seed,
        epoch=config.loop.max_epochs,
        images_per_step=images_per_step(config, processes),
    )
    if total == 0:
        raise DataError(
            f"data_root: in {config.loop.max_epochs} epochs no image is due: raise its multiply, or max_epochs"
        )
    return total


def make_optimizers(config: TrainConfig, parts: TrainedParts, total_steps: int) -> OptimizerSet:
    """Return one optimizer for each network that learns."""
    from trainer.optim.optimizer_set import OptimizerSet

    return OptimizerSet(
        {UNET: config.optimizers.unet, TEXT_ENCODER: config.optimizers.text_encoder},
        {network: [parameter for _, parameter in named] for network, named in parts.parameters.items()},
        total_steps=total_steps,
    )


def make_ema(
    config: TrainConfig, parts: TrainedParts, total_steps: int, device: torch.device, *, begins: bool
) -> Ema | None:
    """Return the averages of what learns, or None where none are asked for.

    Args:
        config: the run's.
        parts: what learns, with the weights that it begins from.
        total_steps: optimizer steps of the run.
        device: the one that trains.
        begins: whether the run begins; one that goes on is given its averages afterwards.

    Raises:
        UserError: the average could never be updated, or the model that it is to begin from does not fit.
    """
    import torch

    from trainer.models.ema import Ema, decay_of, weights_of
    from trainer.models.load import load_models

    options = config.ema
    if not options.active:
        return None
    ema = Ema(
        {network: [parameter for _, parameter in named] for network, named in parts.parameters.items()},
        decay=decay_of(options, total_steps),
        interval=options.ema_update_interval,
        device=torch.device("cpu") if options.ema_device == "cpu" else device,
    )
    if options.ema_resume_model is not None and begins:
        models = load_models(
            replace(config.model, resume_ckpt=options.ema_resume_model, revision=None, vae=None)
        )
        ema.begin_from(weights_of(models, parts.parameters, options.ema_resume_model))
    return ema


def log_folder_problem(logdir: Path) -> str | None:
    """Return why run folders cannot be made in `logdir`, in one sentence, or None where they can."""
    place = logdir.resolve()
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        return f"logdir: {place} is a file, not a folder; choose another logdir."
    if not os.access(place, os.W_OK | os.X_OK):
        return f"logdir: the folder {place} cannot be written to; choose another logdir or change its permissions."
    return None


def make_folder(config: TrainConfig) -> Path:
    """Make the run's folder, `{logdir}/{project}-{timestamp}`, with the run's name between them if it has one.

    Raises:
        UserError: it cannot be made.
    """
    logdir = Path(config.logging.logdir)
    name = "-".join(part for part in (config.logging.project_name, config.logging.run_name) if part)
    while True:
        folder = logdir / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
        try:
            folder.mkdir(parents=True)
            return folder.resolve()
        except FileExistsError:
            time.sleep(0.2)  # another run began in the same second
        except OSError as error:
            raise UserError(
                f"logdir: no run folder can be made in {logdir} ({error.strerror}); choose another logdir."
            ) from error


def drop_unbegun(folder: Path, state: TrainState) -> None:
    """Delete the folder of a run that ended before its first step."""
    from trainer.checkpoints.atomic import remove

    if state.step == 0:
        with suppress(OSError):
            remove(folder)


def keep_beside(models: Models, folder: Path) -> list[str]:
    """Copy the base's further parts, a safety checker for instance, into the run's folder, where every checkpoint finds them.

    The base may be a checkpoint that this run deletes, and a second name for a file is sure to work in one
    folder. Returns a sentence where that cannot be done; checkpoints are without them then.
    """
    from trainer.checkpoints.atomic import appearing
    from trainer.checkpoints.export import copy_beside

    place = folder / "base"
    if not models.beside:
        return []
    names = " and ".join(models.beside)
    try:
        if not place.is_dir():
            with appearing(place) as draft:
                copy_beside(models, draft)
    except OSError as error:
        models.beside = {}
        return [
            f"the base's {names} could not be copied ({error.strerror or error}), so checkpoints are without"
        ]
    models.beside_from = place
    return []


def record_configuration(config: TrainConfig, folder: Path, loggers: Loggers, step: int) -> None:
    """Write the resolved configuration into the run's folder and its log; loading it repeats the run."""
    from trainer.config import write_resolved

    write_resolved(config, folder)
    for name in ("train.json", "optimizer.json"):
        loggers.text(f"config/{name}", (folder / name).read_text(encoding="utf-8"), step)


def make_sampler(
    sampler: Sampler, models: Models, run: Run, options: EmaOptions, waiting: Sequence[nn.Module] = ()
) -> Callable[[int], None]:
    """Return the function that draws, saves and records the samples of a step.

    Args:
        sampler: draws them.
        models: the networks.
        run: where they are recorded.
        options: whether the trained or the averaged weights draw.
        waiting: networks that are on the CPU in between.
    """
    from trainer.models.ema import SUFFIX
    from trainer.transfer import visiting

    def draw(step: int, suffix: str) -> None:
        with visiting(waiting, run.precision.device):
            samples = sampler.draw(
                models,
                step=step,
                device=run.precision.device,
                autocast=run.precision.autocast,
                check=run.signals.check,
            )
        for problem in samples.problems:
            run.console.event(f"Note: {problem}.")
        try:
            run.console.event(f"step {step}: samples in {samples.save(run.folder / 'samples', step, suffix)}")
        except OSError as error:
            run.console.event(
                f"Note: the samples of step {step} could not be saved ({error.strerror or error}); training goes on."
            )
        for tag, picture in samples.rows:
            run.loggers.image(f"{tag} ({suffix})" if suffix else tag, picture, step)

    def sample(step: int) -> None:
        averaged = run.ema is not None and options.ema_sample_ema_model
        if not averaged or options.ema_sample_nonema_model:
            draw(step, "")
        if run.ema is not None and averaged:
            with run.ema.applied():
                draw(step, SUFFIX)

    return sample
