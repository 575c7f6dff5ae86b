"""The example data set: captioned smiling faces, and prompts that show what a fine-tune learned and what it kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .scenes import render, sample_face

CONCEPT_PROMPTS = (
    "a yellow smiling face on a blue background",
    "a white smiling face on a red background",
    "an orange smiling face on a purple background",
    "a red smiling face on a white background",
)
UNRELATED_PROMPTS = (
    "a red square on a yellow background",
    "a blue heart on a white background",
    "a white cross on a green background",
    "a large purple triangle on an orange background",
)


def write_examples(out: Path, count: int, size: int, seed: int) -> None:
    """Write `faces/` and `sample_prompts.txt` into `out`; every example draws from its own generator."""
    faces = out / "faces"
    faces.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        scene, words = sample_face(np.random.default_rng((seed, index)))
        stem = f"face_{index:02d}"
        render(scene, size).save(faces / f"{stem}.png", optimize=True)
        (faces / f"{stem}.txt").write_text(words + "\n", encoding="utf-8")
    prompts = "\n".join((*CONCEPT_PROMPTS, *UNRELATED_PROMPTS)) + "\n"
    (out / "sample_prompts.txt").write_text(prompts, encoding="utf-8")
