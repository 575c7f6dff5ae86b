"""How far pictures have drifted in saturation and contrast: what people call a cooked model shows there first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from PIL import Image


class Tone(NamedTuple):
    """Means over pictures, in 0..1."""

    saturation: float
    """The largest channel of a pixel less its smallest, over all pixels."""

    contrast: float
    """The standard deviation of a picture's luma (Rec. 601), over all pictures."""


def tone(pictures: Sequence[Image.Image]) -> Tone:
    """Measure at least one picture."""
    import numpy as np

    colours = [np.asarray(picture.convert("RGB"), dtype=np.float64) / 255 for picture in pictures]
    lumas = [np.asarray(picture.convert("L"), dtype=np.float64) / 255 for picture in pictures]
    saturation = np.mean([np.mean(colour_HWC.max(-1) - colour_HWC.min(-1)) for colour_HWC in colours])
    return Tone(float(saturation), float(np.mean([luma_HW.std() for luma_HW in lumas])))
