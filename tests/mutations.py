"""A seeded corpus of damaged data sets: valid images and sidecars of every kind, with bytes changed."""

from __future__ import annotations

import copy
import io
import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageCms

NUMBERS = (0, 1, 2, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 13_000, 30_000, 65_500)
"""What damaged counts and sizes tend to be."""

SIDECARS = {
    "txt": "a cat, sitting, on a mat",
    "caption": "\ufeffein Löwe, groß",
    "yaml": (
        "main_prompt: a cat\ntags:\n  - {tag: sitting, weight: 2.5}\n  - on a mat\nmultiply: "
        "2\nflip_p: 0.5\nshuffle_tags: true\n"
    ),
    "yml": "caption: 'a dog'\nmax_caption_length: 20\ncond_dropout: .1\nloss_scale: 0.5\nbatch_id: one\n",
    "json": json.dumps({"caption": "a bird", "tags": ["small", "red"], "multiply": 1.5}),
}

FOLDER_FILES = {
    "multiply.txt": "2",
    "flip_p.txt": "0.5",
    "cond_dropout.txt": "0.1",
    "batch_id.txt": "one",
    "loss_scale.txt": "0.7",
    "shuffle_tags.txt": "",
    "local.yaml": "main_prompt: words of the folder\n",
    "global.yaml": "tags: [everywhere]\n",
    "metadata.jsonl": '{"file_name": "0000.png", "text": "words of a list"}\n'
    '{"file_name": "0001.png", "text": "more"}\n',
    "metadata.csv": 'file_name,text\n0002.png,"words, of a table"\n',
}


def pictures(seed: int) -> dict[str, bytes]:
    """Return small valid files of all formats, by a name with the extension."""
    draws = np.random.default_rng(seed)
    noise = Image.fromarray(draws.integers(0, 255, (70, 90, 4), dtype=np.uint8), "RGBA")
    colour = noise.convert("RGB")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    exif[ExifTags.Base.ImageDescription] = "words" * 20
    profile = (
        ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
        .tobytes()
        .replace(b"s\0R\0G\0B", b"x\0R\0G\0B")
    )
    frames = [colour.resize((60, 40)).rotate(angle) for angle in (0, 90, 180)]
    animated = {"save_all": True, "append_images": frames[1:], "duration": 50}
    kinds = {
        "plain.jpg": (colour, {"exif": exif, "icc_profile": profile}),
        "progressive.jpg": (colour, {"progressive": True, "quality": 30}),
        "ink.jpg": (colour.convert("CMYK"), {"icc_profile": profile}),
        "grey.jpg": (colour.convert("L"), {}),
        "large.jpg": (colour.resize((900, 1200)), {"quality": 20}),
        "plain.png": (colour, {"exif": exif}),
        "clear.png": (noise, {"icc_profile": profile}),
        "palette.png": (colour.quantize(30), {"transparency": 3}),
        "deep.png": (Image.fromarray(draws.integers(0, 65535, (40, 40), dtype=np.uint16)), {}),
        "moving.png": (frames[0], animated),
        "moving.gif": (
            frames[0].quantize(20),
            {**animated, "append_images": [frame.quantize(20) for frame in frames[1:]]},
        ),
        "plain.webp": (colour, {"exif": exif}),
        "clear.webp": (noise, {"lossless": True}),
        "moving.webp": (frames[0], animated),
        "plain.bmp": (colour, {}),
        "plain.tif": (colour, {}),
        "packed.tif": (colour, {"compression": "tiff_lzw", "icc_profile": profile}),
        "zipped.tif": (noise, {"compression": "tiff_adobe_deflate"}),
        "jpeg.tif": (colour, {"compression": "jpeg"}),
        "plain.avif": (colour, {"exif": exif, "quality": 40}),
    }
    found = {}
    for name, (image, settings) in kinds.items():
        file = io.BytesIO()
        form = {"jpg": "JPEG", "tif": "TIFF"}.get(name.partition(".")[2], name.partition(".")[2].upper())
        image.save(file, form, **settings)
        found[name] = file.getvalue()
    return found


def mutated(content: bytes, other: bytes, draws: np.random.Generator) -> bytes:
    """Return bytes with one to four kinds of damage, more of it near the beginning, where headers are."""
    damaged = bytearray(content)
    for _ in range(int(draws.integers(1, 5))):
        size = len(damaged)
        if size < 8:
            break
        reach = size if draws.random() < 0.5 else min(size, 200)
        at = int(draws.integers(0, reach))
        length = int(min(size - at, draws.geometric(1 / 40)))
        kind = draws.integers(8)
        if kind == 0:
            damaged[at] ^= 1 << int(draws.integers(8))
        elif kind == 1:
            form = str(draws.choice(["<I", ">I", "<H", ">H"]))
            number = struct.pack(
                form, int(draws.choice(NUMBERS)) & (0xFFFFFFFF if form[1] == "I" else 0xFFFF)
            )
            damaged[at : at + len(number)] = number
        elif kind == 2:
            del damaged[max(at, 1) :]
        elif kind == 3:
            del damaged[at : at + length]
        elif kind == 4:
            damaged[at:at] = damaged[at : at + length] * int(draws.integers(1, 4))
        elif kind == 5:
            damaged[at : at + length] = draws.bytes(length)
        elif kind == 6:
            damaged[at : at + length] = bytes(length)
        else:
            damaged[at:] = other[at:]
    return bytes(damaged)


