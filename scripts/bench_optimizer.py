"""Time a step of each optimizer on the tensors of Stable Diffusion 1.5, in one run, one after the other in every round.

    python scripts/bench_optimizer.py                             every 21st tensor of the UNet, one and two threads
    python scripts/bench_optimizer.py --every 1 --only ours-8bit  the whole UNet, one optimizer
    python scripts/bench_optimizer.py --device cuda               on a GPU

Weights and gradients are random; only their shapes are Stable Diffusion's. A probe that streams memory runs
in every round, so a machine that is busy with something else shows. The ratio is the median over the rounds
of the time against torch's fused AdamW.
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
from functools import partial
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
    print(
        f"{options.network}: {len(shapes)} tensors, {numel / 1e6:.1f}M parameters (every {options.every}.), "
        f"{options.rounds} rounds"
    )
    with TemporaryDirectory() as empty:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = empty  # compiling shall take the time that it takes
        for threads in options.threads:
            torch.set_num_threads(threads)
            _bench(shapes, numel, threads, options)
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", choices=("unet", "text_encoder", "both"), default="unet")
    parser.add_argument("--every", type=int, default=21, help="take every k-th tensor")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument(
        "--only", nargs="+", choices=list(OPTIMIZERS), help="these, and the base they are compared with"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--weights", choices=("fp32", "bf16"), default="fp32", help="dtype of weights and gradients"
    )
    parser.add_argument(
        "--contiguous", action="store_true", help="convolutions contiguous, not channels last as in training"
    )
    return parser.parse_args(argv)


def _shapes(network: str) -> list[torch.Size]:
    """Return the shapes of all parameters, in order, without reading or allocating weights."""
    import torch

    from trainer.models.family import SD1
    from trainer.models.networks import empty_text_encoder, empty_unet

    with torch.device("meta"):
        networks = [empty_unet(SD1.default.unet)] if network != "text_encoder" else []
        networks += [empty_text_encoder(SD1.default.text_encoder)] if network != "unet" else []
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
        from trainer.optim.dadapt.optimizer import DAdaptAdam

        return DAdaptAdam(params, weight_decay=0.01, decouple=True, **options)

    return build


def _our_adamw(**options: Any) -> Callable[[list[nn.Parameter]], Optimizer]:
    def build(params: list[nn.Parameter]) -> Optimizer:
        from trainer.optim.dadapt.optimizer import TiledAdamW

        return TiledAdamW(params, lr=1e-6, weight_decay=0.01, **options)

    return build


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    BASE: _adamw,
    "adamw8bit": _adamw8bit,
    "dadaptation": _published,
    "prodigy": _prodigy,
    "ours": _ours(compile=True),
    "ours+fused": _ours(compile=True, fused_backward=True),
    "ours-8bit": _ours(compile=True, state_bits=8),
    "ours-8bit+fused": _ours(compile=True, state_bits=8, fused_backward=True),
    "ours-8bit-all-s": _ours(compile=True, state_bits=8, every=1),
    "ours-adamw8bit": _our_adamw(compile=True),
    "ours-adamw8bit+fused": _our_adamw(compile=True, fused_backward=True),
    "ours-eager": _ours(compile=False),
    "ours-8bit-eager": _ours(compile=False, state_bits=8),
}


def _bench(shapes: Sequence[torch.Size], numel: int, threads: int, options: argparse.Namespace) -> None:
    import torch

    from trainer.optim.dadapt.choice import chosen

    dtype = torch.bfloat16 if options.weights == "bf16" else torch.float32

    def random(shape: torch.Size, scale: float) -> torch.Tensor:
        made = (torch.randn(shape, device=options.device) * scale).to(dtype)
        return made if options.contiguous or len(shape) != 4 else made.to(memory_format=torch.channels_last)

    gradients = [random(shape, 1e-3) for shape in shapes]
    built: dict[str, Callable[[], Any]] = {}
    optimizers: dict[str, Optimizer] = {}
    first: dict[str, float] = {}
    for name, build in OPTIMIZERS.items():
        if options.only and name not in (*options.only, BASE):
            continue
        params = [torch.nn.Parameter(random(shape, 0.02)) for shape in shapes]
        try:
            with redirect_stdout(StringIO()), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                optimizer = optimizers[name] = build(params)
        except ImportError as error:
            print(f"{name} is left out: {error}")
            continue
        if getattr(optimizer, "_step_supports_amp_scaling", False) and name != BASE:
            # The trainer hands this over; without it the step would read every gradient once more.
            optimizer.found_inf = torch.zeros((), device=options.device)  # type: ignore[attr-defined]
        built[name] = partial(_step, optimizer, params, gradients)
        first[name], _ = _timed(built[name], options.device)
        for _ in range(2):  # what only the first steps do
            built[name]()

    stream = [torch.randn(PROBE_NUMEL, device=options.device) for _ in range(3)]
    wall: dict[str, list[float]] = {name: [] for name in built}
    host: dict[str, list[float]] = {name: [] for name in built}
    bandwidth: list[float] = []
    for _ in range(options.rounds):
        for name, step in built.items():
            seconds, busy = _timed(step, options.device)
            wall[name].append(seconds * 1e3)
            host[name].append(busy * 1e3)
        seconds, _ = _timed(lambda: torch.add(stream[0], stream[1], out=stream[2]), options.device)
        bandwidth.append(12 * PROBE_NUMEL / seconds / 1e9)

    print(
        f"\n{threads} thread{'s' * (threads > 1)}; streaming {statistics.median(bandwidth):.1f} GB/s "
        f"(median), {max(bandwidth):.1f} (best)"
    )
    counted = "launches" if options.device != "cpu" else "compiled calls"
    print(
        f"{'':20} {'ms':>8} {'ratio':>6} {'host ms':>8} {'ratio':>6} {'state B/param':>13} {'peak MB':>8} "
        f"{counted:>14}"
    )
    for name, step in built.items():
        ratios = [
            statistics.median(a / b for a, b in zip(times[name], times[BASE], strict=True))
            for times in (wall, host)
        ]
        peak, calls = _peak(step, options.device), _calls(step, options.device)
        print(
            f"{name:20} {statistics.median(wall[name]):8.1f} {ratios[0]:6.2f} "
            f"{statistics.median(host[name]):8.1f} {ratios[1]:6.2f}"
            f" {_state_bytes(optimizers[name]) / numel:13.2f} "
            f"{'-' if peak is None else round(peak / 1e6):>8} {calls:14}",
            flush=True,
        )
    if threads == options.threads[0]:
        print(
            "first step, with allocation and compiling: "
            + ", ".join(f"{name} {seconds:.1f} s" for name, seconds in first.items())
        )
        for (bits, every, dtype), choice in chosen.items():
            print(f"compiled step of {bits} bits, s of one in {every}, {dtype} weights: {choice.way}")


def _step(optimizer: Optimizer, params: list[nn.Parameter], gradients: list[torch.Tensor]) -> None:
    """Step as after a backward pass; with fused backward, hand over the gradients as one does."""
    fused = getattr(optimizer, "fused_backward", False)
    for parameter, gradient in zip(reversed(params), reversed(gradients), strict=True):
        parameter.grad = gradient
        if fused:
            for hook in (parameter._post_accumulate_grad_hooks or {}).values():  # type: ignore[attr-defined]
                hook(parameter)
    optimizer.step()


def _timed(run: Callable[[], Any], device: str) -> tuple[float, float]:
    """Return the seconds until the result is there, and the host's: of its CPUs, or on a GPU until it may go on."""
    import torch

    start, busy = time.perf_counter(), time.process_time()
    run()
    if device == "cpu":
        return time.perf_counter() - start, time.process_time() - busy
    launched = time.perf_counter() - start
    torch.cuda.synchronize()
    return time.perf_counter() - start, launched


