"""Write a complete configuration, so that its run can be repeated."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data.atomic import appearing
from trainer.config.optimizers import BASE, FREEZING, OVERRIDES
from trainer.config.schema import TrainConfig, plain, sections

FORMAT = 2
"""Of resolved configurations. Format 1, which has no number, counted the penultimate layer as clip_skip 1."""


def clip_skip_of_format_1(value: int) -> int:
    """Return the clip_skip of a resolved configuration of format 1 as today's."""
    return value + 1 if value > 0 else value


def write_resolved(config: TrainConfig, folder: Path) -> None:
    """Write train.json and optimizer.json with every key and absolute paths; they load as equal options."""
    for name, values in documents(config).items():
        write_document(folder / name, values)


def write_document(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON file whole or not at all."""
    text = json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False)
    with appearing(path) as draft:
        draft.write_text(text + "\n", encoding="utf-8")


def documents(config: TrainConfig) -> dict[str, dict[str, Any]]:
    """Return the contents of train.json and optimizer.json that describe `config` completely."""
    optimizers = config.optimizers
    train: dict[str, Any] = {"_format": FORMAT, "optimizer_config": "optimizer.json"}
    for section in sections():
        train |= plain(getattr(config, section))
    optimizer = {
        BASE: plain(optimizers.unet),
        OVERRIDES: plain(optimizers.text_encoder),
        FREEZING: plain(optimizers.freezing),
        "log_grad_norm": optimizers.log_grad_norm,
        "apply_grad_scaler_step_tweaks": optimizers.apply_grad_scaler_step_tweaks,
    }
    return {"train.json": train, "optimizer.json": optimizer}


def flattened(config: TrainConfig) -> dict[str, Any]:
    """Return every key of both files with its value, those of the optimizer file's sections as base.lr."""
    train, optimizer = documents(config).values()
    flat = {name: value for name, value in train.items() if name != "_format"}
    for name, value in optimizer.items():
        flat |= (
            {f"{name}.{key}": inner for key, inner in value.items()}
            if isinstance(value, dict)
            else {name: value}
        )
    return flat


def without_folders(config: TrainConfig) -> dict[str, str]:
    """Return both files as JSON texts for others to read: of absolute paths only the last name."""
    return {
        name: json.dumps(_without_folders(values), allow_nan=False)
        for name, values in documents(config).items()
    }


def _without_folders(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_folders(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_folders(inner) for inner in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value
