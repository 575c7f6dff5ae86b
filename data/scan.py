"""One pass over the data roots: every image with the content of the files beside and around it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from data.captions import CaptionSource, choose_caption, read_sidecars
from data.captions.caption import Caption, without_main
from data.captions.entry import SETTINGS, Entry, Remark, UnknownKey, first_setting
from data.captions.text import TextFile
from data.captions.wildcards import has_alternatives, has_stray_brace
from data.errors import DataError, FileError
from data.folder import FOLDER_FILES, Folder, list_folder, stem_of, walk
from data.folder_files import read_global, read_local
from data.image import check_mask, displayed_size, has_alpha, is_image
from data.masked import mask_error
from data.record import BadFile, Notice, Record
from data.repeats import read_repeats
from data.table import METADATA, BadRow, Metadata, Row, read_metadata, read_table

_PLACES = 3
"""Files named in a notice; the rest are counted."""

_KEYS = 20
"""Unknown keys named; the rest are counted."""

_RECORD_SETTINGS = [key for key in SETTINGS if key in Record.__dataclass_fields__]


@dataclass(frozen=True)
class _Around:
    """The files outside a folder that concern its images, the nearest first."""

    below: tuple[Entry, ...] = ()
    """global.yaml, of the folder itself and of its parents."""
    lists: tuple[Metadata, ...] = ()
    repeats: tuple[Entry, ...] = ()
    """The entry of a folder name in kohya's layout."""
    trouble: BadFile | None = None
    """An unusable file, because of which all images are skipped."""


@dataclass(frozen=True)
class _About:
    """The entries about one image besides its own files, in the order of precedence."""

    before: tuple[Entry, ...] = ()
    """More important than the image's own files."""
    after: tuple[Entry, ...] = ()
    """Less important, but still about this image alone."""
    around: tuple[Entry, ...] = ()
    """About all images of the folder."""
    problems: tuple[str, ...] = ()
    kohya: bool = False
    """The folder follows kohya's layout, and so do its captions."""


