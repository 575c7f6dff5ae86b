"""The example data set: captioned smiling faces."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .drawing import render
from .scenes import sample_face


def write_examples(out: Path, count: int, size: int, seed: int) -> None:
    """Write `faces/` into `out`; every example has its own generator."""
    faces = out / "faces"
    faces.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        scene, words = sample_face(np.random.default_rng((seed, index)))
        stem = f"face_{index:02d}"
        render(scene, size).save(faces / f"{stem}.png", optimize=True)
        (faces / f"{stem}.txt").write_text(words + "\n", encoding="utf-8")
