"""Training steps of a full-size Stable Diffusion 1.5 with random weights, made on the device.

Weights, latents and captions are random: only sizes matter. The steps are the trainer's own
(`trainer.training.step`), with its data types, memory layout and order.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from data.batch import Batch

if TYPE_CHECKING:
    from trainer.config.schema import TrainConfig
    from trainer.diffusion.objective import Inputs
    from trainer.models.pipeline import Models
    from trainer.optim import OptimizerOptions
    from trainer.training.precision import Precision
    from trainer.training.step import StepResult

BUNDLED = Path(__file__).resolve().parent.parent / "models" / "mini-sd"
VARIANTS = ("", "+fused", "+fused+bf16")
NAMES = (
    "adamw8bit",
    "adamw",
    "prodigy",
    "dadapt_adam_reference",
    *(name + variant for name in ("dadapt_adam", "dadapt_adam8bit") for variant in VARIANTS),
)
"""Optimizers and their variants: updates in the backward pass, bf16 weights."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The training step to measure."""

    optimizer: str
    """One of NAMES."""
    networks: Literal["both", "unet"] = "both"
    resolution: int = 512
    images: int = 4
    mixed_precision: Literal["no", "bf16", "auto"] = "auto"
    device: str = "cuda"
    checkpointing: bool = True
    latents_cached: bool = True
    """Start from latents, with the VAE on the CPU, instead of pixels."""
    bundled: bool = False
    """Use the bundled model instead of full-size networks."""


@dataclass(frozen=True)
class Timing:
    """Milliseconds of a step: until the device has finished, except `host`."""

    forward: float
    backward: float
    """With the gradient norms, and the updates of an optimizer that steps inside backward."""
    optimizer: float
    whole: float
    host: float
    """Until all work was launched."""


def run_config(setting: Setting) -> TrainConfig:
    """Return the configuration of a run with these steps."""
    from trainer.config.schema import OptimizerConfig, TrainConfig
    from trainer.models.options import FreezingOptions, ModelOptions, TrainableOptions
    from trainer.training.options import PrecisionOptions

    optimizer, *variants = setting.optimizer.split("+")
    chosen = optimizer_options(optimizer, fused="fused" in variants)
    weights = "bf16" if "bf16" in variants else "fp32"
    mixed = "auto" if weights == "bf16" and setting.mixed_precision == "no" else setting.mixed_precision
    frozen = setting.networks == "unet"
    return TrainConfig(
        model=ModelOptions(resume_ckpt="random"),
        parts=TrainableOptions(disable_textenc_training=frozen, gradient_checkpointing=setting.checkpointing),
        precision=PrecisionOptions(mixed_precision=mixed, weights_dtype=weights),
        optimizers=OptimizerConfig(
            unet=chosen, text_encoder=chosen, freezing=FreezingOptions(freeze_embeddings=True)
        ),
    )


def precision_of(setting: Setting) -> Precision:
    """Return the precision of these steps on their device."""
    from trainer.training.precision import resolve_precision

    return resolve_precision(run_config(setting).precision, torch.device(setting.device))


def optimizer_options(name: str, *, fused: bool) -> OptimizerOptions:
    """Return an optimizer's options at a usual rate."""
    from trainer.config.schema import optimizer_classes

    options = optimizer_classes()[name]
    chosen: Any = options(lr=1.0 if options.adapts else 1e-6)
    return replace(chosen, fused_backward=True) if fused else chosen


def estimated(setting: Setting) -> int:
    """Return the memory estimate of a step's peak, in bytes of tensors; needs no GPU."""
    from trainer.planning.memory_trace import Work, trace_memory
    from trainer.training.precision import imagined_precision

    config = run_config(setting)
    precision = imagined_precision(config.precision) if setting.device == "cuda" else precision_of(setting)
    size = (setting.resolution, setting.resolution)
    work = Work(size=size, images=setting.images, latents_kept=setting.latents_cached)
    phases = trace_memory(config, empty_models(bundled=setting.bundled), precision, work)
    return max(phase.total for phase in phases if phase.name == "training step")


def empty_models(*, bundled: bool = False) -> Models:
    """Return the networks of Stable Diffusion 1.5, or of the bundled model, on the meta device."""
    from trainer.models.family import SD1
    from trainer.models.load import describe
    from trainer.models.networks import empty_models as empty
    from trainer.models.options import ModelOptions

    if bundled:
        return describe(ModelOptions(resume_ckpt=str(BUNDLED)))
    return empty(SD1.default, None, "random")


def random_models(device: torch.device | None = None) -> Models:
    """Return Stable Diffusion 1.5's networks with random fp32 weights, made on `device`; no tokenizer."""
    from scripts.make_full_size import fill_randomly

    models = empty_models()
    generator = torch.Generator(device or "cpu").manual_seed(0)
    for network in (models.unet, models.text_encoder, models.vae):
        fill_randomly(network, generator)
    return models


def state_bytes(optimizers: Any) -> int:
    """Return the bytes of all tensors of optimizer state, each counted once."""
    tensors: dict[int, int] = {}
    for optimizer in optimizers.optimizers:
        for state in optimizer.state.values():
            for value in state.values():
                if isinstance(value, torch.Tensor):
                    tensors[value.data_ptr()] = value.numel() * value.element_size()
    return sum(tensors.values())


