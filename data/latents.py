"""Cached latents: the VAE's output for each image, in memory or in files that later runs share.

An image's *moments* are cached: mean and standard deviation of the VAE's distribution, concatenated in the
channels, fp32 (2C, h, w). Each showing of the image draws a new latent from them. In a data set with masks
another channel follows: the weight of each latent in the loss, 0 to 1.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from data.atomic import appearing, clear_drafts
from data.buckets import Bucket, buckets, nearest
from data.contents import READERS, content_hash
from data.errors import FileError
from data.image import READING
from data.index import Index
from data.options import DataOptions
from data.regular import irregular

SHARD = 64 << 20
"""Bytes of pending moments that trigger a write: 512 images of 512 x 512."""

PATIENCE = 120.0
"""Seconds that trigger a write of fewer bytes: the most work that a killed process loses."""


class View(NamedTuple):
    """One way in which an image is shown: centre-cropped to a bucket, mirrored or not."""

    record: int
    """Record id."""
    bucket: Bucket
    flipped: bool


def views(index: Index, options: DataOptions) -> list[View]:
    """Return every view of a run without crop jitter, in the order of records."""
    tables = [buckets(resolution) for resolution in options.resolutions]
    found = []
    for identity, record in enumerate(index.records):
        if record.multiply == 0:
            continue
        chance = options.flip_p if record.flip_p is None else record.flip_p
        # `Images.plain` measures even an image that is always mirrored as it is.
        flips = (False, True) if chance > 0 else (False,)
        shown = dict.fromkeys(nearest(record.width, record.height, table) for table in tables)
        found += [View(identity, bucket, flipped) for bucket in shown for flipped in flips]
    return found


@dataclass(frozen=True)
class MomentShape:
    """The shape of a VAE's moments."""

    channels: int
    """Of a latent: 4 for Stable Diffusion."""
    factor: int
    """Pixels per latent along one side: 8 for Stable Diffusion."""
    masked: bool = False
    """Weights follow as another channel."""

    def at(self, bucket: Bucket) -> tuple[int, int, int]:
        """Return the shape (2C, h, w) of the moments of an image in `bucket`, (2C + 1, h, w) with masks."""
        return 2 * self.channels + self.masked, bucket[1] // self.factor, bucket[0] // self.factor

    def nbytes(self, wanted: Iterable[View]) -> int:
        """Return the bytes of these views' moments in fp32."""
        return sum(4 * prod(self.at(view.bucket)) for view in wanted)


class MemoryLatents:
    """Moments in memory, for one run."""

    def __init__(self, shape: MomentShape) -> None:
        self.shape = shape
        self._moments: dict[View, Tensor] = {}
        self.bad: dict[int, str] = {}
        """By record id, the reason why an image has no moments."""

    def missing(self, wanted: Iterable[View]) -> list[View]:
        """Return the views that are not encoded yet, in their order."""
        return [view for view in wanted if view not in self._moments]

    def add(self, view: View, moments: Tensor) -> None:
        """Store the moments (2C, h, w) of a view."""
        self._moments[view] = moments

    def flush(self) -> None:
        """Do nothing: there is no file."""

    def read(self, view: View) -> Tensor:
        """Return the moments (2C, h, w) of a view; FileError if they could not be computed."""
        if view not in self._moments:
            raise FileError(self.bad.get(view.record, _ABSENT))
        return self._moments[view]


class DiskLatents:
    """Moments in a folder of safetensors files, shared by later runs and other data sets.

    The key of moments is the content of the image and its mask, the bucket, the flip and whatever else
    decides the pixels; the folder belongs to one VAE. A changed file has another key, so no stale moments are
    found. Files are written atomically and never changed; any of them may be deleted between runs. A file is
    named by the hash of its content, which is verified before use.

    Args:
        contents: content hash by record id; unreadable records are missing.
    """

    def __init__(self, folder: Path, shape: MomentShape, contents: Mapping[int, str]) -> None:
        self.shape = shape
        self.contents = contents
        self.bad: dict[int, str] = {}
        """By record id, the reason why an image has no moments."""
        self.damaged = 0
        """Files deleted because their content did not match their name."""
        self._folder = folder
        self._sound: set[str] = set()
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._last_flush = time.monotonic()
        self._opened: dict[str, Any] = {}
        self._shard_of = self._find()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_opened": {}}  # a DataLoader worker opens the files itself

    def missing(self, wanted: Iterable[View]) -> list[View]:
        """Return the views that are not encoded yet, in their order; one of several equal images."""
        first: dict[str, View] = {}
        keys = {view: self._key(view) for view in wanted}
        self._verify({shard for key in keys.values() if key and (shard := self._shard_of.get(key))})
        for view, key in keys.items():
            if key not in self._shard_of:
                first.setdefault(key or f"{view}", view)
        return list(first.values())

    def add(self, view: View, moments: Tensor) -> None:
        """Store the moments (2C, h, w) of a view, written by the next `flush` at the latest."""
        key = self._key(view)
        assert key is not None, "only hashed images are encoded"
        self._pending[key] = moments.contiguous()
        self._pending_bytes += moments.numel() * moments.element_size()
        if self._pending_bytes >= SHARD or time.monotonic() - self._last_flush > PATIENCE:
            self.flush()

    def flush(self) -> None:
        """Write pending moments."""
        if self._pending:
            content = save(self._pending)
            name = hashlib.blake2b(content, digest_size=16).hexdigest() + ".safetensors"
            with appearing(self._folder / name, shared=True) as draft:
                draft.write_bytes(content)
            self._shard_of.update(dict.fromkeys(self._pending, name))
            self._sound.add(name)
        self._pending, self._pending_bytes, self._last_flush = {}, 0, time.monotonic()

    def read(self, view: View) -> Tensor:
        """Return the moments (2C, h, w) of a view; FileError if there are none or their file has vanished."""
        key = self._key(view)
        shard = self._shard_of.get(key) if key else None
        if shard is None:
            raise FileError(self.bad.get(view.record, _ABSENT))
        path = self._folder / shard
        try:
            if shard not in self._opened:
                self._opened[shard] = safe_open(path, framework="pt")
            moments = self._opened[shard].get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise FileError(f"its cached latents in {path} cannot be read any more ({error})") from error
        if moments.shape != self.shape.at(view.bucket):
            shape = tuple(moments.shape)
            raise FileError(f"its cached latents in {path} have the shape {shape}; delete the file")
        return moments

    def _verify(self, shards: set[str]) -> None:
        """Delete and forget files whose content does not match their name."""

        def is_sound(shard: str) -> bool:
            try:
                return content_hash(self._folder / shard) == Path(shard).stem
            except OSError:
                return False

        unknown = sorted(shards - self._sound)
        with ThreadPoolExecutor(READERS) as pool:
            sound = {shard for shard, ok in zip(unknown, pool.map(is_sound, unknown), strict=True) if ok}
        self._sound |= sound
        lost = set(unknown) - sound
        for shard in lost:
            (self._folder / shard).unlink(missing_ok=True)
        self.damaged += len(lost)
        if lost:
            self._shard_of = {key: shard for key, shard in self._shard_of.items() if shard not in lost}

    def _key(self, view: View) -> str | None:
        content = self.contents.get(view.record)
        width, height = view.bucket
        kind = f"centre{'-flipped' if view.flipped else ''}{'-masked' if self.shape.masked else ''}"
        return content and f"{content}-{width}x{height}-{kind}-{READING}"

    def _find(self) -> dict[str, str]:
        """Map the key of all moments in the folder to their file, and delete unreadable files."""
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

_ABSENT = "its latents were not computed"
