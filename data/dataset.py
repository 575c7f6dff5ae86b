"""Images by position: decoded, cropped to their bucket and captioned, as CPU tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from data.batch import Batch, to_pixels
from data.buckets import Bucket, buckets, nearest
from data.captions.caption import chosen, render
from data.captions.wildcards import first, has_wildcards
from data.errors import FileError
from data.image import CENTRE, CropPosition
from data.index import Index
from data.latents import Latents, View
from data.masked import read_view
from data.options import DataOptions
from data.plan import MicroBatch
from data.record import BadFile, Record
from data.rng import stream


def shown_captions(index: Index, options: DataOptions) -> list[str] | None:
    """Return every text that training can show, each once; None if draws make too many.

    Draws are those of shuffled and dropped tags, and of wildcards.
    """
    shown: dict[str, None] = {}
    for record in index.records:
        shuffle = options.shuffle_tags if record.shuffle_tags is None else record.shuffle_tags
        keep = options.keep_tags if record.keep_tags is None else record.keep_tags
        loose = max(len(caption.tags) for caption in record.caption.versions) - keep
        if (shuffle and loose > 1) or (options.tag_dropout and loose > 0):
            return None
        texts = [caption.text for caption in record.caption.versions]
        if options.wildcards and any(map(has_wildcards, texts)):
            return None
        shown.update(dict.fromkeys(texts))
    return [*shown, ""]


def plain_caption(record: Record, options: DataOptions) -> str:
    """Return the caption for measurements that must not vary: of wildcards the first alternative."""
    return (chosen(record.caption, first) if options.wildcards else record.caption).text


class Images:
    """Read planned micro-batches, (epoch, MicroBatch) -> Batch: a map-style dataset for DataLoader workers.

    The key of an image's draws is its position in the epoch, so that neither the number of workers nor the
    cut into micro-batches changes the result.

    Args:
        tokenize: turns B captions into int64 tokens (B, T); picklable.
        latents: cached latents, read instead of pixels.
    """

    def __init__(
        self,
        index: Index,
        options: DataOptions,
        *,
        tokenize: Callable[[list[str]], Tensor],
        seed: int,
        latents: Latents | None = None,
    ) -> None:
        self._records, self._masked = index.records, index.masked
        self._options = options
        self._tokenize = tokenize
        self._seed = seed
        self._latents = latents
        self.bad: dict[str, BadFile] = {}
        """Unreadable files by name; the loader adds those met by workers."""

    def __getitem__(self, planned: tuple[int, MicroBatch]) -> Batch:
        """Return the readable images of a micro-batch, or one blank image as a filler."""
        epoch, micro = planned
        images: dict[int, np.ndarray] = {}
        failed: list[BadFile] = []
        for place, (identity, position) in enumerate(zip(micro.records, micro.positions, strict=True)):
            record = self._records[identity]
            view = View(identity, micro.bucket, self._flips(record, epoch, position))
            try:
                images[place] = self._read(view, self._crop(epoch, position))
            except FileError as error:
                failed.append(BadFile(record.name, error.reason))
        places = list(images) or [0]
        planned_images = [(micro.records[place], micro.positions[place]) for place in places]
        captions = [self._caption(self._records[record], epoch, at) for record, at in planned_images]
        tensors = self._tensors(list(images.values()), micro.bucket)
        filler = micro.filler or not images
        return self._batch(planned_images, captions, tensors, epoch, filler=filler, failed=tuple(failed))

    def plain(self, records: Sequence[int]) -> list[Batch]:
        """Return images unflipped with their first caption, at the largest resolution, one batch each.

        Meant for measurements that must not vary. Position and epoch are 0. An unreadable file gives no batch
        and is named in `bad`.
        """
        batches = []
        for identity in records:
            record = self._records[identity]
            bucket = nearest(record.width, record.height, buckets(max(self._options.resolutions)))
            try:
                image = self._read(View(identity, bucket, False), CENTRE)
            except FileError as error:
                self.bad.setdefault(record.name, BadFile(record.name, error.reason))
                continue
            tensors = self._tensors([image], bucket)
            batches.append(self._batch([(identity, 0)], [plain_caption(record, self._options)], tensors, 0))
        return batches

    def _read(self, view: View, crop: CropPosition) -> np.ndarray:
        """Return the uint8 pixels of `read_view`, or cached moments (2C, h, w)."""
        if self._latents is not None:
            return self._latents.read(view).numpy()
        record = self._records[view.record]
        return read_view(record, view.bucket, masked=self._masked, flip=view.flipped, crop=crop)

    def _crop(self, epoch: int, position: int) -> CropPosition:
        jitter = self._options.crop_jitter
        if jitter == 0:
            return CENTRE
        x, y = stream(self._seed, "crop", epoch, position).triangular(-1, 0, 1, size=2)
        return 0.5 + jitter / 2 * x, 0.5 + jitter / 2 * y

    def _flips(self, record: Record, epoch: int, position: int) -> bool:
        chance = self._options.flip_p if record.flip_p is None else record.flip_p
        return bool(stream(self._seed, "image", epoch, position).random() < chance)

    def _caption(self, record: Record, epoch: int, position: int) -> str:
        options = self._options
        return render(
            record.caption,
            lambda name: stream(self._seed, name, epoch, position),
            cond_dropout=options.cond_dropout if record.cond_dropout is None else record.cond_dropout,
            shuffle_tags=options.shuffle_tags if record.shuffle_tags is None else record.shuffle_tags,
            keep_tags=options.keep_tags if record.keep_tags is None else record.keep_tags,
            tag_dropout=options.tag_dropout,
            wildcards=options.wildcards,
        )

    def _tensors(self, images: list[np.ndarray], bucket: Bucket) -> tuple[Tensor | None, Tensor | None]:
        """Stack images, or a blank one if there are none, into pixels or moments."""
        if self._latents is None:
            return to_pixels(images or [np.zeros((bucket[1], bucket[0], 3 + self._masked), np.uint8)]), None
        blank = np.zeros(self._latents.shape.at(bucket), np.float32)
        # Copied, since memory-mapped tensors are aligned less than torch's own.
        return None, torch.tensor(np.stack(images or [blank]))

    def _batch(
        self,
        images: Sequence[tuple[int, int]],
        captions: list[str],
        tensors: tuple[Tensor | None, Tensor | None],
        epoch: int,
        *,
        filler: bool = False,
        failed: tuple[BadFile, ...] = (),
    ) -> Batch:
        """Return the batch of images, each given as record id and position."""
        records, positions = zip(*images, strict=True)
        scales = [0.0 if filler else self._records[identity].loss_scale for identity in records]
        return Batch(
            pixels_BCHW=tensors[0],
            moments_BCHW=tensors[1],
            tokens_BT=self._tokenize(captions),
            loss_scale_B=torch.tensor(scales, dtype=torch.float32),
            epoch=epoch,
            positions=positions,
            records=records,
            names=tuple(self._records[identity].name for identity in records),
            captions=tuple(captions),
            filler=filler,
            failed=failed,
        )
