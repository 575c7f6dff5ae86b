"""The machine of a benchmark in words, and the peak memory of its process."""

from __future__ import annotations

import os
import platform
from datetime import date
from pathlib import Path

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def machine(device: str = "cpu") -> str:
    """Return date, device, threads, load, compiler and versions in one line."""
    import torch

    from trainer.optim.dadapt.choice import compiler, cpu_model

    if device != "cpu":
        name = torch.cuda.get_device_name()
    else:
        load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
        name = f"{cpu_model()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads{load}"
    try:
        found = compiler()
    except RuntimeError:  # torch's error where there is none
        found = "no compiler"
    return f"{date.today()}  {name}; {found}; torch {torch.__version__}, Python {platform.python_version()}"


def forget_peak(device: str = "cpu") -> bool:
    """Start a new peak of the process's memory; return False if the system does not count one."""
    import torch

    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        return True
    if _RESET.exists():
        _RESET.write_text("5", encoding="ascii")  # proc(5): 5 resets the peak resident set
    return _RESET.exists()


def held(device: str = "cpu") -> int:
    """Return the bytes in use: of tensors on a GPU, else resident."""
    import torch

    return torch.cuda.memory_allocated() if device != "cpu" else _status("VmRSS")


def peak(device: str = "cpu") -> int:
    """Return the highest number of bytes in use since `forget_peak`."""
    import torch

    return torch.cuda.max_memory_allocated() if device != "cpu" else _status("VmHWM")


def _status(key: str) -> int:
    lines = _STATUS.read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))
