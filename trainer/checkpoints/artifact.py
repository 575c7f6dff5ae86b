"""The content of a checkpoint and its export: a whole model, or LoRA adapters for a base."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from trainer.checkpoints.base import Base, base_of
from trainer.checkpoints.export import describe_file, save_diffusers, save_single_file
from trainer.errors import UserError
from trainer.models.lora import ADAPTER_CONFIG, LORA_FILE, PREFIX, begin, in_file, named, read_adapter
from trainer.models.options import LoraOptions, TrainableOptions
from trainer.models.pipeline import Models, TrainedParts
from trainer.models.tensor_file import write_tensors


class Artifact(Protocol):
    """The model or the adapters that a run trains, saves and publishes."""

    models: Models
    suffix: str
    """End of the names of single files."""

    folder_name: str
    """The checkpoint's folder, in words."""

    file_name: str
    """The checkpoint's single file, in words."""

    tags: tuple[str, ...]
    """Tags of its own on the hub."""

    relation: str
    """The hub's name of its relation to the base."""

    opening: str
    """Start of the model card's first sentence, before the base's name."""

    def take(self, parts: TrainedParts, adapter: Path | None) -> None:
        """Take the trained parameters, and the checkpoint of a fitting LoRA that the run starts from."""
        ...

    def begin(self, seed: int) -> None:
        """Give new parameters their first values, once the networks are placed."""
        ...

    def write_folder(self, folder: Path) -> None:
        """Write a folder that diffusers loads."""
        ...

    def keep_base(self, folder: Path) -> None:
        """Write into an unpublished folder where a LoRA's base is on this machine."""
        ...

    def write_file(self, path: Path, dtype: torch.dtype, metadata: Mapping[str, str]) -> None:
        """Write one .safetensors file that web UIs load; `metadata` wins over header fields made here."""
        ...

    def folder_bytes(self, weights: torch.dtype | None = None) -> int:
        """Return the bytes of a folder's weights, with trained networks in `weights` or their own dtype."""
        ...

    def file_bytes(self, dtype: torch.dtype) -> int:
        """Return the bytes of the weights in a single file."""
        ...

    def usage(self, repository: str, base: str) -> list[str]:
        """Return lines of Python that load it from the hub."""
        ...


def artifact_of(
    options: TrainableOptions, models: Models, model: str | None = None, adapter: Path | None = None
) -> Artifact:
    """Return the artifact of a run. Call it before LoRA adapters are attached.

    `model` is the name that the networks were loaded by, None on the meta device. The run starts from the
    LoRA in the checkpoint folder `adapter`, which must have been trained on these weights.
    """
    if options.lora is None:
        return WholeModel(models)
    models.beside = {}  # LoRA checkpoints hold none of the base's further parts
    return Adapters(options.lora, models, base_of(models, model, adapter) if model is not None else None)


class WholeModel:
    """All networks of a pipeline."""

    suffix, folder_name, file_name = "", "diffusers folder", "single .safetensors"
    tags: tuple[str, ...] = ()
    relation, opening = "finetune", "Fine-tuned from"

    def __init__(self, models: Models) -> None:
        self.models = models

    def take(self, parts: TrainedParts, adapter: Path | None) -> None:
        """Refuse to start from a LoRA."""
        if adapter is not None:
            raise UserError(
                f"resume_ckpt: {adapter} holds a LoRA, and lora is null; set lora to the rank, alpha and "
                "targets that it was trained with."
            )

    def begin(self, seed: int) -> None:
        """Start from the weights as they are."""

    def write_folder(self, folder: Path) -> None:
        """Write a diffusers folder, with hard links to the base's further parts."""
        save_diffusers(self.models, folder, link=True)

    def keep_base(self, folder: Path) -> None:
        """Write nothing: a whole model needs no base."""

    def write_file(self, path: Path, dtype: torch.dtype, metadata: Mapping[str, str]) -> None:
        """Write a single file in the original layout."""
        save_single_file(self.models, path, dtype, metadata)

    def folder_bytes(self, weights: torch.dtype | None = None) -> int:
        """Return the bytes of all weights; the VAE keeps its dtype."""
        trained = _bytes(self.models.unet, weights) + _bytes(self.models.text_encoder, weights)
        return trained + _bytes(self.models.vae)

    def file_bytes(self, dtype: torch.dtype) -> int:
        """Return the bytes of all weights in `dtype`."""
        networks = (self.models.unet, self.models.text_encoder, self.models.vae)
        return sum(_bytes(network, dtype) for network in networks)

    def usage(self, repository: str, base: str) -> list[str]:
        """Return the lines that load the pipeline."""
        return [f'pipeline = {self.models.family.pipeline}.from_pretrained("{repository}")']


