"""Write a configuration down completely, so that its run can be repeated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trainer.config.optimizers import BASE, FREEZING, OVERRIDES
from trainer.config.schema import TrainConfig, plain, sections


def write_resolved(config: TrainConfig, folder: Path) -> None:
    """Write train.json and optimizer.json into `folder`: every key, input paths absolute; loading them gives an equal configuration."""
    optimizers = config.optimizers
    train: dict[str, Any] = {"optimizer_config": "optimizer.json"}
    for section in sections():
        train |= plain(getattr(config, section))
    optimizer = {
        BASE: plain(optimizers.unet),
        OVERRIDES: plain(optimizers.text_encoder),
        FREEZING: plain(optimizers.freezing),
        "log_grad_norm": optimizers.log_grad_norm,
    }
    for name, values in (("train.json", train), ("optimizer.json", optimizer)):
        (folder / name).write_text(json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
