"""Measure how fast images are read, scanned and encoded: `python scripts/bench_data.py pixels|scan|latents`.

pixels   decode, crop and resize to 512 px, from JPEGs of 12 megapixels and PNGs of 1024 x 1024, images per second of one core:
         this program's data set against the least that Pillow can do, and against Hugging Face datasets' imagefolder
scan     the index of 1 000 to 100 000 captioned images, anew and saved: seconds, and bytes of memory an image
latents  training of the embedded model with and without kept latents, images per second

What is compared runs in turns, and medians are given: a machine that is busy with something else slows all of
them alike.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

SIDE = 512


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark that is named."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["pixels", "scan", "latents"])
    parser.add_argument(
        "--images", type=int, help="pixels: files of each kind (6); scan: the largest data set (100000)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="how often each thing is measured")
    parser.add_argument("--scan-once", nargs=2, metavar=("FOLDER", "CACHE"), help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.scan_once:
        print(json.dumps(scan_once(*map(Path, given.scan_once))))
        return
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    print(
        f"Python {platform.python_version()}, torch {torch.__version__}, Pillow {PIL.__version__}, "
        f"{os.cpu_count()} cores, load {load:.1f}"
    )
    with tempfile.TemporaryDirectory() as folder:
        if given.what == "pixels":
            pixels(Path(folder), given.images or 6, given.rounds)
        elif given.what == "scan":
            scan(Path(folder), given.images or 100_000, given.rounds)
        else:
            latents(Path(folder), given.rounds)


def pixels(folder: Path, images: int, rounds: int) -> None:
    """Print images per second of one core, and each reader's share of the fastest that Pillow can."""
    torch.set_num_threads(1)
    kinds = {
        "JPEG 4000 x 3000": ("jpg", (4000, 3000), (576, 448)),
        "PNG 1024 x 1024": ("png", (1024, 1024), (SIDE, SIDE)),
    }
    for place, (title, (suffix, size, bucket)) in enumerate(kinds.items()):
        files = folder / suffix
        files.mkdir()
        for number in range(images):
            photograph(size, seed=1000 * place + number).save(files / f"{number}.{suffix}", quality=92)
        paths = sorted(files.iterdir())
        readers: dict[str, Callable[[], int]] = {
            "Pillow, as little as it can": lambda paths=paths, bucket=bucket: plain(
                paths, bucket, draft=True
            ),
            "Pillow, decoding all": lambda paths=paths, bucket=bucket: plain(paths, bucket, draft=False),
            "sd-dadapt": ours(files, bucket),
        }
        if other := hugging_face(files, bucket, folder / "hub"):
            readers["datasets imagefolder"] = other
        seconds: dict[str, list[float]] = {name: [] for name in readers}
        for turn in range(rounds + 1):
            for name, read in readers.items():
                began = time.process_time()
                read()
                if turn:  # the first warms up
                    seconds[name].append(time.process_time() - began)
        limit = seconds["Pillow, as little as it can"]
        print(f"\n{title} to {bucket[0]} x {bucket[1]}, {images} files, {rounds} rounds")
        for name, measured in seconds.items():
            speed = images / statistics.median(measured)
            share = statistics.median(best / own for best, own in zip(limit, measured, strict=True))
            print(f"  {name:<28} {speed:7.1f} images/s of one core   {share:5.2f} of the limit")


def photograph(size: tuple[int, int], seed: int) -> Image.Image:
    """Return a picture with the smooth areas, edges and grain of a photograph."""
    draws = np.random.default_rng(seed)
    coarse = Image.fromarray(
        draws.normal(128, 50, (size[1] // 64 + 2, size[0] // 64 + 2, 3)).clip(0, 255).astype(np.uint8)
    )
    smooth = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC)).astype(np.int16)
    grain = draws.normal(0, 6, smooth.shape).astype(np.int16)
    return Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8))


