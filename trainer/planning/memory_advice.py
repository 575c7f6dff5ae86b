"""Changes of a configuration that save memory, the cheapest first."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from trainer.config.schema import TrainConfig, optimizer_classes
from trainer.networks import NETWORKS, TEXT_ENCODER, UNET, by_network
from trainer.optim import OptimizerOptions


def cheapest_key(config: TrainConfig) -> str:
    """Return the cheapest change of the configuration that lowers memory, in one sentence."""
    last = "Train on a device with more memory: what this program can spare is spared already."
    return next((sentence for sentence, _ in filter(None, (change(config) for change in CHANGES))), last)


Change = tuple[str, "TrainConfig"]
"""A sentence that says what to set, and the configuration in which it is set."""


def _checkpointing(config: TrainConfig) -> Change | None:
    if config.parts.gradient_checkpointing:
        return None
    changed = replace(config, parts=replace(config.parts, gradient_checkpointing=True))
    cost = "the same result for about a third more time, with the least memory for activations"
    return f"Set gradient_checkpointing to true: {cost}.", changed


def _latents(config: TrainConfig) -> Change | None:
    if config.cache.cache_latents != "no" or config.data.crop_jitter > 0:
        return None
    changed = replace(config, cache=replace(config.cache, cache_latents="disk"))
    return "Set cache_latents to disk: the VAE leaves the device before training.", changed


def _average(config: TrainConfig) -> Change | None:
    if not config.ema.active or config.ema.ema_device == "cpu":
        return None
    changed = replace(config, ema=replace(config.ema, ema_device="cpu"))
    return "Set ema_device to cpu: the average is kept in main memory.", changed


def _accumulation(config: TrainConfig) -> Change | None:
    fused = any(getattr(options, "fused_backward", False) for options in _trained(config).values())
    if config.data.batch_size == 1 or fused:
        return None
    half = config.data.batch_size // 2
    accumulated = -(-config.data.batch_size * config.loop.grad_accum // half)
    changed = replace(
        config, data=replace(config.data, batch_size=half), loop=replace(config.loop, grad_accum=accumulated)
    )
    return f"Set batch_size to {half} and grad_accum to {accumulated}: the same images a step.", changed


def _eight_bits(config: TrainConfig) -> Change | None:
    if config.parts.trains_adapters:  # with next to no state
        return None
    smaller = {
        "dadapt_adam": "dadapt_adam8bit",
        "dadapt_adam_reference": "dadapt_adam8bit",
        "adamw": "adamw8bit",
        "lion": "lion8bit",
    }
    for section, options in _trained(config).items():
        if options.optimizer in smaller:
            name, file = smaller[options.optimizer], config.optimizer_source.name
            kind = optimizer_classes()[name]
            known = {field.name for field in fields(kind)} - {"optimizer"}
            eight = kind(**{key: value for key, value in vars(options).items() if key in known})
            sentence = f"Set {section}.optimizer to {name} in {file}: it keeps its state in 8 bits."
            return sentence, _with(config, section, eight)
    return None


def _fused_backward(config: TrainConfig) -> Change | None:
    clips, fp16 = config.gradients.clip_grad_norm is not None, config.precision.mixed_precision == "fp16"
    if config.loop.grad_accum > 1 or clips or fp16:
        return None
    if config.parts.trains_adapters:  # with next to no gradients
        return None
    for section, options in _trained(config).items():
        if getattr(options, "fused_backward", None) is False:
            changed = replace(options, fused_backward=True)  # type: ignore[call-arg]
            file = config.optimizer_source.name
            sentence = f"Set {section}.fused_backward to true in {file}: gradients never exist together."
            return sentence, _with(config, section, changed)
    return None


def _bf16_weights(config: TrainConfig) -> Change | None:
    computes = not config.precision.disable_amp and config.precision.mixed_precision in ("auto", "bf16")
    rounds = config.parts.trains_adapters or all(options.rounds_bf16 for options in _trained(config).values())
    if config.precision.weights_dtype == "bf16" or not computes or not rounds:
        return None
    changed = replace(config, precision=replace(config.precision, weights_dtype="bf16"))
    return "Set weights_dtype to bf16: half the memory for weights and gradients.", changed


def _fewer_images(config: TrainConfig) -> Change | None:
    if config.data.batch_size == 1:
        return None
    half = config.data.batch_size // 2
    changed = replace(config, data=replace(config.data, batch_size=half))
    return f"Set batch_size to {half}: fewer images a step.", changed


def _smaller_images(config: TrainConfig) -> Change | None:
    if max(config.data.resolutions) <= 512:
        return None
    changed = replace(config, data=replace(config.data, resolution=512))
    return "Set resolution to 512: fewer activations.", changed


def _frozen_text_encoder(config: TrainConfig) -> Change | None:
    if config.parts.disable_textenc_training or config.parts.disable_unet_training:
        return None
    changed = replace(config, parts=replace(config.parts, disable_textenc_training=True))
    gain = "no gradients and no state for the text encoder"
    return f"Set disable_textenc_training to true: {gain}.", changed


def _adapters(config: TrainConfig) -> Change | None:
    if config.parts.trains_adapters or config.ema.ema_resume_model is not None:
        return None
    changed = replace(config, parts=config.parts.with_adapters())
    what = "adapter weights alone are trained, without gradients and state for the networks"
    return f"Set lora to {{}}: {what}.", changed


CHANGES = (
    *(_checkpointing, _latents, _average, _accumulation),
    *(_eight_bits, _fused_backward, _bf16_weights),
    *(_fewer_images, _smaller_images, _frozen_text_encoder, _adapters),
)
"""Changes without effect on results, then those that cost precision, then those that train less."""


def _trained(config: TrainConfig) -> dict[str, OptimizerOptions]:
    """Return the optimizers of trained networks by their section in the optimizer file."""
    frozen = {UNET: config.parts.disable_unet_training, TEXT_ENCODER: config.parts.disable_textenc_training}
    options = by_network(config.optimizers)
    return {NETWORKS[name].section: options[name] for name in options if not frozen[name]}


def _with(config: TrainConfig, section: str, options: OptimizerOptions) -> TrainConfig:
    """Return the configuration with another optimizer for one section."""
    field = next(network.attribute for network in NETWORKS.values() if network.section == section)
    changed: dict[str, Any] = {field: options}
    return replace(config, optimizers=replace(config.optimizers, **changed))