class Scan:
    """The findings so far.

    Args:
        chain: kinds of files beside an image, of `sidecar_chain`.
        alpha_mask: take the transparency of images without a file of their mask as their mask.
        wildcards: remark on braces that are none.
    """

    def __init__(
        self,
        chain: Sequence[CaptionSource],
        *,
        caption_prefix: str = "",
        alpha_mask: bool = False,
        wildcards: bool = False,
    ) -> None:
        self.records: list[Record] = []
        self.bad: list[BadFile] = []
        self._chain = chain
        self._kohya_chain = [
            replace(source, first=True) if isinstance(source, TextFile) else source for source in chain
        ]
        self._caption_prefix = caption_prefix
        self._alpha_mask = alpha_mask
        self._wildcards = wildcards
        self._names: Counter[str] = Counter()
        self._remarks: dict[str, list[str]] = {}
        self._unknown: dict[str, list[str]] = {}

    def folders(self, root: Path, start: str) -> None:
        """Add the images of a folder and its subfolders, their names prefixed with `start`."""
        every = list(walk(root))
        masks = [folder.path / folder.mask_folder for folder in every if folder.mask_folder]
        listed = [
            (folder, _relative(root, folder.path))
            for folder in every
            if not any(folder.path.is_relative_to(path) for path in masks)
        ]
        holding = {below.partition("/")[0] for folder, below in listed if folder.images}
        repeats, remarks = read_repeats(sorted(holding - {""}), images_beside="" in holding)
        self._remark(remarks, start)
        around: dict[Path, _Around] = {}
        skipped: Counter[BadFile] = Counter()
        for folder, below in listed:
            name = start + below
            if folder.problem:
                self.bad.append(BadFile(printable(name or "."), folder.problem))
            here = self._enter(folder, name, around[folder.path.parent] if below else _Around())
            if repeat := repeats.get(below.removesuffix("/")):
                here = replace(here, repeats=(repeat,))
            around[folder.path] = here
            self._remark(
                [Remark(file, "its format is not read; save it as PNG") for file in folder.unread], name
            )
            if folder.images:
                text = "no image has this name, so nothing is captioned by it"
                self._remark([Remark(file, text) for file in folder.captions_alone], name)
            self._images(folder, name, here, skipped)
        for file, images in skipped.items():
            are = "s are" if images > 1 else " is"
            consequence = f"; {images} image{are} skipped for it" if images else ""
            self.bad.append(replace(file, reason=file.reason + consequence))
        for folder, below in listed:
            for table in around[folder.path].lists:
                if table.folder == folder.path:
                    rows = table.left_over()
                    self._remark([Remark(row.place, "its image is not there") for row in rows], start + below)

    def table(self, path: Path, start: str) -> None:
        """Add the images of a list, their names prefixed with `start`."""
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
                    self._image(folders[found.parent], found.name, name, _About(before=(row.entry,)))
        except FileError as error:
            raise DataError(f"data_root: {path.parent / error.reason}") from error

    def notices(self) -> tuple[Notice, ...]:
        """Return all remarks, grouped by text."""
        notices = [
            Notice(text, tuple(places[:_PLACES]), len(places)) for text, places in self._remarks.items()
        ]
        if self._unknown:
            keys = [f"{key!r} ({len(places)})" for key, places in self._unknown.items()]
            more = f" and {len(keys) - _KEYS} more" if len(keys) > _KEYS else ""
            first = next(iter(self._unknown.values()))[0]
            text = f"keys that mean nothing here: {', '.join(keys[:_KEYS])}{more}"
            notices.append(Notice(text, (first,), 1))
        return tuple(notices)

    def _enter(self, folder: Folder, start: str, above: _Around) -> _Around:
        """Read the files that concern a folder and its subfolders."""
        if above.trouble:
            return above
        try:
            below = read_global(folder)
            names = filter(None, map(folder.own, METADATA))
            lists = tuple(read_metadata(folder.path / name) for name in names)
        except FileError as error:
            return replace(above, trouble=_bad_file(error, start))
        entries = list(below)
        for table in lists:
            self.bad += [BadFile(printable(start + row.place), row.reason) for row in table.nameless]
            again = "a later row names the same image and is used"
            self._remark([Remark(row.place, again) for row in table.repeated], start)
            entries += [row.entry for row in table.rows.values() if isinstance(row, Row)]
        self._remark_all(entries, start)
        return replace(above, below=below + above.below, lists=lists + above.lists)

    def _images(self, folder: Folder, start: str, around: _Around, skipped: Counter[BadFile]) -> None:
        """Add the images of one folder."""
        broken = "it is a broken link or not an ordinary file"
        self.bad += [BadFile(printable(start + name), broken) for name in folder.others if is_image(name)]
        images = folder.images
        stems = set(map(stem_of, images))
        orphans = [mask for stem, mask in folder.masks.items() if stem not in stems]
        self._remark([Remark(mask, "it is a mask, and its image is not there") for mask in orphans], start)
        trouble, local = around.trouble, ()
        if not images:
            local_files = filter(None, (folder.own(file) for file in FOLDER_FILES if "global" not in file))
            text = (
                "it has no effect: no image lies beside it, and of these files only global.yaml reaches the "
                "folders below"
            )
            self._remark([Remark(name, text) for name in local_files], start)
        elif not trouble:
            try:
                local = read_local(folder)
            except FileError as error:
                trouble = _bad_file(error, start)
        if trouble:
            skipped[trouble] += len(images)
        self._remark_all(local, start)
        about = _About(around=(*local, *around.below, *around.repeats), kohya=bool(around.repeats))
        lists = [(table, _relative(table.folder, folder.path)) for table in around.lists]
        for file in images:
            rows = [row for table, below in lists if (row := table.row(below + file))]
            if not trouble:
                after = tuple(row.entry for row in rows[:1] if isinstance(row, Row))
                problems = tuple(row.reason for row in rows[:1] if isinstance(row, BadRow))
                self._image(
                    folder, file, printable(start + file), replace(about, after=after, problems=problems)
                )

    def _image(self, folder: Folder, file: str, name: str, about: _About) -> None:
        """Read the files beside one image, and add it or its problems."""
        stem, mask = stem_of(file), ""
        problems = list(about.problems)
        width = height = 0
        beside: tuple[Entry, ...] = ()
        try:
            width, height = displayed_size(folder.path / file)
            mask = self._mask(folder, file, (width, height))
        except FileError as error:
            problems.append(error.reason)
        try:
            beside = read_sidecars(stem, folder, self._kohya_chain if about.kohya else self._chain)
        except FileError as error:
            problems.append(error.reason)
        if problems:
            self.bad.append(BadFile(name, "; ".join(problems)))
            return
        self._remark_all(beside, name[: name.rfind("/") + 1])
        self._names[name] += 1
        if self._names[name] > 1:  # a list may repeat an image with another caption
            name = f"{name} ({self._names[name]})"
        own = (*about.before, *beside, *about.after)
        entries = (*own, *about.around)
        settings = {
            key: value for key in _RECORD_SETTINGS if (value := first_setting(entries, key)) is not None
        }
        caption = choose_caption(own, about.around, stem, prefix=self._caption_prefix)
        if remark := self._about_braces(caption):
            self._remark([Remark(name, remark)], "")
        if about.kohya:  # whose keep_tokens counts the words before the first comma
            caption = without_main(caption)
        self.records.append(
            Record(
                folder=folder.path,
                file=file,
                name=name,
                width=width,
                height=height,
                caption=caption,
                mask=mask,
                **settings,
            )
        )

    def _about_braces(self, caption: Caption) -> str:
        texts = [version.text for version in caption.versions]
        if not self._wildcards and any(map(has_alternatives, texts)):
            return "{a|b} is trained as it is written; with wildcards one of the two is drawn each time"
        if self._wildcards and any(map(has_stray_brace, texts)):
            return "braces that are no wildcard: nested, or one without the other"
        return ""

    def _mask(self, folder: Folder, file: str, size: tuple[int, int]) -> str:
        """Return the path of an image's mask in its folder, the image's own for its transparency, or ""."""
        if mask := folder.masks.get(stem_of(file)):
            try:
                check_mask(folder.path / mask, size)
            except FileError as error:
                raise mask_error(mask, error) from error
            return mask
        return file if self._alpha_mask and has_alpha(folder.path / file) else ""

    def _remark_all(self, entries: Iterable[Entry], start: str) -> None:
        self._remark([remark for entry in entries for remark in entry.remarks], start)

    def _remark(self, remarks: Iterable[Remark], start: str) -> None:
        for remark in remarks:
            known = self._unknown if isinstance(remark, UnknownKey) else self._remarks
            known.setdefault(remark.text, []).append(printable(start + remark.place))


def printable(name: str) -> str:
    """Replace unprintable letters, so that a name fits on one line anywhere."""
    if name.isprintable():
        return name
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in name)


def _bad_file(error: FileError, start: str) -> BadFile:
    """Return a folder's unusable file, whose name and line begin the reason."""
    name, _, reason = error.reason.partition(": ")
    return BadFile(printable(start + name), reason)


def _relative(root: Path, path: Path) -> str:
    """Return the relative path of a folder with a slash at its end; nothing for the root itself."""
    return "" if path == root else path.relative_to(root).as_posix() + "/"


def _find(folder: Path, file: str) -> Path | None:
    """Find the image of a list in `folder`: relative to the list, else to the working directory."""
    for written in dict.fromkeys((file, file.replace("\\", "/"))):
        for path in (folder / written, Path(written)):
            try:
                if path.is_file():
                    return path
            except (OSError, ValueError):  # too long, or not a file name
                continue
    return None
