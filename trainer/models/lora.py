"""LoRA: adapters beside frozen layers (Hu et al. 2021, arXiv 2106.09685; the layers are peft's)."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data.regular import load_json
from data.rng import stream
from trainer.contained import inside
from trainer.errors import UserError
from trainer.models.options import BASE_FILE, LoraOptions
from trainer.models.pipeline import Models, TrainedParts
from trainer.models.tensor_file import TensorFile
from trainer.networks import NETWORKS

LORA_FILE = "pytorch_lora_weights.safetensors"
"""The name that diffusers looks for in a folder."""

ADAPTER_CONFIG = "lora_adapter_metadata"
"""Header field from which diffusers takes rank and alpha."""

PREFIX = {name: network.attribute for name, network in NETWORKS.items()}
"""What a network's tensors begin with in files."""

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj")
_BLOCKS = ("down_blocks.", "mid_block.", "up_blocks.", "encoder.layers.", "text_model.encoder.layers.")
"""Where layers have names that every program knows; those before and after the blocks do not."""


@dataclass(frozen=True)
class Base:
    """The model under a LoRA."""

    model: str
    """What `load_models` loads."""

    fingerprint: str
    """Of its weights."""

    revision: str | None = None
    """Its commit on the hub."""


def attach(network: nn.Module, options: LoraOptions) -> str:
    """Put adapters beside the targeted layers, train these alone, and return in words what is trained.

    All adapters are 0 until `begin` gives them values. Works on networks of the meta device too.

    Raises:
        UserError: peft is not there.
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
        alpha: Any = options.strength  # which peft declares as an integer
        config = LoraConfig(r=options.rank, lora_alpha=alpha, target_modules=layers, init_lora_weights=False)
        with torch.random.fork_rng(devices=[]):  # peft draws what is overwritten here
            inject_adapter_in_model(config, network)
        for layer in network.modules():
            if isinstance(layer, LoraLayer):
                layer.cast_input_dtype_enabled = False  # which autocast does, without a copy in fp32 between
        with torch.no_grad():
            for parameter in network.parameters():
                if parameter.requires_grad:
                    parameter.zero_()
    kind = {"attention": "attention layers", "all": "layers"}[options.targets]
    size = f"rank {options.rank} and alpha {options.strength:g}"
    return f"a LoRA of {size} on {len(layers)} {kind}" if layers else "nothing"


def begin(parts: TrainedParts, seed: int, values: Mapping[str, Tensor] | None = None) -> None:
    """Give the matrices their first values in fp32: what `read_adapter` returned, or new ones.

    Of new ones A is uniform in +-1/sqrt(fan in), as linear layers begin, and B is 0, so that the model begins
    as it is. Each A depends on the seed and the layer's name alone, neither on the other layers nor on the
    device.
    """
    for name, parameter in named(parts).items():
        value = values[name] if values is not None else _new(name, tuple(parameter.shape), seed)
        # In fp32 whatever the frozen weights are kept in, and channels last where they are.
        parameter.data = torch.empty_like(parameter, dtype=torch.float32).copy_(value)


def named(parts: TrainedParts) -> dict[str, nn.Parameter]:
    """Return the matrices by the names that they have in diffusers' files: unet.mid_block.attentions.0....to_q.lora_A.weight."""
    return {
        f"{PREFIX[network]}.{name.replace('.default.', '.').removeprefix('text_model.')}": parameter
        for network, learning in parts.parameters.items()
        for name, parameter in learning
    }


def read_adapter(folder: Path, parts: TrainedParts, options: LoraOptions) -> dict[str, Tensor]:
    """Return the matrices of a checkpoint by the names of `named`.

    Raises:
        UserError: they are of another rank, alpha or other layers than what is trained now.
    """
    file = TensorFile(inside(folder, LORA_FILE))
    where = f"resume_ckpt: {folder} holds a LoRA"
    here = {in_file(name): (name, tuple(parameter.shape)) for name, parameter in named(parts).items()}
    if {name: shape for name, (_, shape) in here.items()} != file.shapes:
        raise UserError(
            f"{where} of other layers or of another rank than lora, disable_unet_training, "
            "disable_textenc_training and "
            "text_encoder_freezing ask for; put them back as they were."
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
    """Return a matrix's name in diffusers' files: the text encoder's begin with text_model, which newer versions accept."""
    return (
        name.replace("text_encoder.", "text_encoder.text_model.", 1)
        if name.startswith("text_encoder.")
        else name
    )


def base_of(models: Models, model: str, adapter: Path | None) -> Base:
    """Return what is under a LoRA, before it is put there.

    Args:
        models: as they were loaded.
        model: the name that they were loaded by.
        adapter: the checkpoint of the LoRA that was trained on it, None for a new one.

    Raises:
        UserError: its weights are not those that this LoRA was trained on.
    """
    there = Path(model).expanduser()
    base = Base(str(there.resolve()) if there.exists() else model, fingerprint(models), models.revision)
    before = read_base(adapter) if adapter is not None else None
    if before is not None and before.fingerprint != base.fingerprint:
        raise UserError(
            f"resume_ckpt: the LoRA in {adapter} was trained on other weights than {before.model} holds "
            "now; put that model back as it was."
        )
    return base


def fingerprint(models: Models) -> str:
    """Return a hash over 64 evenly spread values of each tensor of UNet and text encoder."""
    found = hashlib.blake2b(digest_size=16)
    for network in (models.unet, models.text_encoder):
        for name, tensor in network.state_dict().items():
            flat = tensor.reshape(-1)
            places = (
                torch.linspace(0, flat.numel() - 1, min(64, flat.numel()), dtype=torch.float64).round().long()
            )
            found.update(f"{name} {tuple(tensor.shape)}".encode())
            found.update(flat[places].to("cpu", torch.float32).numpy().tobytes())
    return found.hexdigest()


def read_base(folder: Path) -> Base | None:
    """Return the base of a checkpoint's LoRA, None where the checkpoint holds a whole model.

    Raises:
        UserError: the file that says so cannot be read, or the model is not there any more.
    """
    if not (folder / LORA_FILE).is_file() or not (folder / BASE_FILE).is_file():
        return None
    try:
        base = Base(**load_json(inside(folder, BASE_FILE)))
        if not Path(base.model).is_absolute() and not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", base.model):
            raise ValueError(f"{base.model!r} is neither a hub id nor an absolute path")
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{folder / BASE_FILE}: the model under the LoRA cannot be read ({error}); "
            "choose another checkpoint."
        ) from error
    if Path(base.model).is_absolute() and not Path(base.model).exists():
        raise UserError(
            f"resume_ckpt: {folder} is a LoRA, and the model that it was trained on, {base.model}, "
            "is not there any more; put it back."
        )
    return base


def _is_target(name: str, layer: nn.Module, options: LoraOptions) -> bool:
    if (
        not isinstance(layer, (nn.Linear, nn.Conv2d))
        or not layer.weight.requires_grad
        or not name.startswith(_BLOCKS)
    ):
        return False
    return options.targets == "all" or name.endswith(tuple(f".{ending}" for ending in _ATTENTION))


def _new(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    if not name.endswith(".lora_A.weight"):
        return torch.zeros(shape)
    bound = 1 / math.sqrt(math.prod(shape[1:]))
    return torch.from_numpy(stream(seed, f"lora {name}").uniform(-bound, bound, shape).astype(np.float32))
