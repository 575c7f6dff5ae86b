"""Measure the memory that training steps of a full-size Stable Diffusion 1.5 need with each optimizer, each in a process of its own.

    python scripts/bench_memory.py                                     both networks, 256 px, gradient checkpointing
    python scripts/bench_memory.py --networks unet --only adamw8bit dadapt_adam_reference
    python scripts/bench_memory.py --mixed_precision bf16
    python scripts/bench_memory.py --cards 8 12 16 24                  measures nothing: the batch sizes that are estimated to fit cards

Weights and images are random: only sizes matter. The steps are the trainer's own (`trainer.step`), with its data types, memory
layout and order. What is reported is the most memory that the process held during the steps (on Linux its peak resident set, on
CUDA what torch had allocated), what the optimizer's state and everything else of known size account for, and what trainer.memory would
have said before: the tensors of its trace, on the CPU with what the process held before there were any.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import date
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if TYPE_CHECKING:
    import torch

    from data.batch import Batch
    from trainer.config.schema import TrainConfig
    from trainer.models.load import Models
    from trainer.optim import OptimizerOptions
    from trainer.precision import Precision

BASE = "adamw8bit"
VARIANTS = ("", "+fused", "+fused+bf16")
NAMES = (
    "adamw8bit",
    "adamw",
    "prodigy",
    "dadapt_adam_reference",
    *(name + variant for name in ("dadapt_adam", "dadapt_adam8bit") for variant in VARIANTS),
)
GIB = 2**30


def main(argv: Sequence[str] | None = None) -> int:
    """Measure each optimizer in turn, in every round, and print the table; with --one, measure that one here."""
    options = parse(argv)
    if options.one:
        print(json.dumps(measure(options)))
        return 0
    if options.cards:
        print_cards(options.cards)
        return 0
    results: dict[str, list[dict[str, Any]]] = {}
    for _ in range(options.rounds):
        for name in options.only:
            forwarded = [f"--{key}={value}" for key, value in vars(options).items() if key not in ("only", "one", "rounds", "cards")]
            command = [sys.executable, __file__, "--one", name, *forwarded]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            if done.returncode:
                print(f"{name}: ended with status {done.returncode}; -9 is what the system does when memory runs out", flush=True)
                continue
            results.setdefault(name, []).append(json.loads(done.stdout.splitlines()[-1]))
            print(f"{name}: {results[name][-1]['peak'] / GIB:.2f} GiB", file=sys.stderr, flush=True)  # minutes each: an end may come before
    _print(options, results)
    return 0


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Train a few steps with one optimizer and return its numbers, in bytes and seconds."""
    from trainer.build import place
    from trainer.diffusion.objective import Networks, Objective, ObjectiveOptions
    from trainer.diffusion.schedule import NoiseSchedule
    from trainer.models.trainable import apply_freezing
    from trainer.optim.optimizer_set import OptimizerSet
    from trainer.step import train_step

    configured, precision = config_of(options.one, options)
    baseline = _held_before(configured.optimizers.unet, precision.device)
    models = random_models()
    parts = apply_freezing(models, configured.parts, configured.optimizers.freezing)
    place(models, precision.device, channels_last=True, weights=precision.weights)
    optimizers = OptimizerSet(
        dict.fromkeys(parts.parameters, configured.optimizers.unet),
        {network: [parameter for _, parameter in named] for network, named in parts.parameters.items()},
        total_steps=options.steps,
    )
    networks = Networks(models.unet, models.text_encoder, models.vae)
    objective = Objective(
        ObjectiveOptions(),
        NoiseSchedule(models.scheduler_config).to(precision.device),
        seed=0,
        latent_channels=4,
        latent_factor=8,
        scaling_factor=0.18215,
        context_width=768,
        train_text_encoder=options.networks != "unet",
    )
    _start_counting(precision.device)
    seconds: list[float] = []
    done: list[tuple[float, float]] = []
    for step in range(options.steps):
        inputs = objective.draw(_batch(step, options)).to(precision.device)
        began = time.perf_counter()
        result = train_step([inputs], networks, objective, optimizers, step=step, images=options.batch_size, autocast=precision.autocast)
        done.append((result.loss.item(), result.skipped.item()))
        seconds.append(time.perf_counter() - began)
    assert all(math.isfinite(loss) and not skipped for loss, skipped in done), "a step was skipped, so it did not do its work"
    trained = sum(part.trained for part in parts.counts.values())
    return {
        "peak": _peak(precision.device),
        "baseline": baseline,
        "state": _state_bytes(optimizers),
        "weights": sum(p.numel() * p.element_size() for part in vars(networks).values() for p in part.parameters()),
        "trained": trained,
        "seconds": statistics.median(seconds[1:] or seconds),
        "machine": _machine(precision.device),
    }


