"""From a `Plan` to a `Run`: weights are loaded here, and every part gets what it needs."""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from functools import cache, partial

from data.loader import StepLoader
from trainer.diffusion.objective import make_objective
from trainer.evaluation.fixed_noise import FixedLoss, Validation
from trainer.models.compiled import compile_networks, uncompiled
from trainer.planning.plan import Plan
from trainer.reporting.console import Console
from trainer.reporting.loggers import Loggers
from trainer.run.announce import announce
from trainer.run.encode import encode, encode_contexts
from trainer.run.folder import keep_beside, make_folder, open_folder
from trainer.run.networks import load, wrap
from trainer.run.outputs import fixed_images, make_sample
from trainer.run.saved import make_saved, make_saver, restore
from trainer.training.cadence import Cadence
from trainer.training.precision import Precision
from trainer.training.ranks import Processes
from trainer.training.run import Evaluation, Learner, Records, Run, TextStop
from trainer.training.signals import StopSignals
from trainer.training.stop_text import stop_text_encoder


def build(
    plan: Plan,
    precision: Precision,
    console: Console,
    processes: Processes,
    ending: ExitStack,
    signals: StopSignals,
) -> Run:
    """Load what a plan names and make, or resume in, the run folder.

    `ending` takes what must be done when the run has ended, however far it came.

    Raises:
        UserError: the model, the environment, the checkpoint or the images do not allow the run.
    """
    models, parts, artifact = load(plan, precision)
    plan = plan.pinned(models)
    config, start, index = plan.config, plan.start, plan.split.train
    tokenize = plan.tokenize(models.tokenizer)
    encoded = encode(plan, models, tokenize, precision, processes, console)
    if config.parts.compile:
        compile_networks([models.unet, *([models.text_encoder] if plan.trains_text else [])])
    loader = StepLoader(
        index,
        config.data,
        tokenize=tokenize,
        seed=config.loop.seed,
        images_per_step=plan.images_per_step,
        rank=processes.rank,
        world=processes.count,
        pin=precision.device.type == "cuda",
        latents=encoded.latents,
    )
    objective = make_objective(
        config.objective,
        models,
        seed=config.loop.seed,
        train_text_encoder=plan.trains_text,
        contexts=encoded.contexts,
    )
    saved = make_saved(plan, parts, precision, processes)
    if start.checkpoint is not None:
        restore(saved, start.checkpoint, loader)
    state, watch = saved.state, saved.watch
    folder = start.run or processes.first(lambda: make_folder(config))
    loggers, notes = Loggers([]), []
    if processes.main:
        loggers = open_folder(
            folder, plan, artifact, state, console, ending, adaptive=watch.networks, curves=saved.card.curves
        )
        notes = keep_beside(models, folder)
    announce(plan, notes, encoded, saved, tokenize, precision, folder, console)

    fixed = fixed_images(plan)
    fixed_loss = FixedLoss(loader.images.plain(fixed) if processes.main else [], objective) if fixed else None
    encode_now = partial(encode_contexts, plan, models, tokenize, precision, processes, encoded.latents)
    validation = {held.tag: FixedLoss(batches, objective, held.keys) for held, batches, _ in encoded.held_out}
    run = Run(
        folder=folder,
        state=state,
        learner=Learner(
            networks=wrap(models, parts, processes, config.objective.clip_skip),
            objective=objective,
            optimizers=saved.optimizers,
            precision=precision,
            images_per_step=plan.images_per_step,
            clip=config.gradients.clip_grad_norm,
            ema=saved.ema,
            dropout=config.parts.adapter_dropout > 0,
        ),
        evaluation=Evaluation(
            fixed_loss=fixed_loss,
            validation=Validation(validation, plan.validation.every_n_epochs),
            loss_watch=saved.loss_watch,
            stop_on_overfit=config.validation.stop_on_overfit,
            sample_first=plan.prompts.generate_pretrain_samples,
            context=uncompiled if config.parts.compile else nullcontext,
        ),
        records=Records(
            console=console,
            loggers=loggers,
            meter=saved.meter,
            watch=watch,
            log_grad_norm=config.optimizers.log_grad_norm,
        ),
        loader=loader,
        cadence=Cadence(
            log_step=config.logging.log_step,
            sample_steps=plan.sample_steps,
            save_every_n_epochs=config.saving.save_every_n_epochs,
            save_ckpts_from_n_epochs=config.saving.save_ckpts_from_n_epochs,
            total_steps=plan.total_steps,
            stop_after_steps=config.loop.stop_after_steps,
        ),
        epochs=config.loop.max_epochs,
        steps_in=cache(loader.steps_in),
        max_seconds=None if config.loop.max_train_time is None else 60 * config.loop.max_train_time,
        saver=make_saver(plan, saved, artifact, folder, processes, console),
        signals=signals,
        processes=processes,
        text_stop=None if plan.text_stop is None else TextStop(plan.text_stop, encode_now, encoded.waiting),
    )
    stop_text_encoder(run)
    if processes.main:
        run.evaluation.sample = make_sample(plan, models, run, encoded.waiting)
    return run
