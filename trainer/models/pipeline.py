"""The parts of a model, and how much of them is trained."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.models.family import Family, family_of

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from torch import nn
    from transformers import CLIPTextModel, CLIPTokenizer


@dataclass(kw_only=True)
class Models:
    """The parts of a Stable Diffusion pipeline."""

    unet: UNet2DConditionModel
    """Predicts noise (or velocity) from latents (B, 4, H/8, W/8), timesteps (B,) and context (B, T, D)."""
    text_encoder: CLIPTextModel
    """Token ids (B, T) to hidden states (B, T, D)."""
    vae: AutoencoderKL
    """Pixels (B, 3, H, W) in -1..1 to latents and back."""
    tokenizer: CLIPTokenizer
    scheduler_config: dict[str, Any]
    """The base's scheduler settings as plain data: betas, prediction type, `_class_name`."""
    source: str
    """Origin of the weights, in messages."""
    notes: tuple[str, ...] = ()
    """Sentences about assumptions."""
    assumed: bool = False
    """No configuration was at hand, so everything is Stable Diffusion 1.5's."""
    beside: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Library and class, as in `model_index.json`, of further parts such as a safety checker: never loaded,
    but exported."""
    beside_from: Path | None = None
    """The folder of these parts."""
    revision: str | None = None
    """The commit of a model from the hub."""
    vae_revision: str | None = None
    """The commit of a VAE from the hub that replaces the model's own."""

    @property
    def family(self) -> Family:
        """The family, by the width of the text."""
        return family_of(self.text_encoder.config.hidden_size)


@dataclass(frozen=True)
class Part:
    """The trained share of one network."""

    trained: int
    total: int
    """All parameters."""
    what: str
    """In words: "everything", "nothing", "layers 4-12 of 12, final layer norm"."""


@dataclass(frozen=True)
class TrainedParts:
    """Trained parameters, by network: "unet" and "text encoder"."""

    parameters: dict[str, list[tuple[str, nn.Parameter]]]
    """Names and parameters in the network's order; a network without any is absent."""
    counts: dict[str, Part]
    """Both networks, trained or not."""
