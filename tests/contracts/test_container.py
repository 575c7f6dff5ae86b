"""What the image copies, without an engine to build it: a folder made of it alone runs the command that the image starts with."""

import fnmatch
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LINES = re.sub(r"\\\n", " ", (ROOT / "Dockerfile").read_text(encoding="utf-8")).splitlines()


def argument(instruction: str) -> list[str]:
    """Return what each line of an instruction says."""
    return [line.removeprefix(instruction).strip() for line in LINES if line.startswith(f"{instruction} ")]


def test_what_the_image_holds_runs(tmp_path):
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    for line in argument("COPY"):
        *sources, target = line.split()
        for source in sources:
            assert not any(fnmatch.fnmatch(source, pattern) for pattern in ignored), f"{source} is ignored and copied"
            place = tmp_path / target / (source if target == "./" else "")
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, place, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / source, place)
    (start,), (words,) = (json.loads(found) for found in argument("ENTRYPOINT")), (json.loads(found) for found in argument("CMD"))
    assert start[0] == "python"
    done = subprocess.run(
        [sys.executable, *start[1:], *words, "--check"],
        cwd=tmp_path,
        env={"PYTHONPATH": "", "PATH": "", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "images: 60 in" in done.stdout and "peak: " in done.stdout


def test_the_image_has_what_the_program_asks_for():
    (base,) = argument("FROM")
    assert re.fullmatch(r"nvidia/cuda:13\.0\.\d+-base-ubuntu24\.04", base), "torch of the package index is built for CUDA 13.0"
    installed = " ".join(argument("RUN"))
    assert "pip install" in installed and "-r requirements.txt" in installed and "gcc" in installed and "python3-dev" in installed
