"""Merges of single-file checkpoints: a weighted sum, or a difference added to a third file."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor

from data.atomic import appearing
from trainer.errors import UserError
from trainer.models.checkpoint_file import (
    CONFIGS,
    PREDICTION_TYPE,
    TOKENIZER,
    family_of_file,
    prediction,
    what_else,
)
from trainer.models.family import FAMILIES, SD1
from trainer.models.single_file import POSITION_IDS, UNET_PREFIX, VAE_PREFIX
from trainer.models.tensor_file import TensorFile, write_tensors

BLEND = "sd_dadapt.blend"
"""Header field of a merged file: its sources, as JSON."""

MERGED_FROM = "modelspec.merged_from"

_FULL = SD1.text.prefix
_BARE = _FULL.removesuffix("text_model.")
_NETWORKS = (UNET_PREFIX, VAE_PREFIX, _BARE, *(family.text.prefix for family in FAMILIES))
_KEPT = (
    "format",
    "modelspec.sai_model_spec",
    "modelspec.architecture",
    "modelspec.implementation",
    "modelspec.resolution",
)
_CONVERT = "write it anew with scripts/convert_checkpoint.py"


def weighted_sum(files: Sequence[Path], weights: Sequence[float], target: Path) -> None:
    """Write the sum of the files' weights, each file multiplied by its number.

    Args:
        files: two or more .safetensors or .ckpt files in the original layout.
        weights: a number for each; they add up to 1, which keeps the size of the weights.
        target: a .safetensors file, which must not exist.

    Raises:
        UserError: the files do not fit together, one cannot be read, the numbers do not add up, or the target
        is taken.
    """
    if len(files) < 2:
        raise UserError("--blend: one file is named; name two or more.")
    if len(weights) != len(files):
        raise UserError(f"--weights: {len(weights)} numbers for {len(files)} files; give each file one.")
    total = math.fsum(weights)
    if not all(map(math.isfinite, weights)) or abs(total - 1) > 1e-6:
        raise UserError(
            f"--weights: {_list(weights)} add up to {total:g}; choose numbers that add up to 1, which keeps "
            "the size of the weights."
        )
    _write(files, weights, target, "weighted sum")


def add_difference(files: Sequence[Path], weight: float, target: Path) -> None:
    """Write A + weight x (B - C): the change from C to B, added to A.

    Args:
        files: A, B and C, .safetensors or .ckpt files in the original layout.
        weight: the factor of the difference.
        target: a .safetensors file, which must not exist.

    Raises:
        UserError: as `weighted_sum`.
    """
    if len(files) != 3:
        raise UserError(
            "--add_difference: takes three files, A, B and C for A + w (B - C), "
            f"and --blend names {len(files)}."
        )
    if not math.isfinite(weight):
        raise UserError(f"--add_difference: {weight:g} is not finite; name a finite number.")
    _write(files, (1.0, weight, -weight), target, "add difference")


def _write(paths: Sequence[Path], factors: Sequence[float], target: Path, method: str) -> None:
    """Write the sum of the files' tensors times a factor each, with one tensor of each file in memory."""
    if target.suffix.lower() != ".safetensors":
        raise UserError(
            f"--out: {target} does not end in .safetensors, the format that is written; rename it."
        )
    if target.exists():
        raise UserError(f"--out: {target} exists already; name a new file.")
    files = [_open(path) for path in paths]
    first, names = files[0], [{_canonical(name): name for name in file} for file in files]
    _check(files, names)

    def read(name: str) -> Tensor:
        own = first[names[0][name]]
        if not _is_blended(name) or not own.is_floating_point():
            return own
        # In double precision: 0.7 and 0.3 of equal weights are these weights, to the bit.
        total = torch.zeros(own.shape, dtype=torch.float64)
        for file, known, factor in zip(files, names, factors, strict=True):
            total.add_(file[known[name]].to(torch.float64), alpha=factor)
        return total.to(dtype)

    kinds = {name: kind for name, own in names[0].items() if (kind := first.dtypes[own]) is not None}
    if unread := sorted(names[0].keys() - kinds.keys()):
        raise UserError(f"--blend: {first.path}: {unread[0]} has a dtype that cannot be written; {_CONVERT}.")
    floats = [kind for name, kind in kinds.items() if kind.is_floating_point and name.startswith(UNET_PREFIX)]
    dtype = max(set(floats), key=floats.count)  # the first file's
    shapes = {
        name: torch.empty(first.shapes[own], dtype=kinds[name], device="meta")
        for name, own in names[0].items()
    }
    with appearing(target) as draft:
        write_tensors(draft, shapes, dtype, _metadata(files, factors, target, method), read)