def plain(paths: Sequence[Path], bucket: tuple[int, int], *, draft: bool) -> int:
    """Decode, crop and resize with Pillow alone."""
    for path in paths:
        with Image.open(path) as image:
            if draft:
                image.draft("RGB", (2 * bucket[0], 2 * bucket[1]))
            np.asarray(
                image.convert("RGB").resize(bucket, Image.Resampling.LANCZOS, box=middle(image.size, bucket))
            )
    return len(paths)


def middle(size: tuple[int, int], bucket: tuple[int, int]) -> tuple[float, float, float, float]:
    """Return the largest box of the bucket's shape in the middle of an image."""
    scale = max(bucket[0] / size[0], bucket[1] / size[1])
    left, top = (size[0] - bucket[0] / scale) / 2, (size[1] - bucket[1] / scale) / 2
    return left, top, size[0] - left, size[1] - top


def ours(folder: Path, bucket: tuple[int, int]) -> Callable[[], int]:
    """Return a reader of batches, from the file to the tensor, captions included."""
    from data.dataset import Images
    from data.index import build_index
    from data.options import DataOptions
    from data.plan import MicroBatch

    options = DataOptions(data_root=str(folder), resolution=SIDE, num_workers=0)
    index = build_index(options)
    images = Images(
        index, options, tokenize=lambda captions: torch.zeros(len(captions), 77, dtype=torch.int64), seed=0
    )

    def read() -> int:
        for record in range(len(index.records)):
            batch = images[0, MicroBatch(bucket, (record,), (record,))]
            assert batch.pixels_BCHW is not None and batch.pixels_BCHW.shape[-2:] == (bucket[1], bucket[0])
        return len(index.records)

    return read


def hugging_face(folder: Path, bucket: tuple[int, int], cache: Path) -> Callable[[], int] | None:
    """Return a reader of the same files through `datasets`, or None where it is not installed."""
    try:
        import datasets  # type: ignore[import-not-found]
    except ImportError:
        print("datasets is not installed (requirements-dev.txt): not compared with")
        return None
    from data.batch import to_pixels

    datasets.disable_progress_bars()
    print(f"datasets {datasets.__version__}")
    loaded = datasets.load_dataset("imagefolder", data_dir=str(folder), split="train", cache_dir=str(cache))

    def transform(examples: dict[str, list[Image.Image]]) -> dict[str, list[torch.Tensor]]:
        resized = [
            np.asarray(
                image.convert("RGB").resize(bucket, Image.Resampling.LANCZOS, box=middle(image.size, bucket))
            )
            for image in examples["image"]
        ]
        return {"pixels": [to_pixels([image]) for image in resized]}

    loaded = loaded.with_transform(transform)

    def read() -> int:
        for place in range(len(loaded)):
            assert loaded[place]["pixels"].shape[-2:] == (bucket[1], bucket[0])
        return len(loaded)

    return read


def scan(folder: Path, largest: int, rounds: int) -> None:
    """Print seconds and memory of scanning data sets of growing size, each in a process of its own."""
    sizes = [size for size in (1_000, 10_000, 100_000) if size < largest] + [largest]
    for size in sizes:
        captioned(folder / str(size), size)
    time.sleep(3)  # what was written a moment ago is not remembered
    print("\n images   anew, s   CPU, s   saved, s   CPU, s   bytes an image")
    for size in sizes:
        anew, saved = [], []
        for turn in range(rounds):
            cache = folder / f"cache-{size}-{turn}"
            anew.append(in_process(folder / str(size), cache))
            saved.append(in_process(folder / str(size), cache))
            assert anew[-1]["fingerprint"] == saved[-1]["fingerprint"]
        held = in_process(folder / str(size), "memory")["bytes"]
        seconds = [
            statistics.median(run[key] for run in runs) for runs in (anew, saved) for key in ("wall", "cpu")
        ]
        print(
            f"{size:>7,}   {seconds[0]:>7.2f}   {seconds[1]:>6.2f}   {seconds[2]:>8.2f}   "
            f"{seconds[3]:>6.2f}   {held:>14,.0f}",
            flush=True,
        )


