"""Measure the memory of training steps of a full-size Stable Diffusion 1.5 with each optimizer.

    python scripts/bench_memory.py                               both networks, 256 px, gradient checkpointing
    python scripts/bench_memory.py --networks unet --only adamw8bit dadapt_adam_reference
    python scripts/bench_memory.py --mixed_precision bf16
    python scripts/bench_memory.py --cards 8 12 16 24            estimates batch sizes; measures nothing

Every optimizer has its own process. Weights and images are random: only sizes matter. The steps are the
trainer's own (`trainer.training.step`), with its dtypes, memory layout and order. The peak is that of the
steps: the resident set on Linux, torch's allocations on CUDA. The estimate is the memory trace's tensors, on
the CPU with the memory that the process held before and what malloc is assumed to keep.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.bench.machine import forget_peak, held, machine, peak
from scripts.bench.rounds import Rounds, parser, table, write_json
from scripts.full_size import (
    NAMES,
    Setting,
    Steps,
    empty_models,
    optimizer_options,
    precision_of,
    run_config,
    state_bytes,
)
from scripts.full_size import estimated as estimated_step

if TYPE_CHECKING:
    import torch

    from trainer.config.schema import TrainConfig
    from trainer.optim import OptimizerOptions

BASE = "adamw8bit"
GIB = 2**30


def main(argv: Sequence[str] | None = None) -> int:
    """Measure each optimizer once a round and print the table; with --one, measure that one here."""
    options = parse(argv)
    if options.one:
        print(json.dumps(measure(options)))
        return 0
    if options.cards:
        print_cards(options.cards)
        return 0
    rounds = Rounds()
    for _ in range(options.rounds):
        for name in options.only:
            kept = {key: value for key, value in vars(options).items() if key not in _OWN}
            forwarded = [f"--{key}={value}" for key, value in kept.items()]
            command = [sys.executable, __file__, "--one", name, *forwarded]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            if done.returncode:
                reason = "; -9 is the system's kill for lack of memory" if done.returncode == -9 else ""
                print(f"{name}: ended with status {done.returncode}{reason}", flush=True)
                continue
            rounds.add(name, json.loads(done.stdout.splitlines()[-1]))
            # Each takes minutes, and the benchmark may be stopped before the table.
            print(f"{name}: {rounds.median(name, 'peak') / GIB:.2f} GiB", file=sys.stderr, flush=True)
    words = machine(options.device)
    if rounds.figures:
        print(f"{words}\n{_table(options, rounds)}")
    write_json(options.json, words, {"steps": rounds})
    return 0


_OWN = ("only", "one", "rounds", "cards", "json")
"""Options that the process of one optimizer does not get."""


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Train a few steps with one optimizer and return its figures, in bytes and seconds."""
    setting = setting_of(options.one, options)
    device = precision_of(setting).device
    baseline = _held_before(run_config(setting).optimizers.unet, device)
    steps = Steps(setting)
    forget_peak(device.type)
    seconds: list[float] = []
    done: list[tuple[float, float]] = []
    for step in range(options.steps):
        inputs = steps.inputs(step, options.batch_size)
        began = time.perf_counter()
        result = steps.step(inputs)
        done.append((result.loss.item(), result.skipped.item()))
        seconds.append(time.perf_counter() - began)
    assert all(math.isfinite(loss) and not skipped for loss, skipped in done), "a step was skipped"
    return {
        "peak": peak(device.type),
        "baseline": baseline,
        "state": state_bytes(steps.optimizers),
        "weights": sum(
            p.numel() * p.element_size() for part in vars(steps.networks).values() for p in part.parameters()
        ),
        "trained": steps.trained,
        "seconds": statistics.median(seconds[1:] or seconds),
    }


def setting_of(name: str, options: argparse.Namespace) -> Setting:
    """Return the step of a name of NAMES: from pixels, with gradient checkpointing."""
    return Setting(
        optimizer=name,
        networks=options.networks,
        resolution=options.resolution,
        images=options.batch_size,
        mixed_precision=options.mixed_precision,
        device=options.device,
        latents_cached=False,
    )


def estimated(name: str, options: argparse.Namespace) -> int:
    """Return the peak bytes of tensors in the trace of the same step, on the CPU with what malloc keeps."""
    from trainer.planning.memory import KEPT

    return estimated_step(setting_of(name, options)) + (KEPT if options.device == "cpu" else 0)


