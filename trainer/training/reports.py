"""Reports: the numbers since the last one, read from the device, recorded and shown."""

from __future__ import annotations

import math
from typing import Any

from trainer.reporting.console import Report
from trainer.reporting.metrics import memory_in_use
from trainer.reporting.tags import (
    D_HAT,
    DECAYED,
    GRAD_SCALE,
    IMAGES_PER_SECOND,
    LOSS,
    NOT_FINITE,
    RAM,
    RATE,
    SKIPPED,
    UNCAPPED,
    VRAM,
    D,
)
from trainer.training.health import check_gradients, check_progress, check_ranks
from trainer.training.run import Run

_TAGS = {"d": D, "d_hat": D_HAT, "d*lr": UNCAPPED, "decayed": DECAYED, "not finite": NOT_FINITE}
"""Tags of the optimizers' measures besides the rate."""


def report(run: Run) -> None:
    """Read, record and show the numbers since the last report.

    Only here does the host wait for the device.

    Raises:
        UserError: no step has been finite for `MOST_SKIPPED` steps, ranks differ, or a fused backward met a
            gradient that was not finite.
    """
    records, precision, step = run.records, run.learner.precision, run.state.step
    numbers = records.meter.read(_measures(run))
    loss, memory = numbers.get(LOSS, math.nan), memory_in_use(precision.device)
    numbers[VRAM if precision.device.type == "cuda" else RAM] = memory / 2**30
    records.loggers.scalars(numbers, step)
    rates = {network: numbers[f"{RATE}{network}"] for network in run.learner.optimizers.parameters}
    records.console.report(Report(loss, rates, numbers.get(IMAGES_PER_SECOND), memory))
    for network in [network for network in records.watch.networks if network in rates]:
        d, d_hat = numbers[f"{D}{network}"], numbers.get(f"{D_HAT}{network}", 0.0)
        for sentence in records.watch.look(network, step=step, d=d, d_hat=d_hat):
            records.console.event(sentence)
    run.evaluation.loss_watch.trained(loss)
    check_ranks(run)
    check_gradients(run)
    check_progress(run, int(numbers.get(SKIPPED, 0)))


def _measures(run: Run) -> dict[str, Any]:
    """Return the optimizers' own numbers by tag, as device tensors where they are on the device."""
    latest: dict[str, Any] = {}
    for network, measures in run.learner.optimizers.measures().items():
        latest[f"{RATE}{network}"] = measures["rate"]
        for name, tag in _TAGS.items():
            if name in measures:
                latest[f"{tag}{network}"] = measures[name]
    if run.learner.precision.scaler is not None:
        latest[GRAD_SCALE] = run.learner.precision.scaler.get_scale()
    return latest
