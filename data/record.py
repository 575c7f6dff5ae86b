"""What a scan says about each file: an image to train on, one that cannot be used, or something that its owner should know."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from data.captions import Caption


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One image to train on. Its place in `Index.records` is its record id."""

    folder: Path
    """One object for all images of a folder: a path of its own for each of 100 000 images would take a third of the index's memory."""
    file: str
    """The file's name in the folder."""
    name: str
    """Relative path with forward slashes, unique in the index and printable: what messages call the image."""
    width: int
    """Pixels as looked at, EXIF orientation applied; so is height."""
    height: int
    caption: Caption
    multiply: float = 1.0
    """How many times an epoch shows the image; a fraction is that share of the epochs, 0 leaves it out."""
    cond_dropout: float | None = None
    """This and the next three replace the run's option of the same name where they are not None."""
    flip_p: float | None = None
    shuffle_tags: bool | None = None
    keep_tags: int | None = None
    loss_scale: float = 1.0
    batch_id: str = ""
    """Images of one batch_id share their batches with each other only."""

    @property
    def path(self) -> Path:
        """Return where the image is."""
        return self.folder / self.file


@dataclass(frozen=True, slots=True)
class BadFile:
    """A file that was left out, and why: `reason` ends the sentence that `name` begins."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


@dataclass(frozen=True, slots=True)
class Notice:
    """Something about files that are used all the same."""

    text: str
    places: tuple[str, ...]
    """The first files that it is true of, with lines where they are known."""
    count: int
    """How many there are in all."""

    def __str__(self) -> str:
        more = f" and {self.count - len(self.places)} more" if self.count > len(self.places) else ""
        return f"{', '.join(self.places)}{more}: {self.text}"
