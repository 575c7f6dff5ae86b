"""Runs of the bundled model: the device's against the CPU's, a resumed against an unbroken one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from scripts.gpu.job import Job, Result

ROOT = Path(__file__).resolve().parents[2]
COMPARED = {
    "loss": "loss/log_step",
    "d of the UNet": "optimizer/d unet",
    "d of the text encoder": "optimizer/d text encoder",
}


def first_run(job: Job, tell: Callable[[Result], None]) -> None:
    """Train the README's first run on the device and on the CPU; compare loss and d by step."""
    steps, every = (2, 1) if job.tiny else (100, 20)
    arguments = ["--stop_after_steps", str(steps), "--log_step", str(every)]
    alone = job.device == "cpu"
    other = None if alone else _elsewhere(job, "cpu", arguments)
    here = _metrics(_train(job, "device", *arguments))
    tell({"kind": "speed", "images per second": here[steps]["performance/images per second"]})
    if other is not None and other.wait():
        raise RuntimeError(f"the run on the CPU ended with status {other.returncode}")
    there = _metrics(_train(job, "cpu", *arguments) if alone else _run_folder(job, "cpu"))
    for step in range(every, steps + 1, every):
        for name, tag in COMPARED.items():
            tell(
                {
                    "kind": "compared",
                    "step": step,
                    "what": name,
                    "device": here[step].get(tag),
                    "cpu": there[step].get(tag),
                }
            )


def resumed(job: Job, tell: Callable[[Result], None]) -> None:
    """Stop a run after half of its steps, resume it, and compare weights and state with an unbroken run's."""
    half = 1 if job.tiny else 4
    whole = _train(job, "unbroken", "--stop_after_steps", str(2 * half))
    _train(job, "resumed", "--stop_after_steps", str(half))
    parts = _train(job, "resumed", "--resume_ckpt", "findlast", "--stop_after_steps", str(2 * half))
    again = whole if job.tiny else _train(job, "again", "--stop_after_steps", str(2 * half))
    for name, folder in (("resumed", parts), ("the same run again", again)):
        tell({"kind": "equality", "what": name, **_difference(_weights(whole), _weights(folder))})
    torch.use_deterministic_algorithms(True, warn_only=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _train(job, "deterministic", "--stop_after_steps", "1")
    torch.use_deterministic_algorithms(False)
    messages = {
        str(warning.message).split(" does not have a deterministic")[0]
        for warning in caught
        if "deterministic" in str(warning.message)
    }
    tell({"kind": "not deterministic", "operators": sorted(messages)})


def images_of(job: Job) -> Path:
    """Return the folder of the example's images; of its first eight in a tiny job."""
    examples = ROOT / "examples" / "faces"
    if not job.tiny:
        return examples
    few = job.folder / "images"
    few.mkdir(parents=True, exist_ok=True)
    for file in sorted(examples.iterdir())[:16]:  # each with its caption
        shutil.copy(file, few)
    return few


def _arguments(job: Job, name: str, *arguments: str) -> list[str]:
    """Return the command line of a run without samples, with its own log folder."""
    prompts = job.folder / "prompts.json"
    prompts.write_text(
        json.dumps(
            {"generate_pretrain_samples": False, "num_inference_steps": 2, "samples": [{"prompt": "a face"}]}
        )
    )
    settings = {
        "logdir": job.folder / name,
        "sample_prompts": prompts,
        "sample_steps": 100_000,
        "fixed_loss_images": 0,
        "num_workers": 0,
    }
    settings |= {
        "config": ROOT / "train.json",
        "data_root": images_of(job),
        "save_format": "diffusers",
        "save_every_n_epochs": "null",
    }
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    return [*words, *arguments]


def _train(job: Job, name: str, *arguments: str) -> Path:
    """Run train.py in this process and return the run's folder."""
    import train

    os.chdir(ROOT)
    if code := train.main(_arguments(job, name, *arguments)):
        raise RuntimeError(f"run {name} ended with exit code {code}")
    return _run_folder(job, name)


def _elsewhere(job: Job, name: str, arguments: list[str]) -> subprocess.Popen[bytes]:
    """Start train.py on the CPU in a process that shares this one's output."""
    threads = str(max(1, (os.cpu_count() or 2) // 2))  # the run on the device needs some too
    command = [sys.executable, "train.py", *_arguments(job, name, *arguments)]
    return subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": threads}
    )


def _run_folder(job: Job, name: str) -> Path:
    return max((job.folder / name).glob("mini_faces-*"))


def _metrics(folder: Path) -> dict[int, dict[str, Any]]:
    """Return a run's numbers by step."""
    lines = (json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    found: dict[int, dict[str, Any]] = {}
    for line in lines:
        found.setdefault(line["step"], {}).update(line)
    return found


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a run's last checkpoint: weights and training state."""
    from safetensors.torch import load_file

    checkpoint = max((folder / "ckpts").glob("*-gs*"), key=lambda path: path.name.rpartition("-gs")[2])
    files = (
        "unet/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "resume/training.safetensors",
    )
    return {f"{file}:{key}": tensor for file in files for key, tensor in load_file(checkpoint / file).items()}


def _difference(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> Result:
    """Return the number of tensors that differ in a bit, and the largest difference of a number."""
    differing = [key for key in left if not torch.equal(left[key], right[key])]
    largest = max(
        ((left[key].double() - right[key].double()).abs().max().item() for key in differing), default=0.0
    )
    return {"tensors": len(left), "differing": len(differing), "largest": largest}
