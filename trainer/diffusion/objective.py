"""The training objective of a latent diffusion model: one image's loss, from pixels and caption to a number.

Read this file first: `Objective.predict` and `Objective.judge` are the whole method, top to bottom.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Gt, Le

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from data.batch import Batch
    from trainer.diffusion.conditioning import Contexts
    from trainer.diffusion.schedule import NoiseSchedule


@dataclass(frozen=True, kw_only=True)
class ObjectiveOptions:
    """Which noise is added, what is predicted and how the loss is weighted."""

    loss_type: Literal["mse", "huber", "mse_huber", "huber_mse"] = "mse"
    """The loss between prediction and target; with b = t/1000, mse_huber is b*MSE + (1-b)*Huber, and huber_mse the reverse."""

    min_snr_gamma: Annotated[float, Gt(0)] | None = None
    """Weight the loss by min(SNR, gamma)/SNR (arXiv 2303.09556; /(SNR+1) for v-prediction); null leaves it unweighted, 5 is usual."""

    zero_frequency_noise_ratio: Annotated[float, Ge(0), Le(1)] = 0.02
    """Offset noise: the share of noise that is constant over a channel, which lets the model learn dark and bright pictures."""

    pyramid_noise_discount: Annotated[float, Ge(0), Le(1)] | None = None
    """Pyramid noise: add ever coarser noise, each level weighted by this factor once more, which moves whole
    areas of a picture; null or 0 adds none, 0.03 is EveryDream2's shipped value."""

    embedding_perturbation: Annotated[float, Ge(0)] = 0.0
    """Add noise of about this length to each token's vector of the encoded caption, so that captions are learned less by heart."""

    input_perturbation: Annotated[float, Ge(0), Le(1)] = 0.0
    """Noise the latents with this much more noise than the UNet is asked to predict, as what it sees when it
    samples is never quite what it has learned from (arXiv 2301.11706); 0.1 is usual."""

    enable_zero_terminal_snr: bool = False
    """Rescale the noise schedule so that the last timestep is noise alone (arXiv 2305.08891), for
    v-prediction models only; the exported scheduler says so, and samples use trailing timesteps and rescaled
    guidance. A model that was trained so needs no switch."""

    timestep_start: Annotated[int, Ge(0), Le(999)] = 0
    """The first timestep that is trained."""

    timestep_end: Annotated[int, Ge(1), Le(1000)] = 1000
    """The end of the trained timesteps, itself not trained."""

    clip_skip: Annotated[int, Ge(0), Le(12)] = 0
    """Which hidden state of the text encoder conditions the UNet, through the final layer norm: 0 or 1 the
    last, 2 the penultimate, n the n-th from the end, as in EveryDream2 and kohya's trainers."""

    @property
    def is_plain(self) -> bool:
        """Whether the loss is the mean squared error and nothing else."""
        return self.loss_type == "mse" and self.min_snr_gamma is None


@dataclass(frozen=True)
class Networks:
    """The modules that a step runs, prepared by `trainer.run.build`: on their device, perhaps wrapped for several processes."""

    unet: Any
    text_encoder: Any
    vae: Any

    @property
    def plain(self) -> Networks:
        """The modules without what several processes wrap them in: for work that one process does alone."""
        return Networks(
            *(getattr(network, "module", network) for network in (self.unet, self.text_encoder, self.vae))
        )


@dataclass(frozen=True)
class Inputs:
    """All that a step needs of its images, on the device; the random numbers are drawn on the CPU and travel with the pixels."""

    pixels_BCHW: Tensor | None
    """fp32 in [-1, 1]; None where moments_BCHW are in its place."""

    tokens_BT: Tensor
    """int64."""

    scale_B: Tensor
    """fp32, each image's loss_scale."""

    posterior_BCHW: Tensor
    """fp32 noise that picks one latent from the VAE's distribution."""

    noise_BCHW: Tensor
    """fp32 noise that is mixed into the latents and predicted."""

    t_B: Tensor
    """int64 timesteps."""

    moments_BCHW: Tensor | None = None
    """fp32, what the VAE made of the pixels before: mean and standard deviation, one after the other in C."""

    context_BTD: Tensor | None = None
    """What the text encoder made of the tokens before; None where it is to be run."""

    perturbation_BTD: Tensor | None = None
    """fp32 noise that is added to the context; None for none."""

    unseen_BCHW: Tensor | None = None
    """fp32 noise that is mixed into the latents too and not predicted; None for none."""

    def to(self, device: torch.device) -> Inputs:
        """Copy everything to `device`, without waiting where the memory is pinned."""
        from trainer.transfer import to_device

        moved: dict[str, Any] = {
            name: None if tensor is None else to_device(tensor, device) for name, tensor in vars(self).items()
        }
        return Inputs(**moved)

    @classmethod
    def cat(cls, parts: Sequence[Inputs]) -> Inputs:
        """Return the images of all parts as one; what is None in the first is None in all."""
        import torch

        fields = {name: [getattr(part, name) for part in parts] for name in vars(parts[0])}
        joined: dict[str, Any] = {
            name: None if tensors[0] is None else torch.cat(tensors) for name, tensors in fields.items()
        }
        return cls(**joined)


