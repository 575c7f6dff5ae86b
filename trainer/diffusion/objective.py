"""The training objective of a latent diffusion model: from pixels and a caption to the loss.

Read this file first: `Objective.predict` and `Objective.judge` are the whole method, top to bottom.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.batch import Batch
from data.rng import stream
from trainer.diffusion import noise
from trainer.diffusion.conditioning import Contexts, encode_text
from trainer.diffusion.loss import LossType, image_losses
from trainer.diffusion.moments import encode_pixels
from trainer.diffusion.options import ObjectiveOptions
from trainer.diffusion.schedule import NoiseSchedule
from trainer.diffusion.weighting import min_snr_weights
from trainer.transfer import to_device


@dataclass(frozen=True)
class Networks:
    """The modules of a step, on their device and possibly wrapped for several processes."""

    unet: Any
    text_encoder: Any
    vae: Any

    @property
    def plain(self) -> Networks:
        """The unwrapped modules, for work of one process alone."""
        return Networks(
            *(getattr(network, "module", network) for network in (self.unet, self.text_encoder, self.vae))
        )


class Prediction(NamedTuple):
    """The UNet's output beside its target."""

    prediction_BCHW: Tensor
    target_BCHW: Tensor
    t_B: Tensor
    weights_B1HW: Tensor | None
    """The weight of each latent in the loss; None without masks."""


@dataclass(frozen=True)
class Inputs:
    """The images of a step with their random numbers, drawn on the CPU."""

    pixels_BCHW: Tensor | None
    """As in `Batch`; None with moments_BCHW."""
    tokens_BT: Tensor
    """int64."""
    scale_B: Tensor
    """fp32, each image's loss_scale."""
    posterior_BCHW: Tensor
    """fp32 noise that samples a latent from the VAE's distribution."""
    noise_BCHW: Tensor
    """fp32 noise that is mixed into the latents and predicted."""
    t_B: Tensor
    """int64 timesteps."""
    moments_BCHW: Tensor | None = None
    """As in `Batch`."""
    context_BTD: Tensor | None = None
    """The text encoder's cached output; None to run it."""
    perturbation_BTD: Tensor | None = None
    """fp32 noise that is added to the context."""
    unseen_BCHW: Tensor | None = None
    """fp32 noise that is mixed into the latents and not predicted."""

    def to(self, device: torch.device) -> Inputs:
        """Copy everything to `device`."""
        moved: dict[str, Any] = {
            name: None if tensor is None else to_device(tensor, device) for name, tensor in vars(self).items()
        }
        return Inputs(**moved)

    @classmethod
    def cat(cls, parts: Sequence[Inputs]) -> Inputs:
        """Concatenate parts; a field that is None in the first is None in all."""
        fields = {name: [getattr(part, name) for part in parts] for name in vars(parts[0])}
        joined: dict[str, Any] = {
            name: None if tensors[0] is None else torch.cat(tensors) for name, tensors in fields.items()
        }
        return cls(**joined)


