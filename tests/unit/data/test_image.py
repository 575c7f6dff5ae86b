import struct
import subprocess
import sys
import warnings
import zlib

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms

from data import image as image_module
from data.errors import FileError
from data.image import displayed_size, read_pixels

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def corners(size=(96, 64)):
    """A picture whose corners tell how it was turned.

    Red top left, green top right, blue bottom left, white bottom right.
    """
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
    exact = {
        "webp": {"lossless": True},
        "avif": {"quality": 100},
        "jpg": {"quality": 95},
        "jfif": {"quality": 95, "format": "JPEG"},
    }
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


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif", "avif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    path = tmp_path / f"picture.{suffix}"
    STORED[orientation](corners((96, 64))).save(path, exif=exif, quality=95)
    assert displayed_size(path) == (96, 64)
    assert near(seen_corners(read_pixels(path, (96, 64))), [RED, GREEN, BLUE, WHITE], tolerance=20)
    assert near(seen_corners(read_pixels(path, (64, 128))), [RED, GREEN, BLUE, WHITE], tolerance=20)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_crop_is_placed_in_the_upright_image(tmp_path, orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    path = tmp_path / "picture.png"
    STORED[orientation](corners((96, 64))).save(path, exif=exif)
    for size in ((64, 64), (96, 32)):  # cut off at the sides; above and below
        whole = np.asarray(corners((96, 64)))
        right, below = 96 - size[0], 64 - size[1]
        for crop, (left, top) in {
            (0, 0): (0, 0),
            (1, 1): (right, below),
            (0.25, 0.75): (right // 4, below * 3 // 4),
        }.items():
            pixels = read_pixels(path, size, crop=crop)
            assert near(pixels, whole[top : top + size[1], left : left + size[0]]), (size, crop)
            mirrored = read_pixels(path, size, crop=crop, flip=True)
            assert near(mirrored, whole[top : top + size[1], left : left + size[0]][:, ::-1]), (size, crop)


def heif():
    return pytest.importorskip("pillow_heif", reason="pip install pillow-heif")


@pytest.mark.parametrize("name", ["picture.heic", "picture.jpg"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_heic_with_its_plug_in(tmp_path, orientation, name):
    heif().register_heif_opener()
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    # Saving turns the tag into HEIF's own rotation, which is what telephones write.
    STORED[orientation](corners((96, 64))).save(
        tmp_path / name, format="HEIF", exif=exif.tobytes(), quality=95
    )
    assert displayed_size(tmp_path / name) == (96, 64)
    assert near(seen_corners(read_pixels(tmp_path / name, (96, 64))), [RED, GREEN, BLUE, WHITE], tolerance=20)


def test_heic_without_its_plug_in_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    image_module._heif_decoder.cache_clear()
    (tmp_path / "picture.heic").write_bytes(struct.pack(">I4s4s", 24, b"ftyp", b"heic") + bytes(100))
    with pytest.raises(FileError, match="pip install pillow-heif"):
        displayed_size(tmp_path / "picture.heic")
    image_module._heif_decoder.cache_clear()


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_is_ignored(tmp_path, orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    corners().save(tmp_path / "picture.jpg", exif=exif)
    assert displayed_size(tmp_path / "picture.jpg") == (96, 64)


SHORT_TAG = b"Exif\0\0II*\0" + struct.pack("<IHHHII", 8, 1, 0x10F, 2, 500, 90) + bytes(4)
"""One tag that says its 500 bytes lie beyond the end: Pillow warns of it."""


@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0",
        SHORT_TAG,
        b"Exif\0\0garbage",
        b"Exif\0\0II*\0\x08\0\0\0\xff\xff",
        b"Exif\0\0MM\0*\xff\xff\xff\xff",
    ],
)
def test_malformed_exif_costs_only_the_rotation(tmp_path, exif):
    corners().save(tmp_path / "picture.jpg", exif=exif, quality=95)
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        assert displayed_size(tmp_path / "picture.jpg") == (96, 64)
        assert near(
            seen_corners(read_pixels(tmp_path / "picture.jpg", (96, 64))),
            [RED, GREEN, BLUE, WHITE],
            tolerance=20,
        )
    assert not shown


def test_flip_mirrors_left_to_right(tmp_path):
    corners().save(tmp_path / "picture.png")
    assert near(
        seen_corners(read_pixels(tmp_path / "picture.png", (96, 64), flip=True)), [GREEN, RED, WHITE, BLUE]
    )


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_white_whatever_colour_it_hides(tmp_path, mode):
    picture = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    picture.paste((0, 0, 0, 255), (0, 0, 64, 32))
    picture.paste((0, 0, 0, 128), (0, 48, 64, 64))
    picture.convert(mode).save(tmp_path / "picture.png")
    pixels = read_pixels(tmp_path / "picture.png", (64, 64))
    assert (
        near(pixels[10, 10], (0, 0, 0))
        and near(pixels[40, 40], WHITE)
        and near(pixels[60, 60], (127, 127, 127))
    )


def test_scaling_brings_no_hidden_colour_to_the_edges(tmp_path):
    """What is transparent has a colour too; it must not shine through where scaling mixes neighbours."""
    picture = Image.new("RGBA", (256, 256), (0, 255, 0, 0))
    picture.paste((255, 0, 0, 255), (0, 0, 128, 256))
    picture.save(tmp_path / "picture.png")
    pixels = read_pixels(tmp_path / "picture.png", (96, 96)).astype(int)
    assert (pixels[..., 1] <= pixels[..., 2] + 2).all(), "between red and white green and blue are equal"


@pytest.mark.parametrize("mode", ["P", "L", "RGB"])
def test_a_transparent_colour_is_white(tmp_path, mode):
    picture = Image.new(mode, (64, 64), 0)
    picture.paste(WHITE[0] if mode == "L" else 1 if mode == "P" else RED, (0, 0, 64, 32))
    if mode == "P":
        picture.putpalette([0, 0, 255, 255, 0, 0])
    picture.save(tmp_path / "picture.png", transparency=(0, 0, 0) if mode == "RGB" else 0)
    pixels = read_pixels(tmp_path / "picture.png", (64, 64))
    assert near(pixels[10, 10], WHITE if mode == "L" else RED) and near(pixels[50, 50], WHITE)


@pytest.mark.parametrize(
    ("mode", "suffix"), [("1", "png"), ("L", "png"), ("I;16", "png"), ("I;16", "tif"), ("I;16B", "tif")]
)
def test_greys(tmp_path, mode, suffix):
    top, bottom = (255, 0) if mode in "1L" else (65535, 128 * 257)
    picture = Image.new(mode, (64, 64), bottom)
    picture.paste(top, (0, 0, 64, 32))
    picture.save(tmp_path / f"picture.{suffix}")
    pixels = read_pixels(tmp_path / f"picture.{suffix}", (64, 64))
    assert near(pixels[10, 10], WHITE)
    assert near(pixels[50, 50], (0, 0, 0) if mode in "1L" else (128, 128, 128))


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.mark.parametrize(
    ("colour_type", "values"),
    [(2, (40_000, 20_000, 65_535)), (6, (40_000, 20_000, 65_535, 65_535)), (4, (30_000, 65_535))],
)
def test_colours_of_16_bits(tmp_path, colour_type, values):
    rows = (b"\0" + struct.pack(f">{len(values)}H", *values) * 64) * 64
    parts = [
        chunk(b"IHDR", struct.pack(">IIBBBBB", 64, 64, 16, colour_type, 0, 0, 0)),
        chunk(b"IDAT", zlib.compress(rows)),
        chunk(b"IEND", b""),
    ]
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    wanted = values[:3] if colour_type != 4 else values[:1] * 3
    assert near(
        read_pixels(tmp_path / "picture.png", (64, 64))[30, 30],
        [value // 257 for value in wanted],
        tolerance=1,
    )


def cmyk_profile():
    """A printer's profile, of version 2, whose cyan ink is red and whose magenta and yellow do nothing.

    2 grid points for each ink.
    """

    def text(kind, content):
        return kind + bytes(4) + content

    paper, red, black = (255, 128, 128), (138, 208, 195), (0, 128, 128)  # L*a*b* in 8 bits
    nodes = b"".join(bytes(black if ink & 1 else red if ink & 8 else paper) for ink in range(16))
    straight = bytes(range(256))
    matrix = b"".join(struct.pack(">i", value << 16) for value in (1, 0, 0, 0, 1, 0, 0, 0, 1))
    table = text(b"mft1", bytes((4, 3, 2, 0)) + matrix + straight * 4 + nodes + straight * 3)
    named = text(b"desc", struct.pack(">I", 5) + b"test\0" + bytes(4 + 4 + 2 + 1 + 67))
    tags = {
        b"desc": named,
        b"cprt": text(b"text", b"none\0"),
        b"wtpt": text(b"XYZ ", struct.pack(">3I", 0xF6D6, 0x10000, 0xD32D)),
        b"A2B0": table,
    }
    directory, body, start = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        directory += name + struct.pack(">II", start + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    head = struct.pack(
        ">I4sI4s4s4s12s4s",
        start + len(body),
        bytes(4),
        0x02400000,
        b"prtr",
        b"CMYK",
        b"Lab ",
        bytes(12),
        b"acsp",
    )
    head += bytes(68 - len(head)) + struct.pack(">3I", 0xF6D6, 0x10000, 0xD32D)
    return head + bytes(128 - len(head)) + directory + body


def test_cmyk_with_its_profile(tmp_path):
    picture = Image.new("CMYK", (64, 64), (255, 0, 0, 0))
    picture.paste((0, 0, 0, 0), (0, 0, 64, 32))
    for suffix in ("jpg", "tif"):
        picture.save(tmp_path / f"picture.{suffix}", quality=95, icc_profile=cmyk_profile())
        pixels = read_pixels(tmp_path / f"picture.{suffix}", (64, 64))
        assert near(pixels[50, 50], RED, tolerance=12), "without its profile cyan ink is cyan"
        assert near(pixels[10, 10], WHITE, tolerance=3)


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
    assert near(pixels[10, 10], (40, 200, 40), tolerance=12), (
        "red and green of this profile have changed places"
    )
    for place, profile in enumerate(
        (b"not a profile", linear.tobytes())
    ):  # damaged, and of another kind than the pixels
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
    assert near(
        seen_corners(read_pixels(tmp_path / "picture.png", (128, 64))),
        [RED, GREEN, BLUE, WHITE],
        tolerance=30,
    )


@pytest.mark.parametrize("size", [(333, 777), (1001, 999), (640, 641), (2000, 65)])
def test_a_big_jpeg_is_decoded_small_without_a_shift(tmp_path, size):
    """Reduced decoding rounds sizes up: the crop must not move by it."""
    ramp = np.linspace(0, 255, size[0])[None, :] * 0.5 + np.linspace(0, 255, size[1])[:, None] * 0.5
    Image.fromarray(ramp.astype(np.uint8)).convert("RGB").save(tmp_path / "picture.jpg", quality=98)
    Image.open(tmp_path / "picture.jpg").save(tmp_path / "picture.png")
    small, full = (
        read_pixels(tmp_path / f"picture.{suffix}", (64, 64)).astype(int) for suffix in ("jpg", "png")
    )
    assert np.abs(small - full).max() <= 3 and abs((small - full).mean()) < 0.5


def bomb(path, side):
    """A PNG header that claims side x side pixels, with a few bytes of data."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(64)))
        + chunk(b"IEND", b"")
    )


SIDES = {  # where the header holds width and height, and how
    "png": (">II", 16),
    "gif": ("<HH", 6),
    "bmp": ("<ii", 18),
    "jpg": (">HH", None),
}


def bombs(folder, side):
    """Small files of several formats whose headers claim side x side pixels."""
    for suffix, (form, place) in SIDES.items():
        path = folder / f"bomb.{suffix}"
        Image.new("RGB", (64, 64), RED).save(path)
        content = bytearray(path.read_bytes())
        place = content.index(b"\xff\xc0") + 5 if place is None else place
        struct.pack_into(form, content, place, side, side)
        if suffix == "png":
            struct.pack_into(">I", content, 29, zlib.crc32(content[12:29]))
        path.write_bytes(content)
        yield path


def test_bombs_are_refused_by_their_header(tmp_path):
    """In a process of its own, whose memory must not grow: 30 000 x 30 000 pixels would be 2.7 GB."""
    paths = list(map(str, bombs(tmp_path, 30_000)))
    code = f"""
import resource
from pathlib import Path
from data.errors import FileError
from data.image import displayed_size, read_pixels
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in map(Path, {paths!r}):
    for read in (displayed_size, lambda path: read_pixels(path, (64, 64))):
        try:
            read(path)
        except FileError as error:
            assert "more than 178 million pixels" in error.reason, error.reason
        else:
            raise AssertionError(path)
assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 * 1024
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


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


def test_odd_tiffs_write_nothing_to_the_standard_error(tmp_path):
    """libtiff writes to the file descriptor and Pillow to logging's last resort, a line per oddity."""
    files = []
    for compression in ("tiff_lzw", "packbits"):
        files.append(tmp_path / f"{compression}.tif")
        Image.effect_noise((64, 64), 50).convert("RGB").save(files[-1], compression=compression)
        content = bytearray(files[-1].read_bytes())
        directory = int.from_bytes(content[4:8], "little")
        entries = {
            int.from_bytes(content[at : at + 2], "little"): at
            for at in range(directory + 2, directory + 2 + 12 * 8, 12)
        }
        content[8:40] = b"\x5a" * 32  # the beginning of the pixels
        files.append(tmp_path / f"pixels_{compression}.tif")
        files[-1].write_bytes(content)
        content[entries[277] + 8] = 200  # samples per pixel
        files.append(tmp_path / f"samples_{compression}.tif")
        files[-1].write_bytes(content)
    code = """
import os, sys
from pathlib import Path
from data.errors import FileError
from data.image import read_pixels
for file in sys.argv[1:]:
    try:
        read_pixels(Path(file), (64, 64))
    except FileError:
        print(Path(file).stem)
os.write(2, b"still there")
"""
    done = subprocess.run([sys.executable, "-c", code, *map(str, files)], capture_output=True, text=True)
    assert {"pixels_packbits", "samples_packbits", "samples_tiff_lzw"} <= (bad := set(done.stdout.split()))
    assert not bad & {"packbits", "tiff_lzw"} and done.stderr == "still there"
