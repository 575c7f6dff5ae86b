"""The training objective of a latent diffusion model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le


@dataclass(frozen=True, kw_only=True)
class ObjectiveOptions:
    """Which noise is added, what is predicted and how the loss is weighted."""

    loss_type: Literal["mse", "huber", "mse_huber", "huber_mse"] = "mse"
    """The loss between prediction and target; with b = t/1000, mse_huber is b*MSE + (1-b)*Huber, and huber_mse the reverse."""

    min_snr_gamma: Annotated[float, Gt(0)] | None = None
    """Weight the loss by min(SNR, gamma)/SNR (arXiv 2303.09556; /(SNR+1) for v-prediction); null leaves it unweighted, 5 is usual."""

    zero_frequency_noise_ratio: Annotated[float, Ge(0), Le(1)] = 0.02
    """Offset noise: the share of noise that is constant over a channel, which lets the model learn dark and bright pictures."""

    timestep_start: Annotated[int, Ge(0), Le(999)] = 0
    """The first timestep that is trained."""

    timestep_end: Annotated[int, Ge(1), Le(1000)] = 1000
    """The end of the trained timesteps, itself not trained."""

    clip_skip: Annotated[int, Ge(0), Le(4)] = 0
    """Which hidden state of the text encoder conditions the UNet: 0 the last, n the n-th before it, through the final layer norm."""
