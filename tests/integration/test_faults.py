"""Faults injected into whole runs; docs/resume-and-faults.md has a row for each."""

import errno
import math
import multiprocessing
import os
import shutil
import signal
import time
from contextlib import nullcontext

import psutil
import pytest
import torch

import train
from tests.runs import ADAMW, COMMAND, DADAPT, FUSED, run_of, same_run, scalars, unbroken, uncut, write
from trainer.checkpoints.format import resume_problem
from trainer.checkpoints.listing import checkpoints

SETTINGS = {
    "max_epochs": 2,
    "sample_steps": 100,
    "fixed_loss_images": 0,
    "first_samples": False,
    "save_every_n_epochs": None,
    "save_format": "diffusers",
}
LAST = "last-tiny-ep02-gs00006"


def at_step(monkeypatch, step, act):
    """Do something when optimizer step `step`, counted from 1, begins; it may take the optimizers."""
    import inspect

    import trainer.training.loop

    real = trainer.training.loop.train_step

    def train_step(*arguments, **keywords):
        if keywords["step"] + 1 == step:
            act(*arguments[3:4] if inspect.signature(act).parameters else ())
        return real(*arguments, **keywords)

    monkeypatch.setattr(trainer.training.loop, "train_step", train_step)


def poison(monkeypatch, steps, value, where="loss"):
    """Make loss or gradients of some steps, counted from 1, NaN or infinite."""
    import trainer.training.loop
    from trainer.diffusion.objective import Objective

    real, step, now = Objective.losses, trainer.training.loop.train_step, []

    def losses(self, *arguments, **keywords):
        loss_B = real(self, *arguments, **keywords)
        if now and now[-1] in steps:
            if where == "loss":
                return loss_B * value
            loss_B.register_hook(lambda gradient: gradient * value)
        return loss_B

    def train_step(*arguments, **keywords):
        now.append(keywords["step"] + 1)
        result = step(*arguments, **keywords)
        now.clear()
        return result

    monkeypatch.setattr(Objective, "losses", losses)
    monkeypatch.setattr(trainer.training.loop, "train_step", train_step)


def resumes_to_the_bit(workplace):
    assert train.main(["--resume_ckpt", "findlast"]) == 0
    same_run(*(run / "ckpts" / LAST for run in (uncut(workplace), run_of(workplace))))


def test_out_of_memory_keeps_the_steps_before_and_names_the_cheapest_key(workplace, monkeypatch, capsys):
    write(workplace, DADAPT, **SETTINGS)
    with monkeypatch.context() as patch:

        def fail():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

        at_step(patch, 5, fail)
        assert train.main([]) == 1
    told = capsys.readouterr()
    assert [path.name for path in checkpoints(run_of(workplace))] == ["errored-tiny-ep02-gs00004"]
    lines = told.err.splitlines()
    assert lines[0].startswith(
        "Memory has run out in step 5 (CUDA out of memory. Tried to allocate 20.00 MiB.). Where it is:"
    )
    assert lines[1].startswith("  unet         weights 0.2 MiB, gradients 0.2 MiB, optimizer state 0.6 MiB")
    assert lines[-1].startswith("Set gradient_checkpointing to true") and "Traceback" not in told.err
    assert f"Resume with: {COMMAND} --resume_ckpt logs/" in unbroken(told.out)
    resumes_to_the_bit(workplace)


def test_out_of_memory_while_the_optimizer_works_keeps_nothing_of_that_step(workplace, monkeypatch, capsys):
    write(workplace, ADAMW, **SETTINGS | {"save_every_n_epochs": 1})
    calls = []
    real = torch.optim.AdamW.step

    def step(self, *arguments, **keywords):
        calls.append(1)
        if len(calls) == 10:  # the text encoder's in step 5: the UNet has made its step
            raise MemoryError
        return real(self, *arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step)
        assert train.main([]) == 1
    assert "while weights were updated, so no checkpoint is saved of this step" in capsys.readouterr().out
    assert [path.name for path in checkpoints(run_of(workplace))] == ["tiny-ep01-gs00003"]
    resumes_to_the_bit(workplace)


def test_out_of_memory_before_the_first_step_says_which_key_to_change(workplace, monkeypatch, capsys):
    write(workplace, ADAMW, **SETTINGS, gradient_checkpointing=True)

    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("trainer.run.networks.place", fail)
    assert train.main([]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "Memory has run out before the first step (CUDA out of memory.).",
        "Set batch_size to 1 and grad_accum to 2: the same images a step.",
    ]
    assert not list((workplace / "logs").glob("tiny-*"))


