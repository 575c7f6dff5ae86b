"""The results of a scan: records of images, unusable files, and notices about used ones."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from data.captions.caption import Caption


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One image to train on. Its position in `Index.records` is its record id."""

    folder: Path
    """One object for all images of a folder: 100 000 paths would take a third of the index's memory."""
    file: str
    """The file's name in the folder."""
    name: str
    """Relative path with forward slashes, unique in the index and printable: the image's name in messages."""
    width: int
    """Pixels as displayed, EXIF orientation applied."""
    height: int
    caption: Caption
    multiply: float = 1.0
    """Showings in an epoch; a fraction is that share of the epochs, 0 excludes the image."""
    cond_dropout: float | None = None
    """This and the next three replace the run's option of the same name unless they are None."""
    flip_p: float | None = None
    shuffle_tags: bool | None = None
    keep_tags: int | None = None
    loss_scale: float = 1.0
    batch_id: str = ""
    """Images share batches only with images of the same batch_id."""
    mask: str = ""
    """Path of the mask in the folder; `file` for the image's transparency."""

    @property
    def path(self) -> Path:
        """The path of the image."""
        return self.folder / self.file

    @property
    def mask_path(self) -> Path | None:
        """The path of the mask."""
        return self.folder / self.mask if self.mask else None


@dataclass(frozen=True, slots=True)
class BadFile:
    """A skipped file: `reason` ends the sentence that `name` starts."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


@dataclass(frozen=True, slots=True)
class Notice:
    """A remark about files that are used all the same."""

    text: str
    places: tuple[str, ...]
    """The first files concerned, with lines where they are known."""
    count: int
    """The number of files concerned."""

    def __str__(self) -> str:
        more = f" and {self.count - len(self.places)} more" if self.count > len(self.places) else ""
        return f"{', '.join(self.places)}{more}: {self.text}"
