"""LoRA adapters on frozen layers, with peft's layers.

    W x + alpha / rank B A x                        LoRA, Hu et al. 2021, arXiv 2106.09685
    m V x / |V|,  V = W + alpha / rank B A          DoRA, Liu et al. 2024, arXiv 2402.09353

The norm |V| is taken of each row, one for each output. The magnitudes m start at |W|.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data.rng import stream
from trainer.contained import inside
from trainer.errors import UserError
from trainer.models.options import LoraOptions
from trainer.models.pipeline import TrainedParts
from trainer.models.tensor_file import TensorFile
from trainer.networks import NETWORKS

LORA_FILE = "pytorch_lora_weights.safetensors"
"""The name that diffusers looks for in a folder."""

ADAPTER_CONFIG = "lora_adapter_metadata"
"""Header field from which diffusers takes rank and alpha."""

PREFIX = {name: network.attribute for name, network in NETWORKS.items()}
"""Prefix of a network's tensors in files."""

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj")
_BLOCKS = ("down_blocks.", "mid_block.", "up_blocks.", "encoder.layers.", "text_model.encoder.layers.")
"""Layers whose names every program knows; those before and after the blocks have none."""

_MAGNITUDE = ".lora_magnitude_vector.weight"
"""End of a name in files. peft leaves out `.weight`, without which transformers 5 loads no text encoder's."""


def attach(network: nn.Module, options: LoraOptions) -> str:
    """Add adapters to the targeted layers, freeze the rest, and return in words what is trained.

    All adapters are 0 until `begin` gives them values, but DoRA's magnitudes: they are those of the base, and
    take no weight decay, which would shrink it. Works on the meta device too.

    Raises:
        UserError: peft is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.lora import LoraLayer
    except ImportError as error:
        raise UserError(
            f"lora: peft does not load ({error}); install it with `pip install peft`, or set lora to null."
        ) from error

    layers = [name for name, layer in network.named_modules() if _is_target(name, layer, options)]
    network.requires_grad_(False)
    if layers:
        alpha: Any = options.strength  # peft declares an integer
        config = LoraConfig(
            r=options.rank,
            lora_alpha=alpha,
            target_modules=layers,
            lora_dropout=options.dropout,
            init_lora_weights=False,
            use_dora=options.dora,
        )
        with torch.random.fork_rng(devices=[]):  # peft draws values that are overwritten here
            inject_adapter_in_model(config, network)
        with torch.no_grad():
            for parameter in network.parameters():
                if parameter.requires_grad:
                    parameter.zero_()
            for layer in network.modules():
                if isinstance(layer, LoraLayer):
                    layer.cast_input_dtype_enabled = False  # autocast casts it without a copy in fp32
                    _start_magnitudes(layer)
    kind = {"attention": "attention layers", "all": "layers"}[options.targets]
    size = f"{'DoRA' if options.dora else 'LoRA'} of rank {options.rank} and alpha {options.strength:g}"
    return f"a {size} on {len(layers)} {kind}" if layers else "nothing"


def begin(parts: TrainedParts, seed: int, values: Mapping[str, Tensor] | None = None) -> None:
    """Give the adapters their first values in fp32: those that `read_adapter` returned, or new ones.

    A new A is uniform in +-1/sqrt(fan in), torch's default for linear layers. B is 0, so the model starts
    unchanged. Each A depends on the seed and the layer's name only.
    """
    adapters = named(parts)
    # peft flattens the matrices of a DoRA, which channels-last ones do not allow.
    dora = any(name.endswith(_MAGNITUDE) for name in adapters)
    layout = torch.contiguous_format if dora else torch.preserve_format
    for name, parameter in adapters.items():
        value = values[name] if values is not None else _new(name, parameter, seed)
        # fp32 whatever the dtype of the frozen weights.
        parameter.data = torch.empty_like(parameter, dtype=torch.float32, memory_format=layout).copy_(value)


def named(parts: TrainedParts) -> dict[str, nn.Parameter]:
    """Return the adapter weights by diffusers' names, such as unet.mid_block. ... .to_q.lora_A.weight."""
    return {
        f"{PREFIX[network]}.{name.replace('.default.', '.').removeprefix('text_model.')}": parameter
        for network, learning in parts.parameters.items()
        for name, parameter in learning
    }


def read_adapter(folder: Path, parts: TrainedParts, options: LoraOptions) -> dict[str, Tensor]:
    """Return the adapter weights of a checkpoint by the names of `named`.

    Raises:
        UserError: their rank, alpha or layers differ from those that are trained now.
    """
    file = TensorFile(inside(folder, LORA_FILE))
    where = f"resume_ckpt: {folder} holds a LoRA"
    here = {in_file(name): (name, tuple(parameter.shape)) for name, parameter in named(parts).items()}
    if {name: shape for name, (_, shape) in here.items()} != file.shapes:
        raise UserError(
            f"{where} of other layers or of another rank than lora, disable_unet_training, "
            "disable_textenc_training and text_encoder_freezing ask for; put them back as they were."
        )
    config = json.loads(file.metadata.get(ADAPTER_CONFIG, "{}"))
    alphas = {value for key, value in config.items() if key.endswith(".lora_alpha")}
    if alphas != {options.strength}:
        raise UserError(
            f"{where} of alpha {', '.join(map(str, alphas))}, and lora.alpha is {options.strength:g} now; "
            "put it back."
        )
    return {ours: file[name] for name, (ours, _) in here.items()}


def in_file(name: str) -> str:
    """Return an adapter's name in files: older diffusers needs text_model in it, newer accepts it."""
    return re.sub(r"^text_encoder\.", "text_encoder.text_model.", name)


def _is_target(name: str, layer: nn.Module, options: LoraOptions) -> bool:
    if (
        not isinstance(layer, (nn.Linear, nn.Conv2d))
        or not layer.weight.requires_grad
        or not name.startswith(_BLOCKS)
    ):
        return False
    return options.targets == "all" or name.endswith(tuple(f".{ending}" for ending in _ATTENTION))


def _start_magnitudes(layer: Any) -> None:
    for magnitude in layer.lora_magnitude_vector.values():
        base = layer.get_base_layer().weight.float()
        magnitude.weight.data = magnitude.get_weight_norm(base, base, scaling=0.0)
        magnitude.weight.no_weight_decay = True


def _new(name: str, parameter: Tensor, seed: int) -> Tensor:
    if name.endswith(_MAGNITUDE):
        return parameter  # of the base
    shape = tuple(parameter.shape)
    if not name.endswith(".lora_A.weight"):
        return torch.zeros(shape)
    bound = 1 / math.sqrt(math.prod(shape[1:]))
    return torch.from_numpy(stream(seed, f"lora {name}").uniform(-bound, bound, shape).astype(np.float32))
