"""Aspect buckets: the training sizes of a resolution, as (width, height).

The networks need sides that are multiples of 64, a batch needs one size, and memory needs a bounded area.
"""

from __future__ import annotations

import math
from bisect import bisect
from functools import cache
from itertools import pairwise

Bucket = tuple[int, int]

SIDE = 64
"""Sides are multiples of this."""

LONGEST = 4
"""The largest aspect ratio; longer images are cropped to it."""


@cache
def buckets(resolution: int) -> tuple[Bucket, ...]:
    """Return the buckets of a resolution, from the tallest to the widest.

    Each width has the largest height that keeps the area within resolution squared and the ratio within 4:1,
    and every bucket has its mirror. Resolution 64 has the square alone.
    """
    wide: set[Bucket] = set()
    for width in range(resolution, 2 * resolution + 1, SIDE):
        height = resolution * resolution // width // SIDE * SIDE
        if height and width <= LONGEST * height:
            wide.add((width, height))
    both = wide | {(height, width) for width, height in wide}
    return tuple(sorted(both, key=lambda bucket: (bucket[0] / bucket[1], bucket)))


def nearest(width: int, height: int, candidates: tuple[Bucket, ...]) -> Bucket:
    """Return the bucket with the nearest aspect ratio, on a logarithmic scale.

    An image twice too wide is then as far away as one twice too tall, and the least is cropped. `candidates`
    are in the order of `buckets`.
    """
    return candidates[bisect(_borders(candidates), width / height)]


@cache
def _borders(candidates: tuple[Bucket, ...]) -> tuple[float, ...]:
    """Return the geometric means of neighbouring ratios."""
    ratios = [width / height for width, height in candidates]
    return tuple(math.sqrt(taller * wider) for taller, wider in pairwise(ratios))
