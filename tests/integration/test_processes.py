"""Two processes train as one does, stop together whatever happens to one, and leave the same files."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import train
from tests.runs import DADAPT, same_run, scalars, unbroken, weights, write
from trainer.checkpoints.format import read_resume, resume_problem
from trainer.checkpoints.listing import checkpoints
from trainer.reporting.tags import GAP

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows cannot send itself these signals")

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = """
import gc, json, os, signal, sys
gc.disable()  # as train.py itself
sys.path.insert(0, {root!r})
from accelerate import PartialState
PartialState(cpu=True)  # connected once for all the runs below
import data.masked
import trainer.checkpoints.saver
import trainer.training.loop
import train
from data.errors import DataError, FileError
from data.loader import StepLoader
gc.freeze()
gc.enable()

rank, codes, written = int(os.environ["RANK"]), [], []

def watch(event, arguments):
    path = arguments[0] if arguments else None
    if not isinstance(path, (str, os.PathLike)) or {folder!r} not in os.path.abspath(path):
        return
    if event in ("os.remove", "os.rmdir") and arguments[1] != -1:  # in a folder named by shutil.rmtree
        return
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT
    changes = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")
    if changes or (event == "open" and arguments[2] & writing):
        written.append(f"{{event}} {{path}}")

sys.addaudithook(watch)
loop, saver = trainer.training.loop, trainer.checkpoints.saver
real_step, real_save, real_steps = loop.train_step, saver.save_checkpoint, StepLoader.steps
real_pixels = data.masked.read_pixels
if rank == 1:
    trainer.checkpoints.saver.Saver.due = lambda saver: True  # a clock that nobody is to look at
for number, (arguments, fault) in enumerate(json.loads({runs!r})):
    made = []

    def train_step(*inputs, **keywords):
        made.append(1)
        if rank == 1 and len(made) == 3 and fault == "death":
            os._exit(9)
        result = real_step(*inputs, **keywords)
        if rank == 1 and len(made) == 3 and fault == "signal":
            os.kill(os.getpid(), signal.SIGTERM)
        if rank == 1 and len(made) == 3 and fault == "d":
            inputs[3].optimizers[0].param_groups[0]["d"] *= 1.5
        return result

    def save_checkpoint(*inputs, **keywords):
        if fault == "disk":
            raise OSError(28, "No space left on device")
        return real_save(*inputs, **keywords)

    def steps(*inputs):
        for count, step in enumerate(real_steps(*inputs)):
            if rank == 1 and count == 1 and fault == "data":
                raise DataError("the images are gone")
            yield step

    def read_pixels(path, *inputs, **keywords):
        if rank == 1 and fault == "unread" and path.name == "3.png":
            raise FileError("it is damaged here")
        return real_pixels(path, *inputs, **keywords)

    data.masked.read_pixels = read_pixels
    loop.train_step, saver.save_checkpoint, StepLoader.steps = train_step, save_checkpoint, steps
    codes.append(train.main(arguments))
    for name in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(name, signal.SIG_DFL)
    print(f"rank {{rank}}, run {{number}}: {{codes[-1]}}", flush=True)
with open(os.path.join(os.path.dirname({folder!r}), f"told-{{rank}}.json"), "w") as file:
    json.dump({{"codes": codes, "written": written}}, file)
