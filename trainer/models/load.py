"""Loading the networks of a Stable Diffusion model: a diffusers folder, a hub id or one file in the original layout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model is trained."""

    resume_ckpt: str
    """The model to start from: a diffusers folder, a hub id such as stable-diffusion-v1-5/stable-diffusion-v1-5, a
    .safetensors file in the original layout, a run folder or a checkpoint folder of this program, or findlast."""

    vae: str | None = None
    """A VAE to use instead of the model's own: a diffusers folder, a hub id or a .safetensors file."""


@dataclass(kw_only=True)
class Models:
    """The parts of a Stable Diffusion pipeline.

    Attributes:
        unet: predicts noise (or velocity) from latents (B, 4, H/8, W/8), timesteps (B,) and context (B, T, D).
        text_encoder: token ids (B, T) to hidden states (B, T, D).
        vae: pixels (B, 3, H, W) in -1..1 to latents and back.
        tokenizer: text to token ids, `model_max_length` of them.
        scheduler_config: the base's scheduler settings as plain data: betas, prediction type, `_class_name`.
        source: where the weights came from, as it is shown to people.
    """

    unet: UNet2DConditionModel
    text_encoder: CLIPTextModel
    vae: AutoencoderKL
    tokenizer: CLIPTokenizer
    scheduler_config: dict[str, Any]
    source: str
