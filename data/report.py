"""Report a data set before training: its captions, sizes, buckets and problems."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Sequence, Sized
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

from data.buckets import Bucket, buckets, nearest
from data.captions.caption import chosen
from data.captions.file_name import SOURCE as FILE_NAME
from data.captions.file_name import describes_nothing
from data.captions.wildcards import longest
from data.duplicates import find_duplicates
from data.index import Index
from data.options import DataOptions
from data.record import BadFile, Notice, Record
from data.repeats import SOURCE as FOLDER_NAME

_SHOWN = 10
"""Names listed of one kind; the rest are counted."""

_WORDS = 80
"""Letters shown of the end of a long caption."""


class Tokens(Protocol):
    """Counts the tokens of captions, none of which spans white space."""

    @property
    def limit(self) -> int:
        """The most tokens of a caption."""
        ...

    def counts(self, texts: Sequence[str]) -> list[int]:
        """Return the number of tokens of each text."""
        ...


@dataclass(frozen=True)
class LongCaption:
    """A caption beyond the token limit."""

    name: str
    tokens: int
    cut: str
    """The words beyond the limit."""


@dataclass(frozen=True)
class Enlarged:
    """An image smaller than its bucket at the largest resolution."""

    name: str
    size: tuple[int, int]
    """(width, height) of the image."""
    bucket: Bucket


@dataclass(frozen=True)
class BucketUse:
    """The images of one bucket."""

    resolution: int
    bucket: Bucket
    images: int
    an_epoch: float
    """Mean number of showings in an epoch."""
    cropped: float
    """Share of the images' pixels outside the crop, 0 to 1."""
    upscaled: int
    """Images smaller than the bucket."""


