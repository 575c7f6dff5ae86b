"""The autoencoder's training stage."""

# The libraries' decorators and exports hide their types.
# pyright: reportPrivateImportUsage=false, reportCallIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from .drawing import FACE, render, to_array
from .networks import new_vae
from .scenes import sample_concept, sample_scene
from .state import Run
from .textures import sample_marked, sample_texture


@dataclass(frozen=True)
class VaeOptions:
    """Settings of the autoencoder's training."""

    steps: int = 8400
    batch: int = 8
    lr: float = 1.5e-3
    texture_share: float = 0.4
    """Share of textures; the rest are scenes."""
    marked_share: float = 0.35
    """Share of scenes with small marks on them, taken from the plain scenes' share."""
    marked_from: int = 5600
    """The first step with marked scenes: large shapes come first, then fine detail."""
    kl: float = 1e-4
    l1: tuple[float, float] = (0.1, 0.4)
    """Weight of the absolute error at the start and at the end."""
    edge: float = 0.3
    """Weight of the error of neighbour differences, in the second half; earlier it stalls the training."""
    seed: int = 1


def cosine(step: int, total: int, warmup: int) -> float:
    """Return the rate's factor in 0..1: linear warm-up, then one cosine down to 1% at `total`."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def load_vae(work: Path) -> AutoencoderKL:
    """Return the trained autoencoder of the work folder, in evaluation mode."""
    vae = new_vae()
    vae.load_state_dict(torch.load(work / "vae.pt", weights_only=True)["parts"]["vae"])
    return vae.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def train_vae(
    work: Path, options: VaeOptions, stop_at: int | None = None, save_every_s: float = 120.0
) -> bool:
    """Start or resume the autoencoder's training; return True once it is complete."""
    torch.manual_seed(options.seed)
    vae = new_vae().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(
        vae.parameters(), lr=options.lr, betas=(0.9, 0.99), weight_decay=1e-3, fused=True
    )
    run = Run(work / "vae.pt", {"vae": vae, "optimizer": optimizer}, save_every_s)

    def train_step(step: int) -> float:
        rng = np.random.default_rng((options.seed, step))
        generator = torch.Generator().manual_seed(options.seed * 1_000_003 + step)
        pixels_BCHW = vae_batch(rng, options, step).contiguous(memory_format=torch.channels_last)
        for group in optimizer.param_groups:
            group["lr"] = options.lr * cosine(step, options.steps, 100)
        posterior = vae.encode(pixels_BCHW).latent_dist
        restored_BCHW = vae.decode(posterior.sample(generator)).sample
        done = step / options.steps
        l1 = options.l1[0] + (options.l1[1] - options.l1[0]) * done
        error = restored_BCHW - pixels_BCHW
        loss = error.square().mean() + l1 * error.abs().mean()
        loss = loss + options.kl * 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
        if done > 0.5:
            loss = loss + options.edge * _edge_error(error)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(error.detach().square().mean())

    return run.advance(options.steps, train_step, stop_at, "vae")


def vae_batch(rng: np.random.Generator, options: VaeOptions, step: int) -> Tensor:
    """Render one batch (B, 3, 64, 64) in -1..1."""
    marked = options.marked_share if step >= options.marked_from else 0.0
    images = []
    for _ in range(options.batch):
        kind = rng.random()
        if kind < options.texture_share:
            images.append(sample_texture(rng))
        elif kind < options.texture_share + marked:
            images.append(sample_marked(rng))
        else:
            images.append(render(sample_scene(rng)))
    return torch.from_numpy(to_array(images))


def reconstruction_error(vae: AutoencoderKL, count: int = 64, faces: bool = False) -> float:
    """Return the mean squared error on unseen scenes, or on the unseen concept; pixels in -1..1."""
    rng = np.random.default_rng(99)
    images = [render(sample_concept(rng, FACE)[0] if faces else sample_scene(rng)) for _ in range(count)]
    pixels_BCHW = torch.from_numpy(to_array(images))
    with torch.no_grad():
        restored_BCHW = vae.decode(vae.encode(pixels_BCHW).latent_dist.mode()).sample
    return float((restored_BCHW - pixels_BCHW).square().mean())


def _edge_error(error_BCHW: Tensor) -> Tensor:
    across = error_BCHW[..., 1:] - error_BCHW[..., :-1]
    down = error_BCHW[..., 1:, :] - error_BCHW[..., :-1, :]
    return across.abs().mean() + down.abs().mean()
