"""Measure the memory that training steps of a full-size Stable Diffusion 1.5 need with each optimizer, each in a process of its own.

    python scripts/bench_memory.py                                     both networks, 256 px, gradient checkpointing
    python scripts/bench_memory.py --networks unet --only adamw8bit dadapt_adam_reference
    python scripts/bench_memory.py --mixed_precision bf16
    python scripts/bench_memory.py --cards 8 12 16 24                  measures nothing: the batch sizes that are estimated to fit cards

Weights and images are random: only sizes matter. The steps are the trainer's own (`trainer.training.step`),
with its data types, memory layout and order. What is reported is the most memory that the process held during
the steps (on Linux its peak resident set, on CUDA what torch had allocated), what the optimizer's state and
everything else of known size account for, and what trainer.planning.memory would have said before: the
tensors of its trace, on the CPU with what the process held before there were any.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import date
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

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
    """Measure each optimizer in turn, in every round, and print the table; with --one, measure that one here."""
    options = parse(argv)
    if options.one:
        print(json.dumps(measure(options)))
        return 0
    if options.cards:
        print_cards(options.cards)
        return 0
    results: dict[str, list[dict[str, Any]]] = {}
    for _ in range(options.rounds):
        for name in options.only:
            forwarded = [
                f"--{key}={value}"
                for key, value in vars(options).items()
                if key not in ("only", "one", "rounds", "cards")
            ]
            command = [sys.executable, __file__, "--one", name, *forwarded]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            if done.returncode:
                print(
                    f"{name}: ended with status {done.returncode}; -9 is what the system does when memory "
                    "runs out",
                    flush=True,
                )
                continue
            results.setdefault(name, []).append(json.loads(done.stdout.splitlines()[-1]))
            print(
                f"{name}: {results[name][-1]['peak'] / GIB:.2f} GiB", file=sys.stderr, flush=True
            )  # minutes each: an end may come before
    _print(options, results)
    return 0


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Train a few steps with one optimizer and return its numbers, in bytes and seconds."""
    setting = setting_of(options.one, options)
    device = precision_of(setting).device
    baseline = _held_before(run_config(setting).optimizers.unet, device)
    steps = Steps(setting)
    _start_counting(device)
    seconds: list[float] = []
    done: list[tuple[float, float]] = []
    for step in range(options.steps):
        inputs = steps.inputs(step, options.batch_size)
        began = time.perf_counter()
        result = steps.step(inputs)
        done.append((result.loss.item(), result.skipped.item()))
        seconds.append(time.perf_counter() - began)
    assert all(math.isfinite(loss) and not skipped for loss, skipped in done), (
        "a step was skipped, so it did not do its work"
    )
    return {
        "peak": _peak(device),
        "baseline": baseline,
        "state": state_bytes(steps.optimizers),
        "weights": sum(
            p.numel() * p.element_size() for part in vars(steps.networks).values() for p in part.parameters()
        ),
        "trained": steps.trained,
        "seconds": statistics.median(seconds[1:] or seconds),
        "machine": _machine(device),
    }


def setting_of(name: str, options: argparse.Namespace) -> Setting:
    """Return the step that a name of NAMES stands for: from pixels, with gradient checkpointing."""
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
    """Return the bytes of tensors that the trace of the same step holds at its peak."""
    return estimated_step(setting_of(name, options))


def print_cards(cards: Sequence[float]) -> None:
    """Print a table of the largest batch that each of some configurations fits into cards of so many GiB, at 512 px."""
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
    """Return the largest number of images whose peak is within bounds, found along a straight line; 0 if one is too many."""
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
    """Return what the process holds with its libraries, and what they make on their first use, but without any model."""
    import torch

    if device.type == "cuda":
        return 0
    parameter = torch.nn.Parameter(torch.ones(4096))
    parameter.grad = torch.ones(4096)
    options.build([parameter], 1.0).step()
    torch.nn.Conv2d(4, 8, 3)(torch.ones(1, 4, 16, 16)).sum().backward()
    import psutil

    import trainer.models.networks  # noqa: F401

    return psutil.Process().memory_info().rss


def _start_counting(device: torch.device) -> None:
    """Forget the peak so far: loading is not what is measured."""
    import torch

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): 5 resets the peak resident set


def _peak(device: torch.device) -> int:
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    line = next(
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")
    )
    return int(line.split()[1]) * 1024


def _machine(device: torch.device) -> str:
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    found = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return f"{found[0].split(': ')[1] if found else platform.machine()}, {torch.get_num_threads()} threads"


def _print(options: argparse.Namespace, results: dict[str, list[dict[str, Any]]]) -> None:
    import torch

    if not results:
        return
    any_result = next(iter(results.values()))[0]
    print(
        f"{date.today()}  {any_result['machine']}  torch {torch.__version__}  Python "
        f"{platform.python_version()}"
    )
    print(
        f"{options.networks}: {any_result['trained'] / 1e6:.0f}M parameters trained, "
        f"{options.resolution} px, batch {options.batch_size}, "
        f"gradient checkpointing, mixed_precision {options.mixed_precision}; {options.steps} steps, "
        f"{options.rounds} rounds\n"
    )
    base = statistics.median(result["peak"] for result in results[BASE]) if BASE in results else None
    print(
        f"{'':<28}{'peak GiB':>9}{'to ' + BASE:>14}{'state GiB':>11}{'state B/param':>15}{'weights GiB':>13}{'s/step':>8}"
        f"{'before GiB':>12}{'estimated GiB':>15}{'to measured':>13}"
    )
    for name, found in results.items():
        peak = statistics.median(result["peak"] for result in found)
        seconds = statistics.median(result["seconds"] for result in found)
        one = found[0]
        before = one["baseline"] + estimated(name, options)
        ratio = f"{peak / base:.2f}" if base else ""
        print(
            f"{name:<28}{peak / GIB:>9.2f}{ratio:>14}{one['state'] / GIB:>11.2f}{one['state'] / one['trained']:>15.2f}"
            f"{one['weights'] / GIB:>13.2f}{seconds:>8.1f}{one['baseline'] / GIB:>12.2f}{before / GIB:>15.2f}{before / peak:>13.3f}"
        )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return what a command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", choices=("both", "unet"), default="both", help="what is trained")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=NAMES,
        default=[BASE, *NAMES[3:]],
        help="optimizers to measure, in this order",
    )
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--steps", type=int, default=2, help="the first makes the state, the second meets it")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--mixed_precision", choices=("no", "bf16", "auto"), default="no")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--cards", nargs="+", type=float, help="GiB of cards: print what fits them, and measure nothing"
    )
    parser.add_argument("--one", choices=NAMES, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
