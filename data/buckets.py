"""Aspect buckets: the sizes that images are trained at, computed from the resolution.

The networks want sides that are multiples of 64, a batch wants one size, and memory wants a bounded area. A
bucket is (width, height).
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
"""The largest ratio of the sides; a longer picture is cropped to it."""


@cache
def buckets(resolution: int) -> tuple[Bucket, ...]:
    """Return the buckets of a resolution, from the tallest to the widest.

    Each width has the largest height that keeps the area within resolution squared and the ratio within 4:1,
    and every bucket has its mirror. At 64 there is nothing but the square.

    Args:
        resolution: a multiple of 64.
    """
    wide: set[Bucket] = set()
    for width in range(resolution, 2 * resolution + 1, SIDE):
        height = resolution * resolution // width // SIDE * SIDE
        if height and width <= LONGEST * height:
            wide.add((width, height))
    return tuple(
        sorted(
            wide | {(height, width) for width, height in wide},
            key=lambda bucket: (bucket[0] / bucket[1], bucket),
        )
    )


def nearest(width: int, height: int, candidates: tuple[Bucket, ...]) -> Bucket:
    """Return the bucket whose aspect ratio is nearest to an image's, by the logarithm of the ratios' quotient.

    So a picture twice too wide is as far away as one twice too tall, and the least is cropped.

    Args:
        width: of the image, in any unit; so is `height`.
        height: of the image.
        candidates: buckets from the tallest to the widest, as `buckets` gives them.
    """
    return candidates[bisect(_borders(candidates), width / height)]


@cache
def _borders(candidates: tuple[Bucket, ...]) -> tuple[float, ...]:
    """Return the ratios halfway between neighbours on the logarithmic scale: their geometric means."""
    ratios = [width / height for width, height in candidates]
    return tuple(math.sqrt(taller * wider) for taller, wider in pairwise(ratios))
