"""Loading the networks of a Stable Diffusion model: a diffusers folder, a hub id or one file in the original layout."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model is trained."""

    resume_ckpt: str
    """The model to start from: a diffusers folder, a hub id such as stable-diffusion-v1-5/stable-diffusion-v1-5, a
    .safetensors file in the original layout, a run folder or a checkpoint folder of this program, or findlast."""

    vae: str | None = None
    """A VAE to use instead of the model's own: a diffusers folder, a hub id or a .safetensors file."""