def test_an_error_that_is_a_bug_keeps_its_traceback_and_the_steps(workplace, monkeypatch):
    write(workplace, FUSED, **SETTINGS)
    with monkeypatch.context() as patch:

        def fail():
            raise ZeroDivisionError("a bug")

        at_step(patch, 3, fail)
        with pytest.raises(ZeroDivisionError, match="a bug"):
            train.main([])
    assert [path.name for path in checkpoints(run_of(workplace))] == ["errored-tiny-ep01-gs00002"]
    resumes_to_the_bit(workplace)


@pytest.mark.parametrize("optimizer", [DADAPT, ADAMW, FUSED], ids=["dadapt", "adamw", "fused"])
def test_a_loss_that_is_nan_once_skips_that_step_and_is_counted(workplace, monkeypatch, capsys, optimizer):
    write(workplace, optimizer, **SETTINGS)
    poison(monkeypatch, {4}, float("nan"))
    assert train.main([]) == 0
    assert (
        "Note: the gradients of 1 of the last 2 steps were not finite, "
        "so these steps changed nothing (1 of 4 in all)." in (capsys.readouterr().out)
    )
    assert scalars(run_of(workplace))["optimizer/skipped steps"] == {1: 0, 2: 0, 4: 1, 6: 1}
    assert checkpoints(run_of(workplace))[0].name == LAST


def test_infinite_gradients_without_end_stop_the_run_with_images_and_timesteps(
    workplace, monkeypatch, capsys
):
    write(workplace, ADAMW, **SETTINGS | {"max_epochs": 5})
    with monkeypatch.context() as fault:
        fault.setattr("trainer.training.health.MOST_SKIPPED", 4)
        poison(fault, set(range(5, 100)), float("inf"), where="gradients")
        assert train.main([]) == 1
    error = capsys.readouterr().err
    assert (
        "no step has had finite gradients since step 4 (now at step 8), so no weight has changed since; "
        "the last one trained" in error
    )
    assert ".png at " in error
    found = checkpoints(run_of(workplace))[0]
    assert found.name == "errored-tiny-ep03-gs00008" and resume_problem(found) is None
    assert train.main(["--resume_ckpt", "findlast", "--max_epochs", "5"]) == 0


def test_a_run_that_fails_in_its_last_step_is_not_done(workplace, monkeypatch, capsys):
    write(workplace, ADAMW, **SETTINGS)
    monkeypatch.setattr("trainer.training.health.MOST_SKIPPED", 2)
    poison(monkeypatch, {5, 6}, float("inf"), where="gradients")
    assert train.main([]) == 1
    told = capsys.readouterr()
    assert "(now at step 6)" in told.err and "Stopped after step 6 of 6: " in told.out
    assert "Done" not in told.out and "max_epochs" not in told.out


def test_gradients_that_are_infinite_in_a_fused_backward_end_the_run_without_a_half_made_step(
    workplace, monkeypatch, capsys
):
    write(workplace, FUSED, **SETTINGS | {"save_every_n_epochs": 1})
    poison(monkeypatch, {4}, float("inf"), where="gradients")
    assert train.main([]) == 1
    told = capsys.readouterr()
    assert "gradients were not finite although the loss was" in told.err
    assert "with fused_backward only these weights were skipped" in told.err
    assert "no checkpoint is saved of this step" in told.out
    (good,) = checkpoints(run_of(workplace))
    assert good.name == "tiny-ep01-gs00003" and resume_problem(good) is None


def _crash():
    raise ZeroDivisionError("a bug")


@pytest.mark.parametrize(
    "end", [None, lambda: signal.raise_signal(signal.SIGINT), _crash], ids=["save", "signal", "error"]
)
def test_no_checkpoint_holds_a_step_that_only_one_network_made(workplace, monkeypatch, capsys, end):
    """The UNet's gradient is infinite, the text encoder has stepped inside backward, no report is near."""
    mixed = {"base": {"optimizer": "adamw8bit", "lr": 1e-6}, "text_encoder_overrides": FUSED["base"]}
    write(workplace, mixed, **SETTINGS | {"save_every_n_epochs": 1, "log_step": 100})
    at_step(
        monkeypatch,
        2,
        lambda optimizers: (
            optimizers.members[0].parameters[0].register_hook(lambda gradient: gradient * math.inf)
        ),
    )
    if end is not None:
        at_step(monkeypatch, 3, end)
    with pytest.raises(ZeroDivisionError) if end is _crash else nullcontext():
        assert train.main([]) == 1
    told = capsys.readouterr()
    where = told.out if end is _crash else told.err
    assert (
        "gradients were not finite although the loss was (" in where and " of the unet; now at step " in where
    )
    assert not checkpoints(run_of(workplace))


