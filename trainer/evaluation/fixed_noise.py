"""Losses comparable over time: the same images, noise and timesteps at every evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from data.batch import Batch
from data.dataset import Images
from data.rng import stream
from trainer.diffusion.moments import encode_pixels
from trainer.diffusion.objective import Inputs, Networks, Objective
from trainer.models.placement import evaluating

TIMESTEPS = 4
EVALUATION = -1  # in place of an epoch, so that no training step draws the same noise


def choose_images(records: int, count: int, seed: int) -> tuple[int, ...]:
    """Draw up to `count` of the record ids 0..records-1, in ascending order."""
    chosen = stream(seed, "fixed loss images").permutation(records)[:count]
    return tuple(sorted(int(record) for record in chosen))


class Measured(NamedTuple):
    """A mean loss over images and timesteps."""

    loss: float
    """The training's loss, without an image's own loss_scale."""

    mse: float
    """The plain mean squared error, comparable between runs with other losses."""


class FixedLoss:
    """The training loss on fixed images, noise and timesteps: it changes only when the model does.

    Args:
        batches: the images, without flips and dropped captions.
        objective: its timestep range is divided into four equal parts, whose middles are measured.
        keys: by record id, the key of an image's noise; None for the record id.
    """

    def __init__(
        self, batches: Sequence[Batch], objective: Objective, keys: Sequence[tuple[int, ...]] | None = None
    ) -> None:
        start, end = objective.options.timestep_start, objective.options.timestep_end
        self._timesteps = [int(start + (end - start) * (part + 0.5) / TIMESTEPS) for part in range(TIMESTEPS)]
        self._batches = list(batches)
        self._objective = objective
        self._keys = keys

    def measure(
        self,
        networks: Networks,
        autocast: Callable[[], AbstractContextManager[Any]],
        device: torch.device,
        check: Callable[[], None] = lambda: None,
    ) -> Measured:
        """Return the mean loss over images and timesteps; `check` before each batch may raise to abort.

        The first call also encodes the images.
        """
        sums, images = [], 0
        with torch.no_grad(), evaluating(networks.unet, networks.text_encoder):
            for number, batch in enumerate(self._batches):
                check()
                if batch.pixels_BCHW is not None:
                    moments = encode_pixels(networks.vae, batch.pixels_BCHW.to(device), autocast).cpu()
                    batch = self._batches[number] = replace(batch, pixels_BCHW=None, moments_BCHW=moments)
                keys = [(record,) if self._keys is None else self._keys[record] for record in batch.records]
                parts = [
                    self._objective.place(batch, [(EVALUATION, part, *key) for key in keys], [t] * len(batch))
                    for part, t in enumerate(self._timesteps)
                ]
                inputs = Inputs.cat(parts).to(device)
                predicted = self._objective.predict(networks, inputs, autocast)
                losses = [self._objective.judge(predicted, kind).sum() for kind in (None, "mse")]
                sums.append(torch.stack(losses))
                images += len(inputs.t_B)
        loss, mse = torch.stack(sums).sum(dim=0).tolist()
        return Measured(loss / images, mse / images)


class Validation:
    """The losses of validation images, by tag."""

    def __init__(self, losses: Mapping[str, FixedLoss], every_n_epochs: float) -> None:
        self.losses = dict(losses)
        self._every = every_n_epochs

    def due(self, before: float, after: float, *, last: bool = False) -> bool:
        """Return whether a step that moves from `before` to `after` epochs is followed by a measurement."""
        slack = 1e-9  # sums of fractions of an epoch
        if last or not self.losses:
            return bool(self.losses)
        return math.floor(after / self._every + slack) > math.floor(before / self._every + slack)


def held_out_batches(
    images: Images, records: int, size: int, encode: Callable[[Batch], Batch]
) -> list[Batch]:
    """Read validation images as batches of up to `size` of one bucket.

    `encode` replaces an image's pixels by moments, which take a 24th of the memory.
    """
    by_size: dict[torch.Size, list[Batch]] = {}
    for identity in range(records):
        for batch in images.plain([identity]):
            encoded = encode(batch)
            moments = encoded.moments_BCHW
            assert moments is not None, "encoding makes moments"
            by_size.setdefault(moments.shape, []).append(encoded)
    return [
        _joined(same[start : start + size])
        for same in by_size.values()
        for start in range(0, len(same), size)
    ]


def _joined(batches: Sequence[Batch]) -> Batch:
    tensors = ("tokens_BT", "loss_scale_B", "moments_BCHW")
    tuples = ("positions", "records", "names", "captions")
    joined: dict[str, Any] = {
        name: torch.cat([getattr(batch, name) for batch in batches]) for name in tensors
    }
    joined |= {name: tuple(item for batch in batches for item in getattr(batch, name)) for name in tuples}
    return replace(batches[0], **joined)
