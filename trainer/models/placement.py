"""Networks on the device that trains: format, memory layout, and the parameters that get no gradient."""

from __future__ import annotations

import torch

from trainer.models.pipeline import Models


def place(models: Models, device: torch.device, *, channels_last: bool, weights: torch.dtype) -> None:
    """Move the networks to the device, each tensor in memory of its own.

    UNet and text encoder are kept in the format `weights`, the VAE in fp32.

    Loaded tensors may be windows on a mapped file, at any address. Kernels add up in another order where an
    address is not aligned, so a continued run would differ from an unbroken one in the last bits; and a
    mapped file cannot be replaced on Windows.
    """
    for network in (models.unet, models.text_encoder):
        torch.nn.Module.to(network, weights)  # diffusers' own method warns of modules to keep in fp32
    layout = torch.channels_last if channels_last else torch.contiguous_format
    for network in (models.unet, models.vae):
        network.to(device, memory_format=layout)  # type: ignore[call-overload]
    models.text_encoder.to(device)  # type: ignore[arg-type]
    if device.type == "cpu":
        for network in (models.unet, models.vae, models.text_encoder):
            for tensor in (*network.parameters(), *network.buffers()):
                tensor.data = tensor.data.clone()


def skipped_layers(models: Models, clip_skip: int) -> list[str]:
    """Return the names of the text encoder's parameters that clip_skip leaves unused."""
    last = int(models.text_encoder.config.num_hidden_layers)
    layers = tuple(f"encoder.layers.{number}." for number in range(last + 1 - max(clip_skip, 1), last))
    return [
        name for name, _ in models.text_encoder.named_parameters() if any(layer in name for layer in layers)
    ]
