"""The plan of an epoch: the images of each optimizer step, their order and their size.

A pure function of (index, seed, epoch) without state, so that resuming at step k means skipping k entries. An
entry is the *global* batch of one optimizer step, in one bucket; micro-batches and ranks take slices of it
(`slice_step`). An image's position is its index in the epoch's flattened plan.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data.buckets import Bucket, buckets, nearest
from data.index import Index
from data.rng import stream


@dataclass(frozen=True, slots=True)
class StepPlan:
    """The global batch of one optimizer step."""

    bucket: Bucket
    images: tuple[int, ...]
    """Record ids."""
    first: int
    """Position of the first image in the epoch; the others follow."""


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """A slice of a step: the images of one forward and backward pass on one device."""

    bucket: Bucket
    positions: tuple[int, ...]
    records: tuple[int, ...]
    filler: bool = False
    """A rank without images in a short step runs this one at weight 0, so that no other waits for it."""


def plan_epoch(
    index: Index, *, resolution: int | Sequence[int], seed: int, epoch: int, images_per_step: int
) -> tuple[StepPlan, ...]:
    """Return the optimizer steps of one epoch, counted from 0.

    Every image is shown `multiply` times. A fraction is rounded up or down anew each epoch, so that over many
    epochs each image gets its exact share, and each epoch and bucket about as many images. With several
    resolutions each showing of an image takes the next one, and every epoch has all of them about equally
    often. Copies of an image are spread over the batches. A bucket's last batch may be short: nothing is
    repeated to fill it.

    Args:
        resolution: a multiple of 64, or several.
        images_per_step: batch size x accumulated micro-batches x world size.
    """
    draws = stream(seed, "plan", epoch)
    batches: list[tuple[Bucket, np.ndarray]] = []
    for (bucket, _), (ids, times) in _Groups(index, resolution, seed).of_epoch(epoch).items():
        images = np.repeat(ids, times)
        # Copy j of k is placed somewhere in the j-th k-th of the group, so that copies rarely share a batch.
        copy = np.arange(len(images)) - np.repeat(np.cumsum(times) - times, times)
        place = (copy + draws.random(len(images))) / np.repeat(times, times)
        images = images[np.argsort(place, kind="stable")]
        batches += [
            (bucket, images[start : start + images_per_step])
            for start in range(0, len(images), images_per_step)
        ]
    steps: list[StepPlan] = []
    first = 0
    for number in draws.permutation(len(batches)):
        bucket, images = batches[number]
        steps.append(StepPlan(bucket, tuple(images.tolist()), first))
        first += len(images)
    return tuple(steps)


def steps_per_epoch(
    index: Index, *, resolution: int | Sequence[int], seed: int, epoch: int, images_per_step: int
) -> int:
    """Return the number of steps of `plan_epoch`.

    It varies by epoch with a fractional `multiply`, and with several resolutions.
    """
    return _Groups(index, resolution, seed).steps(epoch, images_per_step)


def steps_before(
    index: Index, *, resolution: int | Sequence[int], seed: int, epoch: int, images_per_step: int
) -> int:
    """Return the optimizer steps of all epochs before this one."""
    groups = _Groups(index, resolution, seed)
    period = groups.period or epoch
    steps = [groups.steps(earlier, images_per_step) for earlier in range(min(period, epoch))]
    return sum(steps) * (epoch // period) + sum(steps[: epoch % period]) if epoch else 0


def slice_step(step: StepPlan, batch_size: int, rank: int = 0, world: int = 1) -> list[MicroBatch]:
    """Return one rank's part of a step, as micro-batches of at most `batch_size` images.

    The parts of ranks 0, 1, ..., concatenated, are the step's images in order. Parts differ by at most one
    image; a rank without any gets the first image as a filler.
    """
    total = len(step.images)
    start, end = total * rank // world, total * (rank + 1) // world
    if start == end:
        return [MicroBatch(step.bucket, (step.first,), step.images[:1], filler=True)]
    cuts = [(low, min(low + batch_size, end)) for low in range(start, end, batch_size)]
    return [
        MicroBatch(step.bucket, tuple(range(step.first + low, step.first + high)), step.images[low:high])
        for low, high in cuts
    ]


Group = tuple[Bucket, str]
"""A bucket and a batch_id, whose images may share a batch."""


class _Groups:
    """The images of each group in an epoch, and how often each is shown."""

    def __init__(self, index: Index, resolution: int | Sequence[int], seed: int) -> None:
        resolutions = (resolution,) if isinstance(resolution, int) else tuple(resolution)
        tables = [buckets(each) for each in resolutions]
        members: dict[tuple[tuple[Bucket, ...], str], list[int]] = defaultdict(list)
        for identity, record in enumerate(index.records):
            sizes = tuple(nearest(record.width, record.height, table) for table in tables)
            members[sizes, record.batch_id].append(identity)
        shares, turns = stream(seed, "multiply"), stream(seed, "resolution")
        self._kinds: list[_Kind] = []
        for sizes, batch_id in sorted(members):
            ids = np.array(members[sizes, batch_id])
            # Rounded, so that a sum of fractions near 1 never counts an image twice.
            multiply = np.round([index.records[identity].multiply for identity in ids], 9)
            # Evenly spaced, so that the size of a group hardly varies.
            phase = (shares.permutation(len(ids)) + shares.random()) / len(ids)
            turn = (
                turns.permutation(len(ids)) % len(sizes) if len(sizes) > 1 else np.zeros(len(ids), np.int64)
            )
            self._kinds.append(_Kind(tuple((size, batch_id) for size in sizes), ids, multiply, phase, turn))

    @property
    def period(self) -> int | None:
        """The epochs after which the numbers of images repeat; None with a fractional multiply."""
        whole = all((kind.multiply % 1 == 0).all() for kind in self._kinds)
        return len(self._kinds[0].groups) if whole else None

    def of_epoch(self, epoch: int) -> dict[Group, tuple[np.ndarray, np.ndarray]]:
        """Return ascending record ids and their numbers of showings by group, in a fixed order."""
        found: dict[Group, list[tuple[np.ndarray, np.ndarray]]] = defaultdict(list)
        for kind in self._kinds:
            before, after = kind.showings(epoch), kind.showings(epoch + 1)
            count = len(kind.groups)
            for number, group in enumerate(kind.groups):
                # The showings s, counted over the run, with s + turn = number modulo the resolutions.
                times = (after + kind.turn - number + count - 1) // count - (
                    before + kind.turn - number + count - 1
                ) // count
                found[group].append((kind.ids, times))
        return {group: _together(found[group]) for group in sorted(found)}

    def steps(self, epoch: int, images_per_step: int) -> int:
        """Return the number of batches of an epoch."""
        return sum(-(-int(times.sum()) // images_per_step) for _, times in self.of_epoch(epoch).values())


@dataclass(frozen=True)
class _Kind:
    """The images that agree in their group at every resolution."""

    groups: tuple[Group, ...]
    """One for each resolution."""
    ids: np.ndarray
    multiply: np.ndarray
    phase: np.ndarray
    """In [0, 1): offset at which the fraction of a multiply is due."""
    turn: np.ndarray
    """The number of an image's first resolution."""

    def showings(self, epoch: int) -> np.ndarray:
        """Return the number of showings of each image before an epoch, by systematic sampling.

        An image with fraction f is shown once more in the epochs in which epoch x f + phase passes a whole
        number.
        """
        whole = np.floor(self.multiply)
        return (epoch * whole + np.floor(epoch * (self.multiply - whole) + self.phase)).astype(np.int64)


def _together(parts: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    if len(parts) == 1:
        return parts[0]
    ids, times = (np.concatenate(each) for each in zip(*parts, strict=True))
    order = np.argsort(ids, kind="stable")
    return ids[order], times[order]
