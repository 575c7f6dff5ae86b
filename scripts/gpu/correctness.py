"""Correctness on the device: the GPU tests, and D-Adaptation's steps against eager ones on the CPU."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from scripts.full_size import optimizer_options
from scripts.gpu.job import Job, Result

ROOT = Path(__file__).resolve().parents[2]
D0 = 1e-6
COMPARED = ("dadapt_adam", "dadapt_adam8bit", "dadapt_adam8bit+fused")
SHAPES = ((1280, 1280, 3, 3), (2560, 1280), (320, 768), (320,), (77, 3))
"""Of the compared tensors, the first in channels_last: 18 million elements, enough to be compiled."""


def gpu_tests(job: Job, tell: Callable[[Result], None]) -> None:
    """Run the GPU tests; on the CPU, collect them."""
    import pytest

    os.chdir(ROOT)
    outcomes = _Outcomes(tell)
    collected = ["--collect-only", "tests/integration/test_gpu.py"] if job.device == "cpu" else ["tests"]
    code = pytest.main(["-p", "no:cacheprovider", "-m", "gpu", "-q", *collected], plugins=[outcomes])
    tell({"kind": "tests", "collected": outcomes.collected, **outcomes.counts})
    if code:
        raise RuntimeError(
            f"pytest ended with exit code {int(code)}; its output is in {job.folder / 'output.log'}"
        )


class _Outcomes:
    """A pytest plugin that counts outcomes and reports every failure."""

    def __init__(self, tell: Callable[[Result], None]) -> None:
        self.counts: Counter[str] = Counter()
        self.collected = 0
        self._tell = tell

    def pytest_collection_finish(self, session: Any) -> None:
        self.collected = len(session.items)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.counts[report.outcome] += 1
        if report.failed:
            self._tell(
                {
                    "kind": "failure",
                    "test": report.nodeid,
                    "reason": str(report.longrepr).strip().splitlines()[-1][:200],
                }
            )


def agreement(job: Job, tell: Callable[[Result], None]) -> None:
    """Take the same steps on the device and eagerly on the CPU; report the differences of d and weights."""
    shapes = [tuple(min(side, 16) for side in shape) for shape in SHAPES] if job.tiny else SHAPES
    steps = 2 if job.tiny else 4
    for name in COMPARED:
        generator = torch.Generator().manual_seed(0)
        start = [0.02 * torch.randn(shape, generator=generator) for shape in shapes]
        # Gradients share a direction, so d grows.
        ways = [torch.randn(shape, generator=generator) for shape in shapes]
        gradients = [
            [1e-3 * (way + 0.1 * torch.randn(way.shape, generator=generator)) for way in ways]
            for _ in range(steps)
        ]
        there, d_there = _stepped(name, "cpu", start, gradients, eager=True)
        here, d_here = _stepped(name, job.device, start, gradients, eager=False)
        moved = _length(after - before for after, before in zip(there, start, strict=True))
        apart = _length(one - other for one, other in zip(here, there, strict=True))
        tell(
            {
                "kind": "agreement",
                "optimizer": name,
                "steps": steps,
                "grown": d_there / D0,
                "d": d_here / d_there - 1,
                "weights": apart / moved,
            }
        )


def _stepped(
    name: str, device: str, start: list[torch.Tensor], gradients: list[list[torch.Tensor]], *, eager: bool
) -> tuple[list[torch.Tensor], float]:
    """Return the weights, on the CPU, and d after a step for each set of gradients."""
    weights = [torch.nn.Parameter(_placed(tensor, device)) for tensor in start]
    kind, _, fused = name.partition("+")
    optimizer: Any = optimizer_options(kind, fused=bool(fused)).build(weights, 1.0)
    if eager:
        optimizer.compile = False
    for step in gradients:
        if fused:
            optimizer.gate(torch.ones((), dtype=torch.bool, device=device))
        pairs = zip(weights, (_placed(gradient, device) for gradient in step), strict=True)
        torch.stack([(weight * gradient).sum() for weight, gradient in pairs]).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [weight.detach().cpu() for weight in weights], float(optimizer.d)


def _placed(tensor: torch.Tensor, device: str) -> torch.Tensor:
    layout = torch.channels_last if tensor.ndim == 4 else torch.contiguous_format
    return tensor.to(device, memory_format=layout, copy=True)


def _length(tensors: Any) -> float:
    return sum(float(tensor.double().square().sum()) for tensor in tensors) ** 0.5
