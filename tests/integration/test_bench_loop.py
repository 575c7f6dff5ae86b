"""The loop benchmark trains this program and the plain loop, and compares them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import bench_loop
from scripts.bench.rounds import Rounds

ROOT = Path(__file__).resolve().parents[2]


def test_ratios_are_of_speeds_within_a_round():
    rounds = Rounds()
    for name, seconds in (
        ("program, adamw8bit", (2.0, 4.0)),
        ("program, encoding, adamw8bit", (4.0, 8.0)),
        ("plain loop, adamw8bit", (2.0, 2.0)),
        ("plain loop, prodigy_adv int8", (6.0, 6.0)),
    ):
        for each in seconds:
            rounds.add(name, {"seconds": each, "images": 60})
    lines = bench_loop.table_of(rounds, ["adamw8bit", "prodigy_adv int8"]).splitlines()
    assert lines[1].split()[1:4] == ["20.0", "10.0", "30.0"]
    assert "0.750 (0.500 to 1.000)  0.375 (0.250 to 0.500)  1.000 (1.000 to 1.000)" in lines[1]
    assert lines[2].split() == ["prodigy_adv", "int8", "10.0"]


@pytest.mark.slow
def test_both_loops_train_every_kind_of_optimizer(tmp_path):
    names = ["adamw8bit", "dadapt_adam", "dadapt_adam_reference", "prodigy_adv factored"]
    command = [
        sys.executable,
        "scripts/bench_loop.py",
        "--rounds",
        "1",
        "--json",
        str(tmp_path / "found.json"),
    ]
    done = subprocess.run([*command, "--only", *names], cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert "networks alone, adamw8bit: " in done.stdout
    epochs = json.loads((tmp_path / "found.json").read_text())["epochs"]
    assert len(epochs) == 1 + 3 * 3 + 1
    assert all(figures["images"] == 60 and figures["seconds"] > 0 for [figures] in epochs.values())
