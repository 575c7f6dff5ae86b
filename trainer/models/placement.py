"""Placement of networks on the training device: dtype, memory layout, and layers without gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from trainer.models.pipeline import Models


def place(models: Models, device: torch.device, *, channels_last: bool, weights: torch.dtype) -> None:
    """Move the networks to the device: UNet and text encoder in the dtype `weights`, the VAE in fp32.

    On the CPU each tensor gets memory of its own. Loaded tensors may be memory-mapped, at any address:
    kernels add up in another order at unaligned addresses, so a resumed run would differ from an unbroken one
    in the last bits; and Windows cannot replace a mapped file.
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
    """Return the names of the text encoder's parameters that clip_skip does not use."""
    last = int(models.text_encoder.config.num_hidden_layers)
    layers = tuple(f"encoder.layers.{number}." for number in range(last + 1 - max(clip_skip, 1), last))
    return [
        name for name, _ in models.text_encoder.named_parameters() if any(layer in name for layer in layers)
    ]


@contextmanager
def evaluating(*networks: torch.nn.Module) -> Iterator[None]:
    """Put networks into evaluation mode, and restore the mode of each module afterwards."""
    modes = [(module, module.training) for network in networks for module in network.modules()]
    try:
        for network in networks:
            network.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training
