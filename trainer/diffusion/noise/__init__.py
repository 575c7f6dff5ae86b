"""The noise that training adds, drawn on the CPU for each image by its place in the run."""

from __future__ import annotations

import numpy as np

from data.rng import stream


def gaussian(shape_CHW: tuple[int, int, int], seed: int, *place: int) -> np.ndarray:
    """Return unit-variance noise of one image, fp32."""
    return stream(seed, "noise", *place).standard_normal(shape_CHW, dtype=np.float32)


def offset(shape_CHW: tuple[int, int, int], strength: float, seed: int, *place: int) -> np.ndarray:
    """Return offset noise of one image: a constant per channel with standard deviation `strength`, shape (C, 1, 1).

    Source: N. Guttenberg, "Diffusion With Offset Noise", 2023. Added to the unit-variance noise, it moves whole channels, which plain
    noise hardly ever does.
    """
    return np.float32(strength) * stream(seed, "offset noise", *place).standard_normal((shape_CHW[0], 1, 1), dtype=np.float32)
