import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms

from data.errors import FileError
from data.image import displayed_size, read_pixels

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def corners(size=(96, 64)):
    """A picture whose corners tell how it was turned: red top left, green top right, blue bottom left, white bottom right."""
    picture = Image.new("RGB", (2, 2))
    picture.putdata([RED, GREEN, BLUE, WHITE])
    return picture.resize(size, Image.Resampling.NEAREST)


def seen_corners(pixels):
    height, width, _ = pixels.shape
    return [tuple(int(value) for value in pixels[y, x]) for y in (4, height - 5) for x in (4, width - 5)]


def near(found, wanted, tolerance=3):
    return np.abs(np.array(found, int) - np.array(wanted, int)).max() <= tolerance


@pytest.mark.parametrize("suffix", ["png", "bmp", "webp", "gif", "avif", "tif", "jpg", "jfif"])
def test_formats(tmp_path, suffix):
    path = tmp_path / f"picture.{suffix}"
    exact = {"webp": {"lossless": True}, "avif": {"quality": 100}, "jpg": {"quality": 95}, "jfif": {"quality": 95, "format": "JPEG"}}
    corners().save(path, **exact.get(suffix, {}))
    assert displayed_size(path) == (96, 64)
    pixels = read_pixels(path, (96, 64))
    assert pixels.dtype == np.uint8 and pixels.shape == (64, 96, 3)
    assert near(seen_corners(pixels), [RED, GREEN, BLUE, WHITE], tolerance=8)


def test_the_content_decides_the_format(tmp_path):
    corners().save(tmp_path / "picture.jpg", format="PNG")
    assert displayed_size(tmp_path / "picture.jpg") == (96, 64)


STORED = {
    1: lambda image: image,
    2: lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    3: lambda image: image.transpose(Image.Transpose.ROTATE_180),
    4: lambda image: image.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
    5: lambda image: image.transpose(Image.Transpose.TRANSPOSE),
    6: lambda image: image.transpose(Image.Transpose.ROTATE_90),
    7: lambda image: image.transpose(Image.Transpose.TRANSVERSE),
    8: lambda image: image.transpose(Image.Transpose.ROTATE_270),
}
"""How a camera stores the upright picture under each EXIF orientation."""


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    path = tmp_path / f"picture.{suffix}"
    STORED[orientation](corners((96, 64))).save(path, exif=exif, quality=95)
    assert displayed_size(path) == (96, 64)
    assert near(seen_corners(read_pixels(path, (96, 64))), [RED, GREEN, BLUE, WHITE], tolerance=20)
    assert near(seen_corners(read_pixels(path, (64, 128))), [RED, GREEN, BLUE, WHITE], tolerance=20)


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_is_ignored(tmp_path, orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    corners().save(tmp_path / "picture.jpg", exif=exif)
    assert displayed_size(tmp_path / "picture.jpg") == (96, 64)


SHORT_TAG = b"Exif\0\0II*\0" + struct.pack("<IHHHII", 8, 1, 0x10F, 2, 500, 90) + bytes(4)
"""One tag that says its 500 bytes lie beyond the end: Pillow warns of it."""


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0", SHORT_TAG, b"Exif\0\0garbage", b"Exif\0\0II*\0\x08\0\0\0\xff\xff", b"Exif\0\0MM\0*\xff\xff\xff\xff"]
)
def test_malformed_exif_costs_only_the_rotation(tmp_path, exif):
    corners().save(tmp_path / "picture.jpg", exif=exif, quality=95)
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        assert displayed_size(tmp_path / "picture.jpg") == (96, 64)
        assert near(seen_corners(read_pixels(tmp_path / "picture.jpg", (96, 64))), [RED, GREEN, BLUE, WHITE], tolerance=20)
    assert not shown


