"""Building the three networks from their configurations, empty, and filling them with weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from trainer.models import sd2, sd15


@dataclass(frozen=True, kw_only=True)
class Configs:
    """What the networks and the noise schedule are, as the config.json files of a diffusers folder hold it."""

    unet: Mapping[str, Any]
    text_encoder: Mapping[str, Any]
    vae: Mapping[str, Any]
    scheduler: Mapping[str, Any]


SD15 = Configs(unet=sd15.UNET, text_encoder=sd15.TEXT_ENCODER, vae=sd15.VAE, scheduler=sd15.SCHEDULER)
SD2 = Configs(unet=sd2.UNET, text_encoder=sd2.TEXT_ENCODER, vae=sd2.VAE, scheduler=sd2.SCHEDULER)


def empty_unet(config: Mapping[str, Any]) -> UNet2DConditionModel:
    """Return the UNet on the meta device: shapes without weights."""
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(dict(config))  # pyright: ignore[reportReturnType]


def empty_vae(config: Mapping[str, Any]) -> AutoencoderKL:
    """Return the VAE on the meta device: shapes without weights."""
    with torch.device("meta"):
        return AutoencoderKL.from_config(dict(config))  # pyright: ignore[reportReturnType]


def empty_text_encoder(config: Mapping[str, Any]) -> CLIPTextModel:
    """Return the text encoder on the meta device: shapes without weights."""
    with torch.device("meta"):
        return CLIPTextModel(CLIPTextConfig.from_dict(dict(config)))


def fill(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Give an empty network its weights, without copying them.

    Args:
        network: on the meta device.
        weights: one tensor for every parameter, by its name in the network.
    """
    network.load_state_dict(dict(weights), strict=True, assign=True)
    for module in network.modules():
        # Not a weight: CLIP's position numbers are a buffer that is never saved, hence still empty.
        positions = getattr(module, "position_ids", None)
        if isinstance(positions, Tensor) and positions.is_meta:
            module.position_ids = torch.arange(positions.shape[-1]).expand(positions.shape)
