"""Every random draw of a run, by name and place.

A draw is keyed by *where in the run it belongs* (epoch and position of the image, or an evaluation's image
and time), never by what was drawn before it, nor by rank, worker or micro-batch. Resuming therefore needs no
saved generator state, and one process of 8 images, two of 4 and eight accumulated singles draw the same
numbers.
"""

from __future__ import annotations

import hashlib

import numpy as np


def stream(seed: int, name: str, *indices: int) -> np.random.Generator:
    """Return the generator of one named draw, a counter-based Philox keyed by 128 bits of BLAKE2b of all arguments.

    Args:
        seed: the run's seed.
        name: what is drawn: "plan", "image", "caption", "noise", "timestep", ...
        indices: where it belongs, for instance (epoch, position of the image in the epoch).
    """
    text = "\x1f".join([str(int(seed)), name, *(str(int(index)) for index in indices)])
    key = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")
    return np.random.Generator(np.random.Philox(key=key))
