"""Every random draw of a run, by name and key.

The key is *where the draw belongs in the run* (epoch and position of the image, or an evaluation's image and
time), never an earlier draw, a rank, a worker or a micro-batch. Resuming therefore needs no generator state,
and one process of 8 images, two of 4 and eight accumulated singles draw the same numbers.
"""

from __future__ import annotations

import hashlib

import numpy as np


def stream(seed: int, name: str, *indices: int) -> np.random.Generator:
    """Return the generator of one draw: counter-based Philox, keyed by 128 bits of BLAKE2b of the arguments.

    Args:
        name: "plan", "image", "caption", "noise", "timestep", ...
        indices: for instance (epoch, position of the image in the epoch).
    """
    text = "\x1f".join([str(int(seed)), name, *(str(int(index)) for index in indices)])
    key = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")
    return np.random.Generator(np.random.Philox(key=key))
