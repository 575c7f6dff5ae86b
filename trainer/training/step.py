"""One optimizer step: micro-batches in, weights updated, numbers out. Nothing here waits for the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trainer.optim.gradients import finish_gradients

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from trainer.diffusion.objective import Inputs, Networks, Objective
    from trainer.optim.optimizer_set import OptimizerSet


@dataclass(frozen=True)
class StepResult:
    """The numbers of a step, as 0-d device tensors."""

    loss: Tensor
    """Mean loss of the step's images on this process, each weighted by its loss_scale."""
    norms: dict[str, Tensor]
    """Gradient norm by network, before clipping."""
    skipped: Tensor
    """1.0 if the loss or a gradient was not finite and no weight was changed, else 0.0."""


def train_step(
    micro_batches: Sequence[Inputs],
    networks: Networks,
    objective: Objective,
    optimizers: OptimizerSet,
    *,
    step: int,
    images: int,
    nominal: int | None = None,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    scaler: torch.amp.GradScaler | None = None,
    clip: float | None = None,
    processes: int = 1,
    before: Callable[[int], None] = lambda number: None,
) -> StepResult:
    """Train one global batch.

    Args:
        micro_batches: this rank's share of the step, on the device.
        step: counted from 0, for the learning rates.
        images: images of the step over all ranks.
        nominal: images of a full step, None for `images`. Every image counts 1/nominal: no more in a bucket's
            last short step than elsewhere.
        clip: norm to clip each network's gradient to.
        processes: number of ranks, over which the wrapped networks average gradients.
        before: called with the number of each micro-batch before its forward pass.
    """
    optimizers.set_rates(step)
    nominal = nominal or images
    total = None
    for number, inputs in enumerate(micro_batches):
        last = number == len(micro_batches) - 1
        with ExitStack() as stack:
            if not last:  # several processes exchange gradients once a step
                for network in (networks.unet, networks.text_encoder):
                    stack.enter_context(getattr(network, "no_sync", nullcontext)())
            before(number)
            loss_B = objective.losses(networks, inputs, autocast)
            loss = (loss_B * inputs.scale_B).sum() * (processes / nominal)
            optimizers.gate(loss)  # those that step inside backward cannot wait for the gradients
            (loss if scaler is None else scaler.scale(loss)).backward()
        total = loss.detach() if total is None else total + loss.detach()
    assert total is not None, "a step has at least one micro-batch"

    norms, found_inf = finish_gradients(
        optimizers.parameters, optimizers.optimizers, scaler=scaler, clip=clip
    )
    if found_inf is None or optimizers.fused:  # what was updated inside backward was gated by the loss
        not_finite = (~total.isfinite()).float()
        found_inf = not_finite if found_inf is None else found_inf.maximum(not_finite)
        norms |= optimizers.norms_in_backward()
    optimizers.step(found_inf)
    if scaler is not None:
        scaler.update()
    optimizers.zero_grad()
    return StepResult(loss=total * (nominal / images), norms=norms, skipped=found_inf)
