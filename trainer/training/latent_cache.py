"""Cached latents, and captions of a frozen text encoder: encoded once, before training."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from data.atomic import free_bytes, in_gib
from data.contents import content_hashes
from data.index import Index
from data.latents import DiskLatents, Latents, MemoryLatents, MomentShape, View, views
from data.loader import read_crops
from data.options import DataOptions
from trainer.diffusion.conditioning import Contexts
from trainer.diffusion.moments import encode_pixels
from trainer.errors import UserError
from trainer.output import counted
from trainer.training.options import CacheOptions
from trainer.training.precision import Precision
from trainer.transfer import to_device

SHARE = 4
"""auto takes at most the n-th part of free memory."""

SPARE_DISK = 256 << 20
"""Bytes that stay free on a disk."""

MANY = 1000
"""Images whose hashing takes a while, which is announced."""

EVERY = 30.0
"""Seconds between two lines of progress."""


def cache_folder(options: CacheOptions, logdir: str) -> Path:
    """Return the folder of files that later runs use again."""
    return Path(options.cache_dir) if options.cache_dir is not None else Path(logdir) / "cache"


@dataclass(frozen=True)
class LatentPlan:
    """The latents of a run: cached or not, and where."""

    mode: Literal["disk", "memory", "no"]
    entries: Sequence[View]
    """Views that are encoded once; none for the mode no."""
    shape: MomentShape
    why: str = ""
    """The reason why auto became no."""

    @property
    def size(self) -> int:
        """Bytes of all moments."""
        return self.shape.nbytes(self.entries)

    def __str__(self) -> str:
        """Return the plan in words."""
        if self.mode == "no":
            return "encoded in every step" + (f" ({self.why})" if self.why else "")
        place = "in memory" if self.mode == "memory" else "on the disk"
        size = f"{counted(len(self.entries), 'image')}, {self.size / 2**20:,.1f} MiB"
        return f"encoded once, before training: {size}, kept {place}"


def plan_latents(
    options: CacheOptions,
    data: DataOptions,
    index: Index,
    vae_config: Any,
    *,
    epochs: int,
    processes: int = 1,
) -> LatentPlan:
    """Decide how the latents of a run are cached; `processes` ranks on this machine each keep all.

    Raises:
        UserError: the latents do not fit into memory, as cache_latents demands.
    """
    factor = 2 ** (len(vae_config.block_out_channels) - 1)
    shape = MomentShape(vae_config.latent_channels, factor, index.masked)
    wanted = options.cache_latents
    if wanted == "no":
        return LatentPlan("no", (), shape)
    if wanted == "auto" and data.crop_jitter > 0:
        return LatentPlan("no", (), shape, "with crop_jitter no two crops are equal")
    found = views(index, data)
    size, free = shape.nbytes(found), _free_memory() // processes
    if wanted == "auto":
        if len(found) > epochs * sum(record.multiply for record in index.records):
            return LatentPlan("no", (), shape, "the run shows hardly any image twice")
        if size > free // SHARE:
            why = (
                f"{in_gib(size)} of latents are more than a quarter of the {in_gib(free)} that are free; "
                "cache_latents disk would keep them"
            )
            return LatentPlan("no", (), shape, why)
    if wanted == "memory" and size > free:
        raise UserError(
            f"cache_latents: memory needs {in_gib(size)} for {len(found):,} latents and {in_gib(free)} are "
            "free; use disk, auto or no."
        )
    return LatentPlan("disk" if wanted == "disk" else "memory", found, shape)


def encode_images(
    plan: LatentPlan,
    index: Index,
    data: DataOptions,
    vae: Any,
    precision: Precision,
    *,
    folder: Path,
    report: Callable[[str], None],
) -> Latents | None:
    """Encode the planned latents that no earlier run has cached, one image at a time.

    An image's moments therefore depend on nothing but the image and the network. Unreadable files are listed
    in the result's `bad`.

    Raises:
        UserError: the disk is too small or cannot be written to, or latents are not finite.
    """
    if plan.mode == "no":
        return None
    latents, contents, place = _open(plan, index, vae, precision, folder, report)
    missing = latents.missing(plan.entries)
    size = plan.shape.nbytes(missing)
    if plan.mode == "disk":
        _check_disk(folder, size)
    if len(missing) < len(plan.entries):
        report(
            f"Latents of {len(plan.entries) - len(missing):,} of {len(plan.entries):,} images "
            f"are in {place} already."
        )
    if isinstance(latents, DiskLatents) and latents.damaged:
        report(
            f"Deleted {latents.damaged:,} damaged or outdated files of cached latents in {place}; "
            "their images are encoded again."
        )
    if missing:
        report(f"Encoding {len(missing):,} images once: {size / 2**20:,.1f} MiB of latents, kept in {place}.")
    try:
        _encode(latents, missing, contents, index, data, vae, precision, report)
    except OSError as error:
        raise UserError(
            f"cache_latents: {place} cannot be written to ({error.strerror or error}); "
            "choose another cache_dir, or memory or no."
        ) from error
    return latents


def _open(
    plan: LatentPlan,
    index: Index,
    vae: Any,
    precision: Precision,
    folder: Path,
    report: Callable[[str], None],
) -> tuple[DiskLatents | MemoryLatents, dict[int, str] | None, str]:
    """Return the store of latents, the images' content hashes if it is on disk, and its place in words."""
    if plan.mode == "memory":
        return MemoryLatents(plan.shape), None, "memory"
    if len(index.records) >= MANY:
        report(f"Comparing the content of {len(index.records):,} images with the latents cached in {folder}.")
    memory = folder / f"contents-{_roots(index)}.json"
    contents = content_hashes(index.records, memory, masked=index.masked)
    own = folder / "latents" / identity(vae, precision)
    return DiskLatents(own, plan.shape, contents), contents, str(own)


