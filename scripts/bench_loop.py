"""Time epochs of training: this program's loop against its networks alone and against a plain accelerate and diffusers loop.

    python scripts/bench_loop.py                                  the embedded model and its example, one thread
    python scripts/bench_loop.py --config mine.json --rounds 5    another run

Every round trains one epoch of each contender, one after the other in one process, each with networks of its
own. What happens between epochs (samples, checkpoints, fixed-noise losses) is left out; reading, drawing
noise, reports and TensorBoard are in. Ratios are taken within a round, and the median over the rounds is
printed, with the lowest and highest. On the CPU the process's CPU time is counted, so other work on the
machine disturbs less; on CUDA the time until the device has finished.
"""

from __future__ import annotations

import argparse
import atexit
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from datetime import date
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from trainer.training.cadence import Cadence, Due

if TYPE_CHECKING:
    from trainer.config import TrainConfig
    from trainer.training.run import Run

ROOT = Path(__file__).resolve().parent.parent
NETWORKS_ALONE = "the networks alone, adamw8bit"
PLAIN = "plain accelerate + diffusers loop, adamw8bit"
NOT_KEPT = "this program, adamw8bit, latents not kept"
BASE = "this program, adamw8bit"
ADAPTING = ("dadapt_adam8bit", "dadapt_adam", "dadapt_adam_reference")


def main(argv: Sequence[str] | None = None) -> int:
    """Train every contender in turns and print seconds of an epoch and ratios."""
    options = _parse(argv)
    torch.set_num_threads(options.threads)
    with TemporaryDirectory() as folder:
        contenders = _contenders(options, Path(folder))
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        images: dict[str, int] = {}
        for turn in range(options.rounds + 1):
            for name, epoch in contenders.items():
                prepared = epoch()
                began = _now()
                images[name] = prepared()
                if turn:  # the first allocates
                    seconds[name].append(_now() - began)
    print(
        f"{date.today()}  torch {torch.__version__}  {options.threads} threads, "
        f"{options.rounds} rounds of one epoch each"
    )
    print(f"\n{'':<46}{'s/epoch':>8}{'images/s':>10}")
    for name, each in seconds.items():
        median = statistics.median(each)
        print(f"{name:<46}{median:>8.3f}{images[name] / median:>10.1f}")
    print()
    for title, one, other in (
        ("loop / networks alone", BASE, NETWORKS_ALONE),
        ("loop / plain loop, both encoding", NOT_KEPT, PLAIN),
        ("loop with kept latents / plain loop", BASE, PLAIN),
        *(
            (f"epoch of {name} / of adamw8bit", f"this program, {name}", BASE)
            for name in (*ADAPTING, "adamw")
        ),
    ):
        ratios = [mine / its for mine, its in zip(seconds[one], seconds[other], strict=True)]
        print(f"{title:<46}{statistics.median(ratios):>8.3f}   ({min(ratios):.3f} to {max(ratios):.3f})")
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, default=ROOT / "train.json")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args(argv)


def _contenders(options: argparse.Namespace, folder: Path) -> dict[str, Callable[[], Callable[[], int]]]:
    """Return by name what prepares an epoch and returns a function that trains it and returns its images."""

    def loop(optimizer: str, **extra: str) -> Run:
        return build(_config(options.config, optimizer, folder, extra))

    config = _config(options.config, "adamw8bit", folder, {})
    return {
        NETWORKS_ALONE: _alone(loop("adamw8bit")),
        BASE: epochs_of(loop("adamw8bit")),
        PLAIN: _plain(config),
        NOT_KEPT: epochs_of(loop("adamw8bit", cache_latents="no")),
        **{f"this program, {name}": epochs_of(loop(name)) for name in (*ADAPTING, "adamw")},
    }


def _config(path: Path, optimizer: str, folder: Path, extra: dict[str, str]) -> TrainConfig:
    """Return the run's configuration with an optimizer and without what happens between epochs."""
    from trainer.config import load_config

    chosen = folder / f"{optimizer}.json"
    rate = (
        {"lr": 0.1, "weight_decay": 0.8, "decouple": True}
        if optimizer in ADAPTING
        else {"lr": 1e-5, "weight_decay": 0.01}
    )
    freezing = {"freeze_embeddings": True}
    chosen.write_text(
        json.dumps({"base": {"optimizer": optimizer, **rate}, "text_encoder_freezing": freezing})
    )
    settings = {
        "optimizer_config": str(chosen),
        "logdir": str(folder / "logs"),
        "project_name": f"{optimizer}-{len(list(folder.glob('logs/*')))}",
        "fixed_loss_images": "0",
        "sample_prompts": "null",
        "num_workers": "0",  # CPU time of other processes would not be counted
        "max_epochs": "10000",
        **extra,
    }
    return load_config(
        ["--config", str(path), *(word for key, value in settings.items() for word in (f"--{key}", value))]
    ).config


class _OnlyReports(Cadence):
    def due(self, step: int, *, epoch: int, epoch_ends: bool, last_fixed_loss: int) -> Due:
        due = super().due(step, epoch=epoch, epoch_ends=epoch_ends, last_fixed_loss=last_fixed_loss)
        return replace(due, sample=False, fixed_loss=False, save=False)


def build(config: TrainConfig) -> Run:
    """Return a run that draws no samples before its first step and shows nothing."""
    from trainer.models.quiet import quiet_libraries
    from trainer.reporting.console import Console
    from trainer.run.lifecycle import start
    from trainer.training.launch import connect
    from trainer.training.signals import StopSignals

    quiet_libraries()
    signals = StopSignals()
    ending = ExitStack()
    atexit.register(ending.close)  # runs are used until the end of the process
    processes = connect(config.loop.gpuid, signals)
    run = start(config, Console(stream=StringIO()), processes, ending, weights_only=False, signals=signals)
    run.evaluation.sample_first = False
    return run


