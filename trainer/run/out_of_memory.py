"""Out of memory: recognised, and shown with the memory of weights, gradients and state."""

from __future__ import annotations

import errno
import re
from typing import Any

import psutil
import torch
from torch import nn

from data.atomic import in_gib
from trainer.networks import by_network
from trainer.state_file import size_of_state
from trainer.training.run import Run


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that memory has run out, on any device."""
    # On the CPU torch raises a plain RuntimeError of its allocator, or of oneDNN without a reason.
    return (
        isinstance(error, (torch.OutOfMemoryError, MemoryError))
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        or (isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error)) is not None)
    )


_NO_MEMORY = re.compile(
    r"DefaultCPUAllocator|could not create a (primitive|memory|memory object)$"
    r"|could not execute a primitive$|std::bad_alloc"
)


def memory_table(run: Run) -> list[str]:
    """Return what holds memory as aligned lines: weights, state, and gradients as during a step."""
    state, device = run.learner.optimizers.state_dict(), run.learner.precision.device
    rows, held, networks = [], 0, run.learner.networks
    for name, network in {**by_network(networks), "vae": networks.vae}.items():
        weights = [parameter for parameter in network.parameters() if parameter.device.type == device.type]
        parts = {
            "weights": _bytes(weights),
            "gradients": _bytes([parameter for parameter in weights if parameter.requires_grad]),
            "optimizer state": size_of_state(state[name]["state"]) if name in state else 0,
        }
        held += sum(parts.values())
        sizes = ", ".join(f"{kind} {in_gib(size)}" for kind, size in parts.items() if size)
        rows.append((name, sizes or "on the CPU"))
    rest = "the rest of a step is activations, which grow with batch_size and resolution"
    rows += [("together", f"{in_gib(held)}; {rest}"), (str(device), _of_device(device))]
    return [f"  {name:<13}{text}" for name, text in rows]


def _bytes(tensors: list[nn.Parameter]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _of_device(device: torch.device) -> str:
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        most: Any = torch.cuda.max_memory_allocated(device)
        return (
            f"{in_gib(total)}, of which tensors held {in_gib(most)} at most and {in_gib(free)} are free now"
        )
    memory = psutil.virtual_memory()
    return f"{in_gib(memory.total)}, of which {in_gib(memory.available)} are available now"
