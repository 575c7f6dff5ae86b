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
    for (bucket, _), ids, times in _groups(index, resolution, seed, epoch):
        images = np.repeat(ids, times)
        # Copy j of k lands somewhere in the j-th k-th of the group: shuffled, and never the same image twice in a row of batches.
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
    """Return the number of entries that `plan_epoch` has for the same arguments."""
    return sum(-(-int(times.sum()) // images_per_step) for _, _, times in _groups(index, resolution, seed, epoch))


def steps_before(index: Index, *, resolution: int, seed: int, epoch: int, images_per_step: int) -> int:
    """Return the optimizer steps of all epochs before this one: with `epoch=max_epochs`, those of the whole run."""
    if all(record.multiply == int(record.multiply) for record in index.records):
        return epoch * steps_per_epoch(index, resolution=resolution, seed=seed, epoch=0, images_per_step=images_per_step)
    each = (
        steps_per_epoch(index, resolution=resolution, seed=seed, epoch=earlier, images_per_step=images_per_step) for earlier in range(epoch)
    )
    return sum(each)


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


def _groups(index: Index, resolution: int, seed: int, epoch: int) -> Iterator[tuple[tuple[Bucket, str], np.ndarray, np.ndarray]]:
    """Yield ((bucket, batch_id), record ids, times each in this epoch) for all images that may share a batch, in a fixed order."""
    members: dict[tuple[Bucket, str], list[int]] = defaultdict(list)
    choices = buckets(resolution)
    known: dict[tuple[int, int], Bucket] = {}
    for identity, record in enumerate(index.records):
        size = record.width, record.height
        bucket = known.get(size)
        if bucket is None:
            bucket = known[size] = nearest(*size, choices)
        members[bucket, record.batch_id].append(identity)
    draws = stream(seed, "multiply")
    for group in sorted(members):
        ids = np.array(members[group])
        times = _times(np.array([index.records[identity].multiply for identity in ids]), epoch, draws)
        if times.any():
            yield group, ids, times


def _times(multiply: np.ndarray, epoch: int, draws: np.random.Generator) -> np.ndarray:
    """Return how often each image of a group comes in an epoch.

    Systematic sampling: an image with fraction f comes once more in the epochs in which epoch x f, shifted by its own fixed
    phase, passes a whole number. The phases of a group are evenly spaced, so that its size hardly varies.
    """
    whole = np.floor(multiply)
    fraction = multiply - whole
    phase = (draws.permutation(len(multiply)) + draws.random()) / len(multiply)
    passed = np.floor((epoch + 1) * fraction + phase) - np.floor(epoch * fraction + phase)
    return (whole + np.minimum(passed, 1)).astype(np.int64)
