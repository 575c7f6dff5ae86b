"""Profile of a training step: its parts, kernel launches, GPU time, kernels and host operators."""

from __future__ import annotations

import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from typing import Any

import torch
from torch._C._autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

from scripts.full_size import Setting, Steps, Timing, without_checkpointing
from scripts.gpu.job import Job, Result

TOP = 15
"""Longest list of kernels or operators."""


def setting_of(job: Job, optimizer: str, **changes: Any) -> Setting:
    """Return the report's step: 512 px, batch 4, 16-bit autocast, gradient checkpointing, cached latents."""
    setting = Setting(optimizer=optimizer, device=job.device)
    if job.tiny:
        setting = replace(setting, resolution=64, images=2, bundled=True)
    return replace(setting, **changes)


def repeat(
    steps: Steps, images: int, *, warm: int, times: int, seconds: float = float("inf")
) -> dict[str, float]:
    """Return the medians of `times` steps, in milliseconds, after `warm` uncounted ones.

    After `seconds` no further step starts; at least one is counted.
    """
    inputs = steps.inputs(0, images)
    for _ in range(warm):
        steps.step(inputs)
    steps.wait()
    began, found = time.perf_counter(), list[Timing]()
    while len(found) < times and (not found or time.perf_counter() - began < seconds):
        found.append(steps.timed(inputs))
    return {
        part: round(statistics.median(asdict(timing)[part] for timing in found), 3)
        for part in asdict(found[0])
    }


def profile_step(job: Job, tell: Callable[[Result], None]) -> None:
    """Time the AdamW8bit step as configured and with one change each; trace it."""
    optimizer = "adamw" if job.tiny else "adamw8bit"  # bitsandbytes is slow on a CPU
    setting = setting_of(job, optimizer)
    began = time.perf_counter()
    steps = Steps(setting)
    steps.wait()
    tell({"kind": "built", "seconds": time.perf_counter() - began, "trained": steps.trained})
    warm, times = (0, 1) if job.tiny else (3, 5)

    def timed(
        change: str, context: AbstractContextManager[Any] | None = None, images: int = setting.images
    ) -> None:
        with context or nullcontext():
            tell(
                {
                    "kind": "variant",
                    "change": change,
                    "images": images,
                    **repeat(steps, images, warm=warm, times=times, seconds=5),
                }
            )

    timed("as configured")
    tell({"kind": "trace", "change": "as configured", **traced(steps)})
    timed("no gradient checkpointing", without_checkpointing(steps))
    if not job.tiny:
        with without_checkpointing(steps):
            tell({"kind": "trace", "change": "no gradient checkpointing", **traced(steps)})
    usual = steps.autocast
    if steps.precision.dtype is not None:
        steps.autocast = lambda: torch.autocast(job.device, dtype=steps.precision.dtype)
        timed("autocast keeps the cast weights")
        steps.autocast = usual
    timed("four times the images", images=4 * setting.images)
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    timed("cudnn.benchmark")
    torch.backends.cudnn.benchmark = before
    steps.networks.unet.to(memory_format=torch.contiguous_format)
    # One channels_last input makes torch convolve in that format, whatever the weights' format.
    steps.networks.unet.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(), *inputs[1:]))
    timed("not channels last")
    timed("neither channels last nor gradient checkpointing", without_checkpointing(steps))
    began = time.perf_counter()
    steps.objective.draw(steps.batch(1, setting.images))
    tell({"kind": "drawing", "milliseconds": (time.perf_counter() - began) * 1e3})
    if job.device == "cuda":
        del steps
        torch.cuda.empty_cache()
    other = Steps(replace(setting, optimizer=f"{optimizer}+bf16"))
    tell(
        {
            "kind": "variant",
            "change": "bf16 weights",
            "images": setting.images,
            **repeat(other, setting.images, warm=warm, times=times),
        }
    )


def traced(steps: Steps) -> Result:
    """Trace one step after an untraced one."""
    inputs = steps.inputs(0, steps.setting.images)
    steps.step(inputs)
    steps.wait()
    on_cuda = steps.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    with profile(activities=activities) as profiler:
        began = time.perf_counter()
        steps.step(inputs)
        steps.wait()
        wall = time.perf_counter() - began
    events: Any = profiler.events()
    return {"wall": wall * 1e3, **summary(list(events))}


def summary(events: Iterable[FunctionEvent]) -> Result:
    """Return a trace's kernels and host operators (by own time), launches and GPU time; milliseconds."""
    kernels, launches = list[FunctionEvent](), 0
    device_time: dict[str, float] = defaultdict(float)
    host_time: dict[str, float] = defaultdict(float)
    counts: Counter[tuple[str, str]] = Counter()
    for event in events:
        if event.device_type == DeviceType.CPU:
            host_time[event.name] += event.self_cpu_time_total / 1e3
            counts["host", event.name] += 1
            launches += "LaunchKernel" in event.name
        elif not event.is_user_annotation:
            kernels.append(event)
            device_time[event.name] += event.time_range.elapsed_us() / 1e3
            counts["device", event.name] += 1
    return {
        "launches": launches,
        "operators": sum(count for (where, _), count in counts.items() if where == "host"),
        "busy": busy((event.time_range.start, event.time_range.end) for event in kernels) / 1e3,
        "kernels": _top(device_time, counts, "device"),
        "host": _top(host_time, counts, "host"),
    }


def busy(spans: Iterable[tuple[float, float]]) -> float:
    """Return the length of the union of some spans of time."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def _top(times: dict[str, float], counts: Counter[tuple[str, str]], where: str) -> list[Result]:
    longest = sorted(times, key=times.__getitem__, reverse=True)[:TOP]
    return [
        {"name": name, "milliseconds": round(times[name], 3), "count": counts[where, name]}
        for name in longest
    ]
