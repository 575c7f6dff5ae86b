"""From a `Plan` to a `Run`: weights are loaded here, and every part gets what it needs."""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from functools import cache

from data.loader import StepLoader
from trainer.checkpoints.format import TrainState
from trainer.checkpoints.saver import Saver, Stateful
from trainer.config import without_folders
from trainer.diffusion.objective import Networks, make_objective
from trainer.errors import UserError
from trainer.evaluation.fixed_noise import FixedLoss, Validation
from trainer.evaluation.loss_watch import LossWatch
from trainer.models.compiled import compile_networks, uncompiled
from trainer.models.placement import skipped_layers
from trainer.networks import NETWORKS, TEXT_ENCODER, UNET, by_network
from trainer.optim.dadapt import EstimateOptions
from trainer.optim.optimizer_set import OptimizerSet
from trainer.optim.watch import AdaptationWatch
from trainer.planning.prepare import Plan
from trainer.planning.resume import restore_state
from trainer.reporting.console import Console
from trainer.reporting.loggers import Loggers
from trainer.reporting.metrics import Meter
from trainer.reporting.tags import EPOCH_LOSS, LOSS, VALIDATION_LOSS
from trainer.run.announce import NAMED_FILES, announce
from trainer.run.encode import encode
from trainer.run.folder import keep_beside, make_folder, open_folder
from trainer.run.networks import load, make_ema
from trainer.run.outputs import fixed_images, make_card, make_sample
from trainer.training.cadence import Cadence
from trainer.training.precision import Precision
from trainer.training.ranks import Processes
from trainer.training.run import Evaluation, Learner, Records, Run
from trainer.training.signals import StopSignals

__all__ = ["NAMED_FILES", "build"]


def build(
    plan: Plan,
    precision: Precision,
    console: Console,
    processes: Processes,
    ending: ExitStack,
    signals: StopSignals,
) -> Run:
    """Load what a plan names and make, or resume in, the run folder.

    Args:
        plan: the run's, the same on all ranks.
        precision: number format and this rank's device.
        console: where events are shown.
        processes: the connected ranks.
        ending: takes what must be done when the run has ended, however far it came.
        signals: ask the run to end.

    Raises:
        UserError: the model, the environment or the checkpoint does not allow the run.
        DataError: the images do not.
    """
    models, parts, artifact = load(plan, precision)
    if models.revision is not None:
        plan = plan.at_revision(models.revision)
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
    optimizers = OptimizerSet(
        by_network(config.optimizers),
        {network: [parameter for _, parameter in named] for network, named in parts.parameters.items()},
        total_steps=plan.total_steps,
    )
    objective = make_objective(
        config.objective,
        models,
        seed=config.loop.seed,
        train_text_encoder=plan.trains_text,
        contexts=encoded.contexts,
    )
    meter = Meter(epoch_tags={LOSS: EPOCH_LOSS})
    adaptive = {
        member.network: member.options
        for member in optimizers.members
        if isinstance(member.options, EstimateOptions)
    }
    watch = AdaptationWatch(adaptive, {name: network.section for name, network in NETWORKS.items()})
    measured_on = [held.index.fingerprint() for held in plan.split.held_out if held.tag == VALIDATION_LOSS]
    loss_watch = LossWatch(tuple(adaptive), " ".join(measured_on))
    state = start.state or TrainState()
    ema = make_ema(plan, parts, precision.device) if processes.main else None
    card = make_card(plan, state)
    stateful: dict[str, Stateful] = {
        "optimizers": optimizers,
        "meter": meter,
        "watch": watch,
        "loss watch": loss_watch,
        "curves": card.curves,
        "card": card,
    }
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
    loggers, notes = Loggers([]), []
    if processes.main:
        loggers = open_folder(
            folder, plan, state, console, ending, adaptive=list(adaptive), curves=card.curves
        )
        notes = keep_beside(models, folder)
    announce(plan, notes, encoded, optimizers, tokenize, precision, folder, state, console)

    fixed = fixed_images(plan)
    fixed_loss = FixedLoss(loader.images.plain(fixed) if processes.main else [], objective) if fixed else None
    validation = {held.tag: FixedLoss(batches, objective, held.keys) for held, batches, _ in encoded.held_out}
    run = Run(
        folder=folder,
        state=state,
        learner=Learner(
            networks=Networks(
                processes.wrap(models.unet) if UNET in parts.parameters else models.unet,
                processes.wrap(models.text_encoder, skipped_layers(models, config.objective.clip_skip))
                if TEXT_ENCODER in parts.parameters
                else models.text_encoder,
                models.vae,
            ),
            objective=objective,
            optimizers=optimizers,
            precision=precision,
            images_per_step=plan.images_per_step,
            clip=config.gradients.clip_grad_norm,
            ema=ema,
        ),
        evaluation=Evaluation(
            fixed_loss=fixed_loss,
            validation=Validation(validation, plan.validation.every_n_epochs),
            loss_watch=loss_watch,
            stop_on_overfit=config.validation.stop_on_overfit,
            sample_first=plan.prompts.generate_pretrain_samples,
            context=uncompiled if config.parts.compile else nullcontext,
        ),
        records=Records(
            console=console,
            loggers=loggers,
            meter=meter,
            watch=watch,
            log_grad_norm=config.optimizers.log_grad_norm,
        ),
        loader=loader,
        cadence=Cadence(
            log_step=config.logging.log_step,
            sample_steps=config.samples.sample_steps,
            save_every_n_epochs=config.saving.save_every_n_epochs,
            save_ckpts_from_n_epochs=config.saving.save_ckpts_from_n_epochs,
            total_steps=plan.total_steps,
            stop_after_steps=config.loop.stop_after_steps,
        ),
        epochs=config.loop.max_epochs,
        steps_in=cache(loader.steps_in),
        max_seconds=None if config.loop.max_train_time is None else 60 * config.loop.max_train_time,
        saver=Saver(
            config.saving,
            run=folder,
            project=config.logging.project_name,
            artifact=artifact,
            state=state,
            parts=stateful,
            about=plan.about,
            metadata={
                "modelspec.resolution": "x".join([str(max(config.data.resolutions))] * 2),
                **{f"sd_dadapt.{name}": text for name, text in without_folders(config).items()},
            },
            say=console.event,
            ema=ema,
            writes=processes.main,
            describe=lambda checkpoint: card.write(checkpoint, folder / "samples"),
        ),
        signals=signals,
        processes=processes,
    )
    if processes.main:
        run.evaluation.sample = make_sample(plan, models, run, encoded.waiting)
    return run
