"""Copies from the host to the device: the only place that makes them during training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return `tensor` on `device`; to CUDA through pinned memory, so that the copy is asynchronous."""
    if device.type != "cuda":
        return tensor.to(device)
    return (tensor if tensor.is_pinned() else tensor.pin_memory()).to(device, non_blocking=True)


@contextmanager
def visiting(networks: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """Move networks that wait on the CPU to `device` for the time of the block."""
    import torch

    try:
        for network in networks:
            network.to(device)
        yield
    finally:
        for network in networks:
            network.to("cpu")
        if networks and device.type == "cuda":
            torch.cuda.empty_cache()