def test_flip_mirrors_left_to_right(tmp_path):
    corners().save(tmp_path / "picture.png")
    assert near(seen_corners(read_pixels(tmp_path / "picture.png", (96, 64), flip=True)), [GREEN, RED, WHITE, BLUE])


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_white_whatever_colour_it_hides(tmp_path, mode):
    picture = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    picture.paste((0, 0, 0, 255), (0, 0, 64, 32))
    picture.paste((0, 0, 0, 128), (0, 48, 64, 64))
    picture.convert(mode).save(tmp_path / "picture.png")
    pixels = read_pixels(tmp_path / "picture.png", (64, 64))
    assert near(pixels[10, 10], (0, 0, 0)) and near(pixels[40, 40], WHITE) and near(pixels[60, 60], (127, 127, 127))


@pytest.mark.parametrize("mode", ["P", "L", "RGB"])
def test_a_transparent_colour_is_white(tmp_path, mode):
    picture = Image.new(mode, (64, 64), 0)
    picture.paste(WHITE[0] if mode == "L" else 1 if mode == "P" else RED, (0, 0, 64, 32))
    if mode == "P":
        picture.putpalette([0, 0, 255, 255, 0, 0])
    picture.save(tmp_path / "picture.png", transparency=(0, 0, 0) if mode == "RGB" else 0)
    pixels = read_pixels(tmp_path / "picture.png", (64, 64))
    assert near(pixels[10, 10], WHITE if mode == "L" else RED) and near(pixels[50, 50], WHITE)


@pytest.mark.parametrize(("mode", "suffix"), [("1", "png"), ("L", "png"), ("I;16", "png"), ("I;16", "tif"), ("I;16B", "tif")])
def test_greys(tmp_path, mode, suffix):
    top, bottom = (255, 0) if mode in "1L" else (65535, 128 * 257)
    picture = Image.new(mode, (64, 64), bottom)
    picture.paste(top, (0, 0, 64, 32))
    picture.save(tmp_path / f"picture.{suffix}")
    pixels = read_pixels(tmp_path / f"picture.{suffix}", (64, 64))
    assert near(pixels[10, 10], WHITE)
    assert near(pixels[50, 50], (0, 0, 0) if mode in "1L" else (128, 128, 128))


def test_cmyk_without_a_profile(tmp_path):
    Image.new("CMYK", (64, 64), (0, 255, 255, 0)).save(tmp_path / "picture.jpg", quality=95)
    assert near(read_pixels(tmp_path / "picture.jpg", (64, 64))[30, 30], RED, tolerance=5)


def test_a_colour_profile_is_honoured(tmp_path):
    linear = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB"))
    grey = Image.new("RGB", (64, 64), (120, 120, 120))
    wide = swapped_profile()
    grey.paste((200, 40, 40), (0, 0, 64, 32))
    grey.save(tmp_path / "picture.png", icc_profile=wide)
    pixels = read_pixels(tmp_path / "picture.png", (64, 64))
    assert near(pixels[10, 10], (40, 200, 40), tolerance=12), "red and green of this profile have changed places"
    for place, profile in enumerate((b"not a profile", linear.tobytes())):  # damaged, and of another kind than the pixels
        grey.save(tmp_path / f"{place}.png", icc_profile=profile)
        assert near(read_pixels(tmp_path / f"{place}.png", (64, 64))[10, 10], (200, 40, 40))


