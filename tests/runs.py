"""Whole runs on a tiny model: a workplace to start them in, and what they leave behind."""

import hashlib
import json
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from tests.tiny import write_tiny_folder
from trainer.environment import PROGRAM, python_command

COMMAND = f"{python_command()} {PROGRAM}"
"""The words that start the program in a folder that is not its own."""

ADAMW8BIT = {
    "base": {"optimizer": "adamw8bit", "lr": None, "weight_decay": 0.01},
    "text_encoder_lr_scale": 0.5,
}
ADAMW = {"base": {"optimizer": "adamw", "lr_scheduler": "cosine", "lr_warmup_steps": 2}}
DADAPT = {
    "base": {"optimizer": "dadapt_adam", "lr": 0.1, "weight_decay": 0.8, "d0": 1e-6, "decouple": True},
    "text_encoder_freezing": {"freeze_front_n_layers": 2},
}
FUSED = {
    "base": {
        "optimizer": "dadapt_adam8bit",
        "lr": 1.0,
        "d0": 1e-5,
        "weight_decay": 0.1,
        "fused_backward": True,
    }
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_folder(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def workplace(tmp_path, model, monkeypatch):
    """Return a folder with 5 captioned images and a configuration; 3 epochs of 3 steps."""
    monkeypatch.chdir(tmp_path)
    images = tmp_path / "pictures"
    images.mkdir()
    for number in range(5):
        Image.new("RGB", (70, 80), (50 * number, 100, 200 - 40 * number)).save(images / f"{number}.png")
        (images / f"{number}.txt").write_text(f"a red circle, tag {number}")
    write(tmp_path, DADAPT, model=str(model))
    return tmp_path


@pytest.fixture
def no_estimate(monkeypatch):
    """Let --check skip the memory estimate, which takes two seconds: for tests of its other output."""
    monkeypatch.setattr(
        "trainer.planning.plan.estimate", lambda *_, **__: SimpleNamespace(lines=list, as_json=dict)
    )


def write(folder, optimizer, **changes):
    """Write train.json, with changes, optimizer.json and prompts.json; keep the model named first.

    With `first_samples` False none are drawn before the first step, for tests of other things.
    """
    prompts = {"cfgs": [2], "num_inference_steps": 2, "samples": [{"prompt": "a red circle"}]}
    prompts["generate_pretrain_samples"] = changes.pop("first_samples", True)
    settings = {
        "data_root": "pictures",
        "resolution": 64,
        "batch_size": 2,
        "max_epochs": 3,
        "lr": 1e-3,
        "optimizer_config": "optimizer.json",
        "project_name": "tiny",
        "log_step": 2,
        "sample_steps": 100,
        "sample_prompts": "prompts.json",
        "fixed_loss_images": 2,
        "num_workers": 0,
        "seed": 7,
        "save_every_n_epochs": 2,
    }
    if "model" in changes:
        settings["resume_ckpt"] = changes.pop("model")
    elif (folder / "train.json").exists():
        settings["resume_ckpt"] = json.loads((folder / "train.json").read_text())["resume_ckpt"]
    (folder / "train.json").write_text(json.dumps({**settings, **changes}, indent=1))
    (folder / "optimizer.json").write_text(json.dumps(optimizer, indent=1))
    (folder / "prompts.json").write_text(json.dumps(prompts))


_UNCUT = {}


def uncut(folder):
    """Return the folder of the run that `folder` is set up for, made in one go; shared by equal set-ups.

    It is made where it cannot be taken for the test's own, and is not to be changed.
    """
    settings = json.loads((folder / "train.json").read_text())
    model = Path(settings.pop("resume_ckpt"))
    texts = [
        json.dumps(settings),
        *((folder / name).read_text() for name in ("optimizer.json", "prompts.json")),
    ]
    inputs = [path.read_bytes() for path in sorted((folder / "pictures").iterdir())]
    weights = [path.read_bytes() for path in sorted(model.rglob("*.safetensors"))]
    key = hashlib.sha256(b"".join([*(text.encode() for text in texts), *inputs, *weights])).digest()
    if key not in _UNCUT:
        logdir = Path(tempfile.mkdtemp(prefix="uncut-", dir=model.parent.parent))
        assert train.main(["--logdir", str(logdir)]) == 0
        _UNCUT[key] = next(path for path in logdir.iterdir() if path.name.startswith("tiny-"))
    return _UNCUT[key]


def unbroken(text):
    """Return what a run has printed as one line, its broken lines and commands joined."""
    return " ".join(text.replace(" \\\n", " ").split())


def run_of(folder, number=-1):
    """Return a run's folder, the newest or another."""
    return sorted((folder / "logs").iterdir())[number]


def scalars(run):
    """Return every scalar of a run as {tag: {step: value}}, times left out."""
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    return {
        tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]
    }


def weights(checkpoint):
    """Return the trained networks' tensors."""
    files = ("unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors")
    return {f"{file}:{key}": tensor for file in files for key, tensor in load_file(checkpoint / file).items()}


def same_run(left, right):
    """Assert that two checkpoints hold the same weights and training state to the bit."""
    others = weights(right)
    for name, tensor in weights(left).items():
        assert torch.equal(tensor, others[name]), name
    assert (left / "resume" / "training.safetensors").read_bytes() == (
        right / "resume" / "training.safetensors"
    ).read_bytes()
    numbers = []
    for checkpoint in (left, right):
        state = json.loads((checkpoint / "resume" / "training.json").read_text())
        state["meter"].pop("epoch_seconds")
        numbers.append(state)
    assert numbers[0] == numbers[1]
