"""Columns of a grid: its models, their labels, and how they are loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.errors import UserError

if TYPE_CHECKING:
    from trainer.models.pipeline import Models


@dataclass(frozen=True)
class Column:
    """A model to draw with."""

    label: str
    name: str
    """A folder, file or hub id."""

    base: str | None = None
    """The base of a LoRA."""


@dataclass(frozen=True)
class Reading:
    """How the text encoder reads a grid's prompts: as in the samples of a run."""

    clip_skip: int = 0
    max_tokens: int = 75
    wildcard_seed: int | None = None
    """The run's seed, by which one alternative of each `{a|b}` is drawn; None leaves them as they are."""

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Reading:
        """Return the reading of a run's configuration, whose keys are train.json's."""
        seed = config["seed"] if config.get("wildcards") else None
        return cls(config.get("clip_skip", 0), config.get("max_tokens", 75), seed)

    def words(self) -> list[str]:
        """Return what differs from the default, in words."""
        clip_skip = [f"clip_skip {self.clip_skip}"] * (self.clip_skip > 1)
        return clip_skip + [f"{self.max_tokens} tokens"] * (self.max_tokens > 75)


def find_reading(names: Sequence[str]) -> Reading:
    """Return the reading of the first run, or run of a checkpoint, in `names`; the default without one."""
    configs = (_config_of(name) for name in names)
    return next((Reading.of(config) for config in configs if config is not None), Reading())


def find_columns(names: Sequence[str], *, base: str | None, against: Sequence[str]) -> list[Column]:
    """Return a column for the base and for each model.

    Args:
        names: diffusers folders, single files, hub ids, checkpoints, LoRA files, and runs, which stand for
        all their checkpoints.
        base: the base's name, "none" for a grid without it, None for the start of the first run in `names`.
        against: further models, shown last.

    Raises:
        UserError: there is no model, or no base can be found.
    """
    first = base or next((found for found in map(_start_of, names) if found is not None), None)
    if first is None:
        for name in names:
            if not Path(name).expanduser().exists() and name.count("/") != 1:  # nor a hub id
                raise UserError(f"{name}: there is no such run, checkpoint or model; correct the path.")
        raise UserError("--base: no run named here records its base; name a model, or give --base none.")
    runs = [name for name in names if _is_run(name)]
    columns = [] if first == "none" else [Column("base", first)]
    for name in names:
        if _is_run(name):
            columns += _of_run(Path(name), first, named=len(runs) > 1)
        else:
            columns.append(_column(name, first))
    columns += [_column(name, first) for name in against]
    columns = [_distinct(column, columns) for column in columns]
    if not columns:
        raise UserError("no model to draw with; name runs, folders or files.")
    return columns


def load(column: Column) -> Models:
    """Return the networks of a model on the CPU, a LoRA merged into its base.

    Raises:
        UserError: they cannot be read.
    """
    from trainer.models.load import load_models
    from trainer.models.options import ModelOptions

    if column.base is None:
        return load_models(ModelOptions(resume_ckpt=column.name))
    models = load_models(ModelOptions(resume_ckpt=column.base))
    from trainer.evaluation.schedulers import build_pipeline
    from trainer.models.lora import LORA_FILE

    path = Path(column.name)
    folder, file = (path, LORA_FILE) if path.is_dir() else (path.parent, path.name)
    pipeline = build_pipeline(models, "ddim")
    pipeline.load_lora_weights(str(folder), weight_name=file)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    return models


def checkpoint_column(checkpoint: Path, base: str, label: str) -> Column:
    """Return a checkpoint of a run that started from `base`."""
    return _column(str(checkpoint), base, label)


def _distinct(column: Column, columns: Sequence[Column]) -> Column:
    """Return the column; its folder's name precedes a label that another column has too."""
    if [other.label for other in columns].count(column.label) == 1:
        return column
    path = Path(column.name)
    folder = path.absolute().parents[1 if "ckpts" in path.parts else 0]
    return replace(column, label=f"{folder.name} {column.label}")


def _is_run(name: str) -> bool:
    return (Path(name) / "ckpts").is_dir()


def _of_run(run: Path, base: str, *, named: bool) -> list[Column]:
    """Return a run's checkpoints by step: folders, and single files of steps whose folder was deleted."""
    from trainer.checkpoints.format import STEP, place_in_run
    from trainer.checkpoints.listing import checkpoints, single_files
    from trainer.models.tensor_file import read_metadata

    found: dict[int, tuple[str, str]] = {}
    for folder in checkpoints(run):
        step = place_in_run(folder)["step"]
        found.setdefault(step, (f"step {step}", str(folder)))
    for file in single_files(run / "ckpts", run.name):
        step = int(read_metadata(file)[STEP])
        found.setdefault(step, (f"step {step}", str(file)))
    if not found:
        raise UserError(
            f"{run}: the run has no checkpoint yet; name another, or wait until it has saved one."
        )
    before = f"{run.name} " if named else ""
    return [_column(name, base, before + label) for _, (label, name) in sorted(found.items())]


def _column(name: str, base: str, label: str | None = None) -> Column:
    """Return a model, or a LoRA with its base: the recorded one, else the grid's."""
    from trainer.checkpoints.base import read_base
    from trainer.models.lora import LORA_FILE
    from trainer.models.tensor_file import TensorFile

    path = Path(name).expanduser()
    label = label or (path.stem if path.is_file() else path.name)
    if path.is_dir() and (path / LORA_FILE).is_file():
        own = read_base(path, None if base == "none" else base)
        return Column(label, str(path), own.model if own else _needed(base, name))
    if (
        path.is_file()
        and path.suffix == ".safetensors"
        and any("lora_down." in tensor or ".lora_A" in tensor for tensor in TensorFile(path))
    ):
        return Column(label, str(path), _needed(base, name))
    return Column(label, name)


def _needed(base: str, name: str) -> str:
    if base == "none":
        raise UserError(f"{name} is a LoRA, which needs a base model; name one with --base.")
    return base


def _start_of(name: str) -> str | None:
    """Return the model that a run, or the run of a checkpoint, started from; None if it is not recorded."""
    from trainer.checkpoints.base import read_base

    with suppress(UserError):  # a LoRA whose base is not found does not answer
        if (lora := read_base(Path(name))) is not None:
            return lora.model
    model = (_config_of(name) or {}).get("resume_ckpt")
    continued = model == "findlast" or (
        isinstance(model, str) and ((Path(model) / "ckpts").is_dir() or (Path(model) / "resume").is_dir())
    )
    return model if isinstance(model, str) and not continued else None


def _config_of(name: str) -> dict[str, Any] | None:
    """Return the configuration of a run, or of the run of a checkpoint; None if it is not recorded."""
    path = Path(name).absolute()
    run = path if _is_run(name) else path.parent.parent if path.parent.name == "ckpts" else None
    if run is None:
        return None
    try:
        config = json.loads((run / "train.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return config if isinstance(config, dict) else None
