"""Time epochs of this program against a plain accelerate and diffusers loop with the same optimizer.

    python scripts/bench_loop.py                                the bundled model and its example, one thread
    python scripts/bench_loop.py --config mine.json --rounds 5  another run
    python scripts/bench_loop.py --only adamw8bit dadapt_adam8bit

Every round trains one epoch of each contender in one process, each with its own networks. Reading, noise,
reports and TensorBoard are included; samples, checkpoints and fixed-noise losses between epochs are not. The
plain loop encodes images in every step; the program does so in the column "encoding", and else trains on
cached latents. Ratios are taken within a round. A CPU is measured by the process's CPU time, which other work
disturbs less; CUDA by the time until the device has finished.
"""

from __future__ import annotations

import argparse
import atexit
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from scripts.bench.machine import machine
from scripts.bench.optimizers import prodigy_adv
from scripts.bench.plain_loop import plain_loop
from scripts.bench.rounds import Figures, Rounds, parser, table, timed, write_json
from trainer.training.cadence import Cadence, Due

if TYPE_CHECKING:
    from trainer.config import TrainConfig
    from trainer.training.run import Run

ROOT = Path(__file__).resolve().parent.parent
BASE = "adamw8bit"
ALONE = f"networks alone, {BASE}"
ADAPTING = ("dadapt_adam8bit", "dadapt_adam", "dadapt_adam_reference")
PEERS = {"prodigy_adv int8": "int8_sr", "prodigy_adv factored": "factored"}
"""adv-optm's Prodigy, in the plain loop alone, by its state's precision."""
OPTIMIZERS = (BASE, *ADAPTING, "adamw8bit_fused", "adamw", *PEERS)

Prepare = Callable[[], Callable[[], int]]
"""Prepares an epoch and returns a function that trains it and returns its images."""


def main(argv: Sequence[str] | None = None) -> int:
    """Train every contender in turns, and print speeds and ratios."""
    options = _parse(argv)
    torch.set_num_threads(options.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rounds = Rounds()
    with TemporaryDirectory() as folder:
        contenders = _contenders(options, Path(folder))
        rounds.run({name: _measured(prepare, device) for name, prepare in contenders.items()}, options.rounds)
    words = machine(device)
    print(f"{words}\n{options.rounds} rounds of one epoch each; images/s\n")
    print(table_of(rounds, options.only))
    if ALONE in rounds.figures:
        over = rounds.ratio(_program(BASE), ALONE, "seconds")
        print(f"\nnetworks alone, {BASE}: {_speed(rounds, ALONE)}; an epoch takes {over} times as long")
    write_json(options.json, words, {"epochs": rounds})
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    options = parser(__doc__, rounds=9)
    options.add_argument("--config", type=Path, default=ROOT / "train.json")
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--only", nargs="+", choices=OPTIMIZERS, default=OPTIMIZERS, help="optimizers")
    return options.parse_args(argv)


def _program(name: str) -> str:
    return f"program, {name}"


def _encoding(name: str) -> str:
    return f"program, encoding, {name}"


def _plain(name: str) -> str:
    return f"plain loop, {name}"


def _contenders(options: argparse.Namespace, folder: Path) -> dict[str, Prepare]:
    found: dict[str, Prepare] = {}
    if BASE in options.only:
        found[ALONE] = _alone(build(_config(options.config, BASE, folder, {})))
    for name in options.only:
        if name in PEERS:
            train = plain_loop(_config(options.config, BASE, folder, {}), prodigy_adv(PEERS[name]))
        else:
            config = _config(options.config, name, folder, {})
            chosen, rate = config.optimizers.unet, config.optimizers.unet.lr
            assert rate is not None
            train = plain_loop(config, lambda trained, chosen=chosen, rate=rate: chosen.build(trained, rate))
            found[_program(name)] = epochs_of(build(config))
            uncached = _config(options.config, name, folder, {"cache_latents": "no"})
            found[_encoding(name)] = epochs_of(build(uncached))
        found[_plain(name)] = lambda train=train: train
    return found


def _measured(prepare: Prepare, device: str) -> Callable[[], Figures]:
    """Return a function that trains one epoch and returns its seconds and images."""

    def measure() -> Figures:
        images: list[int] = []
        train = prepare()
        times = timed(lambda: images.append(train()), device)
        return {"seconds": times["host" if device == "cpu" else "wall"], "images": images[0]}

    return measure


def table_of(rounds: Rounds, names: Sequence[str]) -> str:
    """Return the speeds of every optimizer's epochs and their ratios."""
    lines = []
    for name in names:
        plain = _plain(name)
        if name in PEERS:
            lines.append((name, "", "", _speed(rounds, plain), "", "", ""))
            continue
        program, encoding = _program(name), _encoding(name)
        lines.append(
            (
                name,
                *(_speed(rounds, each) for each in (program, encoding, plain)),
                # A speed's ratio is that of the times, the other way round.
                str(rounds.ratio(plain, program, "seconds")),
                str(rounds.ratio(plain, encoding, "seconds")),
                str(rounds.ratio(program, _program(BASE), "seconds")) if BASE in names else "",
            )
        )
    heads = ("optimizer", "program", "encoding", "plain loop", "program : plain", "encoding : plain")
    return table((*heads, f"epoch to {BASE}"), lines)


def _speed(rounds: Rounds, name: str) -> str:
    return f"{rounds.median(name, 'images') / rounds.median(name, 'seconds'):.1f}"


def _config(path: Path, optimizer: str, folder: Path, extra: dict[str, str]) -> TrainConfig:
    """Return the run's configuration with an optimizer and without work between epochs."""
    from trainer.config import load_config

    chosen = folder / f"{optimizer}.json"
    rate = {"lr": 0.1, "weight_decay": 0.8} if optimizer in ADAPTING else {"lr": 1e-5, "weight_decay": 0.01}
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
    """Return a run without output and without samples before its first step."""
    from trainer.models.quiet import quiet_libraries
    from trainer.reporting.console import Console
    from trainer.run.lifecycle import start
    from trainer.training.launch import connect
    from trainer.training.signals import StopSignals

    quiet_libraries()
    signals = StopSignals()
    ending = ExitStack()
    atexit.register(ending.close)  # runs last until the process ends
    processes = connect(config.loop.gpuid, signals)
    run = start(config, Console(stream=StringIO()), processes, ending, weights_only=False, signals=signals)
    run.evaluation.sample_first = False
    return run


def epochs_of(run: Run) -> Prepare:
    """Return epochs of the program's own loop."""
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


def _alone(run: Run) -> Prepare:
    """Return epochs of forward, backward and optimizer steps alone, on prepared tensors."""
    networks, objective, device = run.learner.networks, run.learner.objective, run.learner.precision.device
    count = iter(range(1_000_000))

    def prepare() -> Callable[[], int]:
        steps = []
        for batches in run.loader.steps(next(count)):
            for batch in batches:
                inputs = objective.draw(batch).to(device)
                assert inputs.moments_BCHW is not None, "latents are cached"
                mean_BCHW, std_BCHW = inputs.moments_BCHW.chunk(2, dim=1)
                latents_BCHW = (mean_BCHW + std_BCHW * inputs.posterior_BCHW) * objective.scaling_factor
                noisy_BCHW = objective.schedule.noisy(latents_BCHW, inputs.noise_BCHW, inputs.t_B)
                noisy_BCHW = noisy_BCHW.to(memory_format=torch.channels_last)
                steps.append((noisy_BCHW, inputs.noise_BCHW, inputs.t_B, inputs.tokens_BT))

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


if __name__ == "__main__":
    sys.exit(main())
