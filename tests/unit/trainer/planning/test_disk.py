"""The disk space that checkpoints take, before the first is written."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.unit.trainer.checkpoints.test_saver import Bench
from trainer.checkpoints.artifact import WholeModel
from trainer.checkpoints.options import SaveOptions
from trainer.config.schema import optimizer_classes
from trainer.models.options import EmaOptions
from trainer.models.pipeline import Part
from trainer.planning import disk
from trainer.planning.disk import DiskPlan, plan_disk, state_bytes


@pytest.mark.parametrize(
    ("options", "saves", "kept", "resumable", "more"),
    [
        ({}, 4, 4, 2, 1),
        ({}, 1, 1, 1, 0),
        ({"keep_last_n": 1}, 4, 1, 1, 1),
        ({"keep_last_n": 2}, 4, 2, 2, 1),
        ({"keep_last_n": 2, "keep_resume_n": 1}, 4, 2, 1, 1),
        ({"save_optimizer": True}, 4, 4, 4, 0),
        ({"keep_resume_n": 3}, 2, 2, 2, 0),
        ({"keep_last_n": 2, "save_optimizer": True}, 9, 2, 2, 1),
        ({"keep_best": True}, 4, 5, 2, 1),
    ],
)
def test_the_fullest_moment(options, saves, kept, resumable, more):
    plan = DiskPlan(SaveOptions(**options), folder=100, single=50, resume=7, saves=saves)
    assert plan.most == kept * 150 + resumable * 7 + more * 157
    assert replace(plan, beside=1000).most == plan.most + 1000, (
        "what the base has beside the networks is kept once"
    )


def test_single_files_alone_keep_folders_for_resuming_only():
    plan = DiskPlan(SaveOptions(save_format="single"), folder=100, single=50, resume=7, saves=4)
    assert plan.most == 2 * 107 + 4 * 50 + 157


def test_a_run_says_at_once_that_its_checkpoints_will_not_fit(monkeypatch, tmp_path):
    plan = DiskPlan(SaveOptions(keep_resume_n=1), folder=1 << 30, single=1 << 29, resume=1 << 28, saves=3)
    for free, resumed, lacks in [
        (8 << 30, False, None),
        (3 << 30, False, "6.5 GiB are needed for 3 checkpoints and 3.0 GiB are free"),
        (3 << 30, True, None),
        (1 << 30, True, "1.8 GiB are needed for the next checkpoint and 1.0 GiB are free"),
    ]:
        monkeypatch.setattr(disk, "free_bytes", lambda _, free=free: free)
        told = plan.shortage(tmp_path, resumed=resumed)
        assert (told is None) if lacks is None else (told is not None and lacks in told), told
    elsewhere = replace(plan, options=SaveOptions(save_ckpt_dir="models"))
    assert elsewhere.shortage(tmp_path, resumed=True) == (
        "disk: 1.2 GiB are needed for the next checkpoint and 1.0 GiB are free where logdir is; make space "
        "while the run trains, or set save_format or keep_last_n"
    )


@pytest.mark.parametrize("optimizer", ["adamw", "dadapt_adam", "dadapt_adam_reference"])
def test_what_is_told_before_is_what_is_written(tmp_path, optimizer):
    bench = Bench(tmp_path, optimizer=optimizer)
    folder, file = bench.save(1)
    chosen = optimizer_classes()[optimizer](lr=1e-3)
    config: Any = SimpleNamespace(
        saving=SaveOptions(save_every_n_epochs=2),
        optimizers=SimpleNamespace(unet=chosen, text_encoder=chosen),
        loop=SimpleNamespace(max_epochs=7),
        ema=EmaOptions(),
    )
    counts = {
        name: Part(*(sum(parameter.numel() for parameter in group),) * 2, "everything")
        for name, group in bench.parameters.items()
    }
    plan = plan_disk(config, WholeModel(bench.models), counts, torch.float32)
    assert plan.saves == 4
    weights = sum(
        path.stat().st_size
        for part in ("unet", "text_encoder", "vae")
        for path in (folder / part).glob("*.safetensors")
    )
    header = 120 * 900  # a line for each tensor
    assert plan.folder <= weights <= plan.folder + header
    assert (
        plan.single <= file.stat().st_size <= plan.single + header + 60_000
    )  # and the tokenizer's vocabulary
    state = (folder / "resume" / "training.safetensors").stat().st_size
    assert plan.resume <= state * 1.01 <= (plan.resume + 3 * header) * 1.01


def test_eight_bit_state_takes_two_bytes():
    classes = optimizer_classes()
    assert state_bytes(classes["adamw8bit"](lr=1e-3)) == pytest.approx(2.06, abs=0.02)
    assert state_bytes(classes["dadapt_adam8bit"]()) == pytest.approx(2.07, abs=0.01)
    assert state_bytes(classes["dadapt_adam8bit"](fused_backward=True)) == pytest.approx(2.07, abs=0.01)


def test_the_plan_in_words(tmp_path, monkeypatch):
    plan = DiskPlan(
        SaveOptions(ckpt_every_n_minutes=30), folder=4 << 30, single=2 << 30, resume=2 << 30, saves=3
    )
    monkeypatch.setattr(disk, "free_bytes", lambda _: 32 << 30)
    monkeypatch.setattr(disk, "writing_speed", lambda _: 1e9)
    (_, sizes), (_, room) = plan.rows(tmp_path)
    assert sizes.startswith(
        "8.0 GiB: 4.0 GiB the folder + 2.0 GiB single files + 2.0 GiB to resume from it; training waits "
    )
    assert sizes.endswith("s or more for it, at the 1,000 MB/s of a probe just now")
    assert room == "30.0 GiB for 3 of them, and one every 30 minutes, of 32.0 GiB that are free"
    monkeypatch.setattr(disk, "free_bytes", lambda _: 20 << 30)

    def fail(_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(disk, "writing_speed", fail)
    (_, sizes), (_, room) = plan.rows(tmp_path)
    assert "could not be measured (Permission denied)" in sizes and room.endswith(
        "of 20.0 GiB that are free: not enough"
    )
