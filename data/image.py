"""One image file: its displayed size from the header, and its pixels cropped to a bucket.

numpy and Pillow only; tensors begin in `data.batch`.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, lru_cache
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError

from data.errors import FileError

SUFFIXES = ("jpg", "jpeg", "png", "bmp", "webp", "jfif", "gif", "avif", "tif", "tiff", "heic", "heif")
"""Extensions of image files; the content decides how they are decoded."""

READING = 1
"""The version of `read_pixels`: raise it when a file gives other pixels, to make cached latents stale."""

CENTRE = (0.5, 0.5)

_SHAPE_SLACK = 1.0
"""Pixels by which the sides of a scaled mask may be rounded."""

_STDERR = 2

logging.getLogger("PIL").addHandler(logging.NullHandler())  # else warnings about odd files reach the console

_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF", "AVIF", "TIFF")
_HEIF_BRANDS = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"})
_SIXTEEN_BIT = frozenset({"I;16", "I;16L", "I;16B"})
_MODES = (
    frozenset({"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr"})
    | _SIXTEEN_BIT
)

_DRAFT_GAP = 2
"""A JPEG is decoded at a reduced scale of at least this many times the final size.

512 px from 12 megapixels take 78 ms instead of 214 on one core, at 41.5 dB PSNR to the full decode.
"""

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""By EXIF orientation, the operation that turns stored pixels upright; from 5 on, width and height swap."""

CropPosition = tuple[float, float]
"""From (0, 0), the upper left corner of the possible crops, to (1, 1), the lower right."""


def displayed_size(path: Path) -> tuple[int, int]:
    """Read (width, height) as displayed, EXIF orientation applied, from the header."""
    with _opened(path) as image:
        width, height = image.size
        return (height, width) if _orientation(image, path) >= 5 else (width, height)


def is_image(name: str) -> bool:
    """Recognise an image file by its extension."""
    return name.rpartition(".")[2].lower() in SUFFIXES


def has_alpha(path: Path) -> bool:
    """Read from the header if an image may have transparent parts."""
    with _opened(path) as image:
        return image.has_transparency_data


def check_mask(path: Path, size: tuple[int, int]) -> None:
    """Refuse a mask of another shape than the displayed size of its image."""
    width, height = displayed_size(path)
    scale = max(width / size[0], height / size[1])
    if max(size[0] * scale - width, size[1] * scale - height) > _SHAPE_SLACK:
        raise FileError(
            f"it is {width} x {height} and the image {size[0]} x {size[1]}, another shape; save it in the "
            "image's size"
        )


def read_mask(
    path: Path, size: tuple[int, int], *, alpha: bool, flip: bool = False, crop: CropPosition = CENTRE
) -> np.ndarray:
    """Read a mask with the geometry of `read_pixels`, as uint8 (height, width): 255 is trained, 0 is not.

    Args:
        alpha: read an image's opacity; else its red channel, as kohya's scripts do, over black.

    Raises:
        FileError: the file cannot be read, or is 0 everywhere.
    """
    with _opened(path) as image:
        orientation = _orientation(image, path)
        with _decoding(path), _quiet_libtiff(image):
            image.load()
        pixels = _scalable(image)
    if alpha:
        mask = pixels.getchannel("A") if "A" in pixels.mode else Image.new("L", pixels.size, 255)
    else:
        mask = _over(pixels, "black").convert("RGB").getchannel("R")
    if mask.getextrema() == (0, 0):
        found = "the image is transparent" if alpha else "it is black"
        raise FileError(f"{found} everywhere, which leaves nothing to train")
    if orientation in _UPRIGHT:
        mask = mask.transpose(_UPRIGHT[orientation])
    mask = mask.resize(size, Image.Resampling.BILINEAR, box=_box(mask.size, size, crop))
    return np.asarray(mask.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else mask)


def read_pixels(
    path: Path, size: tuple[int, int], *, flip: bool = False, crop: CropPosition = CENTRE
) -> np.ndarray:
    """Read an image upright, scaled to cover `size` and cropped to it, as uint8 sRGB (height, width, 3).

    Transparent parts become white, an embedded colour profile is applied, and an animation gives its first
    frame. Scaling is Lanczos, with antialiasing. Mirroring left to right comes after cropping.

    Raises:
        FileError: the file cannot be read to its end, or is not an image.
    """
    with _opened(path) as image:
        orientation = _orientation(image, path)
        stored = size if orientation < 5 else (size[1], size[0])
        draft = image.draft(None, (stored[0] * _DRAFT_GAP, stored[1] * _DRAFT_GAP))
        # A JPEG drafted to a half of 333 pixels has 167 columns, of which 166.5 hold the image.
        extent = (draft[1][2], draft[1][3]) if draft else image.size
        with _decoding(path), _quiet_libtiff(image):
            image.load()
        profile = image.info.get("icc_profile")
        box = _box(extent, stored, _stored_position(crop, orientation))
        # Transparent images are scaled with their colours weighted by their opacity.
        pixels = _scalable(image).resize(stored, Image.Resampling.LANCZOS, box=box)
    pixels = _to_srgb(_over(pixels, "white"), profile)
    if orientation in _UPRIGHT:
        pixels = pixels.transpose(_UPRIGHT[orientation])
    if flip:
        pixels = pixels.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(pixels)


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    with ExitStack() as stack:
        with _decoding(path):
            file = stack.enter_context(path.open("rb"))
            image = stack.enter_context(Image.open(file, formats=_formats(file)))
        if image.mode not in _MODES:
            raise FileError(f"its pixel format {image.mode} is not supported; save it as 8-bit RGB")
        yield image


