"""Images that are held out of training: which those are depends on what is in their files, not on names, order or neighbours."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import replace

from data.errors import DataError
from data.index import Index


def hold_out(
    index: Index, contents: Mapping[int, str], *, proportion: float, seed: int
) -> tuple[Index, Index]:
    """Return the images to train and those to hold out, about `proportion` of them.

    An image's side follows from its content, the seed and the proportion alone: adding, removing or renaming
    others does not move it, and files of equal content are on one side. Of images that are never shown
    (`multiply` 0) or cannot be read none is held out.

    Args:
        index: the scanned images.
        contents: by record id, a hash of the image file's content.
        proportion: above 0, below 1.
        seed: draws the sides.

    Raises:
        DataError: there are fewer than two images of different content, so that one side would be empty.
    """
    shown = {
        identity: content for identity, content in contents.items() if index.records[identity].multiply > 0
    }
    drawn = {content: _fraction(content, seed) for content in shown.values()}
    if len(drawn) < 2:
        raise DataError(
            f"validation: an automatic split needs two different images that can be read, and there {_are(len(drawn))}; add images, or set "
            "val_split_mode to manual or none"
        )
    order = sorted(drawn, key=lambda content: drawn[content])
    held = {content for content in order if drawn[content] < proportion}
    held = (held or {order[0]}) - ({order[-1]} if len(held) == len(order) else set())
    return take_out(index, {identity for identity, content in shown.items() if content in held})


def take_out(index: Index, identities: Collection[int]) -> tuple[Index, Index]:
    """Return an index without some of its images, and one of these alone."""
    kept, taken = [], []
    for identity, record in enumerate(index.records):
        (taken if identity in identities else kept).append(record)
    return replace(index, records=tuple(kept)), replace(index, records=tuple(taken), bad=())


def _fraction(content: str, seed: int) -> float:
    """Return a number in 0..1 drawn by content and seed."""
    digest = hashlib.blake2b(f"{seed}\x1f{content}".encode(), digest_size=7).digest()
    return int.from_bytes(digest, "little") / 2**56


def _are(count: int) -> str:
    return "is one" if count == 1 else "are none"