def epochs_of(run: Run) -> Callable[[], Callable[[], int]]:
    """Return what prepares an epoch of the program's own loop and returns a function that trains it and returns its images."""
    from trainer.training.loop import make_steps

    def prepare() -> Callable[[], int]:
        run.cadence = _OnlyReports(
            **{**vars(run.cadence), "stop_after_steps": run.state.step + run.steps_in(run.state.epoch)}
        )

        def train() -> int:
            before = run.state.images
            make_steps(run)
            return run.state.images - before

        return train

    return prepare


def _alone(run: Run) -> Callable[[], Callable[[], int]]:
    """Return epochs of forward, backward and optimizer steps on tensors that were made before."""
    networks, objective, device = run.learner.networks, run.learner.objective, run.learner.precision.device
    count = iter(range(1_000_000))

    def prepare() -> Callable[[], int]:
        steps = []
        for batches in run.loader.steps(next(count)):
            for batch in batches:
                inputs = objective.draw(batch).to(device)
                assert inputs.moments_BCHW is not None, "latents are kept"
                mean_BCHW, std_BCHW = inputs.moments_BCHW.chunk(2, dim=1)
                latents_BCHW = (mean_BCHW + std_BCHW * inputs.posterior_BCHW) * objective.scaling_factor
                noisy_BCHW = objective.schedule.noisy(latents_BCHW, inputs.noise_BCHW, inputs.t_B)
                steps.append(
                    (
                        noisy_BCHW.to(memory_format=torch.channels_last),
                        inputs.noise_BCHW,
                        inputs.t_B,
                        inputs.tokens_BT,
                    )
                )

        def train() -> int:
            for noisy_BCHW, noise_BCHW, t_B, tokens_BT in steps:
                with run.learner.precision.autocast():
                    context_BTD = networks.text_encoder(tokens_BT).last_hidden_state
                    prediction_BCHW = networks.unet(noisy_BCHW, t_B, context_BTD).sample
                torch.nn.functional.mse_loss(prediction_BCHW.float(), noise_BCHW).backward()
                for member in run.learner.optimizers.members:
                    member.optimizer.step()
                    member.optimizer.zero_grad()
            return sum(len(t_B) for _, _, t_B, _ in steps)

        return train

    return prepare


class _Pictures(torch.utils.data.Dataset[Any]):
    """Images and token ids, read as examples of diffusers do."""

    def __init__(self, folder: Path, side: int, tokenizer: Any) -> None:
        self.paths = sorted(path for path in folder.rglob("*") if path.suffix in (".png", ".jpg"))
        self.side = side
        self.tokenizer = tokenizer

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        import numpy as np
        from PIL import Image, ImageOps

        path = self.paths[number]
        with Image.open(path) as opened:
            image = ImageOps.fit(opened.convert("RGB"), (self.side, self.side), Image.Resampling.LANCZOS)
        pixels_CHW = torch.from_numpy(np.asarray(image, dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1
        caption = path.with_suffix(".txt").read_text()
        length = self.tokenizer.model_max_length
        tokens_T = self.tokenizer(
            caption, max_length=length, padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids[0]
        return {"pixels": pixels_CHW, "tokens": tokens_T}


def _plain(config: TrainConfig) -> Callable[[], Callable[[], int]]:
    """Return epochs of a loop as one writes it with accelerate and diffusers: no captions dropped, nothing kept, no logs."""
    from accelerate import Accelerator
    from bitsandbytes.optim.adamw import AdamW8bit
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
    from tqdm import tqdm

    from trainer.models.load import load_models
    from trainer.models.trainable import apply_freezing

    models = load_models(config.model)
    apply_freezing(models, config.parts, config.optimizers.freezing)
    unet: Any = models.unet
    text_encoder: Any = models.text_encoder
    vae: Any = models.vae
    learning = [
        parameter
        for network in (unet, text_encoder)
        for parameter in network.parameters()
        if parameter.requires_grad
    ]
    side = max(config.data.resolutions)
    pictures = _Pictures(Path(str(config.data.data_root)), side, models.tokenizer)
    reader = torch.utils.data.DataLoader(pictures, batch_size=config.data.batch_size, shuffle=True)
    accelerator = Accelerator(mixed_precision="no")
    unet, text_encoder, optimizer, reader = accelerator.prepare(
        unet, text_encoder, AdamW8bit(learning, lr=1e-5), reader
    )
    vae.to(accelerator.device)
    scheduler: Any = DDPMScheduler.from_config(models.scheduler_config)

    def train() -> int:
        images = 0
        for batch in tqdm(reader, disable=True):
            with torch.no_grad():
                latents_BCHW = vae.encode(batch["pixels"]).latent_dist.sample() * vae.config.scaling_factor
            noise_BCHW = torch.randn_like(latents_BCHW)
            t_B = torch.randint(
                0, scheduler.config.num_train_timesteps, (len(latents_BCHW),), device=latents_BCHW.device
            )
            noisy_BCHW = scheduler.add_noise(latents_BCHW, noise_BCHW, t_B)
            context_BTD = text_encoder(batch["tokens"])[0]
            prediction_BCHW = unet(noisy_BCHW, t_B, context_BTD).sample
            loss = torch.nn.functional.mse_loss(prediction_BCHW.float(), noise_BCHW.float())
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            accelerator.gather(loss.detach()).mean().item()  # type: ignore[union-attr]
            images += len(t_B)
        return images

    return lambda: train


def _now() -> float:
    """Return seconds: of this process's CPU time, or where there is a GPU of the clock when it has finished."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


if __name__ == "__main__":
    sys.exit(main())
