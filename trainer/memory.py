"""What a run that has run out of memory says: where the memory is, and which key of its configuration spares most for least."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

    from trainer.config import TrainConfig
    from trainer.loop import Run


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory has run out, on whichever device."""
    import torch

    # On the CPU torch raises a plain RuntimeError of its allocator.
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )


def memory_table(run: Run) -> list[str]:
    """Return what holds memory as aligned lines: weights and state as they are, gradients as they are during a step."""
    from trainer.disk import in_gib
    from trainer.state import size_of_state

    state = run.optimizers.state_dict()
    rows = []
    held = 0
    networks = run.networks
    for name, network in (("unet", networks.unet), ("text encoder", networks.text_encoder), ("vae", networks.vae)):
        weights = [parameter for parameter in network.parameters() if parameter.device.type == run.precision.device.type]
        parts = {
            "weights": _bytes(weights),
            "gradients": _bytes([parameter for parameter in weights if parameter.requires_grad]),
            "optimizer state": size_of_state(state[name]["state"]) if name in state else 0,
        }
        held += sum(parts.values())
        rows.append((name, ", ".join(f"{what} {in_gib(size)}" for what, size in parts.items() if size) or "on the CPU"))
    rows.append(("together", f"{in_gib(held)}; the rest of a step is activations, which grow with batch_size and resolution"))
    rows.append((str(run.precision.device), _of_device(run.precision.device)))
    return [f"  {name:<13}{text}" for name, text in rows]


def cheapest_key(config: TrainConfig) -> str:
    """Return the change of the configuration that spares memory for least, in one sentence: first what changes no result."""
    parts, data, loop, chosen = config.parts, config.data, config.loop, config.optimizers
    learning = {
        "base": None if parts.disable_unet_training else chosen.unet,
        "text_encoder_overrides": None if parts.disable_textenc_training else chosen.text_encoder,
    }
    names = {section: options.optimizer for section, options in learning.items() if options is not None}
    if not parts.gradient_checkpointing:
        return "Set gradient_checkpointing to true: the same result for about a third more time, with the least memory for activations."
    if data.batch_size > 1:
        half = data.batch_size // 2
        return f"Set batch_size to {half} and grad_accum to {-(-data.batch_size * loop.grad_accum // half)}: the same images a step."
    smaller = {"dadapt_adam": "dadapt_adam8bit", "dadapt_adam_reference": "dadapt_adam8bit", "adamw": "adamw8bit", "lion": "lion8bit"}
    for section, name in names.items():
        if name in smaller:
            return f"Set {section}.optimizer to {smaller[name]} in {config.optimizer_source.name}: it keeps its state in 8 bits."
    fusible = [section for section, options in learning.items() if getattr(options, "fused_backward", None) is False]
    if fusible and loop.grad_accum == 1 and config.gradients.clip_grad_norm is None:
        return f"Set {fusible[0]}.fused_backward to true in {config.optimizer_source.name}: gradients never exist together."
    if config.precision.weights_dtype == "fp32" and not config.precision.disable_amp:
        return "Set weights_dtype to bf16: half the memory for weights and gradients."
    if min(data.resolutions) > 512:
        return "Set resolution to 512: fewer activations."
    if not parts.disable_textenc_training:
        return "Set disable_textenc_training to true: no gradients and no state for the text encoder."
    return "Train on a device with more memory: what this program can spare is spared already."


def _bytes(tensors: list[nn.Parameter]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _of_device(device: torch.device) -> str:
    from trainer.disk import in_gib

    if device.type == "cuda":
        import torch

        free, total = torch.cuda.mem_get_info(device)
        most: Any = torch.cuda.max_memory_allocated(device)
        return f"{in_gib(total)}, of which tensors held {in_gib(most)} at most and {in_gib(free)} are free now"
    import psutil

    memory = psutil.virtual_memory()
    return f"{in_gib(memory.total)}, of which {in_gib(memory.available)} are available now"
