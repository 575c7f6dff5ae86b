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
    """The parts of a Stable Diffusion pipeline.

    Attributes:
        unet: predicts noise (or velocity) from latents (B, 4, H/8, W/8), timesteps (B,) and context (B, T,
        D).
        text_encoder: token ids (B, T) to hidden states (B, T, D).
        vae: pixels (B, 3, H, W) in -1..1 to latents and back.
        tokenizer: text to token ids, `model_max_length` of them.
        scheduler_config: the base's scheduler settings as plain data: betas, prediction type, `_class_name`.
        source: origin of the weights, in messages.
        notes: sentences about assumptions.
        assumed: no configuration was at hand, so everything is Stable Diffusion 1.5's.
        beside: library and class of the further parts of the base's pipeline, such as a safety checker, as
        its `model_index.json` has them.
        revision: the commit of a model from the hub.
        vae_revision: the commit of a VAE from the hub that takes the place of the model's own.
        beside_from: the folder that holds a folder of each. They are never loaded, and go into exported
        folders as they are.
    """

    unet: UNet2DConditionModel
    text_encoder: CLIPTextModel
    vae: AutoencoderKL
    tokenizer: CLIPTokenizer
    scheduler_config: dict[str, Any]
    source: str
    notes: tuple[str, ...] = ()
    assumed: bool = False
    beside: dict[str, tuple[str, str]] = field(default_factory=dict)
    beside_from: Path | None = None
    revision: str | None = None
    vae_revision: str | None = None

    @property
    def family(self) -> Family:
        """The family, by the width of the text."""
        return family_of(self.text_encoder.config.hidden_size)


@dataclass(frozen=True)
class Part:
    """The trained share of one network.

    Attributes:
        trained: parameters with requires_grad.
        total: all parameters.
        what: in words: "everything", "nothing", "layers 4-12 of 12, final layer norm".
    """

    trained: int
    total: int
    what: str


@dataclass(frozen=True)
class TrainedParts:
    """Trained parameters, by network: "unet" and "text encoder".

    Attributes:
        parameters: names and trained parameters in the network's order; a network without any is absent.
        counts: both networks, trained or not.
    """

    parameters: dict[str, list[tuple[str, nn.Parameter]]]
    counts: dict[str, Part]
