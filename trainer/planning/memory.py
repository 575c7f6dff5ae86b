"""What memory a run will take, told before it; and where memory has gone, and what would spare some, if it runs out."""

from __future__ import annotations

import errno
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from data.buckets import buckets, nearest
from trainer.models.options import LoraOptions

if TYPE_CHECKING:
    import torch
    from torch import nn

    from data.index import Index
    from trainer.config.schema import TrainConfig
    from trainer.evaluation.sampling import Sampler
    from trainer.models.pipeline import Models
    from trainer.optim import OptimizerOptions
    from trainer.planning.memory_trace import Phase, Work
    from trainer.training.precision import Precision
    from trainer.training.run import Run

CONTEXT = 3 << 28
"""Bytes that the CUDA context and libraries are assumed to take beyond torch's allocator.

Measured on an H100: 0.75 to 0.78 GiB."""

SLACK = 0.05
"""Share of the tensors' bytes that CUDA's allocator is assumed to hold unused.

Measured on an H100: 2 to 12%, median 5.4%."""


@dataclass(frozen=True)
class Estimate:
    """What a run will hold in memory, thing by thing."""

    phases: Sequence[Phase]
    """What the run does in turn, each at its peak."""
    device: str
    """cuda or cpu."""
    beside: int
    """Bytes beside tensors: assumed on CUDA, on the CPU those of the process before the run."""
    holds: int | None
    """Bytes of the device, None if that is not to be told."""
    spared: Sequence[tuple[str, int]] = ()
    """Where it does not fit: changes of the configuration, the cheapest first, with the peak after this one and all before it."""

    @property
    def largest(self) -> Phase:
        """What takes most."""
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def peak(self) -> int:
        """Bytes of the device at the peak of the whole run."""
        return _peak(self.phases, self.device, self.beside)

    @property
    def fits(self) -> bool:
        """Whether that is at most what the device holds."""
        return self.holds is None or self.peak <= self.holds

    def lines(self) -> list[str]:
        """Return a table and what follows from it."""
        from trainer.planning.memory_trace import KINDS, NETWORKS

        phase = self.largest
        name, unit = ("GiB", 2**30) if self.peak >= 2**30 else ("MiB", 2**20)
        table: list[tuple[str, list[str]]] = [(f"memory, {name}", [*NETWORKS])]
        for kind in KINDS:
            sizes = [phase.of(kind, network) for network in NETWORKS]
            if any(size >= unit // 100 for size in sizes):
                table.append((kind, [f"{size / unit:.2f}" if size >= unit // 100 else "" for size in sizes]))
        lines = [f"{kind:<22}{''.join(f'{cell:>14}' for cell in cells)}".rstrip() for kind, cells in table]
        beside = {
            "cuda": f"assumed: the CUDA context and workspaces, and {SLACK:.0%} that the allocator holds unused",
            "cpu": "Python and its libraries",
        }[self.device]
        others = "".join(
            f", {other.name} {other.total / unit:.1f}" for other in self.phases if other is not phase
        )
        return [
            *lines,
            f"{'beside tensors':<22}{(self.peak - phase.total) / unit:>14.2f}  {beside}",
            f"peak: {self.peak / unit:.1f} {name}, in the {phase.name} (tensors alone: {phase.total / unit:.1f}{others})",
            *self._verdict(),
        ]

    def as_json(self) -> dict[str, Any]:
        """Return the same as JSON holds it, in bytes."""
        phases = {
            phase.name: {
                f"{kind}, {network}": size for (kind, network), size in phase.bytes_by_kind.items() if size
            }
            for phase in self.phases
        }
        spared = [{"change": sentence, "peak": peak} for sentence, peak in self.spared]
        return {"peak": self.peak, "holds": self.holds, "fits": self.fits, "phases": phases, "spared": spared}

    def _verdict(self) -> list[str]:
        if self.holds is None:
            return []
        of = f"the {self.holds / _GIB:.1f} GiB of the {'card' if self.device == 'cuda' else 'main memory that are available'}"
        if self.fits:
            return [f"fits into {of}"]
        lines = [f"does not fit into {of}; what would spare memory, the cheapest first:"]
        for sentence, peak in self.spared:
            lines.append(
                f"  {sentence} Then {peak / _GIB:.1f} GiB{', which fits.' if peak <= self.holds else '.'}"
            )
        if not self.spared or self.spared[-1][1] > self.holds:
            lines.append("  Beyond that: a device with more memory.")
        return lines


_GIB = 2**30


_WORTH_IT = 0.99
"""A change is proposed if it leaves at most this share of the peak."""


def estimate(
    config: TrainConfig, models: Models, precision: Precision, work: Work, *, holds: int | None
) -> Estimate:
    """Return what a run will hold in memory at most, and if that is too much, what would spare some.

    Args:
        config: the run's.
        models: the networks, of which the configurations alone are used.
        precision: the device's type, which need not be there, and number format.
        work: what the run does.
        holds: the bytes of the device, None if nobody asks.

    Raises:
        UserError: an optimizer's library is not there.
    """
    import psutil

    from trainer.planning.memory_trace import footprint

    device = "cuda" if precision.device.type == "cuda" else "cpu"
    beside = CONTEXT if device == "cuda" else psutil.Process().memory_info().rss
    found = Estimate(footprint(config, models, precision, work), device, beside, holds)
    if found.fits or holds is None:
        return found
    spared: list[tuple[str, int]] = []
    now, peak = config, found.peak
    for change in _CHANGES:
        while peak > holds and (proposed := change(now)) is not None:
            sentence, changed = proposed
            less = footprint(changed, models, _with_weights(precision, changed), _with_less(work, changed))
            after = _peak(less, device, beside)
            if after > peak * _WORTH_IT:
                break
            spared.append((sentence, after))
            now, peak = changed, after
    return replace(found, spared=spared)


def work_of(
    config: TrainConfig,
    index: Index,
    sampler: Sampler,
    *,
    latents_kept: bool,
    trains_text: bool,
    held_out: int,
) -> Work:
    """Return what a run does, as far as its memory depends on it.

    Args:
        config: the run's.
        index: the images that are trained.
        sampler: draws the run's samples.
        latents_kept: whether images are encoded before training.
        trains_text: whether the text encoder learns.
        held_out: images and timesteps that are measured at a time, 0 if none are held out.
    """
    from data.dataset import shown_captions
    from trainer.evaluation.fixed_noise import TIMESTEPS
    from trainer.planning.memory_trace import Work

    shown: dict[tuple[int, int], float] = {}
    for record in index.records:
        for resolution in config.data.resolutions:
            bucket = nearest(record.width, record.height, buckets(resolution))
            shown[bucket] = shown.get(bucket, 0.0) + record.multiply
    most = {
        bucket: min(config.data.batch_size, math.ceil(times)) for bucket, times in shown.items() if times > 0
    }
    size, images = max(most.items(), key=lambda entry: entry[0][0] * entry[0][1] * entry[1])
    fixed = 1 if config.fixed_loss.fixed_loss_images else 0
    held = max(1, held_out // TIMESTEPS) if held_out else 0
    sample, pictures = sampler.largest()
    return Work(
        size=size,
        images=images,
        latents_kept=latents_kept,
        contexts_kept=latents_kept and not trains_text and shown_captions(index, config.data) is not None,
        evaluated=TIMESTEPS * max(fixed, held),
        sample=sample,
        sampled=pictures,
    )


def size_of_device(precision: Precision) -> int:
    """Return the bytes that the device that trains holds: a card's memory, or the main memory that is available."""
    import psutil

    if precision.device.type != "cuda":
        return psutil.virtual_memory().available + psutil.Process().memory_info().rss
    import torch

    return torch.cuda.mem_get_info(precision.device)[1]


def _peak(phases: Sequence[Phase], device: str, beside: int) -> int:
    tensors = max(phase.total for phase in phases)
    return tensors + beside + (round(SLACK * tensors) if device == "cuda" else 0)


def _with_less(work: Work, config: TrainConfig) -> Work:
    """Return what a run of a changed configuration does."""
    resolution = max(config.data.resolutions)
    large = work.size[0] * work.size[1] > resolution**2
    return replace(
        work,
        size=nearest(*work.size, buckets(resolution)) if large else work.size,
        images=min(work.images, config.data.batch_size),
        latents_kept=work.latents_kept or config.cache.cache_latents == "disk",
    )


def _with_weights(precision: Precision, config: TrainConfig) -> Precision:
    """Return the precision with weights in the configuration's format."""
    import torch

    if config.precision.weights_dtype == "fp32" or precision.weights == torch.bfloat16:
        return precision
    return replace(precision, weights=torch.bfloat16, dtype=torch.bfloat16)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory has run out, on whichever device."""
    import torch

    # On the CPU torch raises a plain RuntimeError of its allocator, or of oneDNN, which names no reason.
    return (
        isinstance(error, (torch.OutOfMemoryError, MemoryError))
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        or (isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error)) is not None)
    )


_NO_MEMORY = re.compile(
    r"DefaultCPUAllocator|could not create a (primitive|memory|memory object)$|could not execute a primitive$|std::bad_alloc"
)


def memory_table(run: Run) -> list[str]:
    """Return what holds memory as aligned lines: weights and state as they are, gradients as they are during a step."""
    from trainer.checkpoints.atomic import in_gib
    from trainer.state_file import size_of_state

    state = run.learner.optimizers.state_dict()
    rows = []
    held = 0
    networks = run.learner.networks
    for name, network in (
        ("unet", networks.unet),
        ("text encoder", networks.text_encoder),
        ("vae", networks.vae),
    ):
        weights = [
            parameter
            for parameter in network.parameters()
            if parameter.device.type == run.learner.precision.device.type
        ]
        parts = {
            "weights": _bytes(weights),
            "gradients": _bytes([parameter for parameter in weights if parameter.requires_grad]),
            "optimizer state": size_of_state(state[name]["state"]) if name in state else 0,
        }
        held += sum(parts.values())
        rows.append(
            (
                name,
                ", ".join(f"{what} {in_gib(size)}" for what, size in parts.items() if size) or "on the CPU",
            )
        )
    rows.append(
        (
            "together",
            f"{in_gib(held)}; the rest of a step is activations, which grow with batch_size and resolution",
        )
    )
    rows.append((str(run.learner.precision.device), _of_device(run.learner.precision.device)))
    return [f"  {name:<13}{text}" for name, text in rows]


def cheapest_key(config: TrainConfig) -> str:
    """Return the change of the configuration that spares memory for least, in one sentence."""
    last = "Train on a device with more memory: what this program can spare is spared already."
    return next((sentence for sentence, _ in filter(None, (change(config) for change in _CHANGES))), last)


Change = tuple[str, "TrainConfig"]
"""A sentence that says what to set, and the configuration in which it is set."""


def _checkpointing(config: TrainConfig) -> Change | None:
    if config.parts.gradient_checkpointing:
        return None
    told = "the same result for about a third more time, with the least memory for activations"
    return f"Set gradient_checkpointing to true: {told}.", replace(
        config, parts=replace(config.parts, gradient_checkpointing=True)
    )


def _latents(config: TrainConfig) -> Change | None:
    if config.cache.cache_latents != "no" or config.data.crop_jitter > 0:
        return None
    changed = replace(config, cache=replace(config.cache, cache_latents="disk"))
    return "Set cache_latents to disk: the VAE leaves the device before training.", changed


def _average(config: TrainConfig) -> Change | None:
    if not config.ema.active or config.ema.ema_device == "cpu":
        return None
    return "Set ema_device to cpu: the average is kept in main memory.", replace(
        config, ema=replace(config.ema, ema_device="cpu")
    )


def _accumulation(config: TrainConfig) -> Change | None:
    fused = any(getattr(options, "fused_backward", False) for options in _learning(config).values())
    if config.data.batch_size == 1 or fused:
        return None
    half = config.data.batch_size // 2
    accumulated = -(-config.data.batch_size * config.loop.grad_accum // half)
    changed = replace(
        config, data=replace(config.data, batch_size=half), loop=replace(config.loop, grad_accum=accumulated)
    )
    return f"Set batch_size to {half} and grad_accum to {accumulated}: the same images a step.", changed


def _eight_bits(config: TrainConfig) -> Change | None:
    from trainer.config.schema import optimizer_classes

    if config.parts.lora is not None:  # which has next to no state
        return None
    smaller = {
        "dadapt_adam": "dadapt_adam8bit",
        "dadapt_adam_reference": "dadapt_adam8bit",
        "adamw": "adamw8bit",
        "lion": "lion8bit",
    }
    for section, options in _learning(config).items():
        if options.optimizer in smaller:
            name = smaller[options.optimizer]
            kind = optimizer_classes()[name]
            known = {field.name for field in fields(kind)} - {"optimizer"}
            changed = _with(
                config, section, kind(**{key: value for key, value in vars(options).items() if key in known})
            )
            return (
                f"Set {section}.optimizer to {name} in {config.optimizer_source.name}: it keeps its state in 8 bits.",
                changed,
            )
    return None


def _fused_backward(config: TrainConfig) -> Change | None:
    if (
        config.loop.grad_accum > 1
        or config.gradients.clip_grad_norm is not None
        or config.precision.mixed_precision == "fp16"
    ):
        return None
    if config.parts.lora is not None:  # which has next to no gradients
        return None
    for section, options in _learning(config).items():
        if getattr(options, "fused_backward", None) is False:
            told = f"Set {section}.fused_backward to true in {config.optimizer_source.name}: gradients never exist together."
            return told, _with(config, section, replace(options, fused_backward=True))  # type: ignore[call-arg]
    return None


def _bf16_weights(config: TrainConfig) -> Change | None:
    computes = not config.precision.disable_amp and config.precision.mixed_precision in ("auto", "bf16")
    rounded = config.parts.lora is not None or all(
        options.rounds_bf16 for options in _learning(config).values()
    )
    if config.precision.weights_dtype == "bf16" or not computes or not rounded:
        return None
    changed = replace(config, precision=replace(config.precision, weights_dtype="bf16"))
    return "Set weights_dtype to bf16: half the memory for weights and gradients.", changed


def _fewer_images(config: TrainConfig) -> Change | None:
    if config.data.batch_size == 1:
        return None
    half = config.data.batch_size // 2
    return f"Set batch_size to {half}: fewer images a step.", replace(
        config, data=replace(config.data, batch_size=half)
    )


def _smaller_images(config: TrainConfig) -> Change | None:
    if max(config.data.resolutions) <= 512:
        return None
    return "Set resolution to 512: fewer activations.", replace(
        config, data=replace(config.data, resolution=512)
    )


def _frozen_text_encoder(config: TrainConfig) -> Change | None:
    if config.parts.disable_textenc_training or config.parts.disable_unet_training:
        return None
    told = "Set disable_textenc_training to true: no gradients and no state for the text encoder."
    return told, replace(config, parts=replace(config.parts, disable_textenc_training=True))


def _lora(config: TrainConfig) -> Change | None:
    if config.parts.lora is not None or config.ema.ema_resume_model is not None:
        return None
    changed = replace(config, parts=replace(config.parts, lora=LoraOptions()))
    return (
        "Set lora to {}: matrices beside the layers learn, without gradients and state for the networks themselves.",
        changed,
    )


_CHANGES = (
    *(_checkpointing, _latents, _average, _accumulation),
    *(_eight_bits, _fused_backward, _bf16_weights),
    *(_fewer_images, _smaller_images, _frozen_text_encoder, _lora),
)
"""What spares memory: what changes no result, then what costs precision or bounds other keys, then what trains less."""


def _learning(config: TrainConfig) -> dict[str, OptimizerOptions]:
    """Return the optimizers of what learns by their section in the optimizer file."""
    sections = {"base": config.optimizers.unet, "text_encoder_overrides": config.optimizers.text_encoder}
    frozen = {
        "base": config.parts.disable_unet_training,
        "text_encoder_overrides": config.parts.disable_textenc_training,
    }
    return {section: options for section, options in sections.items() if not frozen[section]}


def _with(config: TrainConfig, section: str, options: OptimizerOptions) -> TrainConfig:
    """Return the configuration with another optimizer for one section."""
    field = {"base": "unet", "text_encoder_overrides": "text_encoder"}[section]
    changed: dict[str, Any] = {field: options}
    return replace(config, optimizers=replace(config.optimizers, **changed))


def _bytes(tensors: list[nn.Parameter]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _of_device(device: torch.device) -> str:
    from trainer.checkpoints.atomic import in_gib

    if device.type == "cuda":
        import torch

        free, total = torch.cuda.mem_get_info(device)
        most: Any = torch.cuda.max_memory_allocated(device)
        return (
            f"{in_gib(total)}, of which tensors held {in_gib(most)} at most and {in_gib(free)} are free now"
        )
    import psutil

    memory = psutil.virtual_memory()
    return f"{in_gib(memory.total)}, of which {in_gib(memory.available)} are available now"
