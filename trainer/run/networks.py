"""The networks of a run: loaded, frozen, placed; adapters and EMA weights."""

from __future__ import annotations

from dataclasses import replace

import torch

from trainer.checkpoints.artifact import Artifact, artifact_of
from trainer.diffusion.objective import Networks
from trainer.models.ema import Ema, decay_of, weights_of
from trainer.models.load import load_models
from trainer.models.options import ModelOptions
from trainer.models.pipeline import Models, TrainedParts
from trainer.models.placement import place, skipped_layers
from trainer.models.trainable import apply_freezing
from trainer.networks import TEXT_ENCODER, UNET
from trainer.planning.plan import Plan
from trainer.planning.prepare import set_noise_schedule
from trainer.training.precision import Precision
from trainer.training.ranks import Processes


def load(plan: Plan, precision: Precision) -> tuple[Models, TrainedParts, Artifact]:
    """Load the networks, mark what is trained, move them to the device and initialise adapters."""
    config, start = plan.config, plan.start
    models = load_models(replace(config.model, resume_ckpt=start.model))
    set_noise_schedule(config, plan.prompts, models)
    artifact = artifact_of(config.parts, models, start.model, start.adapter)
    parts = apply_freezing(models, config.parts, config.optimizers.freezing)
    artifact.take(parts, start.adapter)
    place(models, precision.device, channels_last=config.precision.channels_last, weights=precision.weights)
    artifact.begin(config.loop.seed)
    return models, parts, artifact


def wrap(models: Models, parts: TrainedParts, processes: Processes, clip_skip: int) -> Networks:
    """Return the networks as a step runs them: trained ones average their gradients over ranks."""
    unet, text_encoder = models.unet, models.text_encoder
    if UNET in parts.parameters:
        unet = processes.wrap(unet)
    if TEXT_ENCODER in parts.parameters:
        text_encoder = processes.wrap(text_encoder, skipped_layers(models, clip_skip))
    return Networks(unet, text_encoder, models.vae)


def make_ema(plan: Plan, parts: TrainedParts, device: torch.device) -> Ema | None:
    """Return new EMA weights of what is trained; None without EMA."""
    options, total_steps = plan.config.ema, plan.total_steps
    if not options.active:
        return None
    ema = Ema(
        {network: [parameter for _, parameter in named] for network, named in parts.parameters.items()},
        decay=decay_of(options, total_steps),
        interval=options.ema_update_interval,
        device=torch.device("cpu") if options.ema_device == "cpu" else device,
    )
    if options.ema_resume_model is not None and plan.start.checkpoint is None:
        model = ModelOptions(resume_ckpt=options.ema_resume_model, revision=options.ema_resume_revision)
        models = load_models(model, key="ema_resume_model")
        ema.begin_from(weights_of(models, parts.parameters, options.ema_resume_model))
    return ema