def print_cards(cards: Sequence[float]) -> None:
    """Print the largest batch at 512 px by configuration and by GiB of GPU memory."""
    import torch

    from trainer.planning.memory import estimate
    from trainer.planning.memory_trace import Work
    from trainer.training.precision import Precision

    models = empty_models()
    print(
        f"estimated, torch {torch.__version__}: 512 px, 16-bit autocast, gradient checkpointing, "
        "latents cached"
    )
    print(f"{'':<58}{'peak GiB of 1':>14}{''.join(f'{card:>7g}' for card in cards)}  GiB")
    for title, config, weights in _card_rows():
        precision = Precision(torch.device("cuda"), torch.bfloat16, None, weights)
        frozen = config.parts.disable_textenc_training

        @cache
        def peak(
            images: int, config: TrainConfig = config, precision: Precision = precision, frozen: bool = frozen
        ) -> int:
            size = (512, 512)
            rows = 2 * max(1, images // 2)
            work = Work(
                size=size,
                images=images,
                latents_kept=True,
                contexts_kept=frozen,
                evaluated=4,
                sample=size,
                sampled=rows,
            )
            return estimate(config, models, precision, work, holds=None).peak

        fitting = [_largest(peak, int(card * GIB)) for card in cards]
        print(
            f"{title:<58}{peak(1) / GIB:>14.1f}{''.join(f'{images or chr(8211):>7}' for images in fitting)}",
            flush=True,
        )


def _card_rows() -> list[tuple[str, TrainConfig, torch.dtype]]:
    import torch

    from trainer.config import load_config

    def loaded(*arguments: str) -> TrainConfig:
        root = Path(__file__).resolve().parent.parent
        images = str(root / "examples" / "faces")
        return load_config(
            ["--config", str(root / "configs" / "sd15.json"), "--data_root", images, *arguments]
        ).config

    both, by_hand = loaded(), loaded("--optimizer_config", "optimizer.json")
    unet = loaded("--optimizer_config", "optimizer.json", "--disable_textenc_training")
    library = loaded("--optimizer_config", "optimizer_dadapt.json")
    reference = optimizer_options("dadapt_adam_reference", fused=False)
    library = replace(library, optimizers=replace(library.optimizers, unet=reference, text_encoder=reference))
    return [
        ("configs/sd15.json: dadapt_adam8bit, fused backward", both, torch.float32),
        ("the same, bf16 weights", both, torch.bfloat16),
        ("adamw8bit", by_hand, torch.float32),
        ("adamw8bit, text encoder frozen", unet, torch.float32),
        ("the dadaptation library's DAdaptAdam", library, torch.float32),
    ]


def _largest(peak: Callable[[int], int], holds: int) -> int:
    """Return the largest number of images that fits, by extrapolation; 0 if one image does not."""
    if peak(1) > holds:
        return 0
    guess, step = 1, max(1, (peak(16) - peak(8)) // 8)
    while True:
        ahead = (holds - peak(guess)) // step
        if ahead <= 0 or peak(guess + ahead) > holds:
            break
        guess += ahead
    while peak(guess + 1) <= holds:
        guess += 1
    return guess


def _held_before(options: OptimizerOptions, device: torch.device) -> int:
    """Return the bytes that the process holds with its libraries after their first use, without a model."""
    import torch

    if device.type == "cuda":
        return 0
    parameter = torch.nn.Parameter(torch.ones(4096))
    parameter.grad = torch.ones(4096)
    options.build([parameter], 1.0).step()
    torch.nn.Conv2d(4, 8, 3)(torch.ones(1, 4, 16, 16)).sum().backward()
    import trainer.models.networks  # noqa: F401

    return held()


def _table(options: argparse.Namespace, rounds: Rounds) -> str:
    lines = []
    trained = 0.0
    for name in rounds.figures:
        peak, seconds, trained, state, weights, before = (
            rounds.median(name, key) for key in ("peak", "seconds", "trained", "state", "weights", "baseline")
        )
        expected = before + estimated(name, options)
        ratio = f"{peak / rounds.median(BASE, 'peak'):.2f}" if BASE in rounds.figures else ""
        sizes = (f"{size / GIB:.2f}" for size in (weights, before, expected))
        line = [name, f"{peak / GIB:.2f}", ratio, f"{state / GIB:.2f}", f"{state / trained:.2f}", *sizes]
        lines.append([*line, f"{expected / peak:.3f}", f"{seconds:.1f}"])
    heads = ("", "peak GiB", f"to {BASE}", "state GiB", "state B/param", "weights GiB", "before GiB")
    settings = (
        f"{options.networks}: {trained / 1e6:.0f}M parameters trained, {options.resolution} px, batch "
        f"{options.batch_size}, gradient checkpointing, mixed_precision {options.mixed_precision}; "
        f"{options.steps} steps, {options.rounds} rounds"
    )
    return f"{settings}\n\n{table((*heads, 'estimated GiB', 'to measured', 's/step'), lines)}"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the options of a command line."""
    options = parser(__doc__, rounds=1)
    options.add_argument("--networks", choices=("both", "unet"), default="both", help="what is trained")
    options.add_argument(
        "--only",
        nargs="+",
        choices=NAMES,
        default=[BASE, *NAMES[3:]],
        help="optimizers to measure, in this order",
    )
    options.add_argument("--resolution", type=int, default=256)
    options.add_argument("--batch_size", type=int, default=1)
    options.add_argument(
        "--steps", type=int, default=2, help="the first creates the state, the second finds it"
    )
    options.add_argument("--mixed_precision", choices=("no", "bf16", "auto"), default="no")
    options.add_argument("--device", default="cpu")
    options.add_argument(
        "--cards",
        nargs="+",
        type=float,
        help="GiB of GPUs: estimate the batches that fit, and measure nothing",
    )
    options.add_argument("--one", choices=NAMES, help=argparse.SUPPRESS)
    return options.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
