"""Damaged files of every kind go through scanner and loader: no crash, no hang, bounded memory, and every file accounted for."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mutations import write_corpus

ROOT = Path(__file__).resolve().parents[2]

MEMORY = 2 << 30
"""Bytes: an image may claim up to 178 million pixels, of four bytes each, and has a copy while it is turned to RGB."""

READER = """
import faulthandler, json, resource, sys, time, warnings
warnings.simplefilter("error")  # what is odd about a file is no news for the console
import torch
from data.dataset import DataOptions
from data.index import build_index
from data.loader import StepLoader

def tokenize(captions):
    assert all(isinstance(caption, str) for caption in captions)
    return torch.zeros(len(captions), 1, dtype=torch.int64)

if __name__ == "__main__":
    folder, workers = sys.argv[1], int(sys.argv[2])
    faulthandler.dump_traceback_later(300, exit=True)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    options = DataOptions(data_root=folder, resolution=64, batch_size=4, num_workers=workers, flip_p=0.5)
    index = build_index(options)
    loader = StepLoader(index, options, tokenize=tokenize, seed=0, images_per_step=8)
    slowest, shown, last = 0.0, set(), time.perf_counter()
    for step in loader.steps(0):
        for batch in step:
            assert batch.pixels_BCHW.isfinite().all() and batch.pixels_BCHW.abs().max() <= 1
            if not batch.filler:
                shown.update(batch.names)
        slowest, last = max(slowest, time.perf_counter() - last), time.perf_counter()
    used = {record.name for record in index.records if record.multiply > 0}
    print(json.dumps({
        "bad at the scan": len(index.bad),
        "bad when read": len(loader.bad),
        "reasons": sorted({file.reason for file in (*index.bad, *loader.bad)}),
        "shown": len(shown),
        "lost": sorted(used - shown - {file.name for file in loader.bad}),
        "memory": 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before),
        "slowest": slowest,
    }))
"""


def read_all(folder, script, workers=0):
    script.write_text(READER)
    command = [sys.executable, str(script), str(folder), str(workers)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    # libtiff writes lines of its own there.
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr, done.stderr[-3000:]
    return json.loads(done.stdout)


def assert_survived(found, images):
    assert found["lost"] == [] and found["shown"] > 0
    assert found["bad at the scan"] + found["bad when read"] + found["shown"] <= images
    assert found["memory"] < MEMORY
    assert found["slowest"] < 60
    for reason in found["reasons"]:
        assert reason and "\n" not in reason and len(reason) < 500 and "Traceback" not in reason, reason


def test_damaged_files_cost_themselves_only(tmp_path):
    written = write_corpus(tmp_path / "corpus", 120, seed=1)
    assert written > 150
    assert_survived(read_all(tmp_path / "corpus", tmp_path / "reader.py"), 120)


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "workers"), [(2, 0), (3, 2)])
def test_a_large_corpus_of_damaged_files(tmp_path, seed, workers):
    written = write_corpus(tmp_path / "corpus", 1200, seed=seed)
    assert written > 1500
    found = read_all(tmp_path / "corpus", tmp_path / "reader.py", workers)
    print(written, {key: value for key, value in found.items() if key != "reasons"}, *found["reasons"], sep="\n")
    assert_survived(found, 1200)
