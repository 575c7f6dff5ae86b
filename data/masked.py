"""An image as it is trained: its pixels, and with masks the weight of each pixel as a fourth channel."""

from __future__ import annotations

import numpy as np

from data.errors import FileError
from data.image import CENTRE, CropPosition, read_mask, read_pixels
from data.record import Record


def read_view(
    record: Record, size: tuple[int, int], *, masked: bool, flip: bool = False, crop: CropPosition = CENTRE
) -> np.ndarray:
    """Read an image as uint8 (height, width, 3), or masked (height, width, 4): 255 where it has no mask."""
    pixels = read_pixels(record.path, size, flip=flip, crop=crop)
    if not masked:
        return pixels
    if record.mask_path is None:
        return np.dstack([pixels, np.full(pixels.shape[:2], 255, np.uint8)])
    alpha = record.mask == record.file
    try:
        return np.dstack([pixels, read_mask(record.mask_path, size, alpha=alpha, flip=flip, crop=crop)])
    except FileError as error:
        raise error if alpha else mask_error(record.mask, error) from error


def mask_error(mask: str, error: FileError) -> FileError:
    """Return the reason why a mask cannot be used as a reason of its image."""
    return FileError(f"its mask {mask} cannot be used: {error.reason}")