def encode_captions(
    captions: Sequence[str] | None,
    tokenize: Callable[[list[str]], Tensor],
    text_encoder: Any,
    precision: Precision,
    *,
    clip_skip: int,
    processes: int = 1,
) -> Contexts | None:
    """Encode all captions with a frozen text encoder; None if they need over a quarter of free memory.

    `captions` is None if they cannot be listed, since their tags are shuffled. `processes` ranks on this
    machine each keep all.
    """
    if captions is None:
        return None
    size = 4 * tokenize([""]).shape[1] * text_encoder.config.hidden_size
    if size * len(captions) > _free_memory() // processes // SHARE:
        return None
    contexts = Contexts()
    contexts.add(
        captions,
        tokenize,
        text_encoder,
        clip_skip=clip_skip,
        device=precision.device,
        autocast=precision.autocast,
    )
    return contexts


def identity(vae: Any, precision: Precision) -> str:
    """Return a hash of the VAE's weights, configuration, device and dtype: equal for equal latents."""
    settings = {name: value for name, value in vae.config.items() if not name.startswith("_")}
    layout = [
        parameter.is_contiguous(memory_format=torch.channels_last)
        for parameter in vae.parameters()
        if parameter.dim() == 4
    ]
    digest = hashlib.blake2b(digest_size=12)
    digest.update(
        json.dumps(
            [settings, precision.device.type, precision.name, all(layout)], sort_keys=True, default=str
        ).encode()
    )
    for name, tensor in sorted(vae.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _encode(
    latents: Latents,
    missing: Sequence[View],
    contents: dict[int, str] | None,
    index: Index,
    data: DataOptions,
    vae: Any,
    precision: Precision,
    report: Callable[[str], None],
) -> None:
    began = reported = time.monotonic()
    try:
        for number, crop in enumerate(read_crops(index, data, missing, contents), 1):
            if crop.pixels_1CHW is None:
                latents.bad[crop.view.record] = crop.bad
                continue
            moments_1CHW = encode_pixels(
                vae, to_device(crop.pixels_1CHW, precision.device), precision.autocast
            ).cpu()
            if not moments_1CHW.isfinite().all():
                name = index.records[crop.view.record].name
                raise UserError(
                    f"the VAE returns values that are not finite for {name} in {precision.name}; "
                    "set mixed_precision to bf16 or no, or use another vae."
                )
            latents.add(crop.view, moments_1CHW[0])
            if (now := time.monotonic()) - reported > EVERY:
                reported = now
                left = (now - began) / number * (len(missing) - number)
                report(f"Encoded {number:,} of {len(missing):,} images; about {left / 60:.0f} minutes left.")
    finally:
        latents.flush()  # what was computed before Ctrl-C is there for the next run


def _check_disk(folder: Path, size: int) -> None:
    free = free_bytes(folder)
    if size + SPARE_DISK > free:
        raise UserError(
            f"cache_latents: disk needs {in_gib(size)} in {folder} and {in_gib(free)} are free; "
            "free some space, choose another cache_dir, or use memory or no."
        )


def _free_memory() -> int:
    import psutil

    return psutil.virtual_memory().available


def _roots(index: Index) -> str:
    return hashlib.blake2b(
        "\n".join(str(root.resolve()) for root in index.roots).encode(errors="surrogateescape"), digest_size=8
    ).hexdigest()