class Objective:
    """Denoising score matching in the latents of a frozen VAE (Rombach et al. 2022, arXiv 2112.10752).

    Args:
        seed: the run's seed; with the image's position it is the key of every draw.
        latent_channels, latent_factor, scaling_factor: the VAE's channels, pixels per latent and unit scale.
        context_width: the size of the text encoder's vectors.
        train_text_encoder: let gradients reach the text encoder.
        contexts: cached output of a frozen text encoder.
    """

    def __init__(
        self,
        options: ObjectiveOptions,
        schedule: NoiseSchedule,
        *,
        seed: int,
        latent_channels: int,
        latent_factor: int,
        scaling_factor: float,
        context_width: int,
        train_text_encoder: bool,
        contexts: Contexts | None = None,
    ) -> None:
        self.options = options
        self.schedule = schedule
        self.seed = seed
        self.latent_channels = latent_channels
        self.latent_factor = latent_factor
        self.scaling_factor = scaling_factor
        self.context_width = context_width
        self.train_text_encoder = train_text_encoder
        self.contexts = contexts

    def draw(self, batch: Batch) -> Inputs:
        """Draw a batch's random numbers on the CPU, pure in (seed, epoch, position of each image)."""
        start, end = self.options.timestep_start, self.options.timestep_end
        keys = [(batch.epoch, position) for position in batch.positions]
        timesteps = [int(stream(self.seed, "timestep", *key).integers(start, end)) for key in keys]
        return self.place(batch, keys, timesteps)

    def place(self, batch: Batch, keys: list[tuple[int, ...]], timesteps: list[int]) -> Inputs:
        """Draw a batch's noise with given keys, at given timesteps."""
        options, seed = self.options, self.seed
        if batch.moments_BCHW is not None:
            height, width = batch.moments_BCHW.shape[-2:]
        else:
            assert batch.pixels_BCHW is not None, "a batch holds pixels or moments"
            height, width = (side // self.latent_factor for side in batch.pixels_BCHW.shape[-2:])
        shape = (self.latent_channels, height, width)
        noises = [noise.gaussian(shape, seed, *key) for key in keys]
        for option, add in noise.ADDED.items():
            if strength := getattr(options, option):
                noises = [add(plain, strength, seed, *key) for plain, key in zip(noises, keys, strict=True)]
        perturbation = unseen = None
        if (strength := options.embedding_perturbation) > 0:
            vectors = (batch.tokens_BT.shape[1], self.context_width)
            perturbation = _stacked([noise.perturbation(vectors, strength, seed, *key) for key in keys])
        if (strength := options.input_perturbation) > 0:
            unseen = _stacked([noise.unseen(shape, strength, seed, *key) for key in keys])
        posterior = [stream(seed, "latent", *key).standard_normal(shape, dtype=np.float32) for key in keys]
        return Inputs(
            pixels_BCHW=batch.pixels_BCHW,
            tokens_BT=batch.tokens_BT,
            scale_B=batch.loss_scale_B,
            posterior_BCHW=_stacked(posterior),
            noise_BCHW=_stacked(noises),
            t_B=torch.tensor(timesteps, dtype=torch.int64),
            moments_BCHW=batch.moments_BCHW,
            context_BTD=None if self.contexts is None else self.contexts.lookup(batch.tokens_BT),
            perturbation_BTD=perturbation,
            unseen_BCHW=unseen,
        )

    def losses(
        self,
        networks: Networks,
        inputs: Inputs,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> Tensor:
        """Return loss_B in fp32, weighted by timestep but not by image, without waiting for the device."""
        return self.judge(self.predict(networks, inputs, autocast))

    def predict(
        self,
        networks: Networks,
        inputs: Inputs,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> Prediction:
        """Return the UNet's prediction for each image, its target and its mask."""
        moments_BCHW = inputs.moments_BCHW
        if moments_BCHW is None:
            assert inputs.pixels_BCHW is not None, "a batch holds pixels or moments"
            moments_BCHW = encode_pixels(networks.vae, inputs.pixels_BCHW, autocast)
        # One memory format for pixels and cached moments: the order of sums in a convolution depends on it.
        split = 2 * self.latent_channels
        masks_BCHW = moments_BCHW[:, split:]
        moments_BCHW = moments_BCHW[:, :split].clone(memory_format=torch.channels_last)
        mean_BCHW, std_BCHW = moments_BCHW.chunk(2, dim=1)
        latents_BCHW = (mean_BCHW + std_BCHW * inputs.posterior_BCHW) * self.scaling_factor

        t_B = inputs.t_B
        mixed_BCHW = (
            inputs.noise_BCHW if inputs.unseen_BCHW is None else inputs.noise_BCHW + inputs.unseen_BCHW
        )
        noisy_BCHW = self.schedule.noisy(latents_BCHW, mixed_BCHW, t_B)
        target_BCHW = self.schedule.target(latents_BCHW, inputs.noise_BCHW, t_B)

        with autocast():
            context_BTD = inputs.context_BTD
            if context_BTD is None:
                with torch.set_grad_enabled(self.train_text_encoder and torch.is_grad_enabled()):
                    context_BTD = encode_text(networks.text_encoder, inputs.tokens_BT, self.options.clip_skip)
            if inputs.perturbation_BTD is not None:
                context_BTD = context_BTD + inputs.perturbation_BTD.to(context_BTD.dtype)
            prediction_BCHW = networks.unet(noisy_BCHW, t_B, context_BTD).sample
        rest = self.options.unmasked_weight
        weights_B1HW = rest + (1 - rest) * masks_BCHW if masks_BCHW.shape[1] else None
        return Prediction(prediction_BCHW, target_BCHW, t_B, weights_B1HW)

    def judge(self, predicted: Prediction, kind: LossType | None = None) -> Tensor:
        """Return loss_B in fp32 by loss_type, times the weight of the timestep; by `kind` alone if given."""
        prediction_BCHW, target_BCHW, t_B, weights_B1HW = predicted
        loss_B = image_losses(
            prediction_BCHW,
            target_BCHW,
            t_B,
            kind or self.options.loss_type,
            self.schedule.timesteps,
            weights_B1HW,
        )
        if kind is None and self.options.min_snr_gamma is not None:
            loss_B = loss_B * min_snr_weights(
                self.schedule.snr(t_B), self.options.min_snr_gamma, self.schedule.prediction_kind
            )
        return loss_B


def make_objective(
    options: ObjectiveOptions,
    models: Any,
    *,
    seed: int,
    train_text_encoder: bool,
    contexts: Contexts | None = None,
) -> Objective:
    """Return the objective, fitted to a model's VAE, text encoder and noise schedule."""
    vae = models.vae.config
    return Objective(
        options,
        NoiseSchedule(models.scheduler_config).to(models.unet.device),
        seed=seed,
        latent_channels=vae.latent_channels,
        latent_factor=2 ** (len(vae.block_out_channels) - 1),
        scaling_factor=vae.scaling_factor,
        context_width=models.text_encoder.config.hidden_size,
        train_text_encoder=train_text_encoder,
        contexts=contexts,
    )


def _stacked(arrays: list[np.ndarray]) -> Tensor:
    """Stack arrays into a tensor by copying, since numpy aligns its memory less than torch."""
    return torch.tensor(np.stack(arrays))
