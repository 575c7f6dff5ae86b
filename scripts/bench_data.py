"""Measure how fast images are read, scanned and encoded: `python scripts/bench_data.py pixels|scan|latents`.

pixels   decode, crop and resize to 512 px, from JPEGs of 12 megapixels and PNGs of 1024 x 1024: images per
         second of one core, against Pillow alone and against Hugging Face datasets' imagefolder
scan     the index of 1 000 to 100 000 captioned images, new and saved: seconds, and bytes of memory an image
latents  training of the bundled model with and without cached latents, images per second

Contenders take turns, and medians are printed: other work on the machine slows all of them alike.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.bench.machine import machine
from scripts.bench.rounds import Rounds, parser, table, timed, write_json

ROOT = Path(__file__).resolve().parent.parent
SIDE = 512
LIMIT = "Pillow, least work"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the named benchmark."""
    options = parser(__doc__, rounds=5)
    options.add_argument("what", choices=["pixels", "scan", "latents"])
    options.add_argument(
        "--images", type=int, help="pixels: files of each kind (6); scan: the largest data set (100000)"
    )
    options.add_argument("--scan-once", nargs=2, metavar=("FOLDER", "CACHE"), help=argparse.SUPPRESS)
    given = options.parse_args(arguments)
    if given.scan_once:
        print(json.dumps(scan_once(*map(Path, given.scan_once))))
        return
    print(machine())
    with tempfile.TemporaryDirectory() as folder:
        if given.what == "pixels":
            found = pixels(Path(folder), given.images or 6, given.rounds)
        elif given.what == "scan":
            found = scan(Path(folder), given.images or 100_000, given.rounds)
        else:
            found = latents(Path(folder), given.rounds)
    write_json(given.json, machine(), found)


def measured(contenders: Mapping[str, Callable[[], object]], rounds: int, *, warm: int) -> Rounds:
    """Return CPU seconds of each contender in every round."""
    found = Rounds()
    found.run({name: partial(timed, run) for name, run in contenders.items()}, rounds, warm=warm)
    return found


def pixels(folder: Path, images: int, rounds: int) -> dict[str, Rounds]:
    """Print images per second of one core, and each reader's share of Pillow's best."""
    torch.set_num_threads(1)
    kinds = {
        "JPEG 4000 x 3000": ("jpg", (4000, 3000), (576, 448)),
        "PNG 1024 x 1024": ("png", (1024, 1024), (SIDE, SIDE)),
    }
    found: dict[str, Rounds] = {}
    for place, (title, (suffix, size, bucket)) in enumerate(kinds.items()):
        files = folder / suffix
        files.mkdir()
        for number in range(images):
            photograph(size, seed=1000 * place + number).save(files / f"{number}.{suffix}", quality=92)
        paths = sorted(files.iterdir())
        readers: dict[str, Callable[[], int]] = {
            LIMIT: partial(plain, paths, bucket, draft=True),
            "Pillow, every pixel": partial(plain, paths, bucket, draft=False),
            "sd-dadapt": ours(files, bucket),
        }
        if other := hugging_face(files, bucket, folder / "hub"):
            readers["datasets imagefolder"] = other
        found[title] = measured(readers, rounds, warm=1)
        print(f"\n{title} to {bucket[0]} x {bucket[1]}, {images} files, {rounds} rounds")
        speeds = {name: images / found[title].median(name, "host") for name in readers}
        shares = {name: found[title].ratio(LIMIT, name, "host").median for name in readers}
        rows = [(name, f"{speeds[name]:.1f}", f"{shares[name]:.2f}") for name in readers]
        print(table(("", "images/s of one core", "of the limit"), rows))
    return found


def photograph(size: tuple[int, int], seed: int) -> Image.Image:
    """Return an image with the smooth areas, edges and grain of a photograph."""
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
    """Return a reader of the same files through `datasets`, or None if it is not installed."""
    try:
        import datasets  # type: ignore[import-not-found]
    except ImportError:
        print("datasets imagefolder: skipped: datasets is not installed (requirements-dev.txt)")
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


