"""Losses that can be compared over time: the same images, noise and timesteps at every evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge

if TYPE_CHECKING:
    import torch

    from data.batch import Batch
    from trainer.diffusion.objective import Networks, Objective

TIMESTEPS = 4
EVALUATION = -1  # in an epoch's place: no training image ever draws the same noise


@dataclass(frozen=True, kw_only=True)
class FixedLossOptions:
    """The fixed-noise loss, logged as loss/stabilize-train from step 0."""

    fixed_loss_images: Annotated[int, Ge(0)] = 16
    """How many training images the fixed-noise loss is measured on, each at 4 timesteps; 0 turns it off."""


def choose_images(records: int, count: int, seed: int) -> tuple[int, ...]:
    """Return `count` of the record numbers 0..records-1, or all where there are fewer, drawn once for the run, in ascending order."""
    from data.rng import stream

    chosen = stream(seed, "fixed loss images").permutation(records)[:count]
    return tuple(sorted(int(record) for record in chosen))


class FixedLoss:
    """The training loss on fixed images, noise and timesteps, whose changes are changes of the model and nothing else.

    Args:
        batches: the fixed images, uncropped by chance: no flips, no dropped captions.
        objective: the training objective; its timestep range is divided into four equal parts, whose middles are measured.
    """

    def __init__(self, batches: Sequence[Batch], objective: Objective) -> None:
        from trainer.diffusion.objective import Inputs

        start, end = objective.options.timestep_start, objective.options.timestep_end
        timesteps = [int(start + (end - start) * (part + 0.5) / TIMESTEPS) for part in range(TIMESTEPS)]
        self._objective = objective
        self._inputs: list[Inputs] = []
        for batch in batches:
            parts = [
                objective.place(batch, [(EVALUATION, part, record) for record in batch.records], [t] * len(batch))
                for part, t in enumerate(timesteps)
            ]
            self._inputs.append(Inputs.cat(parts))

    def measure(
        self,
        networks: Networks,
        autocast: Callable[[], AbstractContextManager[Any]],
        device: torch.device,
        check: Callable[[], None] = lambda: None,
    ) -> float:
        """Return the mean loss over images and timesteps; synchronises once.

        Args:
            networks: as they train.
            autocast: the context in which the networks compute.
            device: where they are.
            check: called before each image; raises to break off.
        """
        import torch

        sums = []
        with torch.no_grad():
            for inputs in self._inputs:
                check()
                sums.append(self._objective.losses(networks, inputs.to(device), autocast).sum())
        return float(torch.stack(sums).sum()) / sum(len(inputs.t_B) for inputs in self._inputs)
