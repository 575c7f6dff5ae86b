"""The rules between the optimizer file and the rest of a run: train.json, model size, device, steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from trainer.config.optimizers import BASE, FREEZING, OVERRIDES
from trainer.config.report import Place
from trainer.config.rules import Settings, Unknown
from trainer.config.schema import OptimizerConfig, TrainConfig, optimizer_classes
from trainer.errors import UserError
from trainer.networks import NETWORKS, by_network
from trainer.optim import OptimizerOptions
from trainer.optim.by_class import ByClassOptions, try_out
from trainer.optim.schedules import rate_factor, warmup_steps

if TYPE_CHECKING:
    from trainer.training.precision import Precision

HIGH_LR = 1e-5
"""The largest AdamW rate that a full fine-tune of Stable Diffusion is known to bear."""

LORA_LR = 1e-4
"""A usual AdamW rate of a LoRA."""

FULL_SIZE = 500_000_000
"""Trained parameters from which a run counts as a full fine-tune."""

Sections = Mapping[str, OptimizerOptions]
"""The options of the networks that are trained, by section of the optimizer file."""


def apply_optimizer_rules(settings: Settings, optimizers: OptimizerConfig, file: str) -> None:
    """Report contradictions between train.json and the optimizer file, which messages call `file`."""
    try:
        frozen = (settings["disable_unet_training"], settings["disable_textenc_training"])
        sections = _trained(optimizers, *frozen)
        fused = [name for name, options in sections.items() if _is_fused(options)]
        if fused:
            _fused_backward(settings, f"set fused_backward to false in {file} ({' and '.join(fused)})")
        _adaptation(settings, sections)
        _by_class(settings, sections, file)
        if settings["weights_dtype"] == "bf16":
            _bf16_weights(settings, sections, file)
        if settings["lora"] is not None:
            _lora(settings, sections, optimizers, file)
    except Unknown:
        return


def check_rates(config: TrainConfig, trained_parameters: Mapping[str, int]) -> None:
    """Refuse rates that are known to ruin a full-size model, unless `allow_high_lr` is set.

    These are rates above 1e-5, not found by the optimizer itself, for over 500 million trained parameters.
    """
    total = sum(trained_parameters.values())
    if config.rates.allow_high_lr or total <= FULL_SIZE:
        return
    problems = [
        f"{config.optimizer_source.name}: {NETWORKS[network].section}.lr: "
        f"{options.optimizer} at {options.lr:g} ruins a model "
        f"of this size ({total / 1e6:.0f} million trained parameters); set lr to {HIGH_LR:g} or less (1e-6 "
        f"is usual) there or in {config.source.name}, or set allow_high_lr to true"
        for network, options in by_network(config.optimizers).items()
        if trained_parameters.get(network) and not options.adapts and (options.lr or 0) > HIGH_LR
    ]
    if problems:
        raise UserError(problems)


def check_fused_backward(config: TrainConfig, precision: Precision | None = None, processes: int = 1) -> None:
    """Refuse fused backward with the scaler of fp16, or with several ranks."""
    if not any(map(_is_fused, (config.optimizers.unet, config.optimizers.text_encoder))):
        return
    if processes > 1:
        raise UserError(
            f"{processes} processes were launched, which contradicts fused_backward: it updates the weights "
            "inside the backward pass, before gradients are averaged over processes; set fused_backward to "
            f"false in {config.optimizer_source.name}, or start one process."
        )
    if precision is not None and precision.scaler is not None:
        raise UserError(
            f"mixed_precision: auto is fp16 on {precision.device}, which has no native bf16, and fp16 "
            "contradicts fused_backward: whether a scaled gradient has overflowed is known too late; set "
            f"fused_backward to false in {config.optimizer_source.name}, or mixed_precision to no."
        )


def check_schedules(config: TrainConfig, total_steps: int) -> list[str]:
    """Return notes about learning-rate schedules that suit a run of `total_steps` badly.

    An lr of 0 for part of a run with D-Adaptation is refused, since its sums go stale meanwhile.
    """
    notes: list[str] = []
    problems: list[str] = []
    parts = config.parts
    trained = _trained(config.optimizers, parts.disable_unet_training, parts.disable_textenc_training)
    for section, options in trained.items():
        if options.lr_scheduler == "constant":
            continue
        place = f"{config.optimizer_source.name}: {section}"
        factor = rate_factor(options, total_steps)
        # A schedule may touch 0 for one step, at its start or restart.
        zeros = (step for step in range(total_steps - 1) if factor(step) == 0 and factor(step + 1) == 0)
        still = next(zeros, None)
        if still is not None:
            holds = (
                f"{place}: lr_scheduler {options.lr_scheduler} holds lr at 0 from step {still} on, of "
                f"{total_steps} in all"
            )
            advice = f"set lr_decay_steps to at least {total_steps}, or null for 1.5 times the run"
            if options.adapts:
                problems.append(f"{holds}, where D-Adaptation cannot stand still without harm; {advice}")
            else:
                notes.append(f"{holds}, so nothing is learned from there; {advice}")
        warmup = warmup_steps(options, total_steps)
        if options.adapts and warmup > total_steps / 10:
            notes.append(
                f"{place}: the warm-up of {warmup} steps is more than a tenth of the run's {total_steps}; "
                "D-Adaptation starts at a tiny rate and finds its own, so a long warm-up only holds d back; "
                "lr_warmup_steps 0 is usual"
            )
    if problems:
        raise UserError(problems)
    return notes


def _trained(optimizers: OptimizerConfig, unet_frozen: bool, text_encoder_frozen: bool) -> Sections:
    unet = {} if unet_frozen else {BASE: optimizers.unet}
    return {**unet, **({} if text_encoder_frozen else {OVERRIDES: optimizers.text_encoder})}


def _is_fused(options: OptimizerOptions) -> bool:
    return getattr(options, "fused_backward", False)


def _fused_backward(settings: Settings, off: str) -> None:
    if settings["grad_accum"] > 1:
        settings.error(
            f"{settings['grad_accum']} contradicts fused_backward, which updates the weights inside every "
            "backward pass, before the batches are averaged; raise batch_size instead and set grad_accum "
            f"to 1, or {off}",
            "grad_accum",
        )
    if settings["clip_grad_norm"] is not None:
        settings.error(
            "contradicts fused_backward, which updates the first weights before the norm of the whole "
            f"gradient is known; D-Adaptation seldom needs clipping: set it to null, or {off}",
            "clip_grad_norm",
        )
    if settings["mixed_precision"] == "fp16":
        settings.error(
            "fp16 contradicts fused_backward, which updates weights before it is known whether the scaled "
            f"gradient has overflowed; use bf16 or no, or {off}",
            "mixed_precision",
        )
    if settings["compile"]:
        settings.note(
            "a compiled backward pass hands over all gradients of a network at once, so fused_backward "
            "spares no memory with it",
            "compile",
        )


def _adaptation(settings: Settings, sections: Sections) -> None:
    if settings["allow_high_lr"] and all(options.adapts for options in sections.values()):
        settings.note(
            "has no effect: it allows rates chosen by hand, and D-Adaptation finds them", "allow_high_lr"
        )
    finding = [
        options.optimizer for options in sections.values() if options.adapts and not _is_fused(options)
    ]
    if settings["clip_grad_norm"] is not None and finding:
        settings.note(
            f"also changes d, which {finding[0]} estimates from the clipped gradients; null is usual",
            "clip_grad_norm",
        )


def _by_class(settings: Settings, sections: Sections, file: str) -> None:
    for name, options in sections.items():
        if isinstance(options, ByClassOptions):
            try:
                try_out(options, channels_last=settings["channels_last"])
            except ValueError as error:
                settings.error(f"{file}: {name}.optimizer: {error}", "optimizer_config")


def _bf16_weights(settings: Settings, sections: Sections, file: str) -> None:
    asked = "no" if settings["disable_amp"] else settings["mixed_precision"]
    if asked in ("fp16", "no"):
        settings.error(
            f"bf16 contradicts mixed_precision: {asked}; use mixed_precision auto or bf16 with it",
            "weights_dtype",
        )
    if settings["lora"] is not None:  # LoRA adapters stay in fp32
        return
    able = " or ".join(name for name, options in optimizer_classes().items() if options.rounds_bf16)
    for name, options in sections.items():
        if not options.rounds_bf16:
            settings.error(
                "bf16 needs an optimizer that rounds stochastically, since most steps are smaller than the "
                f"spacing of bf16 numbers and would be lost with {options.optimizer} ({file}: {name}); use "
                f"{able} there, or weights_dtype fp32",
                "weights_dtype",
            )


def _lora(settings: Settings, sections: Sections, optimizers: OptimizerConfig, file: str) -> None:
    for name, options in sections.items():
        if not options.adapts and (options.lr or 0) <= HIGH_LR:
            settings.report.note(
                Place(file, None, f"{name}.lr"),
                f"{options.lr:g} is a rate for training whole networks; a LoRA learns little at it, "
                f"{LORA_LR:g} is usual",
            )
        if settings["lora"].dora and not options.groups_decay and getattr(options, "weight_decay", 0):
            settings.error(
                f"dora contradicts {name}.weight_decay in {file}: {options.optimizer} cannot spare "
                "magnitudes from it, and so shrinks the model; set it to 0, or choose another optimizer",
                "lora",
            )
    if optimizers.freezing.freeze_embeddings is False and OVERRIDES in sections:
        place = Place(file, None, f"{FREEZING}.freeze_embeddings")
        settings.report.note(place, "has no effect: lora trains no embeddings")
