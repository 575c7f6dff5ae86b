"""Time a step of each optimizer on the tensors of Stable Diffusion 1.5, in one run, one after the other in every round.

    python scripts/bench_optimizer.py                             every 21st tensor of the UNet, one and two threads
    python scripts/bench_optimizer.py --every 1 --only ours-8bit  the whole UNet, one optimizer
    python scripts/bench_optimizer.py --device cuda               on a GPU

Weights and gradients are random; only their shapes are Stable Diffusion's. A probe that streams memory runs in every round, so a
machine that is busy with something else shows. The ratio is the median over the rounds of the time against torch's fused AdamW.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from datetime import date
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.optim import Optimizer

BASE = "adamw"
PROBE_NUMEL = 1 << 24


def main(argv: Sequence[str] | None = None) -> int:
    """Print one table for each number of threads."""
    options = _parse(argv)
    import torch

    shapes = _shapes(options.network)[:: options.every]
    numel = sum(shape.numel() for shape in shapes)
    print(f"{date.today()}  {_machine(options.device)}  torch {torch.__version__}")
    print(f"{options.network}: {len(shapes)} tensors, {numel / 1e6:.1f}M parameters (every {options.every}.), {options.rounds} rounds")
    with TemporaryDirectory() as empty:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = empty  # compiling shall take the time that it takes
        for threads in options.threads:
            torch.set_num_threads(threads)
            _bench(shapes, numel, threads, options)
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=("unet", "text_encoder", "both"), default="unet")
    parser.add_argument("--every", type=int, default=21, help="take every k-th tensor")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--only", nargs="+", choices=list(OPTIMIZERS), help="these, and the base they are compared with")
    parser.add_argument("--device", default="cpu")
    return parser.parse_args(argv)


def _shapes(network: str) -> list[torch.Size]:
    """Return the shapes of all parameters, in order, without reading or allocating weights."""
    import torch

    from trainer.models.networks import SD15, empty_text_encoder, empty_unet

    with torch.device("meta"):
        networks = [empty_unet(SD15.unet)] if network != "text_encoder" else []
        networks += [empty_text_encoder(SD15.text_encoder)] if network != "unet" else []
    return [parameter.shape for each in networks for parameter in each.parameters()]


def _adamw(params: list[nn.Parameter]) -> Optimizer:
    from torch.optim import AdamW

    return AdamW(params, lr=1e-6, weight_decay=0.01, fused=True)


def _adamw8bit(params: list[nn.Parameter]) -> Optimizer:
    from bitsandbytes.optim.adamw import AdamW8bit

    return AdamW8bit(params, lr=1e-6, weight_decay=0.01)


def _published(params: list[nn.Parameter]) -> Optimizer:
    from dadaptation import DAdaptAdam

    return DAdaptAdam(params, weight_decay=0.01, decouple=True)  # type: ignore[arg-type]


def _prodigy(params: list[nn.Parameter]) -> Optimizer:
    from prodigyopt import Prodigy

    return Prodigy(params, weight_decay=0.01)  # type: ignore[arg-type]  # likewise


def _ours(**options: Any) -> Callable[[list[nn.Parameter]], Optimizer]:
    def build(params: list[nn.Parameter]) -> Optimizer:
        from trainer.optim.dadapt_adam import DAdaptAdam

        return DAdaptAdam(params, weight_decay=0.01, decouple=True, **options)

    return build


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    BASE: _adamw,
    "adamw8bit": _adamw8bit,
    "dadaptation": _published,
    "prodigy": _prodigy,
    "ours": _ours(compile=True),
    "ours-8bit": _ours(compile=True, state_bits=8),
    "ours-eager": _ours(compile=False),
    "ours-8bit-eager": _ours(compile=False, state_bits=8),
}


def _bench(shapes: Sequence[torch.Size], numel: int, threads: int, options: argparse.Namespace) -> None:
    import torch

    gradients = [torch.randn(shape, device=options.device) * 1e-3 for shape in shapes]
    built: dict[str, Optimizer] = {}
    first: dict[str, float] = {}
    for name, build in OPTIMIZERS.items():
        if options.only and name not in (*options.only, BASE):
            continue
        params = [torch.nn.Parameter(torch.randn(shape, device=options.device) * 0.02) for shape in shapes]
        for parameter, gradient in zip(params, gradients, strict=True):
            parameter.grad = gradient
        try:
            with redirect_stdout(StringIO()), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                built[name] = build(params)
        except ImportError as error:
            print(f"{name} is left out: {error}")
            continue
        optimizer = built[name]
        if getattr(optimizer, "_step_supports_amp_scaling", False) and name != BASE:
            # The trainer hands this over; without it the step would read every gradient once more.
            optimizer.found_inf = torch.zeros((), device=options.device)  # type: ignore[attr-defined]
        first[name], _ = _timed(optimizer.step, options.device)
        for _ in range(2):  # what only the first steps do
            optimizer.step()

    stream = [torch.randn(PROBE_NUMEL, device=options.device) for _ in range(3)]
    wall: dict[str, list[float]] = {name: [] for name in built}
    cpu: dict[str, list[float]] = {name: [] for name in built}
    bandwidth: list[float] = []
    for _ in range(options.rounds):
        for name, optimizer in built.items():
            seconds, busy = _timed(optimizer.step, options.device)
            wall[name].append(seconds * 1e3)
            cpu[name].append(busy * 1e3)
        seconds, _ = _timed(lambda: torch.add(stream[0], stream[1], out=stream[2]), options.device)
        bandwidth.append(12 * PROBE_NUMEL / seconds / 1e9)

    print(
        f"\n{threads} thread{'s' * (threads > 1)}; streaming {statistics.median(bandwidth):.1f} GB/s (median), {max(bandwidth):.1f} (best)"
    )
    print(f"{'':16} {'ms':>8} {'ratio':>6} {'CPU ms':>8} {'ratio':>6} {'state B/param':>13} {'peak MB':>8} {'compiled calls':>14}")
    for name, optimizer in built.items():
        ratios = [statistics.median(a / b for a, b in zip(times[name], times[BASE], strict=True)) for times in (wall, cpu)]
        peak = _peak(optimizer.step) if options.device == "cpu" else None
        print(
            f"{name:16} {statistics.median(wall[name]):8.1f} {ratios[0]:6.2f} {statistics.median(cpu[name]):8.1f} {ratios[1]:6.2f}"
            f" {_state_bytes(optimizer) / numel:13.2f} {'-' if peak is None else round(peak / 1e6):>8} {_compiled_calls(optimizer):14}",
            flush=True,
        )
    if threads == options.threads[0]:
        print("first step, with allocation and compiling: " + ", ".join(f"{name} {seconds:.1f} s" for name, seconds in first.items()))


def _timed(run: Callable[[], Any], device: str) -> tuple[float, float]:
    import torch

    start, busy = time.perf_counter(), time.process_time()
    run()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start, time.process_time() - busy


def _state_bytes(optimizer: Optimizer) -> int:
    import torch

    storages: dict[int, int] = {}
    for entry in optimizer.state.values():
        for value in entry.values():
            if isinstance(value, torch.Tensor) and value.numel() > 1:
                storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
    return sum(storages.values())


def _peak(run: Callable[[], Any]) -> int | None:
    """Return how far the resident memory rises over its start, in bytes; None where the system does not tell."""
    marks = Path("/proc/self/clear_refs")
    if not marks.exists():
        return None
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    marks.write_text("5", encoding="ascii")  # forgets the highest value so far
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def _compiled_calls(optimizer: Optimizer) -> int:
    """Count the compiled regions that one step enters."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        optimizer.step()
    return sum(event.count for event in profiler.key_averages() if event.key.startswith("Torch-Compiled Region"))


def _machine(device: str) -> str:
    if device != "cpu":
        import torch

        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "CPU")


if __name__ == "__main__":
    sys.exit(main())