def config_of(name: str, options: argparse.Namespace) -> tuple[TrainConfig, Precision]:
    """Return the run that a name of NAMES stands for, and its precision."""
    import torch

    from trainer.config.schema import OptimizerConfig, TrainConfig
    from trainer.models.load import ModelOptions
    from trainer.models.trainable import FreezingOptions, TrainableOptions
    from trainer.precision import PrecisionOptions, resolve_precision

    optimizer, *variants = name.split("+")
    chosen = _optimizer(optimizer, fused="fused" in variants)
    weights = "bf16" if "bf16" in variants else "fp32"
    mixed = "auto" if weights == "bf16" and options.mixed_precision == "no" else options.mixed_precision
    config = TrainConfig(
        model=ModelOptions(resume_ckpt="random"),
        parts=TrainableOptions(disable_textenc_training=options.networks == "unet", gradient_checkpointing=True),
        precision=PrecisionOptions(mixed_precision=mixed, weights_dtype=weights),
        optimizers=OptimizerConfig(unet=chosen, text_encoder=chosen, freezing=FreezingOptions(freeze_embeddings=True)),
    )
    return config, resolve_precision(config.precision, torch.device(options.device))


def estimated(name: str, options: argparse.Namespace) -> int:
    """Return the bytes of tensors that the trace of the same step holds at its peak."""
    from trainer.footprint import Work, footprint

    config, precision = config_of(name, options)
    work = Work(size=(options.resolution, options.resolution), images=options.batch_size)
    return max(phase.total for phase in footprint(config, empty_models(), precision, work))


