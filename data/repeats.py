"""kohya's folders: `10_a cat` holds images to show ten times an epoch, captioned "a cat" by default."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from data.captions.caption import parse_caption
from data.captions.entry import Entry, Remark

SOURCE = "folder name"

_NAMED = re.compile(r"([1-9][0-9]{0,2})_(.*\S.*)", re.DOTALL)
"""Three digits at most: 2023_holidays is a year."""


def read_repeats(
    names: Collection[str], *, images_beside: bool
) -> tuple[Mapping[str, Entry], tuple[Remark, ...]]:
    """Return entries by folder name, and remarks about names that were or might have been read so.

    A number in front of a name usually means something else. It counts only where the whole root follows
    kohya's layout: all folders with images are named so, and no images lie beside them. Numbers that count
    the folders, 1, 2, 3, are no repeats.

    Args:
        names: of the folders in the root that hold images at any depth.
        images_beside: the root has images outside of these.
    """
    matches = {name: match for name in names if (match := _NAMED.fullmatch(name))}
    numbers = sorted(int(match[1]) for match in matches.values())
    counting = len(numbers) > 1 and numbers == list(range(1, len(numbers) + 1))
    if images_beside or len(matches) < len(names) or counting:
        why = "the numbers count the folders" if counting else "not everything beside it is named so"
        text = (
            f"not read as kohya's repeats, since {why}; write the number into a multiply.txt if that is meant"
        )
        return {}, tuple(Remark(f"{name}/", text) for name in matches)
    entries = {
        name: Entry(captions=(parse_caption(match[2], SOURCE),), multiply=float(match[1]), source=SOURCE)
        for name, match in matches.items()
    }
    text = (
        "read as kohya names its folders: {} times an epoch, unless a multiply.txt or the like says otherwise"
    )
    return entries, tuple(Remark(f"{name}/", text.format(match[1])) for name, match in matches.items())