class Objective:
    """Denoising score matching in the latents of a frozen VAE (Rombach et al. 2022, arXiv 2112.10752).

    Args:
        options: noise, loss and weighting.
        schedule: the forward process.
        seed: the run's seed; every draw is keyed by it and by the image's place.
        latent_channels, latent_factor, scaling_factor: the VAE's channels, pixels per latent and unit scale.
        context_width: the size of the text encoder's vectors.
        train_text_encoder: whether gradients reach the text encoder.
        contexts: what a text encoder that does not learn has made of the captions, to be used in its place.
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
        """Return the batch with its random numbers, on the CPU: pure in (seed, epoch, position of each image)."""
        from data.rng import stream

        places = [(batch.epoch, position) for position in batch.positions]
        timesteps = [
            int(
                stream(self.seed, "timestep", *place).integers(
                    self.options.timestep_start, self.options.timestep_end
                )
            )
            for place in places
        ]
        return self.place(batch, places, timesteps)

    def place(self, batch: Batch, places: list[tuple[int, ...]], timesteps: list[int]) -> Inputs:
        """Return the batch at given timesteps, with the noise of given places in the run (for losses that are compared over time)."""
        import numpy as np
        import torch

        from data.rng import stream
        from trainer.diffusion import noise

        if batch.moments_BCHW is not None:
            height, width = batch.moments_BCHW.shape[-2:]
        else:
            assert batch.pixels_BCHW is not None, "a batch holds pixels or moments"
            height, width = (side // self.latent_factor for side in batch.pixels_BCHW.shape[-2:])
        shape = (self.latent_channels, height, width)
        noises = [noise.gaussian(shape, self.seed, *place) for place in places]
        if self.options.pyramid_noise_discount:
            discount = self.options.pyramid_noise_discount
            noises = [
                noise.pyramid(plain, discount, self.seed, *place)
                for plain, place in zip(noises, places, strict=True)
            ]
        if self.options.zero_frequency_noise_ratio > 0:
            strength = self.options.zero_frequency_noise_ratio
            noises = [
                plain + noise.offset(shape, strength, self.seed, *place)
                for plain, place in zip(noises, places, strict=True)
            ]
        perturbation = None
        if self.options.embedding_perturbation > 0:
            vectors = (batch.tokens_BT.shape[1], self.context_width)
            strength = self.options.embedding_perturbation
            perturbation = torch.tensor(
                np.stack([noise.perturbation(vectors, strength, self.seed, *place) for place in places])
            )
        unseen = None
        if self.options.input_perturbation > 0:
            strength = self.options.input_perturbation
            unseen = torch.tensor(
                np.stack([noise.unseen(shape, strength, self.seed, *place) for place in places])
            )
        posterior = [
            stream(self.seed, "latent", *place).standard_normal(shape, dtype=np.float32) for place in places
        ]
        return Inputs(
            pixels_BCHW=batch.pixels_BCHW,
            tokens_BT=batch.tokens_BT,
            scale_B=batch.loss_scale_B,
            posterior_BCHW=torch.tensor(
                np.stack(posterior)
            ),  # copied: numpy aligns its memory less than torch does
            noise_BCHW=torch.tensor(np.stack(noises)),
            t_B=torch.tensor(timesteps, dtype=torch.int64),
            moments_BCHW=batch.moments_BCHW,
            context_BTD=None if self.contexts is None else self.contexts.of(batch.tokens_BT),
            perturbation_BTD=perturbation,
            unseen_BCHW=unseen,
        )

    def losses(
        self,
        networks: Networks,
        inputs: Inputs,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> Tensor:
        """Return loss_B in fp32, weighted by timestep but not by image; nothing is read back to the host."""
        return self.judge(*self.predict(networks, inputs, autocast), inputs.t_B)

    def predict(
        self,
        networks: Networks,
        inputs: Inputs,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> tuple[Tensor, Tensor]:
        """Return what the UNet predicts of each image, and what it should have."""
        import torch

        from trainer.diffusion.conditioning import encode_text
        from trainer.diffusion.moments import encode_pixels

        moments_BCHW = inputs.moments_BCHW
        if moments_BCHW is None:
            assert inputs.pixels_BCHW is not None, "a batch holds pixels or moments"
            moments_BCHW = encode_pixels(networks.vae, inputs.pixels_BCHW, autocast)
        # In one memory format, wherever they come from: convolutions add up in another order in another one.
        moments_BCHW = moments_BCHW.clone(memory_format=torch.channels_last)
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
        return prediction_BCHW, target_BCHW

    def judge(self, prediction_BCHW: Tensor, target_BCHW: Tensor, t_B: Tensor) -> Tensor:
        """Return loss_B in fp32: how far predictions are from their targets, by loss_type and the weight of the timestep."""
        from trainer.diffusion.loss import image_losses
        from trainer.diffusion.weighting import min_snr_weights

        loss_B = image_losses(
            prediction_BCHW, target_BCHW, t_B, self.options.loss_type, self.schedule.timesteps
        )
        if self.options.min_snr_gamma is not None:
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
    from trainer.diffusion.schedule import NoiseSchedule

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
