"""Contact sheets: every image as it is cropped for training, over its caption, by bucket."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from data.buckets import Bucket, buckets, nearest
from data.errors import FileError
from data.masked import read_view
from data.record import BadFile, Record
from trainer.errors import UserError
from trainer.evaluation.image_grid import labelled_row, tiled
from trainer.output import counted

PER_SHEET = 60
"""Images of one sheet."""

_AREA = 208**2
"""Pixels of an image on the sheet."""

_WIDTH = 1700
"""Pixels of a sheet, about."""

_NARROWEST = 200
"""Pixels of an image's cell, so that its caption fits."""

_LINES = 16
"""Lines of a caption."""

_UNTRAINED, _TINT = (255, 0, 160), 0.65
"""The colour over masked parts, and its share."""


class ContactSheets:
    """Draw the sheets of a data set; `unseen` has, by image name, the end of a caption beyond the tokens."""

    def __init__(
        self, records: Iterable[Record], resolutions: tuple[int, ...], unseen: Mapping[str, str]
    ) -> None:
        self._records = tuple(records)
        self._resolutions = tuple(dict.fromkeys(resolutions))
        self._unseen = unseen
        self.bad: dict[str, BadFile] = {}
        """Images that could not be decoded, by name."""

    def write(self, folder: Path) -> Iterator[Path]:
        """Write the sheets into a folder, made if missing, and yield their paths as they are written."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for resolution in self._resolutions:
                for bucket, records in self._buckets(resolution).items():
                    several = f"{resolution}-" if len(self._resolutions) > 1 else ""
                    count = counted(len(records), "image")
                    for start in range(0, len(records), PER_SHEET):
                        shown = records[start : start + PER_SHEET]
                        paged = len(records) > PER_SHEET
                        page = f"-{start // PER_SHEET + 1}" if paged else ""
                        of = f", {start + 1} to {start + len(shown)}" if paged else ""
                        path = folder / f"{several}{bucket[0]}x{bucket[1]}{page}.png"
                        self._sheet(shown, bucket, f"{bucket[0]} x {bucket[1]}: {count}{of}").save(path)
                        yield path
        except OSError as error:
            raise UserError(
                f"--contact_sheets: {folder} cannot be written to ({error.strerror or error}); "
                "name another folder."
            ) from error

    def _buckets(self, resolution: int) -> dict[Bucket, list[Record]]:
        choices = buckets(resolution)
        found: dict[Bucket, list[Record]] = defaultdict(list)
        for record in self._records:
            found[nearest(record.width, record.height, choices)].append(record)
        return {bucket: found[bucket] for bucket in choices if bucket in found}

    def _sheet(self, records: list[Record], bucket: Bucket, title: str) -> Image.Image:
        scale = math.sqrt(_AREA / (bucket[0] * bucket[1]))
        scale = scale if scale < 1 else round(scale)  # small ones by a whole factor
        size = round(bucket[0] * scale), round(bucket[1] * scale)
        place = max(size[0], _NARROWEST), size[1]
        cells = [
            labelled_row(
                [self._picture(record, bucket, size, place)],
                [record.name],
                self._words(record),
                size=place,
                most_lines=_LINES,
            )
            for record in records
        ]
        columns = min(len(cells), max(1, round(_WIDTH / max(cell.width for cell in cells))))
        return tiled(cells, columns=columns, title=title)

    def _picture(
        self, record: Record, bucket: Bucket, size: tuple[int, int], place: tuple[int, int]
    ) -> Image.Image | str:
        try:
            pixels = read_view(record, bucket, masked=bool(record.mask))
        except FileError as error:
            self.bad.setdefault(record.name, BadFile(record.name, error.reason))
            return error.reason
        centred = Image.new("RGB", place, "white")
        centred.paste(_tinted(pixels).resize(size, Image.Resampling.LANCZOS), ((place[0] - size[0]) // 2, 0))
        return centred

    def _words(self, record: Record) -> str:
        text = record.caption.text
        cut = self._unseen.get(record.name)
        seen = f"{text.removesuffix(cut)}✂ not seen: {cut}" if cut else text
        others = [f"| {caption.text}" for caption in record.caption.others]
        return " ".join([seen or "(no words)", *others])


def _tinted(pixels: np.ndarray) -> Image.Image:
    """Return the pixels of `read_view` as an image, tinted where the mask is black."""
    image = Image.fromarray(pixels[:, :, :3])
    if pixels.shape[2] == 3:
        return image
    cover = Image.fromarray(pixels[:, :, 3]).point(lambda weight: _TINT * (255 - weight))
    return Image.composite(Image.new("RGB", image.size, _UNTRAINED), image, cover)