class Steps:
    """A model, its optimizers and the inputs of its steps, on the device.

    Attributes:
        networks, optimizers, objective, precision: the run's.
        autocast: the context in which the networks compute; may be replaced.
        trained: number of trained parameters.
    """

    def __init__(self, setting: Setting, models: Models | None = None) -> None:
        from trainer.diffusion.objective import Networks, Objective
        from trainer.diffusion.options import ObjectiveOptions
        from trainer.diffusion.schedule import NoiseSchedule
        from trainer.models.load import load_models
        from trainer.models.options import ModelOptions
        from trainer.models.placement import place
        from trainer.models.trainable import apply_freezing
        from trainer.optim.optimizer_set import OptimizerSet

        self.setting = setting
        config, self.precision = run_config(setting), precision_of(setting)
        self.device, self.autocast = self.precision.device, self.precision.autocast
        if models is None:
            bundled = setting.bundled
            models = (
                load_models(ModelOptions(resume_ckpt=str(BUNDLED))) if bundled else random_models(self.device)
            )
        parts = apply_freezing(models, config.parts, config.optimizers.freezing)
        place(models, self.device, channels_last=True, weights=self.precision.weights)
        if setting.latents_cached:
            torch.nn.Module.to(models.vae, "cpu")
        self.trained = sum(part.trained for part in parts.counts.values())
        self.networks = Networks(models.unet, models.text_encoder, models.vae)
        self.optimizers = OptimizerSet(
            dict.fromkeys(parts.parameters, config.optimizers.unet),
            {network: [parameter for _, parameter in named] for network, named in parts.parameters.items()},
            total_steps=1000,
        )
        self._vocabulary = models.text_encoder.config.vocab_size
        self.objective = Objective(
            ObjectiveOptions(),
            NoiseSchedule(models.scheduler_config).to(self.device),
            seed=0,
            latent_channels=4,
            latent_factor=2 ** (len(models.vae.config["block_out_channels"]) - 1),
            scaling_factor=0.18215,
            context_width=models.text_encoder.config.hidden_size,
            train_text_encoder=setting.networks != "unet",
        )
        self._done = 0

    def inputs(self, number: int, images: int) -> Inputs:
        """Return the inputs of step `number` on the device."""
        return self.objective.draw(self.batch(number, images)).to(self.device)

    def batch(self, number: int, images: int) -> Batch:
        """Return a batch of random images, or of their latents' moments, on the CPU."""
        generator = torch.Generator().manual_seed(number)
        side, latents = self.setting.resolution, self.setting.resolution // self.objective.latent_factor
        draw = partial(torch.rand, generator=generator)
        cached = self.setting.latents_cached
        return Batch(
            pixels_BCHW=None if cached else draw(images, 3, side, side) * 2 - 1,
            moments_BCHW=draw(images, 8, latents, latents) if cached else None,
            tokens_BT=torch.randint(0, self._vocabulary, (images, 77), generator=generator),
            loss_scale_B=torch.ones(images),
            epoch=number,
            positions=tuple(range(images)),
            records=tuple(range(images)),
            names=tuple(map(str, range(images))),
            captions=tuple(map(str, range(images))),
        )

    def step(self, inputs: Inputs) -> StepResult:
        """Train one step."""
        from trainer.training.step import train_step

        self._done += 1
        options = {"step": self._done - 1, "images": len(inputs.t_B), "autocast": self.autocast}
        return train_step([inputs], self.networks, self.objective, self.optimizers, **options)

    def timed(self, inputs: Inputs) -> Timing:
        """Train one step and return the times of its parts."""
        marks = [self._mark()]
        gate, step = self.optimizers.gate, self.optimizers.step

        def marked(function: Callable[..., None], *arguments: Any, after: bool = False, **named: Any) -> None:
            marks.append(self._mark())
            function(*arguments, **named)
            if after:
                marks.append(self._mark())

        began = time.perf_counter()
        optimizers: Any = self.optimizers
        optimizers.gate, optimizers.step = partial(marked, gate), partial(marked, step, after=True)
        try:
            self.step(inputs)
        finally:
            optimizers.gate, optimizers.step = gate, step
        host = time.perf_counter() - began
        marks.append(self._mark())
        self.wait()
        forward, backward, optimizer, _ = (self._between(*pair) for pair in pairwise(marks))
        return Timing(forward, backward, optimizer, self._between(marks[0], marks[-1]), host * 1e3)

    def wait(self) -> None:
        """Wait until the device has finished."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, first: Any, second: Any) -> float:
        return first.elapsed_time(second) if self.device.type == "cuda" else (second - first) * 1e3


@contextmanager
def without_checkpointing(steps: Steps) -> Iterator[None]:
    """Disable gradient checkpointing inside the block."""
    text_encoder = steps.networks.text_encoder
    steps.networks.unet.disable_gradient_checkpointing()
    text_encoder.activation_checkpointing_disable()
    try:
        yield
    finally:
        steps.networks.unet.enable_gradient_checkpointing()
        text_encoder.activation_checkpointing_enable({"use_reentrant": False})
