"""The warning for a model of full size without a GPU."""

from types import SimpleNamespace
from typing import Any

import pytest

from scripts.full_size import empty_models
from tests.tiny import tiny_models
from trainer.planning import speed
from trainer.planning.speed import product_speed, slow_on_cpu


@pytest.mark.parametrize(
    ("checkpointing", "gflops", "duration"),
    [
        (True, 50, "3 days: 2,400 images at 3.2 TFLOP each"),  # 0.8034 TFLOP x 4 x 2400 / 35e9 = 2.55 days
        (False, 50, "2 days: 2,400 images at 2.4 TFLOP each"),
        (False, 300, "8 hours: 2,400 images at 2.4 TFLOP each"),
    ],
)
def test_sd_15_takes_days_on_a_cpu(monkeypatch, checkpointing, gflops, duration):
    monkeypatch.setattr(speed, "product_speed", lambda: gflops * 1e9)
    config: Any = SimpleNamespace(
        data=SimpleNamespace(resolutions=(512,)), parts=SimpleNamespace(gradient_checkpointing=checkpointing)
    )
    told = slow_on_cpu(config, empty_models(), 2400)
    assert told is not None and f"takes about {duration}" in told and f"{gflops} GFLOP/s" in told
    assert slow_on_cpu(config, tiny_models(), 2400) is None


def test_the_speed_of_this_cpu_is_one_that_a_cpu_has():
    assert 1e8 < product_speed() < 1e14
