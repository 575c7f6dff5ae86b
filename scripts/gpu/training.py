"""Speed and memory of training steps, by optimizer."""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from scripts.full_size import Steps, estimated, state_bytes
from scripts.gpu.job import Job, Result
from scripts.gpu.profiling import repeat, setting_of, summary

SHARE = 0.95
"""Share of the GPU's free memory in which the largest batch is tried."""

BATCHES = (4, 1, 16)
"""Images of a step, the most informative first."""


def training(job: Job, tell: Callable[[Result], None]) -> None:
    """Measure one optimizer's steps at each batch size."""
    setting = setting_of(job, job.argument)
    began = time.perf_counter()
    steps = Steps(setting)
    steps.wait()
    tell({"kind": "built", "seconds": time.perf_counter() - began, "trained": steps.trained})
    for images in (2,) if job.tiny else BATCHES:
        tell(_measured(steps, images, times=1 if job.tiny else 10))
        if images == setting.images:
            tell({"kind": "launches", "images": images, **_launches(steps)})
    if job.device == "cuda":
        tell({"kind": "waits", **_waits(steps)})


def largest(job: Job, tell: Callable[[Result], None]) -> None:
    """Measure the largest batch that fits the GPU, extrapolated from two that do; on the CPU a batch of 4."""
    steps = Steps(setting_of(job, job.argument))
    tell({"kind": "built", "trained": steps.trained})
    images = 4
    if job.device == "cuda":
        few, some = (_measured(steps, images, times=1)["allocated"] for images in (4, 16))
        free, _ = torch.cuda.mem_get_info(steps.device)
        holds = SHARE * (free + torch.cuda.memory_reserved(steps.device))
        images = int(4 + (holds - few) / ((some - few) / 12))
    while True:
        try:
            tell(_measured(steps, images, times=1))
            return _estimate(job, job.argument, images, tell)
        except torch.OutOfMemoryError:
            tell({"kind": "too large", "images": images})
        images -= max(1, images // 12)
        del steps  # its backward pass was cut short
        torch.cuda.empty_cache()
        steps = Steps(setting_of(job, job.argument))


def estimates(job: Job, tell: Callable[[Result], None]) -> None:
    """Report the memory estimate of every training step of the report; needs no GPU.

    The job's argument is the device to estimate for and the optimizers, separated by spaces.
    """
    device, *names = job.argument.split()
    for name in names[:1] if job.tiny else names:
        for images in (2,) if job.tiny else BATCHES:
            _estimate(job, name, images, tell, device=device)


def _estimate(job: Job, name: str, images: int, tell: Callable[[Result], None], **changes: Any) -> None:
    found = estimated(setting_of(job, name, images=images, **changes))
    tell({"kind": "estimate", "optimizer": name, "images": images, "bytes": found})


def _measured(steps: Steps, images: int, *, times: int) -> Result:
    """Return times and memory of steps of a batch size."""
    _forget_peak(steps.device)
    began = time.perf_counter()
    steps.step(steps.inputs(0, images))
    steps.wait()
    first = time.perf_counter() - began
    found = {"first": first, **repeat(steps, images, warm=min(2, times - 1), times=times, seconds=6)}
    return {
        "kind": "steps",
        "images": images,
        **found,
        **memory(steps.device),
        "state": state_bytes(steps.optimizers),
    }


def _launches(steps: Steps) -> Result:
    """Return kernel launches, GPU time and CPU time of one step."""
    from torch.profiler import ProfilerActivity, profile

    inputs = steps.inputs(0, steps.setting.images)
    activities = [ProfilerActivity.CUDA] if steps.device.type == "cuda" else [ProfilerActivity.CPU]
    with profile(activities=activities) as profiler:
        steps.step(inputs)
        steps.wait()
    events: Any = profiler.events()
    found = summary(events)
    before = time.process_time()
    steps.step(inputs)
    cpu = (time.process_time() - before) * 1e3
    steps.wait()
    return {"launches": found["launches"], "busy": found["busy"], "cpu": cpu}


def _waits(steps: Steps) -> Result:
    """Return how often one step waits for the device, and the lines with most waits."""
    inputs = steps.inputs(0, steps.setting.images)
    steps.wait()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            steps.step(inputs)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    # torch warns once that this mode is a prototype; that is no wait.
    lines = Counter(
        f"{Path(w.filename).name}:{w.lineno}" for w in caught if "called a synchronizing" in str(w.message)
    )
    return {"count": lines.total(), "where": [f"{line} ({count})" for line, count in lines.most_common(5)]}


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def memory(device: torch.device) -> dict[str, int]:
    """Return peak bytes of tensors and of the allocator, and bytes in use beyond the allocator."""
    if device.type != "cuda":
        return {}
    free, total = torch.cuda.mem_get_info(device)
    beside = total - free - torch.cuda.memory_reserved(device)
    peaks = {
        "allocated": torch.cuda.max_memory_allocated(device),
        "reserved": torch.cuda.max_memory_reserved(device),
    }
    return {**peaks, "beside": beside}
