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
"""Extensions of the files that are taken for images; the content decides how they are read."""

READING = 1
"""Counts the changes after which `read_pixels` gives other pixels for the same file, so that nothing computed from them is stale."""

CENTRE = (0.5, 0.5)

_STDERR = 2

logging.getLogger("PIL").addHandler(
    logging.NullHandler()
)  # or logging prints its warnings about odd files itself

_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF", "AVIF", "TIFF")
_HEIF_BRANDS = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"})
_SIXTEEN_BIT = frozenset({"I;16", "I;16L", "I;16B"})
_MODES = (
    frozenset({"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr"})
    | _SIXTEEN_BIT
)

_DRAFT_GAP = 2
"""A JPEG is decoded at a reduced scale that leaves at least this many times the final size for the proper resampling.

512 px from 12 megapixels take 78 ms instead of 214 on one core and differ from the full decode by 41.5 dB
PSNR.
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
"""EXIF orientation -> what turns the stored pixels upright; from 5 on, width and height change places."""

CropPosition = tuple[float, float]
"""Where a crop lies in what there is to crop from: (0, 0) is the upper left corner, (1, 1) the lower right."""


def displayed_size(path: Path) -> tuple[int, int]:
    """Return (width, height) as the image is looked at, EXIF orientation applied; only the header is read.

    Raises:
        FileError: the file is not an image that can be trained on.
    """
    with _opened(path) as image:
        width, height = image.size
        return (height, width) if _orientation(image, path) >= 5 else (width, height)


def read_pixels(
    path: Path, size: tuple[int, int], *, flip: bool = False, crop: CropPosition = CENTRE
) -> np.ndarray:
    """Return the image upright, scaled to cover `size` and cropped to it, as uint8 sRGB (height, width, 3).

    Transparent parts become white; a colour profile in the file is honoured; of an animation the first frame
    is taken. Scaling is Lanczos, antialiased where it makes smaller.

    Args:
        path: the image file.
        size: (width, height) of the result.
        flip: whether to mirror left to right, after cropping.
        crop: the place of the crop in the upright image.

    Raises:
        FileError: the file cannot be read to its end, or is not an image.
    """
    with _opened(path) as image:
        orientation = _orientation(image, path)
        stored = size if orientation < 5 else (size[1], size[0])
        draft = image.draft(None, (stored[0] * _DRAFT_GAP, stored[1] * _DRAFT_GAP))
        # A JPEG drafted to a half of 333 pixels has 167 columns, of which 166.5 hold the picture.
        extent = (draft[1][2], draft[1][3]) if draft else image.size
        with _decoding(path), _quiet_libtiff(image):
            image.load()
        profile = image.info.get("icc_profile")
        box = _box(extent, stored, _stored_place(crop, orientation))
        # Transparent images are scaled with their colours weighted by their opacity.
        pixels = _scalable(image).resize(stored, Image.Resampling.LANCZOS, box=box)
    pixels = _to_srgb(_over_white(pixels), profile)
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
    """Return what to open a file as; HEIC is looked for whatever the name says, for telephones send it as .jpg too.

    Raises:
        FileError: it is HEIC, and the package that decodes it is not installed.
    """
    start = file.read(12)
    file.seek(0)
    if start[4:8] != b"ftyp" or start[8:] not in _HEIF_BRANDS:
        return _FORMATS
    if not _heif_decoder():
        raise FileError(
            "it is a HEIC image, which the package pillow-heif reads: pip install pillow-heif, or save it as JPEG"
        )
    return ("HEIF",)


@cache
def _heif_decoder() -> bool:
    """Add HEIC to the formats that Pillow opens, and return whether that could be done."""
    try:
        from pillow_heif import register_heif_opener  # type: ignore[import-not-found]
    except ImportError:
        return False
    register_heif_opener(thumbnails=False)
    return True


@contextmanager
def _decoding(path: Path) -> Iterator[None]:
    """Turn what a decoder raises into a FileError, and keep its warnings about odd but readable files off the console.

    On damaged bytes Pillow raises nearly anything (SyntaxError, struct.error, IndexError, ...), hence the
    wide net; it holds calls of the decoder only, so that no error of our own is taken for a bad file.
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
    """Keep off the console what libtiff writes to the file descriptor of the standard error: Pillow raises what matters."""
    try:
        kept = os.dup(_STDERR) if image.format == "TIFF" else None
    except OSError:  # it is closed
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
        return f"it has more than {limit} million pixels, which is refused for fear of a decompression bomb; scale it down"
    if isinstance(error, UnidentifiedImageError):
        if path.exists() and path.stat().st_size == 0:
            return "it is empty (0 bytes)"
        return f"it is not an image in one of the formats {', '.join(_FORMATS)}"
    if isinstance(error, OSError) and error.strerror:
        return f"it cannot be read ({error.strerror})"
    return f"it is damaged ({error or type(error).__name__})"


def _orientation(image: Image.Image, path: Path) -> int:
    """Return the EXIF orientation, 1 to 8, of the pixels that loading will give; 1 where the tag is missing or malformed."""
    if image.format == "TIFF":
        return 1  # Pillow turns TIFF pixels, and reports their size, upright by itself
    try:
        with _decoding(path):
            # The base class's method: the one of PNG decodes the whole file in search of a late tag.
            value = Image.Image.getexif(image).get(ExifTags.Base.Orientation)
    except FileError:
        return 1  # damaged tags cost the picture its rotation, nothing more
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _box(
    extent: tuple[float, float], size: tuple[int, int], crop: CropPosition
) -> tuple[float, float, float, float]:
    """Return the largest box of the shape of `size` at its place in `extent`: (left, top, right, bottom)."""
    scale = max(size[0] / extent[0], size[1] / extent[1])
    width, height = min(size[0] / scale, extent[0]), min(size[1] / scale, extent[1])
    left, top = (extent[0] - width) * crop[0], (extent[1] - height) * crop[1]
    return left, top, min(left + width, extent[0]), min(top + height, extent[1])


def _stored_place(crop: CropPosition, orientation: int) -> CropPosition:
    """Return where a place of the upright image is in the stored one."""
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
    """Return the image in L, RGB or CMYK, or LA or RGBA where it has transparency: palettes looked up, 16 bits brought to 8."""
    if image.mode in _SIXTEEN_BIT:
        return Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    if image.has_transparency_data:
        wanted = "LA" if image.mode in ("LA", "La") else "RGBA"
    else:
        wanted = "L" if image.mode == "1" else image.mode if image.mode in ("L", "CMYK") else "RGB"
    return image if image.mode == wanted else image.convert(wanted)


def _over_white(pixels: Image.Image) -> Image.Image:
    if pixels.mode not in ("LA", "RGBA"):
        return pixels
    colours = pixels.convert(pixels.mode[:-1])
    white = Image.new(colours.mode, pixels.size, "white")
    white.paste(colours, mask=pixels.getchannel("A"))
    return white


def _to_srgb(pixels: Image.Image, profile: bytes | None) -> Image.Image:
    transform = _transform(profile, pixels.mode) if profile else None
    converted = ImageCms.applyTransform(pixels, transform) if transform else None
    return converted or pixels.convert("RGB")


@lru_cache(maxsize=32)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Return the conversion from an embedded profile to sRGB, or None where the profile is sRGB, or unusable and so ignored."""
    try:
        source = ImageCms.ImageCmsProfile(BytesIO(profile))
        if mode == "RGB" and "srgb" in ImageCms.getProfileDescription(source).lower():
            return None
        return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None
