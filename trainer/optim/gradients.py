"""Gradients between backward and step: unscaling, norms, clipping, and whether they are finite."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from annotated_types import Gt

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from torch.optim import Optimizer


@dataclass(frozen=True, kw_only=True)
class GradientOptions:
    """Options of gradients before the optimizers use them."""

    clip_grad_norm: Annotated[float, Gt(0)] | None = None
    """Scale the gradient of each network down to at most this norm; null does not clip."""


def finish_gradients(
    networks: Mapping[str, Sequence[nn.Parameter]],
    optimizers: Sequence[Optimizer],
    *,
    scaler: torch.amp.GradScaler | None,
    clip: float | None,
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Unscale, measure and clip in place; return each network's norm before clipping and `found_inf`.

    Args:
        networks: trained parameters by network.
        optimizers: the optimizers over those parameters, which the scaler unscales one by one.
        scaler: fp16's loss scaler.
        clip: the norm to which each network's gradient is scaled down.

    Returns:
        0-d device tensors: the 2-norms, and found_inf, 1.0 if any of them is not finite and 0.0 otherwise;
        None where there is no gradient at all. Nothing is read back.
    """
    import torch

    if scaler is not None:
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
    norms: dict[str, Tensor] = {}
    for name, parameters in networks.items():
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if not gradients:
            continue
        norms[name] = torch.nn.utils.get_total_norm(gradients)
        if clip is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, clip, norms[name])
    if not norms:
        return norms, None
    finite = torch.stack([norm.isfinite() for norm in norms.values()]).all()
    return norms, (~finite).to(torch.float32)
