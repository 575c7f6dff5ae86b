"""Drift of samples from those of the base, the first sign of a model that was trained too hard."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

_SIDE = 32

_TO_LMS = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
_TO_LAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)
"""Oklab (Ottosson 2020, https://bottosson.github.io/posts/oklab): linear sRGB to LMS, roots to L, a, b."""


class Tone(NamedTuple):
    """Means over samples, in 0..1."""

    saturation: float
    """The largest channel of a pixel less its smallest, over all pixels."""

    contrast: float
    """The standard deviation of a sample's luma (Rec. 601), over all samples."""


class Shift(NamedTuple):
    """Distance of a sample to the base's of the same prompt and noise."""

    colour: float
    """Distance of the mean colours in Oklab: 0.02 is just visible, red to blue 0.54."""

    structure: float
    """1 - correlation of the lumas at 32 x 32: 0 for the same composition, 1 for an unrelated one."""


def tone(samples: Sequence[Image.Image]) -> Tone:
    """Measure at least one sample."""
    colours = [np.asarray(sample.convert("RGB"), dtype=np.float64) / 255 for sample in samples]
    lumas = [np.asarray(sample.convert("L"), dtype=np.float64) / 255 for sample in samples]
    saturation = np.mean([np.mean(colour_HWC.max(-1) - colour_HWC.min(-1)) for colour_HWC in colours])
    return Tone(float(saturation), float(np.mean([luma_HW.std() for luma_HW in lumas])))


def shift(sample: Image.Image, base: Image.Image) -> Shift:
    """Measure how far a sample is from the base's."""
    colour = np.linalg.norm(_mean_colour(sample) - _mean_colour(base))
    one, other = _composition(sample), _composition(base)
    norms = float(np.linalg.norm(one) * np.linalg.norm(other))
    correlation = float(np.vdot(one, other)) / norms if norms else float(np.array_equal(one, other))
    return Shift(float(colour), max(0.0, 1 - correlation))


def _mean_colour(sample: Image.Image) -> np.ndarray:
    """Return the mean of the pixels in Oklab: L, a, b."""
    rgb_HWC = np.asarray(sample.convert("RGB"), dtype=np.float64) / 255
    linear_HWC = np.where(rgb_HWC <= 0.04045, rgb_HWC / 12.92, ((rgb_HWC + 0.055) / 1.055) ** 2.4)
    return (np.cbrt(linear_HWC @ _TO_LMS.T) @ _TO_LAB.T).mean((0, 1))


def _composition(sample: Image.Image) -> np.ndarray:
    """Return the luma at `_SIDE` x `_SIDE` less its mean."""
    from PIL.Image import Resampling

    small = sample.convert("L").resize((_SIDE, _SIDE), Resampling.BOX)
    luma_HW = np.asarray(small, dtype=np.float64)
    return luma_HW - luma_HW.mean()
