"""The optimizer benchmark runs on the true tensor list and reports what it promises."""

import re
import subprocess
import sys
from pathlib import Path

from scripts.bench_optimizer import _shapes


def test_the_tensors_are_those_of_stable_diffusion():
    unet, text = _shapes("unet"), _shapes("text_encoder")
    assert (len(unet), sum(shape.numel() for shape in unet)) == (686, 859_520_964)
    assert (len(text), sum(shape.numel() for shape in text)) == (196, 123_060_480)


def test_it_prints_a_table():
    root = Path(__file__).resolve().parents[2]
    command = [
        sys.executable,
        "scripts/bench_optimizer.py",
        "--every",
        "101",
        "--rounds",
        "1",
        "--threads",
        "1",
        "--only",
        "ours-eager",
    ]
    output = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=240, check=True).stdout
    assert re.search(r"streaming [\d.]+ GB/s", output)
    assert re.search(r"^adamw +[\d.]+ +1\.00 +[\d.]+ +1\.00 +8\.00 ", output, re.MULTILINE)
    assert re.search(
        r"^ours-eager +[\d.]+ +[\d.]+ +[\d.]+ +[\d.]+ +1[23]\.\d\d +\d+ +0$", output, re.MULTILINE
    )
