"""Images by position: a record, decoded, cropped to its bucket and captioned, as CPU tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from data.batch import Batch, to_pixels
from data.buckets import Bucket, buckets, nearest
from data.captions import render
from data.errors import FileError
from data.image import CENTRE, CropPosition, read_pixels
from data.index import Index
from data.latents import Latents, View
from data.options import DataOptions
from data.plan import MicroBatch
from data.record import BadFile, Record
from data.rng import stream


def shown_captions(index: Index, options: DataOptions) -> list[str] | None:
    """Return every text that training can show, each once; None where tags are shuffled, which makes too many of them."""
    shown: dict[str, None] = {}
    for record in index.records:
        shuffle = options.shuffle_tags if record.shuffle_tags is None else record.shuffle_tags
        keep = options.keep_tags if record.keep_tags is None else record.keep_tags
        if shuffle and any(len(caption.tags) - keep > 1 for caption in record.caption.versions):
            return None
        shown.update(dict.fromkeys(caption.text for caption in record.caption.versions))
    return [*shown, ""]


class Images:
    """Read planned micro-batches, (epoch, MicroBatch) -> Batch: a map-style dataset that worker processes can hold.

    An image's draws are keyed by its position in the epoch, so that neither the number of workers nor the cut
    into micro-batches changes what comes out.

    Args:
        index: the scanned images.
        options: the run's settings, which hold where a record has none of its own.
        tokenize: turns B captions into int64 tokens (B, T); it must pickle where workers are spawned.
        seed: the run's.
        latents: what a VAE has made of the images, to be read in their place.
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
        self._records = index.records
        self._options = options
        self._tokenize = tokenize
        self._seed = seed
        self._latents = latents
        self.bad: dict[str, BadFile] = {}
        """Files that could not be read, by name; the loader adds those that were met in a batch, in whichever process."""

    def __getitem__(self, planned: tuple[int, MicroBatch]) -> Batch:
        """Return the images of a micro-batch that can be read; if none can, one blank image as a filler."""
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
        filler = micro.filler or not images
        places = list(images) or [0]
        positions = tuple(micro.positions[place] for place in places)
        records = tuple(micro.records[place] for place in places)
        return self._batch(
            list(images.values()),
            [
                self._words(self._records[identity], epoch, position)
                for identity, position in zip(records, positions, strict=True)
            ],
            bucket=micro.bucket,
            epoch=epoch,
            positions=positions,
            records=records,
            filler=filler,
            failed=tuple(failed),
        )

    def plain(self, records: Sequence[int]) -> list[Batch]:
        """Return images as they are, one batch each: not flipped, with their whole first caption, at the largest resolution.

        Meant for measurements that must not vary. Position and epoch are 0. A file that cannot be read gives
        no batch and is named in `bad`.

        Args:
            records: record ids.
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
            batches.append(
                self._batch(
                    [image],
                    [record.caption.text],
                    bucket=bucket,
                    epoch=0,
                    positions=(0,),
                    records=(identity,),
                )
            )
        return batches

    def _read(self, view: View, crop: CropPosition) -> np.ndarray:
        """Return uint8 pixels (H, W, 3), or the moments (2C, h, w) that were computed of them."""
        if self._latents is not None:
            return self._latents.read(view).numpy()
        return read_pixels(self._records[view.record].path, view.bucket, flip=view.flipped, crop=crop)

    def _crop(self, epoch: int, position: int) -> CropPosition:
        jitter = self._options.crop_jitter
        if jitter == 0:
            return CENTRE
        x, y = stream(self._seed, "crop", epoch, position).triangular(-1, 0, 1, size=2)
        return 0.5 + jitter / 2 * x, 0.5 + jitter / 2 * y

    def _flips(self, record: Record, epoch: int, position: int) -> bool:
        chance = self._options.flip_p if record.flip_p is None else record.flip_p
        return bool(stream(self._seed, "image", epoch, position).random() < chance)

    def _words(self, record: Record, epoch: int, position: int) -> str:
        options = self._options
        return render(
            record.caption,
            stream(self._seed, "caption", epoch, position),
            cond_dropout=options.cond_dropout if record.cond_dropout is None else record.cond_dropout,
            shuffle_tags=options.shuffle_tags if record.shuffle_tags is None else record.shuffle_tags,
            keep_tags=options.keep_tags if record.keep_tags is None else record.keep_tags,
        )

    def _batch(
        self,
        images: list[np.ndarray],
        captions: list[str],
        *,
        bucket: Bucket,
        epoch: int,
        positions: tuple[int, ...],
        records: tuple[int, ...],
        filler: bool = False,
        failed: tuple[BadFile, ...] = (),
    ) -> Batch:
        if self._latents is None:
            pixels, moments = to_pixels(images or [np.zeros((bucket[1], bucket[0], 3), np.uint8)]), None
        else:  # copied: a file mapped into memory is aligned less than torch aligns its own
            blank = np.zeros(self._latents.shape.at(bucket), np.float32)
            pixels, moments = None, torch.tensor(np.stack(images or [blank]))
        scales = [0.0 if filler else self._records[identity].loss_scale for identity in records]
        return Batch(
            pixels_BCHW=pixels,
            moments_BCHW=moments,
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
