"""Latents that were computed before: what a VAE made of each image, in memory or in files that later runs share.

What is kept of an image are its *moments*: the mean and the standard deviation of the VAE's distribution, one
after the other in the channels, fp32 (2C, h, w). A latent is drawn from them anew each time the image is
shown.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from data.buckets import Bucket, buckets, nearest
from data.errors import FileError
from data.image import READING
from data.index import Index, Record
from data.regular import LARGEST_STATE, irregular, load_json, open_regular
from data.replacing import clear_drafts, replacing

if TYPE_CHECKING:
    from torch import Tensor

    from data.dataset import DataOptions

SHARD = 64 << 20
"""Bytes of moments after which a file of them is written: 512 images of 512 x 512."""

PATIENCE = 120.0
"""Seconds after which it is written though it is smaller: so much work is lost at most when the process is killed."""

READERS = 4
"""Files that are hashed at a time."""


class Entry(NamedTuple):
    """One way in which an image is shown; the crop is the middle of the image."""

    record: int
    """Record id."""
    bucket: Bucket
    flipped: bool


def entries(index: Index, options: DataOptions) -> list[Entry]:
    """Return every way in which a run shows its images, in the order of records; without crop jitter there are few."""
    tables = [buckets(resolution) for resolution in options.resolutions]
    found = []
    for identity, record in enumerate(index.records):
        if record.multiply == 0:
            continue
        chance = options.flip_p if record.flip_p is None else record.flip_p
        # An image that is always mirrored is still measured as it is (`Images.plain`).
        flips = (False, True) if chance > 0 else (False,)
        shown = dict.fromkeys(nearest(record.width, record.height, table) for table in tables)
        found += [Entry(identity, bucket, flipped) for bucket in shown for flipped in flips]
    return found


@dataclass(frozen=True)
class MomentShape:
    """What a VAE makes of an image."""

    channels: int
    """Of a latent: 4 for Stable Diffusion."""
    factor: int
    """Pixels along one latent: 8 for Stable Diffusion."""

    def of(self, bucket: Bucket) -> tuple[int, int, int]:
        """Return the shape (2C, h, w) of an image's moments."""
        return 2 * self.channels, bucket[1] // self.factor, bucket[0] // self.factor

    def bytes_of(self, wanted: Iterable[Entry]) -> int:
        """Return the size of moments in fp32."""
        return sum(4 * prod(self.of(entry.bucket)) for entry in wanted)


class MemoryLatents:
    """Moments in memory, for one run."""

    def __init__(self, shape: MomentShape) -> None:
        self.shape = shape
        self._held: dict[Entry, Tensor] = {}
        self.bad: dict[int, str] = {}
        """By record id, why an image has no moments."""

    def missing(self, wanted: Iterable[Entry]) -> list[Entry]:
        """Return which of `wanted` are still to be computed, in their order."""
        return [entry for entry in wanted if entry not in self._held]

    def add(self, entry: Entry, moments: Tensor) -> None:
        """Keep the moments (2C, h, w) of an entry."""
        self._held[entry] = moments

    def flush(self) -> None:
        """Do nothing: there is nothing to write."""

    def read(self, entry: Entry) -> Tensor:
        """Return the moments (2C, h, w) of an entry.

        Raises:
            FileError: they could not be computed.
        """
        if entry not in self._held:
            raise FileError(self.bad.get(entry.record, _ABSENT))
        return self._held[entry]