def write_corpus(folder: Path, files: int, seed: int) -> int:
    """Write `files` mutated images and sidecars in folders of a hundred; return the number of mutated files.

    A few images stay whole, so that there is something to train on.
    """
    draws = np.random.default_rng(seed)
    seeds = list(pictures(seed).items())
    written = 0
    for number in range(files):
        below = folder / f"{number // 100:02d}"
        below.mkdir(parents=True, exist_ok=True)
        name, content = seeds[number % len(seeds)]
        other = seeds[int(draws.integers(len(seeds)))][1]
        whole = number % 50 == 0
        image = below / f"{number % 100:04d}.{name.partition('.')[2]}"
        image.write_bytes(content if whole else mutated(content, other, draws))
        suffix = str(draws.choice(list(SIDECARS)))
        words = SIDECARS[suffix].encode()
        spoiled = not whole and draws.random() < 0.5
        image.with_suffix(f".{suffix}").write_bytes(mutated(words, other, draws) if spoiled else words)
        written += (not whole) + spoiled
        if number % 100 == 99:
            name, words = list(FOLDER_FILES.items())[int(draws.integers(len(FOLDER_FILES)))]
            (below / name).write_bytes(mutated(words.encode(), other, draws))
            written += 1
    return written


JUNK = (
    None, True, "", "x", -1, 0, 1, 2.5, 0.5, "null",
    1e-320, 1e308, 10**30, -(10**30), "1" * 5000, [], [[]], {}, {"a": {}}, "\x1b[2J", "\ud83d",
    "../..", "~", "C:\\x", "CON", "a\nb", "findlast", "owner/name", [1, "x"], {"lr": "x"}, "\u202e",
    "é" * 300,
)  # fmt: skip
"""Values that fit few keys."""

NAMES = (
    b"caf\xe9", b"a\x1b[2Jb", b"line\nfeed", b"tab\tcarriage\r", b"\xff\xfe\xfd", "\u202etxt.exe".encode(),
    "\u2028\u2029".encode(),
    "👩‍🚀 नमस्ते".encode(), b"n" * 245, b"1" * 240, b" spaces at the ends ", b"-rf", b"--help", b"%s%n{0}",
    b"'quotes\"`", b"a,b,,c", b"_",
    b"__", b"#comment", b"$HOME", b"*?[a]", b"multiply", b"METADATA", b"global", b"10_x", b"5000000000_x",
    b"\x7f\x80\x9b",
    b"e\xcc\x81", b"\xc3\xa9",
)  # fmt: skip
"""Beginnings of file names, as bytes, that some program or other stumbles over."""


def crafted(tree: Any, known: Mapping[str, Any], draws: np.random.Generator) -> Any:
    """Return a JSON tree with one to three of its values or keys exchanged for others.

    Args:
        tree: the right one.
        known: keys that it may have, each with a value that is right.
        draws: what is exchanged.
    """
    tree, names = json.loads(json.dumps(tree)), list(known)
    for _ in range(int(draws.integers(1, 4))):
        place = tree
        while isinstance(place, dict | list) and place:
            inner = list(place) if isinstance(place, dict) else list(range(len(place)))
            key = inner[int(draws.integers(len(inner)))]
            if not isinstance(place[key], dict | list) or not place[key] or draws.random() < 0.3:
                value = copy.deepcopy(JUNK[int(draws.integers(len(JUNK)))])
                if isinstance(place, dict) and draws.random() < 0.8:
                    key = names[int(draws.integers(len(names)))]
                    value = copy.deepcopy(known[key]) if draws.random() < 0.8 else value
                elif isinstance(place, dict) and draws.random() < 0.3:
                    key = str(value)
                place[key] = value
                break
            place = place[key]
    return tree


def write_odd_names(folder: Path, seed: int) -> int:
    """Write an image, a sidecar and a folder of each of `NAMES` that the file system takes; count images."""
    draws = np.random.default_rng(seed)
    content = pictures(seed)["plain.png"]
    images = 0
    for name in NAMES:
        suffix = str(draws.choice(list(SIDECARS)))
        inner = Path(os.fsdecode(os.fsencode(folder) + b"/" + name))
        try:
            inner.mkdir(parents=True)
            for place in (folder, inner):
                image = place / os.fsdecode(name + b".png")
                image.write_bytes(content)
                images += 1
                words = (
                    mutated(SIDECARS[suffix].encode(), name * 3, draws)
                    if draws.random() < 0.3
                    else SIDECARS[suffix].encode()
                )
                image.with_suffix(f".{suffix}").write_bytes(words)
        except (OSError, ValueError):
            continue
    return images