def _state_bytes(optimizer: Optimizer) -> int:
    import torch

    storages: dict[int, int] = {}
    for entry in optimizer.state.values():
        for value in entry.values():
            if isinstance(value, torch.Tensor) and value.numel() > 1:
                storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
    return sum(storages.values())


def _peak(run: Callable[[], Any], device: str) -> int | None:
    """Return how far memory rises over its start, in bytes; None where the system does not tell."""
    if device != "cpu":
        import torch

        torch.cuda.reset_peak_memory_stats()
        allocated = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - allocated
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


def _calls(step: Callable[[], Any], device: str) -> int:
    """Count the compiled regions that one step enters, or the kernels and copies that it launches on a GPU."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device != "cpu" else [])
    with profile(activities=activities) as profiler:
        step()
    names = (
        ("cudaLaunch", "cuLaunch", "cudaMemcpy", "cudaMemset")
        if device != "cpu"
        else ("Torch-Compiled Region",)
    )
    return sum(event.count for event in profiler.key_averages() if event.key.startswith(names))


def _machine(device: str) -> str:
    if device != "cpu":
        import torch

        return torch.cuda.get_device_name()
    from trainer.optim.dadapt.choice import compiler, cpu_model

    return f"{cpu_model()}, {compiler()}"


if __name__ == "__main__":
    sys.exit(main())
