"""Saving a run: files written and kept, errors, and the disk space estimate."""

import errno
import json
import re
from pathlib import Path

import pytest
import torch

from tests.tiny import tiny_models
from trainer.checkpoints import saver as saving
from trainer.checkpoints.artifact import WholeModel
from trainer.checkpoints.format import TrainState, resume_problem
from trainer.checkpoints.listing import checkpoints
from trainer.checkpoints.options import SaveOptions
from trainer.checkpoints.saver import Saver, SavingError
from trainer.config.schema import optimizer_classes
from trainer.optim.optimizer_set import OptimizerSet


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


class Bench:
    """A saver of tiny networks that have made a step with AdamW, and what it says."""

    def __init__(self, tmp_path, optimizer="adamw", **options):
        self.models = tiny_models()
        self.models.vae.requires_grad_(False)
        self.parameters = {
            "unet": list(self.models.unet.parameters()),
            "text encoder": list(self.models.text_encoder.parameters()),
        }
        chosen = optimizer_classes()[optimizer](lr=1e-3)
        self.optimizers = OptimizerSet(
            dict.fromkeys(self.parameters, chosen), self.parameters, total_steps=10
        )
        for parameter in (*self.parameters["unet"], *self.parameters["text encoder"]):
            parameter.grad = torch.ones_like(parameter)
        self.optimizers.step(torch.tensor(0.0))
        self.run, self.said, self.clock, self.state = (
            tmp_path / "demo-20260101-000000",
            [],
            Clock(),
            TrainState(),
        )
        self.saver = Saver(
            SaveOptions(**options),
            run=self.run,
            project="demo",
            artifact=WholeModel(self.models),
            state=self.state,
            parts={"optimizers": self.optimizers},
            about={"project": "demo"},
            metadata={"sd_dadapt.train.json": "{}"},
            say=self.said.append,
            clock=self.clock,
        )

    def save(self, step, kind=""):
        self.state.step = step
        return self.saver.save(kind)

    @property
    def names(self):
        return (
            sorted(path.name for path in (self.run / "ckpts").iterdir())
            if (self.run / "ckpts").exists()
            else []
        )


def test_what_is_written_is_whole_and_the_wait_is_told(tmp_path):
    bench = Bench(tmp_path)
    folder, file = bench.save(5)
    assert resume_problem(folder) is None and file.is_file()
    assert len(bench.said) == 1 and re.fullmatch(
        r"step 5: saved .*; training waited \d+\.\d s", bench.said[0]
    )
    from trainer.models.tensor_file import read_metadata

    header = read_metadata(file)
    assert (header["sd_dadapt.run"], header["sd_dadapt.step"], header["modelspec.title"]) == (
        bench.run.name,
        "5",
        "demo-ep00-gs00005",
    )
    assert header["sd_dadapt.train.json"] == "{}"


@pytest.mark.parametrize(
    ("options", "kind", "names"),
    [
        ({}, "", ["demo-ep02-gs00007", "demo-ep02-gs00007.safetensors"]),
        ({"save_format": "diffusers"}, "last", ["last-demo-ep02-gs00007"]),
        ({"no_save_ckpt": True}, "interrupted", ["interrupted-demo-ep02-gs00007"]),
        (
            {"save_format": "single"},
            "errored",
            ["errored-demo-ep02-gs00007", "errored-demo-ep02-gs00007.safetensors"],
        ),
        ({"no_prepend_last": True, "save_format": "diffusers"}, "last", ["demo-ep02-gs00007"]),
        ({"no_prepend_last": True, "save_format": "diffusers"}, "errored", ["errored-demo-ep02-gs00007"]),
    ],
)
def test_names_say_why_and_where(tmp_path, options, kind, names):
    bench = Bench(tmp_path, **options)
    bench.state.epoch, bench.state.step_in_epoch = 1, 3
    bench.save(7, kind)
    assert bench.names == names


@pytest.mark.parametrize(("full", "dtype"), [(True, torch.float32), (False, torch.float16)])
def test_the_single_file_is_fp16_unless_full_precision_is_asked_for_and_goes_where_it_should(
    tmp_path, full, dtype
):
    from trainer.models.tensor_file import TensorFile

    bench = Bench(
        tmp_path, save_full_precision=full, save_ckpt_dir=str(tmp_path / "shelf"), save_format="single"
    )
    written = bench.save(1)
    assert written[1].parent == tmp_path / "shelf"
    assert {tensor.dtype for tensor in TensorFile(written[1]).values() if tensor.is_floating_point()} == {
        dtype
    }


def test_an_untimely_end_saves_only_what_is_not_saved_yet(tmp_path):
    bench = Bench(tmp_path, save_format="diffusers")
    assert bench.save(0, "interrupted") == [], "nothing was trained"
    bench.save(5)
    assert bench.save(5, "interrupted") == bench.save(5, "errored") == []
    assert bench.save(6, "interrupted") and bench.names == [
        "demo-ep00-gs00005",
        "interrupted-demo-ep00-gs00006",
    ]


