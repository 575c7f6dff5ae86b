"""Reading a diffusers folder: `model_index.json` and a folder each for networks, tokenizer and scheduler.

The checkpoints of this program are such folders too, with more files beside, which are not read here.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.regular import load_json
from trainer.contained import files_inside, inside
from trainer.errors import UserError
from trainer.models.family import PARTS
from trainer.models.networks import build, fill
from trainer.models.pipeline import Models
from trainer.models.tensor_file import TensorFile
from trainer.models.tokenizer import read_tokenizer

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

INDEX = "model_index.json"
WEIGHTS = {
    "unet": ("diffusion_pytorch_model", "diffusion_pytorch_model"),
    "vae": ("diffusion_pytorch_model", "diffusion_pytorch_model"),
    "text_encoder": ("model", "pytorch_model"),
}
"""Stem of each network's file, as .safetensors and as the older .bin."""

_OWN = (*WEIGHTS, "tokenizer", "scheduler")
_BESIDE = {
    "safety_checker": "stable_diffusion",
    "feature_extractor": "transformers",
    "image_encoder": "transformers",
}
"""Further parts of StableDiffusionPipeline, and the library of each; others are not copied."""
_RENAMED = {"CLIPFeatureExtractor": "CLIPImageProcessor"}
"""Classes of pipelines of 2022, and their present names with the same settings."""
_RENAMED_TENSORS = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OLD_ATTENTION = re.compile(rf"(.*\.attentions\.\d+)\.({'|'.join(_RENAMED_TENSORS)})\.(weight|bias)")
"""The VAE's attention as diffusers named its tensors until 2023."""
_IS_WEIGHTS = re.compile(
    r"\.(safetensors|bin|msgpack|h5|onnx|pt|ckpt)$|\.(bin|\w+\.safetensors)\.index(\.\w+)?\.json$"
)
_PRECISION = {"": 0, "fp32": 1, "bf16": 2, "fp16": 3, "non_ema": 9}
"""Order of preference among variants of the weights: plain ones first, non-EMA weights last."""


@dataclass(frozen=True)
class Choice:
    """One form of a network's weights among those in a folder."""

    safe: bool
    files: tuple[str, ...]


def read_folder(
    folder: Path, key: str, *, weights: bool, source: str | None = None, weights_follow: bool = False
) -> Models:
    """Load a diffusers folder.

    Args:
        key: the option that named it, for messages.
        weights: False gives networks on the meta device without reading any weight.
        source: the model's name in messages, if not the folder's.
        weights_follow: the folder lacks weights because they are downloaded later.

    Raises:
        UserError: something is missing, damaged or another kind of model.
    """
    index = check_index(folder, key, source)
    networks = {
        network: read_network(
            inside(folder, network), network, key, weights=weights, weights_follow=weights_follow
        )
        for network in WEIGHTS
    }
    beside = parts_beside(index, folder, key)
    dropped = sorted(
        name
        for name in index
        if name not in (*_OWN, *beside) and re.fullmatch(r"\w+", name) and (folder / name).is_dir()
    )
    without = " and ".join(dropped)
    return Models(
        **networks,
        tokenizer=read_tokenizer(inside(folder, "tokenizer")),
        scheduler_config=read_json(inside(folder, "scheduler/scheduler_config.json"), key),
        source=source or str(folder),
        notes=(f"{key}: checkpoints are without the base's {without}, which diffusers does not know.",)
        if dropped
        else (),
        beside=beside,
        beside_from=folder,
    )


def read_vae_folder(folder: Path, key: str, *, weights: bool) -> AutoencoderKL:
    """Load a VAE's own folder, or the one inside a model's folder."""
    if (folder / INDEX).is_file():
        folder = inside(folder, "vae")
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{key}: {folder} is not a VAE's folder: it holds no config.json; "
            "name a folder with config.json and weights."
        )
    return read_network(folder, "vae", key, weights=weights)


def parts_beside(index: Mapping[str, Any], folder: Path, key: str) -> dict[str, tuple[str, str]]:
    """Return library and class of a pipeline's further parts that exist; a hub download lacks them."""
    if strange := [name for name in index if not re.fullmatch(r"[A-Za-z0-9_]+", name)]:
        raise UserError(
            f"{key}: {folder / INDEX} has the key {strange[0]!r}; keys have letters, digits and underscores "
            "only. Remove it, or choose another model."
        )
    found = {}
    for name, library in _BESIDE.items():
        entry = index.get(name)
        if (
            not isinstance(entry, list)
            or len(entry) != 2
            or entry[0] != library
            or not isinstance(entry[1], str)
        ):
            continue
        if entry[1].isidentifier() and (folder / name).is_dir():
            files_of_part(inside(folder, name))  # refuses a link before anything is trained
            found[name] = (library, _RENAMED.get(entry[1], entry[1]))
    return found


def files_of_part(folder: Path) -> list[Path]:
    """Return the files of a pipeline's part; of weights in several forms, only plain .safetensors."""
    files = files_inside(folder)
    plain = [path for path in files if re.fullmatch(r"\w+(-\d{5}-of-\d{5})?\.safetensors", path.name)]
    if not plain:
        return files
    return [path for path in files if path in plain or not _IS_WEIGHTS.search(path.name)]


