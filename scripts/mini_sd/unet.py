"""The UNet's stage: encode a fixed set of scenes once, then train UNet and text encoder together."""

# The libraries' decorators and exports hide their types.
# pyright: reportPrivateImportUsage=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .drawing import Scene, render, to_array
from .networks import new_unet, training_schedule
from .scenes import caption, sample_scene
from .state import Run
from .text import load_text_encoder, load_tokenizer, tokenize
from .vae import cosine, load_vae


@dataclass(frozen=True)
class LatentOptions:
    """The fixed set of training scenes."""

    scenes: int = 24_000
    batch: int = 64
    seed: int = 3


@dataclass(frozen=True)
class UnetOptions:
    """Settings of the UNet's and the text encoder's training."""

    steps: int = 4600
    batch: int = 48
    lr: float = 1e-3
    text_factor: float = 0.4
    """The text encoder's rate as a share of the UNet's."""
    caption_dropout: float = 0.1
    min_snr: float = 5.0
    plain_from: float = 0.8
    """Share of the steps after which the loss is the plain mean squared error, as in a fine-tune."""
    short_tokens: int = 20
    """Padded length of captions at first: the longest has 16 tokens, and 77 take a third more time."""
    mixed_from: float = 0.45
    """Share of the steps after which every fourth step pads to 77 tokens, as in use."""
    long_from: float = 0.9
    """Share of the steps after which every step pads to 77 tokens."""
    ema: float = 0.998
    seed: int = 4


class Average:
    """An exponential moving average of parameters, with a short memory at the beginning."""

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float) -> None:
        """Start at the current values."""
        self._live = list(parameters)
        self._decay = decay
        self.values = [p.detach().clone() for p in self._live]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the live values."""
        weight = 1 - min(self._decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.values, [p.detach() for p in self._live], weight)

    @torch.no_grad()
    def copy_to_live(self) -> None:
        """Overwrite the live parameters."""
        for live, value in zip(self._live, self.values, strict=True):
            live.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """Return the averages by position."""
        return {str(i): value for i, value in enumerate(self.values)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the averages."""
        for i, value in enumerate(self.values):
            value.copy_(state_dict[str(i)])


def fixed_scenes(options: LatentOptions) -> list[Scene]:
    """Return the training scenes; the same options give the same scenes."""
    rng = np.random.default_rng(options.seed)
    return [sample_scene(rng) for _ in range(options.scenes)]


def encode_latents(work: Path, options: LatentOptions) -> None:
    """Write the posteriors of all training scenes (float16) and the scaling factor to `latents.pt`."""
    path = work / "latents.pt"
    if path.exists():
        return
    started = time.process_time()
    vae, scenes = load_vae(work), fixed_scenes(options)
    means, deviations = [], []
    with torch.no_grad():
        for i in range(0, len(scenes), options.batch):
            pixels_BCHW = torch.from_numpy(to_array([render(s) for s in scenes[i : i + options.batch]]))
            posterior = vae.encode(pixels_BCHW.contiguous(memory_format=torch.channels_last)).latent_dist
            means.append(posterior.mean.half())
            deviations.append(posterior.std.half())
    mean, std = torch.cat(means).contiguous(), torch.cat(deviations).contiguous()
    total = (mean.float().var() + std.float().square().mean()).sqrt()
    cpu_s = time.process_time() - started
    state = {"mean": mean, "std": std, "scaling_factor": float(1 / total), "cpu_s": cpu_s}
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)
    print(f"latents {len(scenes)} scaling factor {1 / total:.4f} cpu {cpu_s:.0f} s", flush=True)


def train_unet(
    work: Path,
    options: UnetOptions,
    latents: LatentOptions,
    stop_at: int | None = None,
    save_every_s: float = 120.0,
) -> bool:
    """Start or resume the training of UNet and text encoder; return True once it is complete."""
    torch.manual_seed(options.seed)
    tokenizer = load_tokenizer(work)
    encoder = load_text_encoder(work, tokenizer).train()
    unet = new_unet().train().to(memory_format=torch.channels_last)
    groups = [
        {"params": list(unet.parameters()), "factor": 1.0},
        {"params": list(encoder.parameters()), "factor": options.text_factor},
    ]
    parameters = [p for group in groups for p in group["params"]]  # type: ignore[attr-defined]
    optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.99), fused=True)
    average = Average(parameters, options.ema)
    parts = {"unet": unet, "text": encoder, "optimizer": optimizer, "average": average}
    run = Run(work / "unet.pt", parts, save_every_s)
    cache, scenes = torch.load(work / "latents.pt", weights_only=True), fixed_scenes(latents)
    mean, std, scaling = cache["mean"], cache["std"], cache["scaling_factor"]
    schedule = training_schedule()
    signal = schedule.alphas_cumprod / (1 - schedule.alphas_cumprod)

    def train_step(step: int) -> float:
        rng = np.random.default_rng((options.seed, step))
        generator = torch.Generator().manual_seed(options.seed * 1_000_003 + step)
        chosen = rng.integers(len(scenes), size=options.batch)
        captions = [caption(scenes[i], rng) for i in chosen]
        captions = ["" if rng.random() < options.caption_dropout else text for text in captions]
        tokens = 77 if _is_long(step, options) else options.short_tokens
        mean_BCHW, std_BCHW = mean[chosen].float(), std[chosen].float()
        latents_BCHW = scaling * (mean_BCHW + std_BCHW * torch.randn(mean_BCHW.shape, generator=generator))
        noise_BCHW = torch.randn(latents_BCHW.shape, generator=generator)
        t_B = stratified_timesteps(options.batch, generator)
        noisy_BCHW = schedule.add_noise(latents_BCHW, noise_BCHW, t_B).contiguous(
            memory_format=torch.channels_last
        )
        for group in optimizer.param_groups:
            group["lr"] = options.lr * group["factor"] * cosine(step, options.steps, 60)
        context_BTD = encoder(tokenize(tokenizer, captions, tokens)).last_hidden_state
        guess_BCHW = unet(noisy_BCHW, t_B, context_BTD).sample
        loss_B = (guess_BCHW - noise_BCHW).square().mean((1, 2, 3))
        plain = float(loss_B.detach().mean())
        if step < options.plain_from * options.steps:
            # Min-SNR weighting of the noise objective: Hang et al. 2023, section 3.4.
            loss_B = loss_B * (signal[t_B].clamp(max=options.min_snr) / signal[t_B])
        loss_B.mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.update(step)
        return plain

    return run.advance(options.steps, train_step, stop_at, "unet")


def stratified_timesteps(count: int, generator: torch.Generator) -> Tensor:
    """Return `count` timesteps in 0..999, one uniform draw from each of `count` equal intervals."""
    return (
        ((torch.arange(count) + torch.rand(count, generator=generator)) / count * 1000).long().clamp(max=999)
    )


def _is_long(step: int, options: UnetOptions) -> bool:
    mixed = step >= options.mixed_from * options.steps and step % 4 == 0
    return mixed or step >= options.long_from * options.steps