def test_rotation_follows_a_whole_checkpoint(tmp_path):
    bench = Bench(tmp_path, keep_last_n=2)
    for step in (1, 2, 3):
        bench.save(step)
    assert bench.names == [f"demo-ep00-gs0000{step}{end}" for step in (2, 3) for end in ("", ".safetensors")]
    assert [(folder / "resume").is_dir() for folder in checkpoints(bench.run)] == [True, True]


def test_a_checkpoint_that_cannot_be_deleted_is_a_note(tmp_path, monkeypatch):
    bench = Bench(tmp_path, keep_last_n=1)
    bench.save(1)

    def refuse(*_):
        raise PermissionError(13, "used by another process", "demo-ep00-gs00001")

    monkeypatch.setattr("trainer.checkpoints.listing.drop", refuse)
    assert bench.save(2)
    assert "could not be deleted (used by another process: demo-ep00-gs00001)" in bench.said[-1]


def test_without_room_nothing_is_written_training_goes_on_and_the_third_time_ends_it(tmp_path, monkeypatch):
    bench = Bench(tmp_path)
    good = bench.save(1)[0]
    free = [1 << 20]
    monkeypatch.setattr(saving, "free_bytes", lambda _: free[0])
    before = bench.names
    assert bench.save(2) == []
    assert "MiB are needed and 1.0 MiB are free on the disk of" in bench.said[-1]
    assert (
        f"the last good one is {good}; training continues (1 of 3)" in bench.said[-1]
        and bench.names == before
    )
    free[0] = 1 << 40
    assert bench.save(3), "room was made"
    free[0] = 0
    assert bench.save(4) == [] == bench.save(5), "the count began anew"
    with pytest.raises(SavingError, match="third time in a row") as ended:
        bench.save(6)
    assert ended.value.exit_code == 1
    assert resume_problem(checkpoints(bench.run)[0]) is None and not [
        name for name in bench.names if name.startswith(".")
    ]


def test_the_last_checkpoint_of_a_run_must_be_written(tmp_path, monkeypatch):
    bench = Bench(tmp_path)
    monkeypatch.setattr(saving, "free_bytes", lambda _: 0)
    advice = "free disk space or choose another folder, and"
    with pytest.raises(SavingError, match=f"there is none yet; {advice} train once more") as ended:
        bench.save(9, "last")
    assert "resume" not in str(ended.value), "there is nothing to resume from"


def test_a_last_checkpoint_that_fails_leaves_the_one_before_to_resume_from(tmp_path, monkeypatch):
    bench = Bench(tmp_path)
    bench.save(1)
    monkeypatch.setattr(saving, "free_bytes", lambda _: 0)
    with pytest.raises(SavingError, match=f"and resume with --resume_ckpt {bench.run}"):
        bench.save(9, "last")


def test_a_disk_that_fills_up_while_writing_keeps_the_last_good_one(tmp_path):
    """A limit of the system on file sizes: the write fails in the middle of the weights."""
    resource = pytest.importorskip("resource")
    bench = Bench(tmp_path)
    good = bench.save(1)[0]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limits[1]))
    try:
        assert bench.save(2) == []
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "File too large" in bench.said[-1] and "training continues (1 of 3)" in bench.said[-1]
    assert bench.names == [good.name, f"{good.name}.safetensors"] and resume_problem(good) is None
    assert bench.save(3)


def test_a_single_file_that_cannot_be_written_leaves_the_folder(tmp_path, monkeypatch):
    bench = Bench(tmp_path)

    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("trainer.checkpoints.artifact.save_single_file", fail)
    (folder,) = bench.save(1)
    assert resume_problem(folder) is None and bench.names == [folder.name]
    assert f"{folder} is saved, its single file could not be written (Input/output error)" in bench.said[-1]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_never_saved(tmp_path, value):
    bench = Bench(tmp_path)
    good = bench.save(1)[0]
    with torch.no_grad():
        bench.parameters["unet"][3].view(-1)[-1] = value
    with pytest.raises(SavingError, match=f"weights of the unet are not finite.*last good one is {good}"):
        bench.save(2, "last")
    assert checkpoints(bench.run) == [good]


def test_minutes_are_counted_by_a_clock_that_does_not_jump(tmp_path, monkeypatch):
    bench = Bench(tmp_path, ckpt_every_n_minutes=2.0)
    assert not bench.saver.due()
    monkeypatch.setattr("time.time", lambda: 4e9)
    assert not bench.saver.due()
    bench.clock.now += 121
    assert bench.saver.due()
    bench.save(1)
    assert not bench.saver.due()
    assert not Bench(tmp_path).saver.due()


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="needs Linux's count of the most memory"
)
def test_no_second_copy_of_the_state_is_made(tmp_path):
    """Write 256 MiB of state in tensors of 16 MiB: the process may grow by little more than one of them."""
    from trainer.state_file import write_state

    def status(key):
        return (
            int(
                next(
                    line
                    for line in Path("/proc/self/status").read_text().splitlines()
                    if line.startswith(key)
                ).split()[1]
            )
            * 1024
        )

    state = {str(number): torch.full((1 << 22,), float(number)) for number in range(16)}
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    write_state(state, tmp_path / "state")
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) > 1 << 28
    assert status("VmHWM") - before < 3 << 24
    assert json.loads((tmp_path / "state.json").read_text())["3"] == {"$tensor": "state.3"}
