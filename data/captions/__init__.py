"""Where words and settings of images come from. A new kind of file is a module here, a member of the union and a place in the chain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from data.captions.caption import Caption, Tag, parse_caption, render, without_main
from data.captions.entry import NOTHING, SETTINGS, Entry, Remark, UnknownKey, first_setting, read_setting
from data.captions.file_name import SOURCE as FILE_NAME
from data.captions.file_name import from_file_name
from data.captions.json_file import JsonFile
from data.captions.text import TextFile, read_text
from data.captions.yaml_file import YamlFile, read_yaml
from data.folder import Folder

CaptionSource = YamlFile | TextFile | JsonFile


def sidecar_chain(*, lines: bool = False) -> tuple[CaptionSource, ...]:
    """Return the kinds of files beside an image that speak of it, the first one winning.

    JSON comes last: it is often what a downloader left there.

    Args:
        lines: whether each line of a text file is a caption of its own.
    """
    return (
        YamlFile(".yaml"),
        YamlFile(".yml"),
        TextFile(".caption", lines),
        TextFile(".txt", lines),
        JsonFile(),
    )


def read_sidecars(stem: str, folder: Folder, chain: Sequence[CaptionSource]) -> tuple[Entry, ...]:
    """Return what the files beside an image say, in the order of precedence.

    A text file whose words would not be used is not read. The tags of a JSON file are words too: a
    downloader's, which nobody meant to add to a caption that stands in another file.

    Args:
        stem: the image's file name without its extension.
        folder: where the image is.
        chain: of `sidecar_chain`.

    Raises:
        FileError: one of them cannot be used.
    """
    entries: list[Entry] = []
    spoken = ""
    for source in chain:
        if spoken and isinstance(source, TextFile):
            if name := folder.beside(stem, source.suffix):
                entries.append(
                    Entry(
                        remarks=(
                            Remark(
                                name, f"it is not used: the {spoken} file of the same image has the caption"
                            ),
                        )
                    )
                )
            continue
        if entry := source.read(stem, folder):
            if spoken and isinstance(source, JsonFile) and (entry.captions or entry.tags):
                unused = Remark(
                    f"{stem}.json",
                    f"its words are not used: the {spoken} file of the same image has the caption",
                )
                entry = replace(entry, captions=(), tags=(), remarks=(*entry.remarks, unused))
            entries.append(entry)
            spoken = spoken or (entry.source if entry.has_words else "")
    return tuple(entries)


def choose_caption(own: Sequence[Entry], around: Sequence[Entry], stem: str, *, prefix: str = "") -> Caption:
    """Return the caption of an image.

    The words are those of the first entry that has any; the tags of all entries are added to them, heavier
    ones first. Where there are none, an empty caption counts, then tags of the image's own stand alone, and
    else its file name is the caption.

    Args:
        own: what files say about this image, in the order of precedence.
        around: what is said about its folder, likewise.
        stem: the image's file name without its extension.
        prefix: comes before every caption.
    """
    entries = (*own, *around)
    spoken = next((entry for entry in entries if entry.has_words), None) or next(
        (entry for entry in entries if entry.captions), NOTHING
    )
    captions = spoken.captions
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


__all__ = [
    "FILE_NAME", "NOTHING", "SETTINGS", "Caption", "CaptionSource", "Entry", "JsonFile", "Remark", "Tag", "TextFile", "UnknownKey",
    "YamlFile", "choose_caption", "first_setting", "from_file_name", "parse_caption", "read_setting", "read_sidecars", "read_text",
    "read_yaml", "render", "sidecar_chain", "without_main",
]  # fmt: skip