def _formats(file: BinaryIO) -> tuple[str, ...]:
    """Return the formats to try. HEIC is recognised under any name, since telephones send it as .jpg too."""
    header = file.read(12)
    file.seek(0)
    if header[4:8] != b"ftyp" or header[8:] not in _HEIF_BRANDS:
        return _FORMATS
    if not _heif_decoder():
        raise FileError(
            "it is a HEIC image, which the package pillow-heif reads: pip install pillow-heif, or save it as "
            "JPEG"
        )
    return ("HEIF",)


@cache
def _heif_decoder() -> bool:
    """Register HEIC with Pillow, and return False if its package is missing."""
    try:
        from pillow_heif import register_heif_opener  # type: ignore[import-not-found]
    except ImportError:
        return False
    register_heif_opener(thumbnails=False)
    return True


@contextmanager
def _decoding(path: Path) -> Iterator[None]:
    """Turn a decoder's exception into a FileError, and keep its warnings off the console.

    On damaged bytes Pillow raises nearly anything (SyntaxError, struct.error, IndexError, ...). The block
    holds nothing but calls of the decoder, so that no error of our own is taken for a bad file.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except FileError:
            raise
        except Exception as error:
            raise FileError(_reason(error, path)) from error


@contextmanager
def _quiet_libtiff(image: Image.Image) -> Iterator[None]:
    """Keep off the console what libtiff writes to the stderr descriptor; Pillow raises what matters."""
    try:
        kept = os.dup(_STDERR) if image.format == "TIFF" else None
    except OSError:  # stderr is closed
        kept = None
    if kept is None:
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, _STDERR)
    os.close(nowhere)
    try:
        yield
    finally:
        os.dup2(kept, _STDERR)
        os.close(kept)


def _reason(error: Exception, path: Path) -> str:
    if isinstance(error, Image.DecompressionBombError):
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0) // 10**6
        return (
            f"it has more than {limit} million pixels, which is refused for fear of a decompression bomb; "
            "scale it down"
        )
    if isinstance(error, UnidentifiedImageError):
        if path.exists() and path.stat().st_size == 0:
            return "it is empty (0 bytes)"
        return f"it is not an image in one of the formats {', '.join(_FORMATS)}"
    if isinstance(error, OSError) and error.strerror:
        return f"it cannot be read ({error.strerror})"
    return f"it is damaged ({error or type(error).__name__})"


def _orientation(image: Image.Image, path: Path) -> int:
    """Return the EXIF orientation of the decoded pixels, 1 to 8; 1 for a missing or malformed tag."""
    if image.format == "TIFF":
        return 1  # Pillow itself turns TIFF pixels and their size upright
    try:
        with _decoding(path):
            # The base class's method, since that of PNG decodes the whole file in search of a late tag.
            value = Image.Image.getexif(image).get(ExifTags.Base.Orientation)
    except FileError:
        return 1  # damaged tags cost the rotation, not the image
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _box(
    extent: tuple[float, float], size: tuple[int, int], crop: CropPosition
) -> tuple[float, float, float, float]:
    """Return the largest crop of the shape of `size` in `extent`: (left, top, right, bottom)."""
    scale = max(size[0] / extent[0], size[1] / extent[1])
    width, height = min(size[0] / scale, extent[0]), min(size[1] / scale, extent[1])
    left, top = (extent[0] - width) * crop[0], (extent[1] - height) * crop[1]
    return left, top, min(left + width, extent[0]), min(top + height, extent[1])


def _stored_position(crop: CropPosition, orientation: int) -> CropPosition:
    """Convert a crop position from the upright to the stored image."""
    x, y = crop
    return {
        2: (1 - x, y),
        3: (1 - x, 1 - y),
        4: (x, 1 - y),
        5: (y, x),
        6: (y, 1 - x),
        7: (1 - y, 1 - x),
        8: (1 - y, x),
    }.get(orientation, crop)


def _scalable(image: Image.Image) -> Image.Image:
    """Convert palettes and 16 bits: to L, RGB or CMYK, or to LA or RGBA with transparency."""
    if image.mode in _SIXTEEN_BIT:
        return Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    if image.has_transparency_data:
        wanted = "LA" if image.mode in ("LA", "La") else "RGBA"
    else:
        wanted = "L" if image.mode == "1" else image.mode if image.mode in ("L", "CMYK") else "RGB"
    return image if image.mode == wanted else image.convert(wanted)


def _over(pixels: Image.Image, colour: str) -> Image.Image:
    if pixels.mode not in ("LA", "RGBA"):
        return pixels
    colours = pixels.convert(pixels.mode[:-1])
    paper = Image.new(colours.mode, pixels.size, colour)
    paper.paste(colours, mask=pixels.getchannel("A"))
    return paper


def _to_srgb(pixels: Image.Image, profile: bytes | None) -> Image.Image:
    transform = _transform(profile, pixels.mode) if profile else None
    converted = ImageCms.applyTransform(pixels, transform) if transform else None
    return converted or pixels.convert("RGB")


@lru_cache(maxsize=32)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Return the conversion from a profile to sRGB; None if the profile is sRGB or unusable."""
    try:
        source = ImageCms.ImageCmsProfile(BytesIO(profile))
        if mode == "RGB" and "srgb" in ImageCms.getProfileDescription(source).lower():
            return None
        return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None
