"""The data benchmarks run and report what they promise."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def output_of(*arguments):
    command = [sys.executable, "scripts/bench_data.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=True).stdout


@pytest.mark.slow
def test_reading_is_compared_with_pillow_alone():
    output = output_of("pixels", "--images", "2", "--rounds", "3")
    assert len(re.findall(r"images/s of one core +of the limit$", output, re.MULTILINE)) == 2
    shares = re.findall(r"^sd-dadapt +[\d.]+ +([\d.]+)$", output, re.MULTILINE)
    assert len(shares) == 2 and all(float(share) > 0.5 for share in shares), output


@pytest.mark.slow
def test_scanning_is_timed_anew_and_saved():
    output = output_of("scan", "--images", "3000", "--rounds", "1")
    rows = re.findall(
        r"^ *(1,000|3,000) +([\d.]+) +([\d.]+) +([\d.]+) +([\d.]+) +([\d,]+)$", output, re.MULTILINE
    )
    assert [row[0] for row in rows] == ["1,000", "3,000"], output
    assert float(rows[1][4]) < float(rows[1][2]), "from the saved index it is faster"
    assert all(int(row[5].replace(",", "")) < 1024 for row in rows), "bytes an image"
