"""The forward process: how noise is mixed into latents, and what the network is asked to predict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor

PREDICTION_KINDS = ("epsilon", "v_prediction")


class NoiseSchedule:
    """diffusers' DDPM forward process with the base model's own betas (Ho et al. 2020, arXiv 2006.11239).

    Args:
        scheduler_config: the model's scheduler configuration (betas, number of timesteps, prediction type).

    Raises:
        UserError: the prediction type is neither epsilon nor v_prediction.
    """

    def __init__(self, scheduler_config: Mapping[str, Any]) -> None:
        from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

        from trainer.errors import UserError

        keys = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type")
        self._ddpm = DDPMScheduler(**{key: scheduler_config[key] for key in keys if scheduler_config.get(key) is not None})
        self.prediction_kind: str = str(scheduler_config.get("prediction_type") or "epsilon")
        self.timesteps: int = int(self._ddpm.config["num_train_timesteps"])
        if self.prediction_kind not in PREDICTION_KINDS:
            raise UserError(
                f"scheduler of the model: prediction_type is {self.prediction_kind!r}; accepted are {' and '.join(PREDICTION_KINDS)}; "
                "choose another base model."
            )

    def to(self, device: torch.device) -> NoiseSchedule:
        """Keep the table of alphas on `device`, so that no step copies it there."""
        self._ddpm.alphas_cumprod = self._ddpm.alphas_cumprod.to(device)
        return self

    def noisy(self, latents_BCHW: Tensor, noise_BCHW: Tensor, t_B: Tensor) -> Tensor:
        """Return sqrt(abar_t) * latents + sqrt(1 - abar_t) * noise (arXiv 2006.11239, equation 4)."""
        return self._ddpm.add_noise(latents_BCHW, noise_BCHW, t_B)  # type: ignore[arg-type]

    def target(self, latents_BCHW: Tensor, noise_BCHW: Tensor, t_B: Tensor) -> Tensor:
        """Return what the network should predict: the noise, or v = sqrt(abar) * noise - sqrt(1 - abar) * latents (arXiv 2202.00512)."""
        if self.prediction_kind == "epsilon":
            return noise_BCHW
        return self._ddpm.get_velocity(latents_BCHW, noise_BCHW, t_B)  # type: ignore[arg-type]

    def snr(self, t_B: Tensor) -> Tensor:
        """Return the signal-to-noise ratio abar / (1 - abar) of each timestep."""
        abar_B = self._ddpm.alphas_cumprod[t_B]
        return abar_B / (1 - abar_B)
