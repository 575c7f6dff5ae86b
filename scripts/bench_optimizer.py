"""Time a step of each optimizer on the tensors of Stable Diffusion 1.5, of the bundled model or of a LoRA.

    python scripts/bench_optimizer.py                 every 21st tensor of SD 1.5's UNet, one and two threads
    python scripts/bench_optimizer.py --network mini  the bundled UNet; lora: a LoRA of rank 16 for it
    python scripts/bench_optimizer.py --every 1 --only dadapt_adam8bit    the whole UNet, one optimizer
    python scripts/bench_optimizer.py --device cuda   on a GPU

Weights and gradients are random; only their shapes are the network's. Every round times each optimizer once,
and a probe that streams memory, which shows other work on the machine. Ratios are to torch's fused AdamW.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from scripts.bench.machine import forget_peak, held, machine, peak
from scripts.bench.optimizers import (
    BASE,
    CONTENDERS,
    NETWORKS,
    prepared,
    random_gradients,
    shapes,
    state_bytes,
)
from scripts.bench.rounds import Figures, Rounds, parser, table, timed, write_json

if TYPE_CHECKING:
    import torch
    from torch.optim import Optimizer

PROBE = "streaming memory"
PROBE_NUMEL = 1 << 24


class Contender(NamedTuple):
    """An optimizer over parameters of its own."""

    optimizer: Optimizer
    step: Callable[[], None]
    first: float
    """Seconds of the first step, with allocation and compiling."""


def main(argv: Sequence[str] | None = None) -> int:
    """Print one table for each number of threads."""
    options = _parse(argv)
    import torch

    every = options.every or (1 if options.network in ("mini", "lora") else 21)
    chosen = shapes(options.network)[::every]
    found: dict[str, Rounds] = {}
    numel = sum(shape.numel() for shape in chosen)
    print(f"{options.network}: {len(chosen)} tensors (1 of {every}), {numel / 1e6:.2f}M parameters")
    with TemporaryDirectory() as empty:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = empty  # first steps include compiling
        for threads in options.threads:
            torch.set_num_threads(threads)
            print(f"\n{machine(options.device)}", flush=True)
            contenders = _contenders(chosen, options)
            rounds = found[f"{threads} threads"] = _measure(contenders, options)
            print(_table(contenders, rounds, numel, options.device))
            firsts = (f"{name} {contender.first:.1f}" for name, contender in contenders.items())
            print(f"first step, seconds: {', '.join(firsts)}")
        from trainer.optim.dadapt.choice import chosen as ways

        for (bits, each, weights), choice in ways.items():
            print(f"step of {bits} bits, s of one in {each}, {weights} weights: {choice.way}")
    write_json(options.json, machine(options.device), found)
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    options = parser(__doc__, rounds=9)
    options.add_argument("--network", choices=NETWORKS, default="unet")
    options.add_argument("--every", type=int, help="take every k-th tensor (21; of mini and lora all)")
    options.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    options.add_argument(
        "--only", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS), help=f"besides {BASE}"
    )
    options.add_argument("--device", default="cpu")
    options.add_argument(
        "--weights", choices=("fp32", "bf16"), default="fp32", help="dtype of weights and gradients"
    )
    options.add_argument(
        "--contiguous", action="store_true", help="convolutions contiguous, not channels_last"
    )
    return options.parse_args(argv)


def _contenders(chosen: Sequence[torch.Size], options: argparse.Namespace) -> dict[str, Contender]:
    """Return the optimizers after three steps, the first of which is timed."""
    import torch

    dtype = torch.bfloat16 if options.weights == "bf16" else torch.float32
    gradients = random_gradients(chosen, options.device, dtype, contiguous=options.contiguous)
    made: dict[str, Contender] = {}
    for name in dict.fromkeys((BASE, *options.only)):
        try:
            optimizer, step = prepared(name, gradients)
        except ImportError as error:
            print(f"{name}: skipped: {error}")
            continue
        made[name] = Contender(optimizer, step, timed(step, options.device)["wall"])
        for _ in range(2):  # one-time work of first steps
            step()
    return made


def _measure(contenders: dict[str, Contender], options: argparse.Namespace) -> Rounds:
    """Return the times of all rounds, the probe's included."""
    import torch

    source = [torch.randn(PROBE_NUMEL, device=options.device) for _ in range(3)]
    steps: dict[str, Callable[[], object]] = {name: each.step for name, each in contenders.items()}
    steps[PROBE] = lambda: torch.add(source[0], source[1], out=source[2])
    measures: dict[str, Callable[[], Figures]] = {
        name: partial(timed, step, options.device) for name, step in steps.items()
    }
    rounds = Rounds()
    rounds.run(measures, options.rounds, warm=0)
    return rounds


def _table(contenders: dict[str, Contender], rounds: Rounds, numel: int, device: str) -> str:
    speeds = [12 * PROBE_NUMEL / figures["wall"] / 1e9 for figures in rounds.figures[PROBE]]
    counted = "launches" if device != "cpu" else "compiled calls"
    lines = []
    for name, (optimizer, step, _) in contenders.items():
        times = [
            cell
            for key in ("wall", "host")
            for cell in (
                f"{rounds.median(name, key) * 1e3:.1f}",
                f"{rounds.ratio(name, BASE, key).median:.2f}",
            )
        ]
        over = _peak(step, device)
        memory = "-" if over is None else str(round(over / 1e6))
        lines.append(
            (name, *times, f"{state_bytes(optimizer) / numel:.2f}", memory, str(_calls(step, device)))
        )
    heads = ("", "ms", "ratio", "host ms", "ratio", "state B/param", "peak MB", counted)
    probe = f"streaming {statistics.median(speeds):.1f} GB/s (median), {max(speeds):.1f} (best)"
    return f"{probe}\n{table(heads, lines)}"


def _peak(run: Callable[[], Any], device: str) -> int | None:
    """Return the bytes by which memory rises during a call; None if the system does not count them."""
    if device == "cpu":
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
    if not forget_peak(device):
        return None
    before = held(device)
    run()
    return peak(device) - before


def _calls(step: Callable[[], Any], device: str) -> int:
    """Count the compiled regions that one step enters, or on a GPU its kernels and copies."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device != "cpu" else [])
    with profile(activities=activities) as profiler:
        step()
    launches = ("cudaLaunch", "cuLaunch", "cudaMemcpy", "cudaMemset")
    names = launches if device != "cpu" else ("Torch-Compiled Region",)
    return sum(event.count for event in profiler.key_averages() if event.key.startswith(names))


if __name__ == "__main__":
    sys.exit(main())
