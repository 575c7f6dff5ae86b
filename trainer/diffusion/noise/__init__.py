"""The noise that training adds, drawn on the CPU for each image by its place in the run."""

from __future__ import annotations

import numpy as np

from data.rng import stream


def gaussian(shape_CHW: tuple[int, int, int], seed: int, *place: int) -> np.ndarray:
    """Return unit-variance noise of one image, fp32."""
    return stream(seed, "noise", *place).standard_normal(shape_CHW, dtype=np.float32)


def pyramid(noise_CHW: np.ndarray, discount: float, seed: int, *place: int) -> np.ndarray:
    """Return noise of one image with coarser noise added to it, scaled to a standard deviation of 1 over the image; fp32.

    Level i is r^i times as coarse, r being drawn from 2 to 4 for each level, bilinearly enlarged and weighted
    by discount^i. The last one has a side of one latent. Level 0, of full resolution and weight 1, is a
    second noise on top of the plain one. Source: J. Whitaker, "Multi-Resolution Noise for Diffusion Model
    Training", 2023; r^i counts from the whole image, as in EveryDream2 and kohya's trainers.

    Args:
        noise_CHW: the image's unit-variance noise.
        discount: above 0, up to 1; the weight of level 1.
        seed: the run's.
        place: the image's, in the run.
    """
    import torch
    from torch.nn.functional import interpolate

    draws = stream(seed, "pyramid noise", *place)
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


def perturbation(shape_TD: tuple[int, int], strength: float, seed: int, *place: int) -> np.ndarray:
    """Return what is added to one image's context, fp32: noise of standard deviation strength / sqrt(D), vectors of about that length."""
    length, width = shape_TD
    return np.float32(strength / width**0.5) * stream(seed, "embedding", *place).standard_normal(
        (length, width), dtype=np.float32
    )


def offset(shape_CHW: tuple[int, int, int], strength: float, seed: int, *place: int) -> np.ndarray:
    """Return offset noise of one image: a constant per channel with standard deviation `strength`, shape (C, 1, 1).

    Source: N. Guttenberg, "Diffusion With Offset Noise", 2023. Added to the unit-variance noise, it moves
    whole channels, which plain noise hardly ever does.
    """
    return np.float32(strength) * stream(seed, "offset noise", *place).standard_normal(
        (shape_CHW[0], 1, 1), dtype=np.float32
    )


def unseen(shape_CHW: tuple[int, int, int], strength: float, seed: int, *place: int) -> np.ndarray:
    """Return what one image's noise is perturbed by, fp32 with standard deviation `strength`: mixed into its latents, and not predicted.

    Source: M. Ning et al., "Input Perturbation Reduces Exposure Bias in Diffusion Models", 2023 (arXiv
    2301.11706), algorithm 1.
    """
    return np.float32(strength) * stream(seed, "input perturbation", *place).standard_normal(
        shape_CHW, dtype=np.float32
    )
