"""Networks that run through torch.compile."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from trainer.errors import UserError
from trainer.optim.dadapt.choice import own_cache

if TYPE_CHECKING:
    import torch
    from torch import nn

_MOST_SHAPES = 1024
"""Shapes that a network is compiled for; beyond, torch would silently run it uncompiled."""


def require_compiler(device: torch.device) -> None:
    """Compile and run a small function on the device, forward and backward; UserError if that fails."""
    import torch
    import torch._dynamo

    try:
        if torch._dynamo.config.disable:
            raise RuntimeError("TORCH_COMPILE_DISABLE is set")
        own_cache()
        numbers = torch.linspace(0.0, 1.0, 64, device=device, requires_grad=True)
        torch.compile(lambda x: (x * x).sin().sum(), fullgraph=True)(numbers).backward()
        x = numbers.detach()
        if numbers.grad is None or not torch.allclose(numbers.grad, 2 * x * (x * x).cos(), atol=1e-5):
            raise RuntimeError("it gives wrong results")
    except Exception as error:  # a missing or broken compiler raises anything
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        gpu = device.type == "cuda"
        needed = "Triton (see requirements.txt)" if gpu else "a C++ compiler (g++, clang or cl)"
        raise UserError(
            f"compile: torch.compile does not work here ({reason}); install {needed} or set compile to false."
        ) from error


def compile_networks(networks: Iterable[nn.Module]) -> None:
    """Have networks run through torch.compile, in place: their parameters keep their names.

    Each shape is compiled by itself. One kernel for all shapes would depend on their order, and so would the
    last bits of a resumed run.
    """
    import torch._dynamo

    # diffusers asks for torch's version through a cache, which Dynamo reports needlessly.
    warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache`")
    settings: Any = torch._dynamo.config
    settings.recompile_limit = max(settings.recompile_limit, _MOST_SHAPES)
    settings.accumulated_recompile_limit = max(settings.accumulated_recompile_limit, _MOST_SHAPES)
    for network in networks:
        network.compile(dynamic=False)


def uncompile(network: nn.Module) -> None:
    """Have a network run eagerly again; nothing changes if it was not compiled."""
    network._compiled_call_impl = None


def uncompiled() -> AbstractContextManager[Any]:
    """Return the context in which compiled networks run eagerly: for shapes that come up rarely."""
    import torch

    return torch.compiler.set_stance("force_eager")
