"""The files that the image copies, without an engine: a folder made of them runs its command."""

import fnmatch
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LINES = re.sub(r"\\\n", " ", (ROOT / "Dockerfile").read_text(encoding="utf-8")).splitlines()


def argument(instruction: str) -> list[str]:
    """Return what each line of an instruction says."""
    return [line.removeprefix(instruction).strip() for line in LINES if line.startswith(f"{instruction} ")]


@pytest.fixture
def image(tmp_path) -> Path:
    """Return a folder of what is copied into the image."""
    ignored = [
        line
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    for line in argument("COPY"):
        *sources, target = line.split()
        for source in sources:
            assert not any(fnmatch.fnmatch(source, pattern) for pattern in ignored), (
                f"{source} is ignored and copied"
            )
            place = tmp_path / target / (source if target == "./" else "")
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, place, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / source, place)
    return tmp_path


def run(image: Path, *words: str) -> str:
    """Run Python in the image's folder, where nothing of this repository is found."""
    environment = {"PYTHONPATH": "", "PATH": "", "HOME": str(image), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *words], cwd=image, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def command() -> list[str]:
    """Return what the image starts with, without python."""
    (start,), (words,) = (
        (json.loads(found) for found in argument("ENTRYPOINT")),
        (json.loads(found) for found in argument("CMD")),
    )
    assert start[0] == "python"
    return [*start[1:], *words]


def test_the_image_holds_what_its_command_reads(image):
    program, *words = command()
    assert (image / program).is_file()
    found = run(
        image,
        "-c",
        "import sys, train; from trainer.config import load_config; print(load_config(sys.argv[1:]).config)",
        *words,
    )
    assert f"{image}/examples/faces" in found and f"{image}/models/mini-sd" in found


@pytest.mark.slow
def test_the_image_holds_what_its_command_runs(image):
    said = run(image, *command(), "--check")
    assert "images: 60 in" in said and "peak: " in said


def test_the_image_has_what_the_program_asks_for():
    (base,) = argument("FROM")
    assert re.fullmatch(r"nvidia/cuda:13\.0\.\d+-base-ubuntu24\.04", base), (
        "torch of the package index is built for CUDA 13.0"
    )
    installed = " ".join(argument("RUN"))
    assert (
        "pip install" in installed
        and "--require-hashes -r requirements.lock" in installed
        and "gcc" in installed
        and "python3-dev" in installed
    )