def check_index(folder: Path, key: str, source: str | None = None) -> dict[str, Any]:
    """Return a model's index, or raise UserError, which calls the model `source` or the folder."""
    if not (folder / INDEX).is_file():
        raise UserError(f"{key}: {_what_else(folder)}")
    index = read_json(inside(folder, INDEX), key)
    if "text_encoder_2" in index or "transformer" in index or "XL" in str(index.get("_class_name")):
        raise UserError(
            f"{key}: {source or folder} is a {index.get('_class_name')}, which this program does not train; "
            "name a Stable Diffusion 1.x or 2.x model."
        )
    for network, accepted in ((network, PARTS[network][1]) for network in WEIGHTS):
        entry = index.get(network)
        found = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
        if found != accepted:
            raise UserError(
                f"{key}: {folder / INDEX} names {found or 'nothing'} as {network}; "
                f"Stable Diffusion 1.x and 2.x have {accepted} there."
            )
    return index


def read_network(folder: Path, network: str, key: str, *, weights: bool, weights_follow: bool = False) -> Any:
    """Load one network in fp32, on the meta device without weights, or raise UserError."""
    files = files_inside(folder)
    config = read_json(folder / "config.json", key)
    names = config.get("architectures")
    found = config.get("_class_name") or (
        names[0] if isinstance(names, list) and names else PARTS[network][1]
    )
    if found != PARTS[network][1]:
        raise UserError(
            f"{key}: {folder} holds a {found}; {PARTS[network][1]} is the only class that is trained as "
            f"{network}."
        )
    choice = choose_weights([path.name for path in files if path.parent == folder], network)
    if choice is None and not weights_follow:
        stem = WEIGHTS[network][0]
        raise UserError(
            f"{key}: {folder} holds no weights ({stem}.safetensors or the like); download the model again."
        )
    empty = build(network, config, f"{key}: {folder / 'config.json'}")
    if choice is None or not (weights or choice.safe):  # a .bin cannot be described without reading it whole
        return empty
    tensors = {
        _current(name): (file, name)
        for file in map(TensorFile, (folder / name for name in choice.files))
        for name in file
    }
    shapes = {name: (_current(name), tuple(tensor.shape)) for name, tensor in empty.state_dict().items()}
    if missing := sorted(name for name, (known, _) in shapes.items() if known not in tensors):
        raise UserError(
            f"{key}: {folder}: {len(missing)} tensors are missing from the weights, "
            f"{missing[0]} among them; download the model again."
        )
    for name, (known, shape) in shapes.items():
        file, own = tensors[known]
        if file.shapes[own] != shape:
            problem = f"{name} is {file.shapes[own]} instead of {shape}"
            raise UserError(
                f"{key}: {folder}: the weights do not fit config.json ({problem}); download the model again."
            )
        dtype = file.dtypes[own]
        if dtype is None or not dtype.is_floating_point:
            raise UserError(
                f"{key}: {folder}: the weights are quantized ({name} is {dtype or 'of 8 bits'}); "
                "name the model in fp16 or fp32."
            )
    if weights:
        fill(
            empty, {name: tensors[known][0][tensors[known][1]].float() for name, (known, _) in shapes.items()}
        )
        empty.eval()
    return empty


def _current(name: str) -> str:
    """Return the current name of a tensor with an old or a current name."""
    match = _OLD_ATTENTION.fullmatch(name)
    return (
        f"{match[1]}.{_RENAMED_TENSORS[match[2]]}.{match[3]}" if match else name.removeprefix("text_model.")
    )


def choose_weights(names: Collection[str], network: str) -> Choice | None:
    """Return the files that hold the weights: full precision and .safetensors first; None if none does."""
    found: dict[tuple[int, int, str], list[str]] = {}
    for order, (stem, suffix) in enumerate(zip(WEIGHTS[network], ("safetensors", "bin"), strict=True)):
        pattern = re.compile(rf"{stem}(?:\.(\w+))?(?:-\d{{5}}-of-\d{{5}})?(?:\.(\w+))?\.{suffix}")
        for name in names:
            match = pattern.fullmatch(name)
            if match:
                variant = match[1] or match[2] or ""
                found.setdefault((_PRECISION.get(variant, 5), order, variant), []).append(name)
    if not found:
        return None
    best = min(found)
    return Choice(best[1] == 0, tuple(sorted(found[best])))


def read_json(path: Path, key: str) -> dict[str, Any]:
    """Return a JSON object from a file, or raise UserError."""
    try:
        content = load_json(path)
    except OSError as error:
        raise UserError(
            f"{key}: {path} is missing or cannot be read ({error.strerror}); download the model again."
        ) from error
    except ValueError as error:
        raise UserError(f"{key}: {path} is not valid JSON ({error}); download the model again.") from error
    if not isinstance(content, dict):
        raise UserError(f"{key}: {path} holds no JSON object; download the model again.")
    return content


def _what_else(folder: Path) -> str:
    """Return what a folder without an index is, and what to name instead."""
    if (folder.parent / INDEX).is_file():
        return f"{folder} is one part of a model; name the folder above it, which holds {INDEX}."
    if folder.is_dir():
        inside = sorted(path.parent.name for path in folder.glob(f"*/{INDEX}"))
        if inside:
            return f"{folder} holds no {INDEX} itself, but {inside[0]} in it does; name {folder / inside[0]}."
        files = sorted(
            path.name for path in folder.iterdir() if path.suffix.lower() in (".safetensors", ".ckpt")
        )
        if files:
            return f"{folder} holds no {INDEX}; to load a single file, name the file: {folder / files[0]}."
        if not any(folder.iterdir()):
            return f"{folder} is empty; name a diffusers folder, which holds {INDEX}."
    return (
        f"{folder} is not a model: it holds no {INDEX}; name a diffusers folder, "
        "a hub id or a .safetensors file."
    )
