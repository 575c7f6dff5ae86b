"""Validation images: split by file content, independent of names, order and other images."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import replace

from data.errors import DataError
from data.index import Index


def hold_out(
    index: Index, contents: Mapping[int, str], *, proportion: float, seed: int
) -> tuple[Index, Index]:
    """Return training images and about `proportion` of the images for validation.

    An image's side depends on its content, the seed and the proportion alone: adding, removing or renaming
    others does not move it, and equal files are on one side. Excluded (`multiply` 0) and unreadable images
    are never validation images.

    Args:
        contents: content hash by record id.
        proportion: above 0, below 1.

    Raises:
        DataError: there are fewer than two different images, so that one side would be empty.
    """
    shown = {
        identity: content for identity, content in contents.items() if index.records[identity].multiply > 0
    }
    drawn = {content: _fraction(content, seed) for content in shown.values()}
    if len(drawn) < 2:
        are = "is one" if len(drawn) == 1 else "are none"
        raise DataError(
            "validation: an automatic split needs two different images that can be read, and there "
            f"{are}; add images, or set val_split_mode to manual or none"
        )
    order = sorted(drawn, key=lambda content: drawn[content])
    held = {content for content in order if drawn[content] < proportion}
    held = (held or {order[0]}) - ({order[-1]} if len(held) == len(order) else set())
    return take_out(index, {identity for identity, content in shown.items() if content in held})


def take_out(index: Index, identities: Collection[int]) -> tuple[Index, Index]:
    """Return an index without some of its images, and an index of these alone."""
    kept, taken = [], []
    for identity, record in enumerate(index.records):
        (taken if identity in identities else kept).append(record)
    return replace(index, records=tuple(kept)), replace(index, records=tuple(taken), bad=())


def _fraction(content: str, seed: int) -> float:
    """Draw a number in 0..1 by content and seed."""
    digest = hashlib.blake2b(f"{seed}\x1f{content}".encode(), digest_size=7).digest()
    return int.from_bytes(digest, "little") / 2**56
