"""Damaged files of every kind in scanner and loader: no crash, no hang, bounded memory, all reported."""

import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import train
from tests.contracts.config_cases import Case
from tests.mutations import crafted, mutated, write_corpus, write_odd_names
from trainer.config import load_config
from trainer.config.schema import optimizer_keys, plain, train_keys
from trainer.errors import UserError

ROOT = Path(__file__).resolve().parents[2]

MEMORY = 2 << 30
"""Bytes: an image may have 178 million pixels of four bytes, and is copied while it is turned to RGB."""

READER = """
import faulthandler, json, resource, sys, time, warnings
warnings.simplefilter("error")  # what is odd about a file is no news for the console
import torch
from data.options import DataOptions
from data.index import build_index
from data.loader import StepLoader

def tokenize(captions):
    assert all(isinstance(caption, str) and caption.encode() is not None for caption in captions)
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
    loader.close()
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
    print(
        written, {key: value for key, value in found.items() if key != "reasons"}, *found["reasons"], sep="\n"
    )
    assert_survived(found, 1200)


@pytest.mark.skipif(os.name == "nt", reason="names there are Unicode, and some are devices")
def test_images_of_odd_names_are_trained(tmp_path):
    images = write_odd_names(tmp_path / "corpus", seed=4)
    assert images >= 50
    found = read_all(tmp_path / "corpus", tmp_path / "reader.py")
    assert_survived(found, images)
    assert found["shown"] > 0.6 * images


@pytest.mark.skipif(os.name == "nt", reason="names there are Unicode, and some are devices")
def test_a_check_of_odd_names_is_plain_lines(workplace, capsys, no_estimate):
    write_odd_names(workplace / "pictures", seed=4)
    assert train.main(["--check"]) == 0
    assert {letter for letter in capsys.readouterr().out if ord(letter) < 32 or 127 <= ord(letter) < 160} == {
        "\n"
    }
    assert train.main(["--check", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["data"]


SETTINGS = {
    "train.json": {
        "resume_ckpt": "model", "data_root": ["input", "pictures"], "resolution": [64, 128],
        "lora": {"rank": 4}, "batch_size": 2,
        "optimizer_config": "optimizer.json", "sample_prompts": "prompts.json",
        "validation_config": "validation.json", "max_epochs": 3,
    },
    "optimizer.json": {
        "base": {"optimizer": "dadapt_adam", "lr": 0.1, "betas": [0.9, 0.99], "d0": 1e-6, "decouple": True},
        "text_encoder_overrides": {"optimizer": "adamw", "lr": 1e-6},
        "text_encoder_freezing": {"freeze_front_n_layers": 2},
    },
    "prompts.json": {
        "cfgs": [2, 7.0], "samples": [{"prompt": "a", "negative_prompt": "b", "seed": 3}],
        "num_inference_steps": 2,
    },
    "validation.json": {"validate_training": True, "val_split_mode": "automatic", "seed": 5, "batch_size": 2},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("seed", [6, 7, 8])
def test_mutated_configurations_load_or_are_refused_in_sentences(tmp_path, monkeypatch, seed):
    """A thousand a seed: bytes of a file changed, values exchanged, or some on the command line."""
    Case("").write(tmp_path)
    monkeypatch.chdir(tmp_path)
    draws, texts = (
        np.random.default_rng(seed),
        {name: json.dumps(tree, indent=1) for name, tree in SETTINGS.items()},
    )
    known = {name: {**tree, **tree.get("base", {})} for name, tree in SETTINGS.items()}
    known["train.json"] = {
        name: None if key.required else plain(key.default) for name, key in train_keys().items()
    }
    known["optimizer.json"] |= {
        name: plain(next(iter(users.values())).default) for name, users in optimizer_keys().items()
    }
    refused, slowest = 0, 0.0
    for number in range(1000):
        for name, text in texts.items():
            (tmp_path / name).write_text(text)
        name, words = list(texts)[int(draws.integers(len(texts)))], []
        tree = crafted(SETTINGS[name], known[name], draws)
        if number % 3 == 0:
            (tmp_path / name).write_bytes(
                mutated(texts[name].encode(), (json.dumps(tree) * 3).encode(), draws)
            )
        elif number % 3 == 1 or name != "train.json":
            (tmp_path / name).write_text(json.dumps(tree), errors="surrogatepass")
        else:
            words = [
                word
                for key, value in tree.items()
                for word in (f"--{key}", value if isinstance(value, str) else json.dumps(value))
            ]
        began = time.perf_counter()
        try:
            load_config([word.replace("\0", "") for word in words])
        except UserError as error:
            refused += 1
            assert (
                error.exit_code == 2
                and error.problems
                and all(0 < len(problem) < 12_000 for problem in error.problems)
            ), (number, error)
        slowest = max(slowest, time.perf_counter() - began)
    print(f"seed {seed}: {refused} of 1000 refused, the slowest took {slowest:.2f} s")
    assert 300 < refused < 950 and slowest < 20


@pytest.mark.slow
def test_the_largest_and_smallest_value_of_every_number_is_planned_or_refused(workplace, capsys, no_estimate):
    numbers = {int: ("9223372036854775807", "100000", "0", "-1"), float: ("1e36", "1e-36", "0", "-1")}
    tried = 0
    for key in train_keys().values():
        kinds = {kind for kind in numbers if kind.__name__ in str(key.annotation)}
        for value in itertools.chain(
            *(numbers[kind] for kind in kinds if key.name not in ("lora", "data_root"))
        ):
            tried += 1
            code = train.main(["--check", f"--{key.name}", value])
            error = capsys.readouterr().err
            assert code in (0, 2) and bool(error) == (code == 2), (key.name, value, error)
    assert tried > 120
