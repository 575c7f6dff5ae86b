"""Aspect buckets: the sizes that images are trained at, computed from the resolution.

The networks want sides that are multiples of 64, a batch wants one size, and memory wants a bounded area. A bucket is
(width, height).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

Bucket = tuple[int, int]

SIDE = 64
"""Sides are multiples of this."""

LONGEST = 4
"""The largest ratio of the sides; a longer picture is cropped to it."""


@cache
def buckets(resolution: int) -> tuple[Bucket, ...]:
    """Return the buckets of a resolution, from the tallest to the widest.

    Each width has the largest height that keeps the area within resolution squared and the ratio within 4:1, and every bucket
    has its mirror. At 64 there is nothing but the square.

    Args:
        resolution: a multiple of 64.
    """
    wide: set[Bucket] = set()
    for width in range(resolution, 2 * resolution + 1, SIDE):
        height = resolution * resolution // width // SIDE * SIDE
        if height and width <= LONGEST * height:
            wide.add((width, height))
    return tuple(sorted(wide | {(height, width) for width, height in wide}, key=lambda bucket: (bucket[0] / bucket[1], bucket)))


def nearest(width: int, height: int, candidates: Sequence[Bucket]) -> Bucket:
    """Return the bucket whose aspect ratio is nearest to an image's, by the logarithm of the ratios' quotient.

    So a picture twice too wide is as far away as one twice too tall, and the least is cropped. Of equals the first is taken.
    """
    ratio = math.log(width / height)
    return min(candidates, key=lambda bucket: abs(math.log(bucket[0] / bucket[1]) - ratio))