@dataclass(frozen=True)
class DatasetReport:
    """The findings; `lines` puts them into words."""

    roots: tuple[str, ...]
    images: int
    an_epoch: float
    """Mean number of showings in an epoch."""
    excluded: int
    """Images with a multiply of 0; the other numbers do not count them."""
    batch_size: int
    images_per_step: int
    several: int
    """Images with more than one caption."""
    missing: dict[str, str]
    """Images captioned by their file name, with that caption."""
    folder_named: tuple[str, ...]
    """Images captioned by their folder's name."""
    empty: tuple[str, ...]
    """Images with an empty caption."""
    token_limit: int | None
    """The most tokens of a caption; None without a tokenizer."""
    long: tuple[LongCaption, ...]
    enlarged: tuple[Enlarged, ...]
    """The most enlarged first."""
    duplicates: tuple[tuple[str, ...], ...] | None
    """Groups of images with the same content; None if not searched for."""
    buckets: tuple[BucketUse, ...]
    bad: tuple[BadFile, ...]
    notices: tuple[Notice, ...]

    def small(self, use: BucketUse) -> bool:
        """Return True if a bucket never fills the batch of a step."""
        return use.an_epoch < self.images_per_step

    def notes(self) -> tuple[str, ...]:
        """Return a warning sentence for each problem except skipped files."""
        notes = [*map(str, self.notices)]
        if self.missing:
            images, names = _count(self.missing, "image"), _names([*self.missing])
            notes.append(f"{images} without a caption, trained on the file name: {names}")
        if unnamed := self._unnamed():
            named = f"{_count(unnamed, 'file name')} given by a camera or a program, describing nothing"
            notes.append(f"{named}: {_names(unnamed)}; write a caption beside each image, or rename it")
        if self.empty:
            notes.append(f"{_count(self.empty, 'image')} with an empty caption: {_names(self.empty)}")
        if self.long:
            names, captions = _names([caption.name for caption in self.long]), _count(self.long, "caption")
            notes.append(f"{captions} over {self.token_limit} tokens, of which the end is not seen: {names}")
        if self.enlarged:
            names = _names([image.name for image in self.enlarged])
            notes.append(f"{_count(self.enlarged, 'image')} smaller than trained, and so enlarged: {names}")
        if self.batch_size > self.images:
            larger = f"batch_size {self.batch_size} is larger than the number of images, {self.images}"
            notes.append(f"{larger}: a smaller one trains the same in less memory")
        return tuple(notes)

    def lines(self) -> list[str]:
        """Return the report as lines of text."""
        return list(self._lines())

    def as_json(self) -> dict[str, Any]:
        """Return the report as JSON values, with all names."""
        return {
            "roots": list(self.roots),
            "images": self.images,
            "images_an_epoch": self.an_epoch,
            "left_out_by_multiply": self.excluded,
            "bad": [{"file": file.name, "reason": file.reason} for file in self.bad],
            "notices": [
                {"places": list(notice.places), "count": notice.count, "text": notice.text}
                for notice in self.notices
            ],
            "captions": {
                "several": self.several,
                "missing": list(self.missing),
                "from_file_name": self.missing,
                "from_folder_name": list(self.folder_named),
                "empty": list(self.empty),
                "token_limit": self.token_limit,
                "long": [
                    {"image": long.name, "tokens": long.tokens, "not_seen": long.cut} for long in self.long
                ],
            },
            "duplicates": None if self.duplicates is None else [list(group) for group in self.duplicates],
            "enlarged": [
                {"image": image.name, "size": list(image.size), "bucket": list(image.bucket)}
                for image in self.enlarged
            ],
            "buckets": [
                {
                    "resolution": use.resolution,
                    "width": use.bucket[0],
                    "height": use.bucket[1],
                    "images": use.images,
                    "images_an_epoch": use.an_epoch,
                    "cropped": round(use.cropped, 6),
                    "upscaled": use.upscaled,
                    "fewer_than_a_step": self.small(use),
                }
                for use in self.buckets
            ],
        }

    def _unnamed(self) -> list[str]:
        return [f'{name} as "{text}"' for name, text in self.missing.items() if describes_nothing(text)]

    def _lines(self) -> Iterator[str]:
        excluded = f" ({self.excluded} more excluded by multiply 0)" if self.excluded else ""
        epoch = f"; {_number(self.an_epoch)} are shown in an epoch" if self.an_epoch != self.images else ""
        several = f"; {self.several} have several captions" if self.several else ""
        yield f"images: {self.images} in {', '.join(self.roots)}{excluded}{epoch}{several}"
        yield from _listed("files skipped", [str(file) for file in self.bad])
        if self.notices:
            yield from _listed("remarks", [str(notice) for notice in self.notices])
        named = [f'{name}: "{text}"' for name, text in self.missing.items()]
        yield from _listed("images without a caption, whose file name is used", named)
        if unnamed := self._unnamed():
            yield from _listed("names given by a camera or a program among them, describing nothing", unnamed)
        if self.folder_named:
            yield from _listed("images without a caption, whose folder's name is used", self.folder_named)
        yield from _listed("images with an empty caption", self.empty)
        if self.token_limit is not None:
            described = [
                f"{caption.name}: {caption.tokens} tokens; not seen: {_clipped(caption.cut)}"
                for caption in self.long
            ]
            yield from _listed(f"captions over {self.token_limit} tokens", described)
        if self.duplicates is not None:
            yield from _listed(
                "images that are there more than once", [_names(group, " = ") for group in self.duplicates]
            )
        described = [
            f"{image.name}: {_size(image.size)}, trained as {_size(image.bucket)}" for image in self.enlarged
        ]
        yield from _listed("images smaller than trained, and so enlarged", described)
        several_resolutions = len({use.resolution for use in self.buckets}) > 1
        first = "resolution  " if several_resolutions else ""
        yield f"{first}bucket        images   an epoch   cropped   upscaled"
        for use in self.buckets:
            short = f"   fewer than the {self.images_per_step} of a step" if self.small(use) else ""
            resolution = f"{use.resolution:>10}  " if several_resolutions else ""
            width, height = use.bucket
            shape = f"{width:>5} x {height:<5} {use.images:>6}   {_number(use.an_epoch):>8}"
            yield f"{resolution}{shape}   {use.cropped:>6.1%}   {use.upscaled:>8}{short}"


