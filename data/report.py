"""What a data set holds and what training will do to it, before it does."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from data.buckets import Bucket, buckets, nearest
from data.captions import FILE_NAME
from data.index import BadFile, Index, Record

TOKENS = 75
"""Tokens of a caption that the text encoder sees, the start and end tokens not counted."""

_SHOWN = 10
"""Names listed of one kind; the rest are counted."""


@dataclass(frozen=True)
class LongCaption:
    """A caption of which the text encoder sees the beginning only."""

    name: str
    tokens: int
    cut: str
    """The words that are not seen."""


@dataclass(frozen=True)
class BucketUse:
    """The images that are trained at one size."""

    bucket: Bucket
    images: int
    cropped: float
    """Share of the images' pixels that lies outside the crop, 0 to 1."""
    upscaled: int
    """Images that are smaller than the bucket."""


@dataclass(frozen=True)
class DatasetReport:
    """The findings, by name; `lines` words them."""

    roots: tuple[str, ...]
    images: int
    excluded: int
    """Images that a multiply of 0 leaves out; the other numbers do not count them."""
    batch_size: int
    missing: tuple[str, ...]
    """Images without a caption of their own, whose file name is used."""
    empty: tuple[str, ...]
    """Images whose caption is the empty text."""
    long: tuple[LongCaption, ...] | None
    """None where no tokenizer was at hand to count."""
    buckets: tuple[BucketUse, ...]
    bad: tuple[BadFile, ...]

    def notes(self) -> tuple[str, ...]:
        """Return a sentence for each thing that a run should warn about; none for clean data."""
        notes: list[str] = []
        if self.bad:
            notes.append(f"{_count(self.bad, 'file')} left out that cannot be used: {_names([file.name for file in self.bad])}")
        if self.missing:
            notes.append(f"{_count(self.missing, 'image')} without a caption file, trained on the file name: {_names(self.missing)}")
        if self.empty:
            notes.append(f"{_count(self.empty, 'image')} with an empty caption: {_names(self.empty)}")
        if self.long:
            names = _names([caption.name for caption in self.long])
            notes.append(f"{_count(self.long, 'caption')} over {TOKENS} tokens, of which the end is not seen: {names}")
        if self.batch_size > self.images:
            notes.append(
                f"batch_size {self.batch_size} is larger than the number of images, {self.images}: "
                "every step is trained with what there is, so a smaller batch_size uses less memory for the same"
            )
        return tuple(notes)

    def lines(self) -> list[str]:
        """Return the report as plain text, a line each."""
        return list(self._lines())

    def _lines(self) -> Iterator[str]:
        excluded = f" ({self.excluded} more left out by multiply 0)" if self.excluded else ""
        yield f"images: {self.images} in {', '.join(self.roots)}{excluded}"
        yield from _listed("files left out", [str(file) for file in self.bad])
        yield from _listed("images without a caption file, whose name is used", self.missing)
        yield from _listed("images with an empty caption", self.empty)
        if self.long is not None:
            described = [f"{caption.name}: {caption.tokens} tokens; not seen: {caption.cut!r}" for caption in self.long]
            yield from _listed(f"captions over {TOKENS} tokens", described)
        yield "bucket        images   cropped   upscaled"
        for use in self.buckets:
            short = "   fewer than a batch" if use.images < self.batch_size else ""
            width, height = use.bucket
            yield f"{width:>5} x {height:<5} {use.images:>6}   {use.cropped:>6.1%}   {use.upscaled:>8}{short}"


def report(index: Index, *, resolution: int, batch_size: int, count_tokens: Callable[[str], int] | None = None) -> DatasetReport:
    """Return what an index holds.

    Args:
        index: the scanned images.
        resolution: of the buckets.
        batch_size: images of one batch, against which buckets are called small.
        count_tokens: the number of tokens of a caption, start and end tokens not counted; without it, lengths are not reported.
    """
    used = [record for record in index.records if record.multiply > 0]
    return DatasetReport(
        roots=tuple(str(root) for root in index.roots),
        images=len(used),
        excluded=len(index.records) - len(used),
        batch_size=batch_size,
        missing=tuple(record.name for record in used if record.caption.source == FILE_NAME),
        empty=tuple(record.name for record in used if not record.caption.text),
        long=tuple(_long(used, count_tokens)) if count_tokens else None,
        buckets=tuple(_bucket_uses(used, resolution)),
        bad=index.bad,
    )


def _bucket_uses(records: Sequence[Record], resolution: int) -> Iterator[BucketUse]:
    choices = buckets(resolution)
    members: dict[Bucket, list[Record]] = defaultdict(list)
    for record in records:
        members[nearest(record.width, record.height, choices)].append(record)
    for bucket in choices:
        if images := members.get(bucket):
            scales = [max(bucket[0] / record.width, bucket[1] / record.height) for record in images]
            kept = sum(bucket[0] * bucket[1] / scale**2 for scale in scales)
            pixels = sum(record.width * record.height for record in images)
            yield BucketUse(bucket, len(images), max(0.0, 1 - kept / pixels), sum(scale > 1 for scale in scales))


def _long(records: Sequence[Record], count_tokens: Callable[[str], int]) -> Iterator[LongCaption]:
    for record in records:
        text = record.caption.text
        tokens = count_tokens(text)
        if tokens > TOKENS:
            yield LongCaption(record.name, tokens, _unseen(text, count_tokens))


def _unseen(text: str, count_tokens: Callable[[str], int]) -> str:
    """Return the words after the longest beginning that fits."""
    words = text.split(" ")
    fits, over = 0, len(words)
    while over - fits > 1:
        middle = (fits + over) // 2
        if count_tokens(" ".join(words[:middle])) <= TOKENS:
            fits = middle
        else:
            over = middle
    return " ".join(words[fits:])


def _count(things: Sequence[object], noun: str) -> str:
    return f"{len(things)} {noun}" + ("" if len(things) == 1 else "s")


def _names(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _listed(title: str, entries: Sequence[str]) -> Iterator[str]:
    yield f"{title}: {len(entries) or 'none'}"
    yield from (f"  {entry}" for entry in entries[:_SHOWN])
    if len(entries) > _SHOWN:
        yield f"  ... and {len(entries) - _SHOWN} more"
