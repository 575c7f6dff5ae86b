"""The plan of an epoch: which images each optimizer step sees, in which order and at which size.

A pure function of (index, seed, epoch): nothing is read and nothing remembered, so that resuming at step k means skipping k
entries. An entry is the *global* batch of one optimizer step, in one bucket; the micro-batches and processes that share the
work take slices of it (`slice_step`), whatever their number. An image's position is its place in the epoch's flattened plan.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from data.buckets import Bucket, buckets, nearest
from data.index import Index
from data.rng import stream


@dataclass(frozen=True, slots=True)
class StepPlan:
    """The global batch of one optimizer step."""

    bucket: Bucket
    """(width, height) that all its images are cropped to."""
    images: tuple[int, ...]
    """Record ids."""
    first: int
    """Position in the epoch of the first image; the others follow."""


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """A slice of a step: the images of one forward and backward pass on one device."""

    bucket: Bucket
    positions: tuple[int, ...]
    records: tuple[int, ...]
    filler: bool = False
    """True where a process has no image left in a short step: it runs this one at weight 0, so that no other waits for it forever."""


def plan_epoch(index: Index, *, resolution: int, seed: int, epoch: int, images_per_step: int) -> tuple[StepPlan, ...]:
    """Return the optimizer steps of one epoch.

    Every image comes as often as its `multiply` says. Where that is not a whole number it comes floor or ceil times, so chosen
    that over many epochs each image gets its exact share, and each bucket about as many images every epoch. Copies of an image
    are spread over the batches. A bucket's last batch is as short as it comes out: nothing is repeated to fill it.

    Args:
        index: the scanned images.
        resolution: of the buckets; a multiple of 64.
        seed: the run's.
        epoch: from 0.
        images_per_step: images of a whole global batch: batch size x accumulated micro-batches x processes.
    """
    draws = stream(seed, "plan", epoch)
    batches: list[tuple[Bucket, np.ndarray]] = []
    groups = _members(index, resolution)
    for (bucket, ids, _), times in zip(groups, _times(groups, seed, epoch), strict=True):
        images = np.repeat(ids, times)
        # Copy j of k lands somewhere in the j-th k-th of the group: the order is random, and copies rarely meet in a batch.
        copy = np.arange(len(images)) - np.repeat(np.cumsum(times) - times, times)
        place = (copy + draws.random(len(images))) / np.repeat(times, times)
        images = images[np.argsort(place, kind="stable")]
        batches += [(bucket, images[start : start + images_per_step]) for start in range(0, len(images), images_per_step)]
    steps: list[StepPlan] = []
    first = 0
    for place in draws.permutation(len(batches)):
        bucket, images = batches[place]
        steps.append(StepPlan(bucket, tuple(images.tolist()), first))
        first += len(images)
    return tuple(steps)


def steps_per_epoch(index: Index, *, resolution: int, seed: int, epoch: int, images_per_step: int) -> int:
    """Return the number of entries that `plan_epoch` has for the same arguments; it varies where a `multiply` is a fraction."""
    return _count(_members(index, resolution), seed, epoch, images_per_step)


def steps_before(index: Index, *, resolution: int, seed: int, epoch: int, images_per_step: int) -> int:
    """Return the optimizer steps of all epochs before this one: with the number of epochs, those of the whole run."""
    groups = _members(index, resolution)
    if all((multiply % 1 == 0).all() for _, _, multiply in groups):
        return epoch * _count(groups, seed, 0, images_per_step)
    return sum(_count(groups, seed, earlier, images_per_step) for earlier in range(epoch))


def slice_step(step: StepPlan, batch_size: int, rank: int = 0, world: int = 1) -> list[MicroBatch]:
    """Return one process's part of a step, as micro-batches of at most `batch_size` images.

    The parts of ranks 0, 1, ... and their micro-batches, one after the other, are the step's images in order. Parts differ by
    at most one image; a process without any gets the first image as a filler.
    """
    total = len(step.images)
    start, end = total * rank // world, total * (rank + 1) // world
    if start == end:
        return [MicroBatch(step.bucket, (step.first,), step.images[:1], filler=True)]
    cuts = [(low, min(low + batch_size, end)) for low in range(start, end, batch_size)]
    return [MicroBatch(step.bucket, tuple(range(step.first + low, step.first + high)), step.images[low:high]) for low, high in cuts]


def _members(index: Index, resolution: int) -> list[tuple[Bucket, np.ndarray, np.ndarray]]:
    """Return (bucket, record ids, multiply) of each group of images that may share a batch, in a fixed order."""
    members: dict[tuple[Bucket, str], list[int]] = defaultdict(list)
    choices = buckets(resolution)
    for identity, record in enumerate(index.records):
        members[nearest(record.width, record.height, choices), record.batch_id].append(identity)
    return [
        (group[0], np.array(members[group]), np.array([index.records[identity].multiply for identity in members[group]], float))
        for group in sorted(members)
    ]


def _count(groups: list[tuple[Bucket, np.ndarray, np.ndarray]], seed: int, epoch: int, images_per_step: int) -> int:
    return sum(-(-int(times.sum()) // images_per_step) for times in _times(groups, seed, epoch))


def _times(groups: list[tuple[Bucket, np.ndarray, np.ndarray]], seed: int, epoch: int) -> Iterator[np.ndarray]:
    """Yield, for each group, how often each of its images comes in an epoch.

    Systematic sampling: an image with fraction f comes once more in the epochs in which epoch x f, shifted by its own fixed
    phase, passes a whole number. The phases of a group are evenly spaced, so that its size hardly varies.
    """
    draws = stream(seed, "multiply")
    for _, ids, multiply in groups:
        whole = np.floor(multiply)
        fraction = multiply - whole
        phase = (draws.permutation(len(ids)) + draws.random()) / len(ids)
        passed = np.floor((epoch + 1) * fraction + phase) - np.floor(epoch * fraction + phase)
        yield (whole + np.minimum(passed, 1)).astype(np.int64)