def captioned(folder: Path, size: int) -> None:
    """Make small images, of which a hundred are different and the others links to them, each with a caption of its own."""
    different = []
    for number in range(size):
        place = folder / f"{number // 1000:03d}"
        place.mkdir(parents=True, exist_ok=True)
        path = place / f"img_{number:06d}.jpg"
        if number < 100:
            draws = np.random.default_rng(number).integers(
                0, 255, (32 + number % 7, 32 + number % 5, 3), dtype=np.uint8
            )
            Image.fromarray(draws).save(path)
            different.append(path)
        else:
            os.link(different[number % 100], path)
        path.with_suffix(".txt").write_text(f"a photo of thing number {number}, tag one, tag two, tag three")


def in_process(folder: Path, cache: Path | str) -> dict[str, Any]:
    """Scan in a new process and return what it measured."""
    command = [sys.executable, __file__, "scan", "--scan-once", str(folder), str(cache)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def scan_once(folder: Path, cache: Path) -> dict[str, Any]:
    """Scan and return seconds and a fingerprint, or for the cache "memory" the bytes that an image takes in the index."""
    from data.index import build_index
    from data.options import DataOptions
    from data.saved_index import remembered_index

    options = DataOptions(data_root=str(folder))
    if str(cache) == "memory":
        build_index(
            DataOptions(data_root=str(folder / "000"))
        )  # what is imported and tabulated once does not count
        gc.collect()
        tracemalloc.start()
        index = build_index(options)
        gc.collect()
        return {"bytes": tracemalloc.get_traced_memory()[0] / len(index.records)}
    wall, cpu = time.perf_counter(), time.process_time()
    index = remembered_index(options, cache)
    return {
        "wall": time.perf_counter() - wall,
        "cpu": time.process_time() - cpu,
        "fingerprint": index.fingerprint(),
    }


def latents(folder: Path, rounds: int) -> None:
    """Print images per second of training the embedded model with and without kept latents, a step of each in turn."""
    print(
        f"\nembedded model, batch 8, 64 px, fp32 on the CPU, one thread, {rounds} steps each in turns, "
        "CPU time"
    )
    torch.set_num_threads(1)
    for title, extra in {
        "both networks train": [],
        "text encoder frozen": ["--disable_textenc_training", "true"],
    }.items():
        steps = {kept: training_steps(kept, folder, extra) for kept in ("no", "memory")}
        seconds: dict[str, list[float]] = {kept: [] for kept in steps}
        for turn in range(rounds + 3):
            for kept, step in steps.items():
                began = time.process_time()
                step()
                if turn >= 3:  # the first allocate and tune
                    seconds[kept].append(time.process_time() - began)
        ratio = statistics.median(
            plain / own for plain, own in zip(seconds["no"], seconds["memory"], strict=True)
        )
        speeds = {kept: 8 / statistics.median(measured) for kept, measured in seconds.items()}
        print(
            f"  {title:<22} encoded in every step {speeds['no']:6.1f} images/s   kept "
            f"{speeds['memory']:6.1f} images/s   {ratio:5.2f} times"
        )


def training_steps(kept: str, folder: Path, extra: Sequence[str]) -> Callable[[], None]:
    """Return a function that trains the bundled model by one step, from reading the batch to the update."""
    from scripts.bench_loop import build
    from trainer.config import load_config
    from trainer.training.loop import learn

    files = ["--config", str(ROOT / "train.json"), "--optimizer_config", str(ROOT / "optimizer.json")]
    sizes = ["--max_epochs", "1000", "--batch_size", "8", "--cache_latents", kept]
    run = build(load_config([*files, *sizes, "--logdir", str(folder), *extra]).config)
    batches = (step for epoch in itertools.count() for step in run.loader.steps(epoch) if len(step[0]) == 8)

    def step() -> None:
        learn(run, next(batches), 8)
        run.state.step += 1

    return step


if __name__ == "__main__":
    main()
