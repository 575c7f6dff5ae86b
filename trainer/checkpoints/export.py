"""Export of models for other programs: a diffusers folder, or one .safetensors file in the original layout.

Functions write straight to their path; callers write a draft and rename it (`trainer.checkpoints.format`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from shutil import copyfile
from typing import TYPE_CHECKING, Any

import torch

from trainer.models.checkpoint_file import ARCHITECTURE, CONFIGS, PREDICTION_TYPE, TOKENIZER
from trainer.models.folder import INDEX, WEIGHTS, files_of_part
from trainer.models.single_file import join, original_parts
from trainer.models.tensor_file import write_tensors
from trainer.models.tokenizer import is_clip_tokenizer, tokenizer_to_text, write_tokenizer

if TYPE_CHECKING:
    from trainer.models.pipeline import Models


def save_diffusers(
    models: Models, folder: Path, dtype: torch.dtype | None = None, *, link: bool = False
) -> None:
    """Write a folder that diffusers' `from_pretrained(folder)` loads, with the base's safety checker.

    Older diffusers and transformers read it too: the text encoder's names start with `text_model.`, which
    newer versions accept, and the tokenizer has both of its forms. Needs memory for one tensor.

    Missing folders are made. `dtype` None keeps each network's own; `link` makes hard links to the base's
    further parts, where the file system can.
    """
    import diffusers

    folder.mkdir(parents=True, exist_ok=True)
    version = {"_diffusers_version": diffusers.__version__}
    scheduler_class = models.scheduler_config["_class_name"]
    beside = copy_beside(models, folder, link=link)
    index = {
        "_class_name": models.family.pipeline,
        **version,
        "feature_extractor": (None, None),
        "requires_safety_checker": "safety_checker" in beside,
        "safety_checker": (None, None),
        "scheduler": ("diffusers", scheduler_class),
        **models.family.parts,
        **beside,
    }
    write_json(folder / INDEX, index)
    configs = _configs(models)
    for network, (stem, _) in WEIGHTS.items():
        part = folder / network
        part.mkdir(exist_ok=True)
        kept = dtype or getattr(models, network).dtype
        extra: dict[str, Any] = {"_class_name": models.family.parts[network][1], **version}
        start = ""
        if network == "text_encoder":
            extra = {
                "architectures": [models.family.parts[network][1]],
                "torch_dtype": str(kept).removeprefix("torch."),
            }
            start = "text_model."
        write_json(part / "config.json", {**configs[network], **extra})
        weights = {
            start + name.removeprefix(start): tensor
            for name, tensor in getattr(models, network).state_dict().items()
        }
        write_tensors(part / f"{stem}.safetensors", weights, kept, {"format": "pt"})
    (folder / "scheduler").mkdir(exist_ok=True)
    write_json(folder / "scheduler" / "scheduler_config.json", {**configs["scheduler"], **version})
    write_tokenizer(models.tokenizer, folder / "tokenizer")


def copy_beside(models: Models, folder: Path, *, link: bool = False) -> dict[str, tuple[str, str]]:
    """Copy the base's further parts into a folder, or link them; return library and class of each."""
    placed = {}
    for name, source in places_beside(models).items():
        placed[name] = models.beside[name]
        for file in files_of_part(source):
            target = folder / name / file.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.exists() and target.samefile(file):
                continue
            target.unlink(missing_ok=True)
            if link:
                with suppress(OSError):
                    target.hardlink_to(file)
                    continue
            copyfile(file, target)
    return placed


def size_beside(models: Models) -> int:
    """Return the bytes of the base's further parts."""
    return sum(
        file.stat().st_size for place in places_beside(models).values() for file in files_of_part(place)
    )


def places_beside(models: Models) -> dict[str, Path]:
    """Return the folders of the base's further parts that still exist."""
    if models.beside_from is None:
        return {}
    return {name: models.beside_from / name for name in models.beside if (models.beside_from / name).is_dir()}


def save_single_file(
    models: Models, path: Path, dtype: torch.dtype = torch.float16, metadata: Mapping[str, str] | None = None
) -> None:
    """Write one .safetensors file in the original layout, which web UIs and `from_single_file` read.

    The header follows the ModelSpec standard (https://github.com/Stability-AI/ModelSpec). It also holds the
    configurations, so that this program needs no other file, and a tokenizer that is not the family's own. An
    SD 2.x text encoder gets OpenCLIP's names, without the last layer and projection that SD 2.x does not use.
    Needs memory for one tensor.

    `metadata` wins over header fields made here, such as `modelspec.title`.
    """
    configs = _configs(models)
    size = configs["unet"]["sample_size"]
    side = max(size if isinstance(size, (list, tuple)) else [size]) * 2 ** (
        len(configs["vae"]["block_out_channels"]) - 1
    )
    header = describe_file(models, path)
    header |= {
        "modelspec.resolution": f"{side}x{side}",
        PREDICTION_TYPE: header.pop(PREDICTION_TYPE),  # after the resolution
        CONFIGS: json.dumps(configs, separators=(",", ":")),
    }
    if not is_clip_tokenizer(models.tokenizer, models.family.text.pad):
        header[TOKENIZER] = tokenizer_to_text(models.tokenizer)
    pieces = original_parts(models)
    shapes = {name: join([piece.to("meta") for piece in parts]) for name, parts in pieces.items()}
    write_tensors(path, shapes, dtype, {**header, **(metadata or {})}, read=lambda name: join(pieces[name]))


def describe_file(models: Models, path: Path, kind: str = "") -> dict[str, str]:
    """Return the ModelSpec header fields of a model's file; `kind` ends the architecture's name."""
    prediction = models.scheduler_config.get("prediction_type", "epsilon")
    return {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        ARCHITECTURE: architecture(models) + kind,
        "modelspec.implementation": "https://github.com/CompVis/stable-diffusion",
        "modelspec.title": path.stem,
        "modelspec.date": datetime.now(UTC).isoformat(timespec="seconds"),
        PREDICTION_TYPE: "v" if prediction == "v_prediction" else prediction,
    }


def architecture(models: Models) -> str:
    """Return the model's architecture by ModelSpec's name."""
    names, prediction = models.family.architectures, models.scheduler_config.get("prediction_type")
    return names.get(prediction or "", names["epsilon"])


def _configs(models: Models) -> dict[str, dict[str, Any]]:
    """Return the four configurations as plain data, without paths and versions of this machine."""
    text_encoder = models.text_encoder.config.to_diff_dict()
    configs = {
        "unet": dict(models.unet.config),
        "vae": dict(models.vae.config),
        "text_encoder": text_encoder,
        "scheduler": dict(models.scheduler_config),
    }
    dropped = (
        "_name_or_path",
        "_diffusers_version",
        "_use_default_values",
        "transformers_version",
        "dtype",
        "torch_dtype",
        "architectures",
    )
    return {
        part: {name: value for name, value in config.items() if name not in dropped}
        for part, config in configs.items()
    }


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object with sorted keys."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