def swapped_profile():
    """sRGB with the tags of its red and green primaries renamed into each other."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    profile = profile.replace(b"rXYZ", b"....").replace(b"gXYZ", b"rXYZ").replace(b"....", b"gXYZ")
    return profile.replace("sRGB".encode("utf-16-be"), "test".encode("utf-16-be"))


def test_an_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (64, 64), colour) for colour in (RED, GREEN, BLUE)]
    for suffix in ("gif", "webp", "png"):
        frames[0].save(tmp_path / f"picture.{suffix}", save_all=True, append_images=frames[1:], duration=50)
        assert near(read_pixels(tmp_path / f"picture.{suffix}", (64, 64))[30, 30], RED, tolerance=4)


def test_the_crop_is_central_and_the_shape_is_kept(tmp_path):
    picture = Image.new("RGB", (400, 100), RED)
    picture.paste(GREEN, (150, 0, 250, 100))  # the middle 100 x 100
    picture.save(tmp_path / "wide.png")
    pixels = read_pixels(tmp_path / "wide.png", (64, 64))
    assert near(pixels[:, 2:-2], np.broadcast_to(GREEN, (64, 60, 3)))
    picture.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "tall.png")
    assert near(read_pixels(tmp_path / "tall.png", (64, 64))[2:-2], np.broadcast_to(GREEN, (60, 64, 3)))


def test_making_smaller_is_antialiased(tmp_path):
    stripes = np.zeros((512, 512, 3), np.uint8)
    stripes[:, ::2] = 255
    for suffix in ("png", "jpg"):
        Image.fromarray(stripes).save(tmp_path / f"picture.{suffix}", quality=95)
        assert np.ptp(read_pixels(tmp_path / f"picture.{suffix}", (64, 64))[8:-8, 8:-8].astype(int)) <= 6


def test_making_larger(tmp_path):
    corners((16, 16)).save(tmp_path / "picture.png")
    assert near(seen_corners(read_pixels(tmp_path / "picture.png", (128, 64))), [RED, GREEN, BLUE, WHITE], tolerance=30)


@pytest.mark.parametrize("size", [(333, 777), (1001, 999), (640, 641), (2000, 65)])
def test_a_big_jpeg_is_decoded_small_without_a_shift(tmp_path, size):
    """Reduced decoding rounds sizes up: the crop must not move by it."""
    ramp = np.linspace(0, 255, size[0])[None, :] * 0.5 + np.linspace(0, 255, size[1])[:, None] * 0.5
    Image.fromarray(ramp.astype(np.uint8)).convert("RGB").save(tmp_path / "picture.jpg", quality=98)
    Image.open(tmp_path / "picture.jpg").save(tmp_path / "picture.png")
    small, full = (read_pixels(tmp_path / f"picture.{suffix}", (64, 64)).astype(int) for suffix in ("jpg", "png"))
    assert np.abs(small - full).max() <= 3 and abs((small - full).mean()) < 0.5


def bomb(path, side):
    """A PNG header that claims side x side pixels, with a few bytes of data."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(64))) + chunk(b"IEND", b""))


def damaged(tmp_path):
    """Files that cannot be trained on, with what their reasons say."""
    corners((512, 512)).save(tmp_path / "whole.jpg", quality=95)
    whole = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "whole.jpg").unlink()
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "text.png").write_text("<html>404</html>")
    (tmp_path / "half.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "head.jpg").write_bytes(whole[:20])
    bomb(tmp_path / "bomb.png", 30_000)
    Image.new("F", (64, 64)).save(tmp_path / "float.tif")
    Image.new("I", (64, 64)).save(tmp_path / "wide.tif")
    return {
        "empty.jpg": "it is empty (0 bytes)",
        "text.png": "it is not an image in one of the formats JPEG, PNG,",
        "half.jpg": "it is damaged (image file is truncated",
        "head.jpg": "it is not an image",
        "bomb.png": "it has more than 178 million pixels",
        "wide.tif": "its pixel format I is not supported",
        "float.tif": "its pixel format F is not supported",
        "missing.jpg": "it cannot be read (No such file or directory)",
    }


def test_bad_files_are_file_errors_with_a_reason(tmp_path):
    for name, reason in damaged(tmp_path).items():
        with pytest.raises(FileError) as caught:
            displayed_size(tmp_path / name)
            read_pixels(tmp_path / name, (64, 64))
        assert caught.value.reason.startswith(reason), name


def test_an_image_cut_short_still_has_a_size(tmp_path):
    damaged(tmp_path)
    assert displayed_size(tmp_path / "half.jpg") == (512, 512)


def test_our_own_mistakes_are_not_taken_for_bad_files(tmp_path):
    corners().save(tmp_path / "picture.png")
    with pytest.raises((TypeError, ValueError)):
        read_pixels(tmp_path / "picture.png", (64, "64"))
