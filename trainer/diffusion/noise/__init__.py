"""The noise that training adds, drawn on the CPU for each image by its key, such as (epoch, position)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch.nn.functional import interpolate

from data.rng import stream


def gaussian(shape_CHW: tuple[int, int, int], seed: int, *key: int) -> np.ndarray:
    """Return unit-variance noise of one image, fp32."""
    return stream(seed, "noise", *key).standard_normal(shape_CHW, dtype=np.float32)


def pyramid(noise_CHW: np.ndarray, discount: float, seed: int, *key: int) -> np.ndarray:
    """Add coarser noise to the unit-variance noise of one image, and scale the sum to unit deviation.

    Level i is r^i times as coarse, r being drawn from 2 to 4 for each level, bilinearly enlarged and weighted
    by discount^i. The last one has a side of one latent. Level 0, of full resolution and weight 1, is a
    second noise on top of the plain one. Source: J. Whitaker, "Multi-Resolution Noise for Diffusion Model
    Training", 2023; r^i counts from the whole image, as in EveryDream2 and kohya's trainers.
    """
    draws = stream(seed, "pyramid noise", *key)
    channels, height, width = noise_CHW.shape
    total = np.float32(2**0.5) * noise_CHW  # the plain noise and level 0 together
    for level in range(1, _LEVELS):
        coarser = draws.uniform(2, 4) ** level
        sides = max(1, int(height / coarser)), max(1, int(width / coarser))
        coarse = draws.standard_normal((1, channels, *sides), dtype=np.float32)
        enlarged = interpolate(
            torch.from_numpy(coarse), size=(height, width), mode="bilinear", align_corners=False
        )
        total += np.float32(discount**level) * enlarged[0].numpy()
        if 1 in sides:
            break
    return total / total.std()


_LEVELS = 10
"""The last would be at least 512 times as coarse as a latent."""


def perturbation(shape_TD: tuple[int, int], strength: float, seed: int, *key: int) -> np.ndarray:
    """Return noise for one image's context, fp32, with a standard deviation of strength / sqrt(D)."""
    length, width = shape_TD
    return np.float32(strength / width**0.5) * stream(seed, "embedding", *key).standard_normal(
        (length, width), dtype=np.float32
    )


def offset(noise_CHW: np.ndarray, strength: float, seed: int, *key: int) -> np.ndarray:
    """Add offset noise to that of one image: a constant per channel with standard deviation `strength`.

    Source: N. Guttenberg, "Diffusion With Offset Noise", 2023. It moves whole channels, which plain noise
    hardly ever does.
    """
    draws = stream(seed, "offset noise", *key)
    return noise_CHW + np.float32(strength) * draws.standard_normal(
        (noise_CHW.shape[0], 1, 1), dtype=np.float32
    )


ADDED: dict[str, Callable[..., np.ndarray]] = {
    "pyramid_noise_discount": pyramid,
    "zero_frequency_noise_ratio": offset,
}
"""Noises that are mixed into the plain one and predicted, in this order, by option; None or 0 omits one.

Each takes the noise of one image, the value of the option, the seed and the image's key.
"""


def unseen(shape_CHW: tuple[int, int, int], strength: float, seed: int, *key: int) -> np.ndarray:
    """Return fp32 noise of deviation `strength` that is mixed into one image's latents and not predicted.

    Source: M. Ning et al., "Input Perturbation Reduces Exposure Bias in Diffusion Models", 2023 (arXiv
    2301.11706), algorithm 1.
    """
    return np.float32(strength) * stream(seed, "input perturbation", *key).standard_normal(
        shape_CHW, dtype=np.float32
    )