def scan(folder: Path, largest: int, rounds: int) -> dict[str, Rounds]:
    """Print seconds and memory of scanning data sets of growing size, each in its own process."""
    sizes = [size for size in (1_000, 10_000, 100_000) if size < largest] + [largest]
    for size in sizes:
        captioned(folder / str(size), size)
    time.sleep(3)  # the index does not remember files written a moment ago
    found = {"scan": Rounds()}
    rows = []
    for size in sizes:
        for turn in range(rounds):
            cache = folder / f"cache-{size}-{turn}"
            new, saved = (in_process(folder / str(size), cache) for _ in range(2))
            assert new.pop("fingerprint") == saved.pop("fingerprint")
            found["scan"].add(f"{size} new", new)
            found["scan"].add(f"{size} saved", saved)
        held = in_process(folder / str(size), "memory")["bytes"]
        medians = [
            f"{found['scan'].median(f'{size} {kind}', key):.2f}"
            for kind in ("new", "saved")
            for key in ("wall", "cpu")
        ]
        rows.append((f"{size:,}", *medians, f"{held:,.0f}"))
    print("\n" + table(("images", "new, s", "CPU, s", "saved, s", "CPU, s", "bytes an image"), rows))
    return found


def captioned(folder: Path, size: int) -> None:
    """Make small images: a hundred files and links to them, each with its own caption."""
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
    """Scan in a new process and return its measurements."""
    command = [sys.executable, __file__, "scan", "--scan-once", str(folder), str(cache)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def scan_once(folder: Path, cache: Path) -> dict[str, Any]:
    """Scan and return seconds and a fingerprint; for the cache "memory" the index's bytes an image."""
    from data.index import build_index
    from data.options import DataOptions
    from data.saved_index import remembered_index

    options = DataOptions(data_root=str(folder))
    if str(cache) == "memory":
        build_index(DataOptions(data_root=str(folder / "000")))  # one-time imports and tables do not count
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


def latents(folder: Path, rounds: int) -> dict[str, Rounds]:
    """Print images per second of training the bundled model with and without cached latents."""
    print(f"\nbundled model, batch 8, 64 px, fp32, {rounds} steps each in turns, CPU time")
    torch.set_num_threads(1)
    found: dict[str, Rounds] = {}
    rows = []
    for title, extra in {
        "both networks trained": [],
        "text encoder frozen": ["--disable_textenc_training", "true"],
    }.items():
        steps = {cached: training_steps(cached, folder, extra) for cached in ("no", "memory")}
        rounds_of = found[title] = measured(steps, rounds, warm=3)  # the first steps allocate
        speeds = [f"{8 / rounds_of.median(cached, 'host'):.1f}" for cached in steps]
        rows.append((title, *speeds, f"{rounds_of.ratio('no', 'memory', 'host').median:.2f}"))
    print(table(("images/s", "encoded in every step", "cached", "ratio"), rows))
    return found


def training_steps(cached: str, folder: Path, extra: Sequence[str]) -> Callable[[], None]:
    """Return a function that trains the bundled model by one step, from reading to the update."""
    from scripts.bench_loop import build
    from trainer.config import load_config
    from trainer.training.loop import learn

    files = ["--config", str(ROOT / "train.json"), "--optimizer_config", str(ROOT / "optimizer.json")]
    sizes = ["--max_epochs", "1000", "--batch_size", "8", "--cache_latents", cached]
    run = build(load_config([*files, *sizes, "--logdir", str(folder), *extra]).config)
    batches = (step for epoch in itertools.count() for step in run.loader.steps(epoch) if len(step[0]) == 8)

    def step() -> None:
        learn(run, next(batches), 8)
        run.state.step += 1

    return step


if __name__ == "__main__":
    main()
