"""Latents, captions and validation images, encoded once before training."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace

from torch import nn

from data.batch import Batch
from data.dataset import Images, plain_caption, shown_captions
from data.index import refuse_bad
from data.latents import Latents
from data.record import BadFile
from trainer.diffusion.conditioning import Contexts, Tokenize
from trainer.diffusion.moments import encode_pixels
from trainer.errors import UserError
from trainer.evaluation.fixed_noise import TIMESTEPS, held_out_batches
from trainer.evaluation.validation import HeldOut
from trainer.models.pipeline import Models
from trainer.planning.plan import Plan
from trainer.reporting.console import Console
from trainer.training.latent_cache import cache_folder, encode_captions, encode_images
from trainer.training.precision import Precision
from trainer.training.ranks import Processes
from trainer.transfer import to_device


@dataclass(frozen=True)
class Encoded:
    """Cached latents and captions, and validation images."""

    latents: Latents | None
    contexts: Contexts | None
    held_out: list[tuple[HeldOut, list[Batch], list[BadFile]]]
    """Validation images with their batches and unreadable files; without both on ranks other than 0."""
    waiting: list[nn.Module]
    """Networks that only sampling still needs, kept on the CPU in between."""


def encode(
    plan: Plan,
    models: Models,
    tokenize: Tokenize,
    precision: Precision,
    processes: Processes,
    console: Console,
) -> Encoded:
    """Encode what the plan caches, and move networks that are no longer needed to the CPU.

    On a shared disk rank 0 encodes before the others.

    Raises:
        UserError: the disk is too small, no validation image can be read, or an image is damaged and
            on_bad_image is error.
    """
    config, index = plan.config, plan.split.train
    folder = cache_folder(config.cache, config.logging.logdir)
    shared = plan.latents.mode == "disk"
    with processes.first_before_others() if shared else nullcontext():
        latents = encode_images(
            plan.latents, index, config.data, models.vae, precision, folder=folder, report=console.event
        )
    if latents is not None and config.data.on_bad_image == "error":
        damaged = [BadFile(index.records[record].name, reason) for record, reason in latents.bad.items()]
        refuse_bad(replace(index, bad=tuple(damaged)))
    contexts = None
    if not plan.trains_text:
        contexts = encode_contexts(plan, models, tokenize, precision, processes, latents)
    nothing: tuple[list[Batch], list[BadFile]] = ([], [])  # rank 0 measures for all
    held_out = [
        (held, *(_held_out(plan, held, tokenize, models, precision) if processes.main else nothing))
        for held in plan.split.held_out
    ]
    done: dict[nn.Module, object] = {models.vae: latents, models.text_encoder: contexts}
    waiting = [network for network, encoded in done.items() if encoded is not None]
    for network in waiting:
        network.to("cpu")
    return Encoded(latents, contexts, held_out, waiting)


def encode_contexts(
    plan: Plan,
    models: Models,
    tokenize: Tokenize,
    precision: Precision,
    processes: Processes,
    latents: Latents | None,
) -> Contexts | None:
    """Encode a run's captions with its frozen text encoder, as `encode_captions`; None without latents."""
    if latents is None:
        return None
    config = plan.config
    captions = shown_captions(plan.split.train, config.data)
    if captions is not None:
        held_out = [record for held in plan.split.held_out for record in held.index.records]
        captions += [plain_caption(record, config.data) for record in held_out]
    return encode_captions(
        captions,
        tokenize,
        models.text_encoder,
        precision,
        clip_skip=config.objective.clip_skip,
        processes=processes.on_machine,
    )


def _held_out(
    plan: Plan, held: HeldOut, tokenize: Tokenize, models: Models, precision: Precision
) -> tuple[list[Batch], list[BadFile]]:
    """Return validation images as encoded batches, and the files that cannot be read."""

    def encode_batch(batch: Batch) -> Batch:
        assert batch.pixels_BCHW is not None, "images are read without cached latents"
        pixels_BCHW = to_device(batch.pixels_BCHW, precision.device)
        moments_BCHW = encode_pixels(models.vae, pixels_BCHW, precision.autocast).cpu()
        return replace(batch, pixels_BCHW=None, moments_BCHW=moments_BCHW)

    config = plan.config
    images = Images(held.index, config.data, tokenize=tokenize, seed=config.loop.seed)
    size = max(1, plan.validation_batch // TIMESTEPS)
    batches = held_out_batches(images, len(held.index.records), size, encode_batch)
    bad = list(images.bad.values())
    if not batches:
        raise UserError(
            [f"validation_config: none of the images for {held.tag} can be read.", *map(str, bad[:10])]
        )
    return batches, bad