def test_d_that_overflows_spoils_no_checkpoint(workplace, monkeypatch, capsys):
    write(workplace, DADAPT, **SETTINGS | {"save_every_n_epochs": 1})

    def overflow(optimizers):
        for member in optimizers.members:
            member.optimizer.d.fill_(1e300)

    at_step(monkeypatch, 5, overflow)
    assert train.main([]) == 1
    (good,) = checkpoints(run_of(workplace))
    error = capsys.readouterr().err
    assert (
        "step 6: weights of the unet" in error
        and f"so no checkpoint is saved and the run ends; the last good one is {good}" in error
    )
    assert good.name == "tiny-ep01-gs00003" and resume_problem(good) is None


def test_a_full_disk_is_survived(workplace, monkeypatch, capsys):
    """A limit on the size of files, which plays the full disk, from the first save to the second."""
    resource = pytest.importorskip("resource")
    write(workplace, DADAPT, **SETTINGS | {"max_epochs": 3, "save_every_n_epochs": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    at_step(monkeypatch, 5, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limits[1])))
    import trainer.training.loop
    from trainer.training.due import SAVE

    real = trainer.training.loop.do_due

    def do_due(run):
        saves = SAVE in run.state.pending
        real(run)
        if saves:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(trainer.training.loop, "do_due", do_due)
    try:
        assert train.main([]) == 0
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    out = capsys.readouterr().out
    assert (
        "step 6: the checkpoint could not be written (File too large" in out
        and "tiny-ep01-gs00003; training continues (1 of 3)" in out
    )
    assert [path.name for path in checkpoints(run_of(workplace))] == [
        "last-tiny-ep03-gs00009",
        "tiny-ep01-gs00003",
    ]


def test_a_run_folder_that_is_deleted_is_made_again_by_the_next_save(workplace, monkeypatch, capsys):
    write(workplace, DADAPT, **SETTINGS)
    at_step(monkeypatch, 4, lambda: shutil.rmtree(run_of(workplace)))
    assert train.main([]) == 0
    out = capsys.readouterr().out
    assert "its event file was deleted" in out and "training continues" in out
    assert [path.name for path in checkpoints(run_of(workplace))] == [LAST]
    assert list(scalars(run_of(workplace))["loss/log_step"]) == [4, 6]


def test_a_folder_that_has_become_read_only_is_survived_until_the_last_save(workplace, monkeypatch, capsys):
    write(workplace, DADAPT, **SETTINGS | {"save_every_n_epochs": 1})
    from pathlib import Path

    real = Path.mkdir

    def mkdir(path, *arguments, **keywords):
        if path.name.startswith(".draft-") and "ep01" not in path.name:
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        return real(path, *arguments, **keywords)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    assert train.main([]) == 1
    out, error = capsys.readouterr()
    assert (
        "step 6: the checkpoint could not be written (Read-only file system" in error
        and "the last good one is" in error
    )
    assert "Resume with:" in out and "raise max_epochs" not in out, "the last steps are still to be saved"
    assert [path.name for path in checkpoints(run_of(workplace))] == ["tiny-ep01-gs00003"]


def test_a_log_folder_that_cannot_be_written_to_is_said_before_anything_loads(workplace, monkeypatch, capsys):
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr("trainer.run.networks.load_models", lambda *_: pytest.fail("nothing is to be loaded"))
    assert train.main([]) == 2
    assert "cannot be written to; choose another logdir" in capsys.readouterr().err


def test_a_clock_that_is_put_back_changes_nothing(workplace, monkeypatch):
    write(workplace, DADAPT, **SETTINGS)
    assert train.main(["--stop_after_steps", "4"]) == 0
    real = time.time
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: real() - 86_400)
        resumes_to_the_bit(workplace)
    curves = [
        {tag: steps for tag, steps in scalars(run).items() if not tag.startswith("performance/")}
        for run in (uncut(workplace), run_of(workplace))
    ]
    assert curves[0] == curves[1]


