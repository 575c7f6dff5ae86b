"""Drift of samples in saturation and contrast, the first signs of a model that was trained too hard."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from PIL import Image


class Tone(NamedTuple):
    """Means over samples, in 0..1."""

    saturation: float
    """The largest channel of a pixel less its smallest, over all pixels."""

    contrast: float
    """The standard deviation of a sample's luma (Rec. 601), over all samples."""


def tone(samples: Sequence[Image.Image]) -> Tone:
    """Measure at least one sample."""
    import numpy as np

    colours = [np.asarray(sample.convert("RGB"), dtype=np.float64) / 255 for sample in samples]
    lumas = [np.asarray(sample.convert("L"), dtype=np.float64) / 255 for sample in samples]
    saturation = np.mean([np.mean(colour_HWC.max(-1) - colour_HWC.min(-1)) for colour_HWC in colours])
    return Tone(float(saturation), float(np.mean([luma_HW.std() for luma_HW in lumas])))
