"""One pass over the data roots: every image with what the files beside and around it say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from data.captions import (
    SETTINGS,
    CaptionSource,
    Entry,
    Remark,
    TextFile,
    UnknownKey,
    choose_caption,
    first_setting,
    read_sidecars,
    without_main,
)
from data.errors import DataError, FileError
from data.folder import FOLDER_FILES, Folder, list_folder, walk
from data.folder_files import read_global, read_local
from data.image import SUFFIXES, displayed_size
from data.record import BadFile, Notice, Record
from data.repeats import read_repeats
from data.table import METADATA, BadRow, Metadata, Row, read_metadata, read_table

_PLACES = 3
"""Files that a notice names; the rest are counted."""

_KEYS = 20
"""Unknown keys that are named; the rest are counted."""

_FIELDS = Record.__dataclass_fields__


@dataclass(frozen=True)
class _Around:
    """What is said of a folder's images from outside of it, the nearest first."""

    below: tuple[Entry, ...] = ()
    """global.yaml, of the folder itself and of those above."""
    lists: tuple[Metadata, ...] = ()
    repeats: tuple[Entry, ...] = ()
    """What kohya's name of a folder says; empty in other folders."""
    trouble: BadFile | None = None
    """The file that cannot be used, so that all images have to be left out."""


class Scan:
    """What has been found so far.

    Args:
        chain: the kinds of files beside an image, of `sidecar_chain`.
        caption_prefix: comes before every caption.
    """

    def __init__(self, chain: Sequence[CaptionSource], *, caption_prefix: str = "") -> None:
        self.records: list[Record] = []
        self.bad: list[BadFile] = []
        self._chain = chain
        self._kohyas = [
            replace(source, first=True) if isinstance(source, TextFile) else source for source in chain
        ]
        self._caption_prefix = caption_prefix
        self._names: Counter[str] = Counter()
        self._remarks: dict[str, list[str]] = {}
        self._unknown: dict[str, list[str]] = {}

    def folders(self, root: Path, start: str) -> None:
        """Add the images below a folder.

        Args:
            root: the folder.
            start: what comes before its images' names.
        """
        listed = [(folder, _below(root, folder.path)) for folder in walk(root)]
        holding = {below.partition("/")[0] for folder, below in listed if any(map(_is_image, folder.files))}
        repeats, remarks = read_repeats(sorted(holding - {""}), images_beside="" in holding)
        self._remark(remarks, start)
        around: dict[Path, _Around] = {}
        left_out: Counter[BadFile] = Counter()
        for folder, below in listed:
            name = start + below
            if folder.problem:
                self.bad.append(BadFile(printable(name or "."), folder.problem))
            here = self._enter(folder, name, around[folder.path.parent] if below else _Around())
            if repeat := repeats.get(below.removesuffix("/")):
                here = replace(here, repeats=(repeat,))
            around[folder.path] = here
            self._images(folder, name, here, left_out)
        for file, images in left_out.items():
            consequence = (
                f"; {images} image{'s are' if images > 1 else ' is'} left out for it" if images else ""
            )
            self.bad.append(replace(file, reason=file.reason + consequence))
        for folder, below in listed:
            for table in around[folder.path].lists:
                if table.folder == folder.path:
                    self._remark(
                        [Remark(row.place, "its image is not there") for row in table.left_over()],
                        start + below,
                    )

    def table(self, path: Path, start: str) -> None:
        """Add the images of a list.

        Args:
            path: the list.
            start: what comes before its images' names.

        Raises:
            DataError: it cannot be read.
        """
        folders: dict[Path, Folder] = {}
        try:
            for row in read_table(path):
                name = printable(start + row.file.replace("\\", "/"))
                found = _find(path.parent, row.file) if row.file else None
                if isinstance(row, BadRow):
                    self.bad.append(BadFile(name if row.file else printable(start + row.place), row.reason))
                elif found is None:
                    self.bad.append(BadFile(name, f"{row.place} names it, and it is not there"))
                else:
                    self._remark(row.entry.remarks, start)
                    if found.parent not in folders:
                        folders[found.parent] = list_folder(found.parent)
                    self._image(folders[found.parent], found.name, name, before=(row.entry,))
        except FileError as error:
            raise DataError(f"data_root: {path.parent / error.reason}") from error

    def notices(self) -> tuple[Notice, ...]:
        """Return what has been remarked."""
        notices = [
            Notice(text, tuple(places[:_PLACES]), len(places)) for text, places in self._remarks.items()
        ]
        if self._unknown:
            keys = [f"{key!r} ({len(places)})" for key, places in self._unknown.items()]
            more = f" and {len(keys) - _KEYS} more" if len(keys) > _KEYS else ""
            first = next(iter(self._unknown.values()))[0]
            notices.append(
                Notice(f"keys that mean nothing here: {', '.join(keys[:_KEYS])}{more}", (first,), 1)
            )
        return tuple(notices)

    def _enter(self, folder: Folder, start: str, above: _Around) -> _Around:
        """Return what holds for a folder and what is below it."""
        if above.trouble:
            return above
        try:
            below = read_global(folder)
            lists = tuple(
                read_metadata(folder.path / name) for kind in METADATA if (name := folder.own(kind))
            )
        except FileError as error:
            return replace(above, trouble=_named(error, start))
        for table in lists:
            self.bad += [BadFile(printable(start + row.place), row.reason) for row in table.nameless]
            again = "a later row names the same image and is used"
            self._remark([Remark(row.place, again) for row in table.repeated], start)
        said = (
            *below,
            *(row.entry for table in lists for row in table.rows.values() if isinstance(row, Row)),
        )
        self._remark([remark for entry in said for remark in entry.remarks], start)
        return replace(above, below=below + above.below, lists=lists + above.lists)

    def _images(self, folder: Folder, start: str, around: _Around, left_out: Counter[BadFile]) -> None:
        """Add the images of one folder."""
        broken = "it is a broken link or not an ordinary file"
        self.bad += [BadFile(printable(start + name), broken) for name in folder.others if _is_image(name)]
        images = [name for name in folder.files if _is_image(name)]
        trouble, local = around.trouble, ()
        if not images:
            idle = [
                name for kind in FOLDER_FILES if not kind.startswith("global.") and (name := folder.own(kind))
            ]
            text = "it has no effect: no image lies beside it, and of these files only global.yaml reaches the folders below"
            self._remark([Remark(name, text) for name in idle], start)
        elif not trouble:
            try:
                local = read_local(folder)
            except FileError as error:
                trouble = _named(error, start)
        if trouble:
            left_out[trouble] += len(images)
        self._remark([remark for entry in local for remark in entry.remarks], start)
        said = (*local, *around.below, *around.repeats)
        lists = [(table, _below(table.folder, folder.path)) for table in around.lists]
        for file in images:
            rows = [row for table, below in lists if (row := table.row(below + file))]
            if not trouble:
                wrong = [row.reason for row in rows[:1] if isinstance(row, BadRow)]
                after = tuple(row.entry for row in rows[:1] if isinstance(row, Row))
                kohyas = bool(around.repeats)
                self._image(
                    folder,
                    file,
                    printable(start + file),
                    after=after,
                    around=said,
                    problems=wrong,
                    kohyas=kohyas,
                )

    def _image(
        self,
        folder: Folder,
        file: str,
        name: str,
        *,
        before: tuple[Entry, ...] = (),
        after: tuple[Entry, ...] = (),
        around: tuple[Entry, ...] = (),
        problems: Sequence[str] = (),
        kohyas: bool = False,
    ) -> None:
        """Add one image, or what is wrong with it; its own files are read here, what else speaks of it comes before or after them."""
        stem = file.rpartition(".")[0] or file
        problems = list(problems)
        width = height = 0
        beside: tuple[Entry, ...] = ()
        try:
            width, height = displayed_size(folder.path / file)
        except FileError as error:
            problems.append(error.reason)
        try:
            beside = read_sidecars(stem, folder, self._kohyas if kohyas else self._chain)
        except FileError as error:
            problems.append(error.reason)
        if problems:
            self.bad.append(BadFile(name, "; ".join(problems)))
            return
        self._remark([remark for entry in beside for remark in entry.remarks], name[: name.rfind("/") + 1])
        self._names[name] += 1
        if self._names[name] > 1:  # a list may show an image with several captions
            name = f"{name} ({self._names[name]})"
        own = (*before, *beside, *after)
        settings = {
            key: value
            for key in SETTINGS
            if key in _FIELDS and (value := first_setting((*own, *around), key)) is not None
        }
        caption = choose_caption(own, around, stem, prefix=self._caption_prefix)
        caption = (
            without_main(caption) if kohyas else caption
        )  # kohya's keep_tokens counts from the first piece
        self.records.append(
            Record(
                folder=folder.path,
                file=file,
                name=name,
                width=width,
                height=height,
                caption=caption,
                **settings,
            )
        )

    def _remark(self, remarks: Iterable[Remark], start: str) -> None:
        for remark in remarks:
            known = self._unknown if isinstance(remark, UnknownKey) else self._remarks
            known.setdefault(remark.text, []).append(printable(start + remark.place))


def printable(name: str) -> str:
    """Return a name that can be shown on one line anywhere: what cannot be printed becomes the replacement character."""
    return (
        name
        if name.isprintable()
        else "".join(letter if letter.isprintable() else "\ufffd" for letter in name)
    )


def _named(error: FileError, start: str) -> BadFile:
    """Return what is wrong with a folder's file, whose name and line begin the reason."""
    name, _, reason = error.reason.partition(": ")
    return BadFile(printable(start + name), reason)


def _is_image(name: str) -> bool:
    return name.rpartition(".")[2].lower() in SUFFIXES


def _below(root: Path, path: Path) -> str:
    """Return the way from a folder to one inside it, with a slash at its end; nothing where they are the same."""
    return "" if path == root else path.relative_to(root).as_posix() + "/"


def _find(folder: Path, file: str) -> Path | None:
    """Return the image that a list in `folder` means: relative to the list, else to the working directory."""
    for written in dict.fromkeys((file, file.replace("\\", "/"))):
        for path in (folder / written, Path(written)):
            try:
                if path.is_file():
                    return path
            except (OSError, ValueError):  # a name that is too long, or no name at all
                continue
    return None
