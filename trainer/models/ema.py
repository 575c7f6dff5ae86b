"""EMA weights: diffusers' EMAModel over the trained parameters, without effect on training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from trainer.errors import UserError
from trainer.models.options import EmaOptions
from trainer.models.pipeline import Models
from trainer.networks import by_network

SUFFIX = "ema"
"""Mark of files with EMA weights."""


def decay_of(options: EmaOptions, total_steps: int) -> float:
    """Return the share of the EMA weights that stays at an update, for a run of `total_steps`."""
    if options.ema_decay_rate is not None:
        return options.ema_decay_rate
    assert options.ema_strength_target is not None, "EMA is active"
    updates = total_steps // options.ema_update_interval
    if updates == 0:
        raise UserError(
            f"ema_strength_target: ema_update_interval is {options.ema_update_interval} and the run has "
            f"{total_steps} optimizer steps, so the average is never updated; lower ema_update_interval."
        )
    return options.ema_strength_target ** (1 / updates)


def plan_ema(options: EmaOptions, total_steps: int) -> str | None:
    """Return decay and updates in words; None without EMA."""
    if not options.active:
        return None
    updates = total_steps // options.ema_update_interval
    count = f"{updates:,} updates" if updates else "no update: the run is shorter"
    decay, interval = decay_of(options, total_steps), options.ema_update_interval
    return f"decay {decay:.6g} every {interval} steps ({count}), kept on {options.ema_device}"


class Ema:
    """The EMA weights of all trained parameters, in fp32 on `device`.

    Every `interval` optimizer steps, average = decay * average + (1 - decay) * weights. EMAModel's own
    warm-up would start by forgetting the initial weights, and no strength could be aimed at.
    """

    def __init__(
        self,
        parameters: Mapping[str, Sequence[nn.Parameter]],
        *,
        decay: float,
        interval: int,
        device: torch.device,
    ) -> None:
        self._parameters = {network: list(learning) for network, learning in parameters.items()}
        self._interval = interval
        self._device = device
        self._averages: dict[str, Any] = {}
        for network, learning in self._parameters.items():
            # Step -1 as the last before updates makes the very first one an update and no copy.
            average = EMAModel(learning, decay=decay, min_decay=decay, update_after_step=-1)
            average.to(device=device, dtype=torch.float32)
            self._averages[network] = average

    def begin_from(self, weights: Mapping[str, Sequence[Tensor]]) -> None:
        """Set the averages to other weights, by network in the order of the parameters."""
        for network, average in self._averages.items():
            for shadow, weight in zip(average.shadow_params, weights[network], strict=True):
                shadow.copy_(weight)

    def after(self, step: int) -> None:
        """Update the averages if one is due after an optimizer step, counted from 1."""
        if step % self._interval:
            return
        for network, average in self._averages.items():
            average.step([self._at_hand(parameter) for parameter in self._parameters[network]])

    def _at_hand(self, parameter: nn.Parameter) -> Tensor:
        """Return a weight on the averages' device; EMAModel copies weights that need no gradient."""
        return parameter.detach().to(self._device).requires_grad_(True)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Swap the EMA weights in for the block, and restore the trained weights to the bit."""
        swapped: list[str] = []
        try:
            for network, average in self._averages.items():
                average.store(self._parameters[network])
                swapped.append(network)
                average.copy_to(self._parameters[network])
            yield
        finally:
            for network in swapped:
                self._averages[network].restore(self._parameters[network])

    def state_dict(self) -> dict[str, Any]:
        """Return the averages and the number of updates, by network."""
        return {
            network: {"updates": average.optimization_step, "averages": list(average.shadow_params)}
            for network, average in self._averages.items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned, of the same networks."""
        if state.keys() != self._averages.keys():
            raise UserError(
                f"resume_ckpt: the checkpoint holds EMA weights of {' and '.join(state)}, and what is "
                f"trained now is {' and '.join(self._averages)}; train the same networks, or start a new run."
            )
        self.begin_from({network: saved["averages"] for network, saved in state.items()})
        for network, saved in state.items():
            self._averages[network].optimization_step = saved["updates"]


def weights_of(
    models: Models, names: Mapping[str, Sequence[tuple[str, Tensor]]], source: str
) -> dict[str, list[Tensor]]:
    """Return a model's weights by the names of trained parameters; messages call the model `source`.

    Raises:
        UserError: it lacks some, or has them in other shapes.
    """
    networks = by_network(models)
    found: dict[str, list[Tensor]] = {}
    for network, learning in names.items():
        there = dict(networks[network].named_parameters())
        wrong = [name for name, own in learning if name not in there or there[name].shape != own.shape]
        if wrong:
            raise UserError(
                f"ema_resume_model: {source} is another kind of model: {len(wrong)} tensors of its "
                f"{network} are missing or of other shapes, {wrong[0]} among them; name EMA weights of the "
                "model that is trained."
            )
        found[network] = [there[name].detach() for name, _ in learning]
    return found
