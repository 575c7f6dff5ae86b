"""The fastest of the ways to run the step on this CPU: compiled with one of two sets of options, or eagerly.

Which one it is depends on the CPU and the C++ compiler, so all are timed once, and the outcome is kept in the
folder where torch keeps compiled code. Both compiled ways give the same bits, as the trial checks, so a run
may change between them. The eager way differs in the last bits. Processes that share the folder agree on it:
the first outcome written there holds. A run that resumes keeps the way it began with, whatever is faster.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import tempfile
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trainer.optim.dadapt.eager import PACK_TILES, Arrival, TorchEngine
from trainer.optim.dadapt.kernels import CompiledKernel, compile_kernel
from trainer.optim.dadapt.state import TILE, Bank, Segment

EAGER = "eager"
WAYS: dict[str, dict[str, Any]] = {
    "default": {},
    # gcc prefers vectors of 256 bits, and some CPUs stall where one load spans two such stores.
    "512-bit vectors": {"cpp.march": "native -mprefer-vector-width=512"},
}
"""Options of torch.compile by name."""

_ROUNDS = 5
_TILES = PACK_TILES + 32


class Choice(NamedTuple):
    """The outcome of a trial."""

    way: str
    """A name of `WAYS`, or EAGER where the eager step is faster than any of them."""
    kernel: CompiledKernel | None
    """The fastest compiled step; None where none works."""


chosen: dict[tuple[int, int, torch.dtype], Choice] = {}
"""The choices of this process by bits, every and dtype of the weights."""


@torch.no_grad()  # as every step: the graph is for one of the two modes
def choose(bits: int, every: int, weights: torch.dtype) -> Choice:
    """Return the fastest way on the CPU for fp32 or bf16 weights.

    The first call in a process compiles, for any number of tiles above one, in some seconds, the first on a
    machine also measures. One graph serves every shape, group and optimizer. If compiling does not work, a
    warning of one line says so.
    """
    key = bits, every, weights
    if key not in chosen:
        try:
            chosen[key] = _choose(*key)
        except (
            Exception
        ) as error:  # a missing or broken compiler raises anything, from OSError to InductorError
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            warnings.warn(
                f"torch.compile does not work here ({reason}): the optimizer runs without it, slower",
                stacklevel=2,
            )
            chosen[key] = Choice(EAGER, None)
    return chosen[key]


def _choose(bits: int, every: int, weights: torch.dtype) -> Choice:
    def trial(way: str) -> Trial:
        kernel = None if way == EAGER else compile_kernel(bits, every, WAYS[way])
        return Trial(kernel, bits, every, weights)

    place = _place(bits, every, weights)
    kept = place.read_text(encoding="utf-8") if place.exists() else ""
    first = trial(kept if kept in WAYS else "default")
    expected = first.run()
    if kept in (*WAYS, EAGER):
        return Choice(kept, first.kernel)
    trials = {"default": first}
    for way in [way for way in WAYS if way != "default"] if has_512_bits() else []:
        with suppress(Exception):  # a compiler without the option
            other = trial(way)
            if all(map(torch.equal, other.run(), expected)):
                trials[way] = other
    trials[EAGER] = trial(EAGER)
    times = {way: min(each.timed() for _ in range(_ROUNDS)) for way, each in trials.items()}
    way = _kept(place, min(times, key=times.__getitem__))
    if way not in trials:  # nothing can be kept: only a choice that does not show in the results is made
        way = min(set(trials) - {EAGER}, key=times.__getitem__)
    return Choice(way, trials["default" if way == EAGER else way].kernel)


class Trial:
    """A buffer that one way advances."""

    def __init__(self, kernel: CompiledKernel | None, bits: int, every: int, weights: torch.dtype) -> None:
        cpu, size = torch.device("cpu"), _TILES * TILE
        draws = torch.Generator().manual_seed(0)
        self._bank = Bank(cpu, weights, _TILES, bits, every)
        self.kernel = kernel
        self._engine = TorchEngine(self._bank, kernel, [1.0])
        p, g = (torch.randn(size, generator=draws).to(weights) for _ in range(2))
        values = [0.9, 1e-4, 0.999, 1e-3, 0.9995, 5e-7, 1e-8, 1e-5, 1.0, 0.0, 1.0, 1.0, 1.0]
        self._arrival = Arrival(Segment(0, 0, self._bank, 0, size, (0,)), p, g, None, torch.tensor(values))
        self._bank.segments.append(self._arrival.segment)

    def run(self) -> list[Tensor]:
        """Make three steps and return weights, state and sums.

        Raises:
            RuntimeError: the kernel does not advance them.
        """
        before = self._arrival.parameter.clone()
        for step in range(3):
            self._engine.begin(step, scaled=False, coupled=False)
            self._engine.advance([self._arrival])
        state = [tensor for pair in self._bank.held.values() for tensor in pair]
        results = [self._arrival.parameter, *state, self._engine.totals()]
        if torch.equal(before, results[0]) or not all(result.isfinite().all() for result in results):
            raise RuntimeError("the compiled kernel gives wrong results")
        return results

    def timed(self) -> float:
        """Return the seconds of a step."""
        start = time.perf_counter()
        self._engine.begin(0, scaled=False, coupled=False)
        self._engine.advance([self._arrival])
        return time.perf_counter() - start


def has_512_bits() -> bool:
    """Return whether inductor writes vectors of 512 bits, for the CPU's own architecture."""
    from torch._inductor import config, cpu_vec_isa

    return (
        config.cpp.march is None
        and platform.machine().lower() in ("x86_64", "amd64")
        and (cpu_vec_isa.pick_vec_isa().bit_width() == 512)
    )


def _place(bits: int, every: int, weights: torch.dtype) -> Path:
    """Return the file of the choice for this CPU, this compiler and this torch."""
    key = [cpu_model(), compiler(), torch.__version__, torch.get_num_threads(), bits, every, str(weights)]
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    return own_cache() / f"dadapt-{name}.txt"


def own_cache() -> Path:
    """Make torch keep compiled code in a folder of this CPU's own, and return it.

    torch's key of such code does not name the CPU: code that was compiled for vectors of 512 bits gives wrong
    results where torch works with 256.
    """
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    key = f"{cpu_model()} {torch.backends.cpu.get_cpu_capability()}"
    name = f"cpu-{hashlib.sha256(key.encode()).hexdigest()[:8]}"
    if (folder := Path(cache_dir())).name != name:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / name)
    return Path(cache_dir())


def _kept(place: Path, way: str) -> str:
    """Keep the choice, and return the one that was written there first; empty if nothing can be written."""
    try:
        with tempfile.NamedTemporaryFile("w", dir=place.parent, encoding="utf-8", delete=False) as file:
            file.write(way)
        try:
            os.link(file.name, place)  # unlike a rename it fails where there is one already
        except FileExistsError:
            pass
        finally:
            Path(file.name).unlink()
        return place.read_text(encoding="utf-8")
    except OSError:
        return ""


def cpu_model() -> str:
    """Return the CPU's name."""
    lines: list[str] = []
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def compiler() -> str:
    """Return name and version of the C++ compiler that torch.compile uses."""
    from torch._inductor import cpp_builder

    info = cpp_builder.get_compiler_version_info(cpp_builder.get_cpp_compiler())
    found = re.search(r"(gcc|clang) version \d[\w.]*", info)
    return found[0] if found else info