def test_images_that_vanish_end_the_run_where_it_was_and_it_goes_on_when_they_are_back(
    workplace, monkeypatch, capsys
):
    write(workplace, DADAPT, **SETTINGS | {"max_epochs": 2}, cache_latents="no")
    monkeypatch.setattr("trainer.training.health.MOST_UNREAD", 2)
    with monkeypatch.context() as patch:
        at_step(patch, 2, lambda: (workplace / "pictures").rename(workplace / "elsewhere"))
        assert train.main([]) == 1
    told = capsys.readouterr()
    assert (
        "of the last 2 steps no image could be read" in told.err
        or "none of the images can be read any more" in told.err
    )
    assert "the image is skipped" in told.out
    (found,) = checkpoints(run_of(workplace))
    assert found.name in ("errored-tiny-ep01-gs00002", "errored-tiny-ep01-gs00003")
    (workplace / "elsewhere").rename(workplace / "pictures")
    resumes_to_the_bit(workplace)


def test_a_killed_reader_ends_the_run_in_a_sentence_and_it_goes_on(workplace, monkeypatch, capsys):
    write(workplace, DADAPT, **SETTINGS, num_workers=1, cache_latents="no")
    with monkeypatch.context() as patch:

        def kill():
            for child in psutil.Process().children():
                if child.pid in {process.pid for process in multiprocessing.active_children()}:
                    child.kill()
            time.sleep(30)  # torch ends it by a signal: not during an update, of which nothing is saved

        at_step(patch, 2, kill)
        assert train.main([]) == 1
    told = capsys.readouterr()
    assert (
        "a DataLoader worker was killed" in told.err
        and "set num_workers lower" in told.err
        and "Traceback" not in told.err
    )
    (found,) = checkpoints(run_of(workplace))
    assert found.name.startswith("errored-tiny-ep01")
    resumes_to_the_bit(workplace)


def test_a_reader_that_is_killed_while_latents_are_encoded_is_told_in_a_sentence(
    workplace, monkeypatch, capsys
):
    import data.masked

    own, real = os.getpid(), data.masked.read_pixels

    def read_pixels(*arguments, **keywords):
        if os.getpid() != own:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **keywords)

    write(workplace, DADAPT, **SETTINGS, num_workers=1, cache_latents="memory")
    monkeypatch.setattr(data.masked, "read_pixels", read_pixels)
    assert train.main([]) == 2
    told = capsys.readouterr().err
    assert (
        "a DataLoader worker was killed" in told
        and "set num_workers lower" in told
        and "Traceback" not in told
    )
    assert not (workplace / "logs").exists()


def test_an_image_that_gives_an_input_output_error_is_left_out(workplace, monkeypatch, capsys):
    from PIL import ImageFile

    real = ImageFile.ImageFile.load

    def load(image):
        if image.fp is not None and str(getattr(image.fp, "name", "")).endswith("3.png"):
            raise OSError(errno.EIO, "Input/output error")
        return real(image)

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    write(workplace, DADAPT, **SETTINGS, cache_latents="no")
    assert train.main([]) == 0
    out = capsys.readouterr().out
    assert "3.png: " in out and "the image is skipped" in out and "8 images" in out


def test_a_checkpoint_that_cannot_be_read_is_passed_over(workplace, monkeypatch, capsys):
    write(workplace, DADAPT, **SETTINGS | {"save_every_n_epochs": 1})
    assert train.main([]) == 0
    import hashlib

    real = hashlib.file_digest

    def file_digest(file, *arguments):
        if LAST in str(file.name) and "training" in str(file.name):
            raise OSError(errno.EIO, "Input/output error")
        return real(file, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(hashlib, "file_digest", file_digest)
        assert train.main(["--resume_ckpt", str(run_of(workplace) / "ckpts" / LAST)]) == 2
        assert "the file cannot be read (Input/output error)" in capsys.readouterr().err
        assert train.main(["--resume_ckpt", "findlast", "--stop_after_steps", "3"]) == 0
        assert "Resuming after step 3" in capsys.readouterr().out


def test_an_event_file_that_is_locked_costs_its_numbers_only(workplace, monkeypatch, capsys):
    from trainer.reporting import tensorboard

    real, calls = tensorboard.append, []

    def append(file, events):
        calls.append(1)
        if 3 < len(calls) < 6:
            raise PermissionError(errno.EACCES, "the file is used by another process")
        return real(file, events)

    monkeypatch.setattr(tensorboard, "append", append)
    write(workplace, DADAPT, **SETTINGS)
    assert train.main([]) == 0
    out = capsys.readouterr().out
    assert out.count("TensorBoard's events are not recorded (the file is used by another process)") == 1
    assert checkpoints(run_of(workplace))[0].name == LAST and 6 in scalars(run_of(workplace))["loss/log_step"]
