"""The forward process: how noise is mixed into latents, and what the network is asked to predict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor

PREDICTION_KINDS = ("epsilon", "v_prediction")


def with_zero_terminal_snr(scheduler_config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return a scheduler configuration whose last timestep is noise alone (Lin et al. 2024, arXiv 2305.08891, algorithm 1).

    It also says how to sample from what is trained with it: trailing timesteps, the first of which is the
    last trained one, and a scheduler of diffusers that knows the rescaled betas, which PNDM, the usual one of
    SD 1.5, does not.

    Args:
        scheduler_config: the model's.
        source: the model, as messages call it.

    Raises:
        UserError: the model predicts the noise, from which nothing can be learned where there is nothing
        else.
    """
    from trainer.errors import UserError

    if (scheduler_config.get("prediction_type") or "epsilon") != "v_prediction":
        raise UserError(
            f"enable_zero_terminal_snr: {source} predicts epsilon, the noise, and where there is nothing but noise that says nothing about "
            "the picture; set it to false, or name a v-prediction model."
        )
    said = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    defaults = [
        name for name in scheduler_config.get("_use_default_values", ()) if name not in said
    ]  # diffusers would ignore these
    rescaled = {**scheduler_config, **said, **({"_use_default_values": defaults} if defaults else {})}
    if scheduler_config.get("_class_name") not in _RESCALING:
        rescaled |= {"_class_name": "DDIMScheduler", "clip_sample": False}
    return rescaled


_RESCALING = (
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
)
"""diffusers' schedulers that take rescale_betas_zero_snr, among those that a Stable Diffusion model is saved with."""


class NoiseSchedule:
    """diffusers' DDPM forward process with the base model's own betas (Ho et al. 2020, arXiv 2006.11239).

    Args:
        scheduler_config: the model's scheduler configuration (betas, whether they are rescaled to a last
            timestep without signal, number of timesteps, prediction type).

    Raises:
        UserError: the prediction type is neither epsilon nor v_prediction.
    """

    def __init__(self, scheduler_config: Mapping[str, Any]) -> None:
        from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

        from trainer.errors import UserError

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
                f"scheduler of the model: prediction_type is {self.prediction_kind!r}; accepted are {' and '.join(PREDICTION_KINDS)}; "
                "choose another base model."
            )

    @property
    def kept(self) -> Tensor:
        """Return the share of the signal's variance that is left at each timestep, abar_T."""
        return self._ddpm.alphas_cumprod

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
        """Return the signal-to-noise ratio abar / (1 - abar) of each timestep; 0 at the last where the betas are rescaled."""
        abar_B = self._ddpm.alphas_cumprod[t_B]
        return abar_B / (1 - abar_B)