class Adapters:
    """LoRA adapters for the layers of a base, in fp32."""

    suffix, folder_name, file_name = "-lora", "LoRA folder", "LoRA .safetensors"
    tags: tuple[str, ...] = ("lora",)
    relation, opening = "adapter", "A LoRA for"

    def __init__(self, options: LoraOptions, models: Models, base: Base | None) -> None:
        self.models = models
        self._options, self._base = options, base
        self._parts = TrainedParts({}, {})
        self._values: dict[str, Tensor] | None = None

    def take(self, parts: TrainedParts, adapter: Path | None) -> None:
        """Take the adapters, and read their values from a checkpoint if there is one."""
        self._parts = parts
        if adapter is not None:
            self._values = read_adapter(adapter, parts, self._options)

    def begin(self, seed: int) -> None:
        """Give the adapters the values of the checkpoint, or new ones."""
        begin(self._parts, seed, self._values)
        self._values = None

    def write_folder(self, folder: Path) -> None:
        """Write a folder that `pipe.load_lora_weights(folder)` loads, and the base's name."""
        assert self._base is not None, "weights are loaded"
        folder.mkdir(parents=True, exist_ok=True)
        config: dict[str, Any] = {}
        for network, learning in self._parts.parameters.items():
            layers = sorted({name.partition(".lora_")[0] for name, _ in learning})
            values = {"r": self._options.rank, "lora_alpha": self._options.strength, "target_modules": layers}
            values |= {"use_dora": True} if self._options.dora else {}
            config |= {f"{PREFIX[network]}.{key}": value for key, value in values.items()}
        tensors = {in_file(name): tensor for name, tensor in named(self._parts).items()}
        header = {"format": "pt", ADAPTER_CONFIG: json.dumps(config)}
        write_tensors(folder / LORA_FILE, tensors, torch.float32, header)
        self._base.publish(folder)

    def keep_base(self, folder: Path) -> None:
        """Write the path of a local base."""
        assert self._base is not None, "weights are loaded"
        self._base.keep(folder)

    def write_file(self, path: Path, dtype: torch.dtype, metadata: Mapping[str, str]) -> None:
        """Write one file with kohya's names and header fields, which web UIs and diffusers read."""
        assert self._base is not None, "weights are loaded"
        family, strength = self.models.family, self._options.strength
        velocity = self.models.scheduler_config.get("prediction_type") == "v_prediction"
        header = {
            **describe_file(self.models, path, "/lora"),
            "ss_base_model_version": family.kohya_version + ("_v" if velocity else ""),
            "ss_network_module": "networks.lora",
            "ss_network_dim": str(self._options.rank),
            "ss_network_alpha": str(strength),
            "ss_output_name": metadata.get("modelspec.title", path.stem),  # the name that web UIs show
            "ss_sd_model_name": self._base.name,
            "ss_v2": str(family.kohya_v2),
        }
        tensors: dict[str, Tensor] = {}
        for name, tensor in named(self._parts).items():
            layer, _, which = in_file(name).partition(".lora_")
            for ours, theirs in (("text_encoder.", family.text.lora_prefix), ("unet.", "lora_unet")):
                layer = layer.replace(ours, f"{theirs}.", 1)
            kohya = layer.replace(".", "_")
            tensors[f"{kohya}.{'lora_down' if which.startswith('A') else 'lora_up'}.weight"] = tensor
            tensors[f"{kohya}.alpha"] = torch.tensor(strength)
        write_tensors(path, tensors, dtype, {**header, **metadata})

    def folder_bytes(self, weights: torch.dtype | None = None) -> int:
        """Return the bytes of the adapters, which stay in fp32."""
        return self.file_bytes(torch.float32)

    def file_bytes(self, dtype: torch.dtype) -> int:
        """Return the bytes of the adapters in `dtype`."""
        learning = (each for group in self._parts.parameters.values() for _, each in group)
        return sum(parameter.numel() for parameter in learning) * dtype.itemsize

    def usage(self, repository: str, base: str) -> list[str]:
        """Return the lines that load the base and its adapters."""
        return [
            f"pipeline = {self.models.family.pipeline}.from_pretrained({json.dumps(base)})",
            f'pipeline.load_lora_weights("{repository}")',
        ]


def _bytes(network: nn.Module, dtype: torch.dtype | None = None) -> int:
    return sum(each.numel() * (dtype or each.dtype).itemsize for each in network.parameters())