"""

LAST = "last-tiny-ep03-gs00006"

SETTINGS = {
    "batch_size": 2,
    "grad_accum": 2,
    "max_epochs": 3,
    "log_step": 1,
    "fixed_loss_images": 2,
    "gradient_checkpointing": True,
    "clip_skip": 2,
    "validation_config": "validation.json",
    "save_every_n_epochs": None,
    "ckpt_every_n_minutes": 1000,
}


@pytest.fixture
def place(workplace):
    """Return the workplace with 9 images for training, a step of 8 and one of 1, and 2 for validation."""
    for number in range(5, 9):
        Image.new("RGB", (70, 80), (25 * number, 250 - 20 * number, 100)).save(
            workplace / "pictures" / f"{number}.png"
        )
        (workplace / "pictures" / f"{number}.txt").write_text(f"a blue square, tag {number}")
    (workplace / "held").mkdir()
    for number in range(2):
        Image.new("RGB", (64, 64), (200, 10 * number, 0)).save(workplace / "held" / f"a photo {number}.png")
    (workplace / "validation.json").write_text(
        json.dumps({"val_split_mode": "manual", "manual_data_root": "held"})
    )
    write(workplace, {**DADAPT, "base": {**DADAPT["base"], "lr": 1.0, "d0": 1e-4}}, **SETTINGS)
    return workplace


def two_processes(place, runs, *, launcher=("torch.distributed.run", "--nproc_per_node", "2"), timeout=600):
    """Run a list of (arguments, fault) in two processes; return the launcher's end and both outputs."""
    told = [place.parent / f"told-{rank}.json" for rank in range(2)]
    for path in told:
        path.unlink(missing_ok=True)
    program = place.parent / "program.py"
    program.write_text(PROGRAM.format(root=str(ROOT), folder=str(place), runs=json.dumps(runs)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_PORT": "0"}
    command = [sys.executable, "-m", *launcher, str(program)]
    ended = subprocess.run(
        command, cwd=place, env=environment, capture_output=True, text=True, timeout=timeout
    )
    return ended, [json.loads(path.read_text()) for path in told if path.exists()]


def curves(run):
    return {tag: steps for tag, steps in scalars(run).items() if not tag.startswith("performance/")}


def runs_in(place, *names):
    return [next((place / name).glob("tiny-*")) for name in names]


def as_one_process(place, together, *changes):
    """Assert that one process with the same images a step trains as two did; return its curves."""
    assert train.main(["--logdir", "one", "--batch_size", "8", "--grad_accum", "1", *changes]) == 0
    (one,) = runs_in(place, "one")
    alone, other = curves(one), curves(together)
    assert alone.keys() == other.keys()
    for tag, steps in alone.items():
        # A difference of nearly equal losses is as exact as they are, however small it is itself. Six steps
        # of growing rates multiply differences in last bits, which depend on the threads and the CPU; norms
        # and D-Adaptation's estimates show them more than losses do.
        near = {"rel": 1e-5 if tag.startswith("loss/") else 1e-4}
        if tag == GAP:
            near = {"rel": 0, "abs": 1e-5 * max(alone["loss/val"].values())}
        assert other[tag] == pytest.approx(steps, **near), tag
    others = weights(together / "ckpts" / LAST)
    for name, tensor in weights(one / "ckpts" / LAST).items():
        torch.testing.assert_close(tensor, others[name], rtol=0, atol=1e-4)
    return alone


def test_two_processes_train_as_one_and_end_together(place, capsys):
    """Two ranks x 2 images x 2 batches are one x 8; in an epoch's second step a rank has no image."""
    (place / "fused.json").write_text(
        json.dumps({"base": {"optimizer": "dadapt_adam", "fused_backward": True}})
    )
    runs = [
        (["--logdir", "whole"], ""),
        (["--logdir", "stopped"], "signal"),
        (["--logdir", "stopped", "--resume_ckpt", "findlast", "--cache_latents", "disk"], ""),
        (["--logdir", "parted"], "d"),
        (["--logdir", "data"], "data"),
        (["--logdir", "disk"], "disk"),
        (["--logdir", "fused", "--optimizer_config", "fused.json", "--grad_accum", "1"], ""),
        (["--logdir", "unread", "--cache_latents", "no"], "unread"),
        (["--check"], ""),
    ]
    ended, told = two_processes(
        place, runs, launcher=("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2")
    )
    assert ended.returncode == 0, ended.stderr
    assert [process["codes"] for process in told] == [[0, 143, 0, 1, 1, 1, 2, 0, 0]] * 2, ended.stderr
    assert told[0]["written"] and told[1]["written"] == [], "the first process alone writes"

    whole, stopped, parted, data = runs_in(place, "whole", "stopped", "parted", "data")
    interrupted = next(path for path in checkpoints(stopped) if path.name.startswith("interrupted-"))
    assert interrupted.name.endswith("gs00003"), "a signal to one process ends both after the same step"
    same_run(*(run / "ckpts" / "last-tiny-ep03-gs00006" for run in (whole, stopped)))
    assert curves(whole) == curves(stopped)
    assert len(list(whole.glob("events*"))) == 1 and read_resume(checkpoints(whole)[0])[0].images == 27
    assert (
        f"--nproc_per_node 2 {ROOT / 'train.py'} --logdir stopped --resume_ckpt stopped/{stopped.name}"
        in unbroken(ended.stdout)
    )
    assert ended.stdout.count("8 images a step, 4 on each of 2 processes in 2 passes of 2") == 8, (
        "told once a run"
    )

    assert (
        len(re.findall(r"step 3: d of the unet is \S+ in process 0 and \S+ in process 1, so", ended.stderr))
        == 1
    )
    assert not checkpoints(parted), "of models that differ neither is saved"
    assert ended.stderr.count("process 1: the images are gone") == 1
    assert checkpoints(data)[0].name.startswith("errored-")
    assert ended.stderr.count("No space left on device") == 1
    assert (
        ended.stderr.count("2 processes were launched, which contradicts fused_backward") == 1
        and not (place / "fused").exists()
    )

    assert ended.stdout.count("3.png: it is damaged here; the image is skipped") == 1, (
        "the first tells what the second has met"
    )
    assert 18 <= read_resume(checkpoints(runs_in(place, "unread")[0])[0])[0].images < 27

    alone = as_one_process(place, whole)
    assert max(alone["optimizer/d unet"].values()) > 2e-4, "d has moved"

    capsys.readouterr()
    assert train.main(["--resume_ckpt", str(whole), "--batch_size", "4", "--max_epochs", "4"]) == 0
    assert "Changed: processes: 2 -> 1" in capsys.readouterr().out
    assert train.main(["--resume_ckpt", str(whole), "--max_epochs", "5"]) == 2
    assert "images per step was 8, and is 4 now" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_stop_the_text_encoder_as_one_and_resume_across_the_stop(place):
    """Of six steps the text encoder trains for three; one run ends before, at and after its stop."""
    stop, parts = ["--stop_textenc_after_n_epochs", "1.5"], ["--logdir", "parts"]
    resume = [*parts, "--resume_ckpt", "findlast", *stop]
    runs = [
        (["--logdir", "whole", *stop], ""),
        ([*parts, *stop, "--stop_after_steps", "2"], ""),
        (resume, "signal"),  # in the third step since, the fifth
        (resume, ""),
        (["--logdir", "at", *stop], "signal"),
        (["--logdir", "at", "--resume_ckpt", "findlast", *stop], ""),
    ]
    ended, told = two_processes(place, runs)
    assert [process["codes"] for process in told] == [[0, 0, 143, 0, 143, 0]] * 2, ended.stderr
    assert told[1]["written"] == []
    assert ended.stdout.count("The text encoder is frozen after step 3") == 5, "by rank 0, in all but one"

    whole, *resumed = runs_in(place, "whole", "parts", "at")
    for run, step in zip(resumed, (5, 3), strict=True):
        assert any(
            path.name == f"interrupted-tiny-ep0{1 + step // 2}-gs0000{step}" for path in checkpoints(run)
        )
        same_run(whole / "ckpts" / LAST, run / "ckpts" / LAST)
        assert curves(run) == curves(whole)
    alone = as_one_process(place, whole, *stop)
    assert max(alone["lr/text encoder"]) == 3 and max(alone["lr/unet"]) == 6


OPTIMIZERS = {
    "adamw8bit": {"base": {"optimizer": "adamw8bit", "lr": 1e-3}},
    "dadapt_adam8bit": {"base": {"optimizer": "dadapt_adam8bit", "lr": 1.0, "d0": 1e-5}},
    "prodigy": {"base": {"optimizer": "prodigy", "lr": 1.0, "weight_decay": 0.0}},
    "lion": {"base": {"optimizer": "lion", "lr": 1e-4}},
}


@pytest.mark.slow
def test_two_processes_go_on_to_the_bit(place):
    """With every kind of optimizer library, workers, latents on disk, EMA weights, a LoRA."""
    runs = []
    for name, optimizer in OPTIMIZERS.items():
        (place / f"{name}.json").write_text(json.dumps(optimizer))
        more = ["--optimizer_config", f"{name}.json", "--cache_dir", "kept", "--sample_steps", "4"]
        more += {
            "adamw8bit": [
                "--num_workers",
                "2",
                "--cache_latents",
                "no",
                "--ema_decay_rate",
                "0.9",
                "--ema_update_interval",
                "2",
            ],
            "dadapt_adam8bit": ["--cache_latents", "disk", "--num_workers", "2"],
            "prodigy": ["--lora", "{}", "--crop_jitter", "0.5"],
            "lion": ["--disable_textenc_training", "true"],
        }[name]
        whole, stopped = (["--logdir", f"{name}-{kind}", *more] for kind in ("whole", "stopped"))
        runs += [
            (whole, ""),
            ([*stopped, "--stop_after_steps", "3"], ""),
            ([*stopped, "--resume_ckpt", "findlast"], ""),
        ]
    ended, told = two_processes(place, runs)
    assert [process["codes"] for process in told] == [[0] * len(runs)] * 2, ended.stderr
    assert told[1]["written"] == []
    for name in OPTIMIZERS:
        whole, stopped = runs_in(place, f"{name}-whole", f"{name}-stopped")
        if name != "prodigy":  # whose LoRA is all that it holds
            same_run(*(run / "ckpts" / LAST for run in (whole, stopped)))
        files = [run / "ckpts" / LAST / "resume" / "training.safetensors" for run in (whole, stopped)]
        assert files[0].read_bytes() == files[1].read_bytes(), name
        assert curves(whole) == curves(stopped), name


@pytest.mark.slow
def test_a_process_that_dies_takes_the_other_with_it_and_loses_no_step(place):
    ended, told = two_processes(place, [(["--logdir", "dead"], "death")])
    assert ended.returncode != 0 and [process["codes"] for process in told] == [[1]], ended.stderr
    (run,) = runs_in(place, "dead")
    assert (
        checkpoints(run)[0].name == "errored-tiny-ep01-gs00002"
        and resume_problem(checkpoints(run)[0]) is None
    )
    assert (
        ended.stderr.count("another process has ended without a word") == 1 and "Resume with:" in ended.stdout
    )


@pytest.mark.slow
def test_ctrl_c_of_the_launcher_saves(place):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        str(ROOT / "train.py"),
        "--max_epochs",
        "1000",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, cwd=place, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as launcher:
        assert launcher.stdout is not None
        next(line for line in launcher.stdout if "step 2/2000" in line)
        launcher.send_signal(signal.SIGINT)
        out, errors = launcher.communicate(timeout=120)
    (run,) = runs_in(place, "logs")
    (checkpoint,) = checkpoints(run)
    assert checkpoint.name.startswith("interrupted-") and resume_problem(checkpoint) is None
    assert errors.count("SIGINT: stopping after this step") == 1 and errors.count("Stopped by SIGINT.") == 1
    assert (
        f"Resume with: torchrun --nproc_per_node 2 {ROOT / 'train.py'} --max_epochs 1000 --resume_ckpt"
        in unbroken(out)
    )
