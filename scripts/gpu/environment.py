"""The machine of the report."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from scripts.gpu.job import Job, Result

PACKAGES = (
    "torch",
    "triton",
    "diffusers",
    "transformers",
    "accelerate",
    "bitsandbytes",
    "dadaptation",
    "numpy",
)


def environment(job: Job, tell: Callable[[Result], None]) -> None:
    """Report device, versions and compiler, then measured speeds of copies and matrix products."""
    tell({"kind": "machine", **machine(job.device)})
    tell({"kind": "speed", **speed(job)})


def machine(device: str) -> Result:
    """Return the machine's device and versions, and the versions that differ from the pinned ones."""
    versions = {name: known for name in PACKAGES if (known := _version(name))}
    found: Result = {
        "python": platform.python_version(),
        "system": platform.platform(),
        "threads": torch.get_num_threads(),
        "versions": versions,
        "differs": _differences(versions),
        "compiler": next((name for name in ("cc", "gcc", "clang", "cl") if shutil.which(name)), None),
    }
    if device != "cuda":
        return found
    properties = torch.cuda.get_device_properties(0)
    return {
        **found,
        "gpu": properties.name,
        "memory": properties.total_memory,
        "capability": f"{properties.major}.{properties.minor}",
        "processors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "driver": _driver(),
    }


def speed(job: Job) -> Result:
    """Return GB/s of a copy (bytes read and written) and TFLOPS of a product of square matrices."""
    numel, side = (1 << 20, 256) if job.tiny else (1 << 28, 8192)
    source = torch.zeros(numel, device=job.device)
    target = torch.empty_like(source)
    dtype = torch.bfloat16 if job.device == "cuda" else torch.float32
    matrix = torch.ones(side, side, device=job.device, dtype=dtype)
    copying = _best(job, lambda: target.copy_(source))
    product = _best(job, lambda: matrix @ matrix)
    return {
        "copy": 8 * numel / copying / 1e9,
        "product": 2 * side**3 / product / 1e12,
        "product_dtype": str(dtype).removeprefix("torch."),
    }


def _best(job: Job, run: Callable[[], object]) -> float:
    seconds = []
    for _ in range(7):
        began = time.perf_counter()
        run()
        if job.device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return min(seconds[2:])


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _differences(versions: dict[str, str]) -> list[str]:
    """Return the packages whose version differs from that in requirements.txt."""
    text = (Path(__file__).resolve().parents[2] / "requirements.txt").read_text(encoding="utf-8")
    pinned = dict(re.findall(r"^([\w.-]+)==([^\s;]+)", text, re.MULTILINE))
    return [
        f"{name} {found} (pinned: {pinned[name]})"
        for name, found in versions.items()
        if name in pinned and found.partition("+")[0] != pinned[name].partition("+")[0]
    ]


def _driver() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return (
        subprocess.run(command, capture_output=True, text=True, check=False).stdout.partition("\n")[0].strip()
        or None
    )