def _open(path: Path) -> TensorFile:
    if path.is_dir():
        raise UserError(f"--blend: {path} is a folder; {_CONVERT} as one file.")
    if not path.is_file():
        raise UserError(f"--blend: there is no file {path}.")
    file = TensorFile(path)
    if problem := what_else(file):
        raise UserError(f"--blend: {path} {problem}")
    return file


def _check(files: Sequence[TensorFile], names: Sequence[Mapping[str, str]]) -> None:
    """Raise UserError unless the networks in all files are of the same shape and predict the same thing."""
    first, own = files[0], names[0]
    for file, known in zip(files[1:], names[1:], strict=True):
        ours, theirs = (
            {name for name in each if _is_blended(name) and name != POSITION_IDS} for each in (own, known)
        )
        if lacking := sorted(ours - theirs) or sorted(theirs - ours):
            has, lacks = (first, file) if lacking[0] in ours else (file, first)
            raise UserError(
                f"--blend: {lacks.path} has no {lacking[0]} ({len(lacking)} such tensors), and {has.path} "
                f"has; they are of different models, or one is not whole: {_CONVERT}."
            )
        for name in sorted(ours):
            shapes = first.shapes[own[name]], file.shapes[known[name]]
            if shapes[0] != shapes[1]:
                raise UserError(
                    f"--blend: {name} is {shapes[0]} in {first.path} and {shapes[1]} in {file.path}; "
                    "name models of one kind."
                )
        kinds = prediction(first)[0], prediction(file)[0]
        if kinds[0] != kinds[1]:
            raise UserError(
                f"--blend: {first.path} predicts {kinds[0]} and {file.path} {kinds[1]}; "
                "name models of one kind."
            )


def _metadata(
    files: Sequence[TensorFile], factors: Sequence[float], target: Path, method: str
) -> dict[str, str]:
    """Return the header: the first file's description of the model, and the sources; none of their runs."""
    kept = {
        key: files[0].metadata[key]
        for key in (*_KEPT, PREDICTION_TYPE, CONFIGS, TOKENIZER)
        if key in files[0].metadata
    }
    kind, said = prediction(files[0])
    if said and family_of_file(files[0]).ambiguous:
        # A .ckpt of SD 2.x may record it by its number of steps, which is not copied.
        kept.setdefault(PREDICTION_TYPE, "v" if kind == "v_prediction" else kind)
    made = {
        "method": method,
        "files": [
            {"name": file.path.name, "sha256": _sha256(file.path), "factor": factor}
            for file, factor in zip(files, factors, strict=True)
        ],
    }
    return {
        "format": "pt",
        **kept,
        "modelspec.title": target.stem,
        "modelspec.date": datetime.now(UTC).isoformat(timespec="seconds"),
        MERGED_FROM: ", ".join(file.path.name for file in files),
        BLEND: json.dumps(made),
    }


def _canonical(name: str) -> str:
    """Return a tensor's name in the original layout; newer transformers omit the text encoder's prefix."""
    return name.replace(_BARE, _FULL, 1) if name.startswith(_BARE) and not name.startswith(_FULL) else name


def _is_blended(name: str) -> bool:
    """Return True for a network's weight; the first file's schedules and averages are copied."""
    return name.startswith(_NETWORKS)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _list(numbers: Sequence[float]) -> str:
    return " and ".join(f"{number:g}" for number in numbers)