def report(
    index: Index,
    options: DataOptions,
    *,
    images_per_step: int,
    tokens: Tokens | None = None,
    duplicates: bool = False,
) -> DatasetReport:
    """Return the report of an index.

    Args:
        images_per_step: a bucket with fewer showings in an epoch is called small.
        tokens: None reports no lengths of captions.
        duplicates: search for images with the same content, which reads files of equal size.
    """
    used = [record for record in index.records if record.multiply > 0]
    return DatasetReport(
        roots=tuple(map(str, index.roots)),
        images=len(used),
        an_epoch=round(sum(record.multiply for record in used), 6),
        excluded=len(index.records) - len(used),
        batch_size=options.batch_size,
        images_per_step=images_per_step,
        several=sum(bool(record.caption.others) for record in used),
        missing={each.name: each.caption.text for each in used if each.caption.source == FILE_NAME},
        folder_named=tuple(record.name for record in used if record.caption.source == FOLDER_NAME),
        empty=tuple(
            record.name for record in used if any(caption.empty for caption in record.caption.versions)
        ),
        token_limit=tokens.limit if tokens else None,
        long=tuple(_long(used, tokens, wildcards=options.wildcards)) if tokens else (),
        enlarged=tuple(_enlarged(used, max(options.resolutions))),
        duplicates=find_duplicates(used) if duplicates else None,
        buckets=tuple(
            use
            for resolution in dict.fromkeys(options.resolutions)
            for use in _bucket_uses(used, resolution, options)
        ),
        bad=index.bad,
        notices=index.notices,
    )


def _bucket_uses(records: Sequence[Record], resolution: int, options: DataOptions) -> Iterator[BucketUse]:
    choices = buckets(resolution)
    share = options.resolutions.count(resolution) / len(options.resolutions)
    members: dict[Bucket, list[Record]] = defaultdict(list)
    for record in records:
        members[nearest(record.width, record.height, choices)].append(record)
    for bucket in choices:
        if images := members.get(bucket):
            scales = [_scale(record, bucket) for record in images]
            kept = sum(bucket[0] * bucket[1] / scale**2 for scale in scales)
            pixels = sum(record.width * record.height for record in images)
            yield BucketUse(
                resolution=resolution,
                bucket=bucket,
                images=len(images),
                an_epoch=round(share * sum(record.multiply for record in images), 6),
                cropped=max(0.0, 1 - kept / pixels),
                upscaled=sum(scale > 1 for scale in scales),
            )


def _enlarged(records: Sequence[Record], resolution: int) -> Iterator[Enlarged]:
    choices = buckets(resolution)
    found = [(record, nearest(record.width, record.height, choices)) for record in records]
    small = [(scale, record, bucket) for record, bucket in found if (scale := _scale(record, bucket)) > 1]
    for _, record, bucket in sorted(small, key=lambda each: (-each[0], each[1].name)):
        yield Enlarged(record.name, (record.width, record.height), bucket)


def _scale(record: Record, bucket: Bucket) -> float:
    return max(bucket[0] / record.width, bucket[1] / record.height)


def _long(records: Sequence[Record], tokens: Tokens, *, wildcards: bool) -> Iterator[LongCaption]:
    captions = [
        (record.name if number == 1 else f"{record.name}, caption {number}", text.split())
        for record in records
        for number, caption in enumerate(record.caption.versions, 1)
        if not _surely_fits(text := (chosen(caption, longest) if wildcards else caption).text, tokens)
    ]
    # Each word is counted once: of 100 000 captions the tokenizer would take half a minute.
    words = list(dict.fromkeys(word for _, words in captions for word in words))
    counted = dict(zip(words, tokens.counts(words), strict=True))
    for name, words in captions:
        ends = list(accumulate(map(counted.__getitem__, words)))
        if ends and ends[-1] > tokens.limit:
            yield LongCaption(name, ends[-1], " ".join(words[bisect_right(ends, tokens.limit) :]))


def _surely_fits(text: str, tokens: Tokens) -> bool:
    """Recognise a short caption without counting: each letter of ASCII is one token at most."""
    return len(text) <= tokens.limit and text.isascii()


def _count(things: Sized, noun: str) -> str:
    return f"{len(things)} {noun}" + ("" if len(things) == 1 else "s")


def _number(count: float) -> str:
    """Format a mean count with four digits, or as a whole number from 1,000 up."""
    return f"{count:.0f}" if count >= 1000 else f"{count:.4g}"


def _names(names: Sequence[str], between: str = ", ") -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return between.join(names[:3]) + more


def _clipped(words: str) -> str:
    return (
        repr(words) if len(words) <= _WORDS else f"{words[:_WORDS]!r} and {len(words) - _WORDS} letters more"
    )


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"


def _listed(title: str, entries: Sequence[str]) -> Iterator[str]:
    yield f"{title}: {len(entries) or 'none'}"
    yield from (f"  {entry}" for entry in entries[:_SHOWN])
    if len(entries) > _SHOWN:
        yield f"  ... and {len(entries) - _SHOWN} more"
