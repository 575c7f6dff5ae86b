"""Captions and settings of images. A new kind of file needs a module and an entry in the chain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from data.captions.caption import Caption, Tag
from data.captions.entry import NOTHING, Entry, Remark, first_setting
from data.captions.file_name import from_file_name
from data.captions.json_file import JsonFile
from data.captions.text import TextFile
from data.captions.yaml_file import YamlFile
from data.folder import Folder

CaptionSource = YamlFile | TextFile | JsonFile


def sidecar_chain(*, lines: bool = False) -> tuple[CaptionSource, ...]:
    """Return the kinds of files beside an image in the order of precedence.

    JSON comes last, since it is often the remains of a downloader. With `lines`, each line of a text file is
    a caption of its own.
    """
    texts = TextFile(".caption", lines), TextFile(".txt", lines)
    return YamlFile(".yaml"), YamlFile(".yml"), *texts, JsonFile()


def read_sidecars(stem: str, folder: Folder, chain: Sequence[CaptionSource]) -> tuple[Entry, ...]:
    """Read the files beside the image of a stem, in the order of precedence.

    A text file after a caption is not read. Nor are a JSON file's caption and tags used: they are a
    downloader's, not meant to be added to a caption in another file.
    """
    entries: list[Entry] = []
    chosen = ""
    for source in chain:
        if chosen and isinstance(source, TextFile):
            if name := folder.beside(stem, source.suffix):
                text = f"it is not used: the {chosen} file of the same image has the caption"
                entries.append(Entry(remarks=(Remark(name, text),)))
            continue
        if entry := source.read(stem, folder):
            if chosen and isinstance(source, JsonFile) and (entry.captions or entry.tags):
                text = f"its words are not used: the {chosen} file of the same image has the caption"
                remarks = (*entry.remarks, Remark(f"{stem}.json", text))
                entry = replace(entry, captions=(), tags=(), remarks=remarks)
            entries.append(entry)
            chosen = chosen or (entry.source if entry.has_words else "")
    return tuple(entries)


def choose_caption(own: Sequence[Entry], around: Sequence[Entry], stem: str, *, prefix: str = "") -> Caption:
    """Return the caption of an image from entries about itself and `around` it, in the order of precedence.

    It is the first entry's that is not empty, plus the tags of all entries, heavier ones first. Without one,
    the order is: an empty caption, the image's own tags alone, the file name.
    """
    entries = (*own, *around)
    chosen = next((entry for entry in entries if entry.has_words), None) or next(
        (entry for entry in entries if entry.captions), NOTHING
    )
    captions = chosen.captions
    if not captions:
        alone = next((entry.source for entry in own if entry.tags), None)
        captions = (from_file_name(stem) if alone is None else Caption("", (), alone),)
    added = [tag for entry in entries for tag in entry.tags]
    longest = first_setting(entries, "max_caption_length")
    if added or prefix or longest is not None:
        captions = tuple(
            replace(caption, tags=_joined(caption.tags, added), prefix=prefix, longest=longest)
            for caption in captions
        )
    first, *others = captions
    return replace(first, others=tuple(others)) if others else first


def _joined(tags: tuple[Tag, ...], added: Sequence[Tag]) -> tuple[Tag, ...]:
    present = {tag.text for tag in tags}
    every = list(tags)
    for tag in added:
        if tag.text not in present:
            present.add(tag.text)
            every.append(tag)
    return tuple(sorted(every, key=lambda tag: -tag.weight))