def print_cards(cards: Sequence[float]) -> None:
    """Print a table of the largest batch that each of some configurations fits into cards of so many GiB, at 512 px."""
    import torch

    from trainer.footprint import Work
    from trainer.memory import estimate
    from trainer.precision import Precision

    models = empty_models()
    print(f"estimated, torch {torch.__version__}: 512 px, 16-bit autocast, gradient checkpointing, latents cached")
    print(f"{'':<58}{'peak GiB of 1':>14}{''.join(f'{card:>7g}' for card in cards)}  GiB")
    for title, config, weights in _card_rows():
        precision = Precision(torch.device("cuda"), torch.bfloat16, None, weights)
        frozen = config.parts.disable_textenc_training

        @cache
        def peak(images: int, config: TrainConfig = config, precision: Precision = precision, frozen: bool = frozen) -> int:
            size = (512, 512)
            rows = 2 * max(1, images // 2)
            work = Work(size=size, images=images, latents_kept=True, contexts_kept=frozen, evaluated=4, sample=size, sampled=rows)
            return estimate(config, models, precision, work, holds=None).peak

        fitting = [_largest(peak, int(card * GIB)) for card in cards]
        print(f"{title:<58}{peak(1) / GIB:>14.1f}{''.join(f'{images or chr(8211):>7}' for images in fitting)}", flush=True)


def _card_rows() -> list[tuple[str, TrainConfig, torch.dtype]]:
    import torch

    from trainer.config import load_config

    def loaded(*arguments: str) -> TrainConfig:
        root = Path(__file__).resolve().parent.parent
        images = str(root / "examples" / "faces")
        return load_config(["--config", str(root / "configs" / "sd15.json"), "--data_root", images, *arguments]).config

    both, by_hand = loaded(), loaded("--optimizer_config", "optimizer.json")
    unet = loaded("--optimizer_config", "optimizer.json", "--disable_textenc_training")
    library = loaded("--optimizer_config", "optimizer_dadapt.json")
    reference = _optimizer("dadapt_adam_reference", fused=False)
    library = replace(library, optimizers=replace(library.optimizers, unet=reference, text_encoder=reference))
    return [
        ("configs/sd15.json: dadapt_adam8bit, fused backward", both, torch.float32),
        ("the same, bf16 weights", both, torch.bfloat16),
        ("adamw8bit", by_hand, torch.float32),
        ("adamw8bit, text encoder frozen", unet, torch.float32),
        ("the dadaptation library's DAdaptAdam", library, torch.float32),
    ]


def _largest(peak: Callable[[int], int], holds: int) -> int:
    """Return the largest number of images whose peak is within bounds, found along a straight line; 0 if one is too many."""
    if peak(1) > holds:
        return 0
    guess, step = 1, max(1, (peak(16) - peak(8)) // 8)
    while True:
        ahead = (holds - peak(guess)) // step
        if ahead <= 0 or peak(guess + ahead) > holds:
            break
        guess += ahead
    while peak(guess + 1) <= holds:
        guess += 1
    return guess


def empty_models() -> Models:
    """Return Stable Diffusion 1.5's networks without weights."""
    from trainer.models.load import ModelOptions, describe

    return describe(ModelOptions(resume_ckpt="stable-diffusion-v1-5/stable-diffusion-v1-5"))


def random_models() -> Models:
    """Return the networks of Stable Diffusion 1.5 with random weights, in fp32 on the CPU; without a tokenizer."""
    import torch

    from scripts.make_full_size import fill_randomly
    from trainer.models.load import Models
    from trainer.models.networks import SD15, empty_text_encoder, empty_unet, empty_vae

    unet, text_encoder, vae = empty_unet(SD15.unet), empty_text_encoder(SD15.text_encoder), empty_vae(SD15.vae)
    generator = torch.Generator().manual_seed(0)
    for network in (unet, text_encoder, vae):
        fill_randomly(network, generator)
    none: Any = None
    return Models(unet=unet, text_encoder=text_encoder, vae=vae, tokenizer=none, scheduler_config=dict(SD15.scheduler), source="random")


def _optimizer(name: str, *, fused: bool) -> OptimizerOptions:
    from trainer.config.schema import optimizer_classes

    options = optimizer_classes()[name]
    chosen = options(lr=1.0 if options.adapts else 1e-6)
    return replace(chosen, fused_backward=True) if fused else chosen


def _batch(step: int, options: argparse.Namespace) -> Batch:
    import torch

    from data.batch import Batch

    generator = torch.Generator().manual_seed(step)
    images = range(options.batch_size)
    return Batch(
        pixels_BCHW=torch.rand(len(images), 3, options.resolution, options.resolution, generator=generator) * 2 - 1,
        tokens_BT=torch.randint(0, 49000, (len(images), 77), generator=generator),
        loss_scale_B=torch.ones(len(images)),
        epoch=step,
        positions=tuple(images),
        records=tuple(images),
        names=tuple(map(str, images)),
        captions=tuple(map(str, images)),
    )


def _held_before(options: OptimizerOptions, device: torch.device) -> int:
    """Return what the process holds with its libraries, and what they make on their first use, but without any model."""
    import torch

    if device.type == "cuda":
        return 0
    parameter = torch.nn.Parameter(torch.ones(4096))
    parameter.grad = torch.ones(4096)
    options.build([parameter], 1.0).step()
    torch.nn.Conv2d(4, 8, 3)(torch.ones(1, 4, 16, 16)).sum().backward()
    import psutil

    import trainer.models.networks  # noqa: F401

    return psutil.Process().memory_info().rss


def _state_bytes(optimizers: Any) -> int:
    """Return the bytes of all tensors that the optimizers keep, each counted once."""
    import torch

    tensors: dict[int, int] = {}
    for optimizer in optimizers.optimizers:
        for state in optimizer.state.values():
            for value in state.values():
                if isinstance(value, torch.Tensor):
                    tensors[value.data_ptr()] = value.numel() * value.element_size()
    return sum(tensors.values())


def _start_counting(device: torch.device) -> None:
    """Forget the peak so far: loading is not what is measured."""
    import torch

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): 5 resets the peak resident set


def _peak(device: torch.device) -> int:
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def _machine(device: torch.device) -> str:
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    found = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return f"{found[0].split(': ')[1] if found else platform.machine()}, {torch.get_num_threads()} threads"


def _print(options: argparse.Namespace, results: dict[str, list[dict[str, Any]]]) -> None:
    import torch

    if not results:
        return
    any_result = next(iter(results.values()))[0]
    print(f"{date.today()}  {any_result['machine']}  torch {torch.__version__}  Python {platform.python_version()}")
    print(
        f"{options.networks}: {any_result['trained'] / 1e6:.0f}M parameters trained, {options.resolution} px, batch {options.batch_size}, "
        f"gradient checkpointing, mixed_precision {options.mixed_precision}; {options.steps} steps, {options.rounds} rounds\n"
    )
    base = statistics.median(result["peak"] for result in results[BASE]) if BASE in results else None
    print(
        f"{'':<28}{'peak GiB':>9}{'to ' + BASE:>14}{'state GiB':>11}{'state B/param':>15}{'weights GiB':>13}{'s/step':>8}"
        f"{'before GiB':>12}{'estimated GiB':>15}{'to measured':>13}"
    )
    for name, found in results.items():
        peak = statistics.median(result["peak"] for result in found)
        seconds = statistics.median(result["seconds"] for result in found)
        one = found[0]
        before = one["baseline"] + estimated(name, options)
        ratio = f"{peak / base:.2f}" if base else ""
        print(
            f"{name:<28}{peak / GIB:>9.2f}{ratio:>14}{one['state'] / GIB:>11.2f}{one['state'] / one['trained']:>15.2f}"
            f"{one['weights'] / GIB:>13.2f}{seconds:>8.1f}{one['baseline'] / GIB:>12.2f}{before / GIB:>15.2f}{before / peak:>13.3f}"
        )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return what a command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", choices=("both", "unet"), default="both", help="what is trained")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=[BASE, *NAMES[3:]], help="optimizers to measure, in this order")
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--steps", type=int, default=2, help="the first makes the state, the second meets it")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--mixed_precision", choices=("no", "bf16", "auto"), default="no")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cards", nargs="+", type=float, help="GiB of cards: print what fits them, and measure nothing")
    parser.add_argument("--one", choices=NAMES, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
