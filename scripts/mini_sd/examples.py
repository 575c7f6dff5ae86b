"""The example data set: captioned images of a concept that the bundled model has never seen."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .drawing import render
from .scenes import sample_concept


def write_examples(folder: Path, concept: str, count: int, size: int, seed: int) -> None:
    """Write images and captions into a folder; every example has its own generator."""
    folder.mkdir(parents=True, exist_ok=True)
    noun = concept.split()[-1]
    for index in range(count):
        scene, words = sample_concept(np.random.default_rng((seed, index)), concept)
        stem = f"{noun}_{index:02d}"
        render(scene, size).save(folder / f"{stem}.png", optimize=True)
        (folder / f"{stem}.txt").write_text(words + "\n", encoding="utf-8")
