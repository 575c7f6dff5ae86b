"""The three networks, built empty from their configurations and filled with weights."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.modeling_utils import no_init_weights
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from trainer.errors import UserError, first_line
from trainer.models import sd15
from trainer.models.family import Configs
from trainer.models.pipeline import Models

_TEXT_KEYS = (*sd15.TEXT_ENCODER, "attention_dropout", "initializer_factor", "initializer_range")
"""Accepted keys of a text encoder's configuration. Others choose attention code, quantization or files."""

_COUNTS = ("layers_per_block", "transformer_layers_per_block", "num_hidden_layers")
_MOST_LAYERS = 1000
"""Levels times layers; 8 in SD 1.5's UNet, 12 in its text encoder."""

_LARGEST = 1 << 24
"""The largest number in a configuration; SD 1.5's is the vocabulary, 49,408."""


@contextmanager
def _empty() -> Iterator[None]:
    """Make modules on the meta device; drawing their first weights there takes half of the time."""
    with torch.device("meta"), no_init_weights():
        yield


def empty_unet(config: Mapping[str, Any]) -> UNet2DConditionModel:
    """Return the UNet on the meta device: shapes without weights."""
    with _empty():
        network = UNet2DConditionModel.from_config(_known(UNet2DConditionModel, config))
        return network  # pyright: ignore[reportReturnType]


def empty_vae(config: Mapping[str, Any]) -> AutoencoderKL:
    """Return the VAE on the meta device: shapes without weights."""
    with _empty():
        return AutoencoderKL.from_config(_known(AutoencoderKL, config))  # pyright: ignore[reportReturnType]


def empty_text_encoder(config: Mapping[str, Any]) -> CLIPTextModel:
    """Return the text encoder on the meta device: shapes without weights."""
    with _empty():
        return CLIPTextModel(
            CLIPTextConfig.from_dict({key: config[key] for key in _TEXT_KEYS if key in config})
        )


EMPTY: Mapping[str, Callable[[Mapping[str, Any]], Any]] = {
    "unet": empty_unet,
    "vae": empty_vae,
    "text_encoder": empty_text_encoder,
}


def empty_models(configs: Configs, tokenizer: Any, source: str) -> Models:
    """Return a model on the meta device: shapes without weights."""
    networks = {network: make(getattr(configs, network)) for network, make in EMPTY.items()}
    return Models(**networks, tokenizer=tokenizer, scheduler_config=dict(configs.scheduler), source=source)


def build(network: str, config: object, where: str) -> Any:
    """Return a network on the meta device from an untrusted configuration, which messages call `where`.

    Raises:
        UserError: it describes no network of this kind, or an unreasonably large one.
    """
    problem = _problem(config)
    if problem is None and isinstance(config, Mapping):
        try:
            return EMPTY[network](config)
        except Exception as error:  # the libraries raise anything for a wrong value
            problem = first_line(error)
    raise UserError(
        f"{where} describes no {network} that can be built ({problem}); download the model again."
    )


def _problem(config: object) -> str | None:
    """Return why a configuration cannot be a network's, or None. A million layers would take hours."""
    if not isinstance(config, Mapping):
        return "it is not an object"
    layers = 1
    for key, value in config.items():
        numbers = [
            number
            for number in (value if isinstance(value, (list, tuple)) else [value])
            if isinstance(number, (int, float))
        ]
        if any(not -_LARGEST <= number <= _LARGEST for number in numbers):  # NaN too
            return f"{key} is out of range"
        layers *= max((1, *numbers)) if key in _COUNTS else 1
    levels = max((len(value) for value in config.values() if isinstance(value, (list, tuple))), default=1)
    return f"it has more than {_MOST_LAYERS:,} layers" if layers * max(1, levels) > _MOST_LAYERS else None


def _known(kind: type, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries that a class of diffusers takes; others would stay in every checkpoint."""
    return {key: config[key] for key in inspect.signature(kind.__init__).parameters if key in config}


def fill(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Give an empty network its weights, one tensor a parameter, without copying them."""
    network.load_state_dict(dict(weights), strict=True, assign=True)
    for module in network.modules():
        # Not a weight: CLIP's position numbers are a buffer that is never saved, hence still empty.
        positions = getattr(module, "position_ids", None)
        if isinstance(positions, Tensor) and positions.is_meta:
            module.position_ids = torch.arange(positions.shape[-1]).expand(positions.shape)
