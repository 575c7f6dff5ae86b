"""The meter: means, totals and speed, without reading the device between reports."""

from __future__ import annotations

import json
import math
import mmap

import pytest
import torch

from trainer.reporting.metrics import DATA_WAIT, IMAGES_PER_SECOND, MINUTES_PER_EPOCH, Meter, memory_in_use

LOSS, EPOCH = "loss/log_step", "loss/epoch"


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def meter(clock: Clock | None = None) -> Meter:
    return Meter(epoch_tags={LOSS: EPOCH}, clock=clock or Clock())


def loss(value: float) -> dict[str, torch.Tensor]:
    return {LOSS: torch.tensor(value)}


def test_means_weigh_every_image_alike_and_windows_begin_anew():
    m = meter()
    m.add(loss(1.0), images=8)
    m.add(loss(4.0), images=4)
    assert m.read()[LOSS] == 2.0
    m.add(loss(7.0), images=1)
    assert m.read()[LOSS] == 7.0
    assert m.read_epoch()[EPOCH] == pytest.approx((8 + 16 + 7) / 13)
    m.add(loss(3.0), images=2)
    assert m.read_epoch()[EPOCH] == 3.0


def test_a_report_without_steps_has_no_mean():
    m = meter()
    m.add(loss(1.0), images=1)
    m.read()
    assert m.read() == {}


def test_a_value_that_is_not_finite_is_left_out_of_the_mean():
    m = meter()
    for value in (1.0, math.nan, 3.0, math.inf):
        m.add(loss(value), images=1)
    assert m.read()[LOSS] == 2.0
    m.add(loss(math.nan), images=1)
    assert math.isnan(m.read()[LOSS])


def test_totals_are_never_reset():
    m = meter()
    for skipped in (0.0, 1.0):
        m.add(loss(1.0), images=1, totals={"optimizer/skipped steps": torch.tensor(skipped)})
        m.read()
    m.add(loss(1.0), images=1, totals={"optimizer/skipped steps": torch.tensor(1.0)})
    assert m.read()["optimizer/skipped steps"] == 2.0


def test_latest_values_may_be_tensors_or_numbers():
    m = meter()
    read = m.read({"optimizer/d unet": torch.tensor(1e-6, dtype=torch.float64), "lr/unet": 0.5})
    assert read == {"optimizer/d unet": 1e-6, "lr/unet": 0.5}


def test_speed_leaves_pauses_out_and_waiting_is_per_step():
    clock = Clock()
    m = meter(clock)
    for _ in range(2):
        with m.waiting():
            clock.now += 0.5
        clock.now += 1.5
        m.add(loss(1.0), images=8)
    with m.paused():
        clock.now += 100
    read = m.read()
    assert read[IMAGES_PER_SECOND] == 16 / 4
    assert read[DATA_WAIT] == 0.5
    assert m.read_epoch()[MINUTES_PER_EPOCH] == pytest.approx(104 / 60)
    clock.now += 60
    assert m.read_epoch()[MINUTES_PER_EPOCH] == pytest.approx(1)


def test_a_continued_run_reports_what_an_unbroken_one_does():
    values = torch.rand(20, generator=torch.Generator().manual_seed(0)).tolist()
    whole, first, second = meter(), meter(), meter()
    for place, value in enumerate(values):
        whole.add(loss(value), images=3 + place % 2, totals={"n": torch.tensor(1.0)})
        (first if place < 13 else second).add(
            loss(value), images=3 + place % 2, totals={"n": torch.tensor(1.0)}
        )
        if place == 12:
            second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert whole.read() == second.read()
    assert whole.read_epoch()[EPOCH] == second.read_epoch()[EPOCH]


def test_the_epochs_time_goes_on_where_it_was_saved():
    clock = Clock()
    first, second = meter(clock), meter(clock)
    clock.now = 60
    state = first.state_dict()
    clock.now = 1000  # the machine was off
    second.load_state_dict(state)
    clock.now += 30
    assert second.read_epoch()[MINUTES_PER_EPOCH] == pytest.approx(1.5)


def test_adding_a_step_reads_nothing_back():
    """On the meta device every read raises."""
    m = meter()
    with torch.device("meta"):
        for _ in range(3):
            m.add({LOSS: torch.zeros(())}, images=2, totals={"optimizer/skipped steps": torch.zeros(())})
    with pytest.raises((RuntimeError, NotImplementedError)):
        m.read()


def test_a_report_reads_each_device_once(monkeypatch: pytest.MonkeyPatch):
    m = meter()
    for _ in range(5):
        m.add({LOSS: torch.tensor(1.0), "b": torch.tensor(2.0)}, images=2, totals={"c": torch.tensor(1.0)})
    reads = []
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: reads.append(1) or [1.0] * self.numel())
    monkeypatch.setattr(torch.Tensor, "item", lambda self: pytest.fail("item() waits for the device"))
    m.read({"d": torch.tensor(0.0)})
    assert len(reads) == 1


def test_memory_on_the_cpu_is_the_process():
    before = memory_in_use(torch.device("cpu"))
    with mmap.mmap(
        -1, 2**27
    ) as block:  # pages of its own: memory from the allocator may be some that the process holds already
        block[:: mmap.PAGESIZE] = b"1" * (2**27 // mmap.PAGESIZE)
        assert memory_in_use(torch.device("cpu")) - before > 100 * 2**20
