"""Epochs of the program's own loop at full size: cached latents, noise, steps and reports."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import TYPE_CHECKING
from unittest import mock

from scripts.bench_loop import build, epochs_of
from scripts.full_size import BUNDLED, random_models
from scripts.gpu.job import Job, Result
from scripts.gpu.runs import ROOT, images_of
from scripts.gpu.training import memory

if TYPE_CHECKING:
    from trainer.config import TrainConfig
    from trainer.models.options import ModelOptions
    from trainer.models.pipeline import Models


def epochs(job: Job, tell: Callable[[Result], None]) -> None:
    """Time epochs of configs/sd15.json with one optimizer; the first is not counted."""
    import torch

    from trainer.models.load import load_models
    from trainer.models.tokenizer import clip_tokenizer

    def models(_: ModelOptions) -> Models:
        made = random_models(torch.device(job.device))
        made.tokenizer = clip_tokenizer()
        return made

    config = _config(job)
    began = time.perf_counter()
    with mock.patch("trainer.models.load.load_models", load_models if job.tiny else models):
        run = build(config)
    tell({"kind": "built", "seconds": time.perf_counter() - began})
    for number in range(1 if job.tiny else 3):
        train = epochs_of(run)()
        if job.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        images = train()
        if job.device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        found = {"number": number, "images": images, "seconds": seconds, "counted": job.tiny or number > 0}
        tell({"kind": "epoch", **found, **memory(torch.device(job.device))})


def _config(job: Job) -> TrainConfig:
    """Return configs/sd15.json with the job's optimizer and without work between epochs."""
    from trainer.config import load_config

    name, *variants = job.argument.split("+")
    base = {"optimizer": name, "lr": 1.0 if name.startswith("dadapt") else 1e-6}
    if "fused" in variants:
        base["fused_backward"] = True
    chosen = job.folder / "optimizer.json"
    chosen.write_text(json.dumps({"base": base, "text_encoder_freezing": {"freeze_embeddings": True}}))
    settings = {
        "config": ROOT / "configs" / "sd15.json",
        "resume_ckpt": BUNDLED,
        "data_root": images_of(job),
        "optimizer_config": chosen,
        "logdir": job.folder / "logs",
        "batch_size": 4,
        "resolution": 512,
        "max_epochs": 1000,
        "sample_prompts": "null",
        "fixed_loss_images": 0,
        "weights_dtype": "bf16" if "bf16" in variants else "fp32",
    }
    if job.tiny:
        settings |= {"resolution": 64, "num_workers": 0, "mixed_precision": "no", "weights_dtype": "fp32"}
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    return load_config(words).config
