"""The forward process: how noise is mixed into latents, and the network's target."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import Tensor

from trainer.errors import UserError

PREDICTION_KINDS = ("epsilon", "v_prediction")

_RESCALING = (
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
)
"""Schedulers with rescale_betas_zero_snr, among those that Stable Diffusion models are saved with."""


def with_zero_terminal_snr(scheduler_config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return the configuration with zero-terminal SNR (Lin et al. 2024, arXiv 2305.08891, algorithm 1).

    It also sets how to sample from the trained model: trailing timesteps, which start at the last trained
    one, and a scheduler that supports the rescaled betas. PNDM, usual for SD 1.5, does not.

    Args:
        source: the model's name in messages.

    Raises:
        UserError: the model predicts epsilon, which teaches nothing at a timestep of pure noise.
    """
    if (scheduler_config.get("prediction_type") or "epsilon") != "v_prediction":
        raise UserError(
            f"enable_zero_terminal_snr: {source} predicts epsilon, the noise, and where there is nothing but "
            "noise that says nothing about the image; set it to false, or name a v-prediction model."
        )
    changes = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    rescaled = {**scheduler_config, **changes}
    # diffusers would ignore the changed keys if they were still listed as defaults.
    if defaults := [name for name in scheduler_config.get("_use_default_values", ()) if name not in changes]:
        rescaled["_use_default_values"] = defaults
    if scheduler_config.get("_class_name") not in _RESCALING:
        rescaled |= {"_class_name": "DDIMScheduler", "clip_sample": False}
    return rescaled


class NoiseSchedule:
    """diffusers' DDPM forward process with the base model's own betas (Ho et al. 2020, arXiv 2006.11239).

    Raises:
        UserError: the prediction type is neither epsilon nor v_prediction.
    """

    def __init__(self, scheduler_config: Mapping[str, Any]) -> None:
        keys = (
            "num_train_timesteps",
            "beta_start",
            "beta_end",
            "beta_schedule",
            "trained_betas",
            "prediction_type",
            "rescale_betas_zero_snr",
        )
        self._ddpm = DDPMScheduler(
            **{key: scheduler_config[key] for key in keys if scheduler_config.get(key) is not None}
        )
        self.prediction_kind: str = str(scheduler_config.get("prediction_type") or "epsilon")
        self.timesteps: int = int(self._ddpm.config["num_train_timesteps"])
        if self.prediction_kind not in PREDICTION_KINDS:
            raise UserError(
                f"scheduler of the model: prediction_type is {self.prediction_kind!r}; accepted are "
                f"{' and '.join(PREDICTION_KINDS)}; choose another base model."
            )

    @property
    def kept(self) -> Tensor:
        """The remaining share of the signal's variance at each timestep, abar_T."""
        return self._ddpm.alphas_cumprod

    def to(self, device: torch.device) -> NoiseSchedule:
        """Move the table of alphas to `device`, so that no step copies it there."""
        self._ddpm.alphas_cumprod = self._ddpm.alphas_cumprod.to(device)
        return self

    def noisy(self, latents_BCHW: Tensor, noise_BCHW: Tensor, t_B: Tensor) -> Tensor:
        """Return sqrt(abar_t) * latents + sqrt(1 - abar_t) * noise (arXiv 2006.11239, equation 4)."""
        return self._ddpm.add_noise(latents_BCHW, noise_BCHW, t_B)  # type: ignore[arg-type]

    def target(self, latents_BCHW: Tensor, noise_BCHW: Tensor, t_B: Tensor) -> Tensor:
        """Return the noise, or v = sqrt(abar) * noise - sqrt(1 - abar) * latents (arXiv 2202.00512)."""
        if self.prediction_kind == "epsilon":
            return noise_BCHW
        return self._ddpm.get_velocity(latents_BCHW, noise_BCHW, t_B)  # type: ignore[arg-type]

    def snr(self, t_B: Tensor) -> Tensor:
        """Return the signal-to-noise ratio abar / (1 - abar) of each timestep, 0 at zero-terminal SNR."""
        abar_B = self._ddpm.alphas_cumprod[t_B]
        return abar_B / (1 - abar_B)
