"""diffusers' samplers under EveryDream2's names."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from diffusers import schedulers
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

from trainer.errors import UserError
from trainer.evaluation.options import SamplePrompts, Scheduler
from trainer.models.pipeline import Models

_DPM, _SDE, _KARRAS = "dpmsolver++", "sde-dpmsolver++", {"use_karras_sigmas": True}
_SCHEDULERS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "ddpm": ("DDPMScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "kdpm2": ("KDPM2DiscreteScheduler", {}),
    "dpm++": ("DPMSolverMultistepScheduler", {"algorithm_type": _DPM}),
    "dpm++_2s": ("DPMSolverSinglestepScheduler", {"algorithm_type": _DPM}),
    "dpm++_2m": ("DPMSolverMultistepScheduler", {"algorithm_type": _DPM}),
    "dpm++_sde": ("DPMSolverSinglestepScheduler", {"algorithm_type": _SDE}),
    "dpm++_2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": _SDE}),
    "dpm++_2s_k": ("DPMSolverSinglestepScheduler", {"algorithm_type": _DPM, **_KARRAS}),
    "dpm++_2m_k": ("DPMSolverMultistepScheduler", {"algorithm_type": _DPM, **_KARRAS}),
    "dpm++_sde_k": ("DPMSolverSinglestepScheduler", {"algorithm_type": _SDE, **_KARRAS}),
    "dpm++_2m_sde_k": ("DPMSolverMultistepScheduler", {"algorithm_type": _SDE, **_KARRAS}),
}
"""By name, diffusers' class and its settings besides the model's own noise schedule."""


def build_pipeline(models: Models, scheduler: Scheduler) -> StableDiffusionPipeline:
    """Return diffusers' pipeline of these networks with the named sampler and the model's noise schedule."""
    return StableDiffusionPipeline(
        vae=models.vae,
        text_encoder=models.text_encoder,
        tokenizer=models.tokenizer,
        unet=models.unet,
        scheduler=_build_scheduler(scheduler, models.scheduler_config),
        safety_checker=None,  # type: ignore[arg-type]
        feature_extractor=None,  # type: ignore[arg-type]
        requires_safety_checker=False,
    )


def check_scheduler(prompts: SamplePrompts, scheduler_config: Mapping[str, Any]) -> None:
    """Refuse a sampler that does not support the model's noise schedule or zero-terminal SNR."""
    name = prompts.scheduler
    if scheduler_config.get("rescale_betas_zero_snr") and name not in (rescaling := _rescaling()):
        raise UserError(
            f"sample_prompts: scheduler {name} does not know a noise schedule that ends in noise alone "
            f"(zero-terminal SNR); use one of {', '.join(rescaling)}."
        )
    try:
        _build_scheduler(name, scheduler_config)
    except ImportError:  # scipy, already checked for with the file of prompts
        return
    except Exception as error:  # diffusers raises anything for a wrong value
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"scheduler of the model: {name} cannot sample with its settings ({reason}); download the model "
            "again, or name another scheduler in sample_prompts."
        ) from error


def _build_scheduler(scheduler: Scheduler, config: Mapping[str, Any]) -> Any:
    kind, settings = _SCHEDULERS[scheduler]
    # PNDM's configurations lack clip_sample, and DDIM's default would clip latents, which exceed -1..1.
    settings = {"set_alpha_to_one": False, **config, "clip_sample": False, "thresholding": False, **settings}
    return getattr(schedulers, kind).from_config(settings)


def _rescaling() -> list[str]:
    """Return the samplers that support zero-terminal SNR."""
    parameters = {
        name: inspect.signature(getattr(schedulers, kind).__init__).parameters
        for name, (kind, _) in _SCHEDULERS.items()
    }
    return [name for name, known in parameters.items() if "rescale_betas_zero_snr" in known]