class DiskLatents:
    """Moments in a folder of safetensors files, which later runs and other data sets share.

    A moment's key is the content of the image file, the bucket, the flip and whatever else decides its
    pixels; the folder belongs to one VAE. A changed image has another key, so nothing stale is ever found.
    Files are written whole or not at all and never changed; any of them may be deleted between runs. A file's
    name is the hash of its content: one whose bits have changed is deleted before it is used.

    Args:
        folder: made when the first file is written.
        shape: of the VAE's moments.
        contents: by record id, a hash of the image file's content; records whose file could not be read are
        missing.
    """

    def __init__(self, folder: Path, shape: MomentShape, contents: Mapping[int, str]) -> None:
        self.shape = shape
        self.contents = contents
        self.bad: dict[int, str] = {}
        """By record id, why an image has no moments."""
        self.damaged = 0
        """Files that were deleted because their content was not what had been written."""
        self._folder = folder
        self._sound: set[str] = set()
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._began = time.monotonic()
        self._opened: dict[str, Any] = {}
        self._shard_of = self._find()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_opened": {}}  # a worker process opens the files for itself

    def missing(self, wanted: Iterable[Entry]) -> list[Entry]:
        """Return which of `wanted` are still to be computed, in their order; of equal images one."""
        first: dict[str, Entry] = {}
        keys = {entry: self._key(entry) for entry in wanted}
        self._verify({shard for key in keys.values() if key and (shard := self._shard_of.get(key))})
        for entry, key in keys.items():
            if key not in self._shard_of:
                first.setdefault(key or f"{entry}", entry)
        return list(first.values())

    def add(self, entry: Entry, moments: Tensor) -> None:
        """Keep the moments (2C, h, w) of an entry; they are in a file after the next `flush` at the latest.

        Raises:
            OSError: the disk is full, or the folder cannot be written to.
        """
        key = self._key(entry)
        assert key is not None, "only what could be hashed is computed"
        self._pending[key] = moments.contiguous()
        self._pending_bytes += moments.numel() * moments.element_size()
        if self._pending_bytes >= SHARD or time.monotonic() - self._began > PATIENCE:
            self.flush()

    def flush(self) -> None:
        """Write what is not in a file yet.

        Raises:
            OSError: the disk is full, or the folder cannot be written to.
        """
        from safetensors.torch import save

        if self._pending:
            content = save(self._pending)
            name = hashlib.blake2b(content, digest_size=16).hexdigest() + ".safetensors"
            with replacing(self._folder / name) as draft:
                draft.write_bytes(content)
            self._shard_of.update(dict.fromkeys(self._pending, name))
            self._sound.add(name)
        self._pending, self._pending_bytes, self._began = {}, 0, time.monotonic()

    def read(self, entry: Entry) -> Tensor:
        """Return the moments (2C, h, w) of an entry.

        Raises:
            FileError: they could not be computed, or their file has vanished.
        """
        from safetensors import SafetensorError, safe_open

        key = self._key(entry)
        shard = self._shard_of.get(key) if key else None
        if shard is None:
            raise FileError(self.bad.get(entry.record, _ABSENT))
        try:
            if shard not in self._opened:
                self._opened[shard] = safe_open(self._folder / shard, framework="pt")
            moments = self._opened[shard].get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise FileError(
                f"its cached latents in {self._folder / shard} cannot be read any more ({error})"
            ) from error
        if moments.shape != self.shape.of(entry.bucket):
            raise FileError(
                f"its cached latents in {self._folder / shard} have the shape {tuple(moments.shape)}; delete the file"
            )
        return moments

    def _verify(self, shards: set[str]) -> None:
        """Delete and forget those of some files whose content is not what their name says."""

        def is_sound(shard: str) -> bool:
            try:
                return content_of(self._folder / shard) == Path(shard).stem
            except OSError:
                return False

        unknown = sorted(shards - self._sound)
        with ThreadPoolExecutor(READERS) as pool:
            sound = {
                shard for shard, right in zip(unknown, pool.map(is_sound, unknown), strict=True) if right
            }
        self._sound |= sound
        lost = set(unknown) - sound
        for shard in lost:
            (self._folder / shard).unlink(missing_ok=True)
        self.damaged += len(lost)
        if lost:
            self._shard_of = {key: shard for key, shard in self._shard_of.items() if shard not in lost}

    def _key(self, entry: Entry) -> str | None:
        content = self.contents.get(entry.record)
        width, height = entry.bucket
        return content and f"{content}-{width}x{height}-centre{'-flipped' if entry.flipped else ''}-{READING}"

    def _find(self) -> dict[str, str]:
        """Return the file of every moment in the folder by key; a file that is damaged is deleted, for its moments are computed anew."""
        from safetensors import SafetensorError, safe_open

        clear_drafts(self._folder)
        found: dict[str, str] = {}
        for path in sorted(self._folder.glob("*.safetensors")):
            try:
                if irregular(path):
                    continue
                with safe_open(path, framework="pt") as shard:
                    found.update(dict.fromkeys(shard.keys(), path.name))
            except SafetensorError:
                self.damaged += 1
                path.unlink(missing_ok=True)
            except OSError:
                continue
        return found


Latents = MemoryLatents | DiskLatents


def content_of(path: Path) -> str:
    """Return a hash of a file's content.

    Raises:
        OSError: it cannot be read.
    """
    with open_regular(path) as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def contents_of(records: Sequence[Record], memory: Path, *, save: bool = True) -> dict[int, str]:
    """Return by record id a hash of each image file's content; files that cannot be read are left out.

    What was hashed is remembered in a file, so that a later run reads only images whose size or times have
    changed.

    Args:
        records: the images.
        memory: the file to remember in; where it cannot be written, everything is hashed again next time.
        save: whether to remember; what was before is used in any case.
    """
    known = _remembered(memory)

    def look(record: Record) -> list[Any] | None:
        try:
            status = record.path.stat()
            stamp = [status.st_size, status.st_mtime_ns, status.st_ctime_ns]
            before = known.get(str(record.path))
            return [*stamp, before[-1] if before and before[:-1] == stamp else content_of(record.path)]
        except OSError:
            return None

    now = time.time_ns()
    with ThreadPoolExecutor(READERS) as pool:
        found = list(pool.map(look, records))
    # Within the grain of the file system's clock a file could change once more and keep its times.
    facts = {
        str(record.path): fact
        for record, fact in zip(records, found, strict=True)
        if fact and now - max(fact[1:3]) > _GRAIN
    }
    if save and facts != known:
        with suppress(OSError), replacing(memory) as draft:
            draft.write_text(json.dumps(facts), encoding="utf-8")
    return {identity: fact[-1] for identity, fact in enumerate(found) if fact}


def _remembered(memory: Path) -> dict[str, list[Any]]:
    try:
        known = load_json(memory, LARGEST_STATE)
    except (OSError, ValueError):
        return {}
    if not isinstance(known, dict):
        return {}
    return {
        path: fact
        for path, fact in known.items()
        if isinstance(fact, list) and len(fact) == 4 and isinstance(fact[-1], str)
    }


_ABSENT = "its latents were not computed"
_GRAIN = 2_000_000_000  # nanoseconds
