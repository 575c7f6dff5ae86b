"""Images by position: a record, decoded, cropped to its bucket and captioned, as CPU tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from annotated_types import Ge, Le, MinLen, MultipleOf

from data.buckets import Bucket, buckets, nearest
from data.captions import render
from data.errors import FileError
from data.image import CENTRE, Place, read_pixels
from data.index import BadFile, Index, Record
from data.latents import Entry, Latents
from data.plan import MicroBatch
from data.rng import stream

if TYPE_CHECKING:
    from torch import Tensor

    from data.batch import Batch


Resolution = Annotated[int, Ge(64), Le(8192), MultipleOf(64)]


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Where the captioned images are and how they are shown to the model."""

    data_root: str | tuple[str, ...] = "input"
    """The folder of captioned images, sub-folders included, or a .json, .jsonl, .csv or .parquet list of images; or several of these."""

    resolution: Resolution | Annotated[tuple[Resolution, ...], MinLen(1)] = 512
    """The training resolution in pixels, a multiple of 64: images are resized into aspect buckets of about
    its square in area. Of a list, each image takes the next resolution every time that it is shown, so an
    epoch stays as long as it is."""

    batch_size: Annotated[int, Ge(1)] = 2
    """Images in one forward and backward pass on one device; a step has batch_size x grad_accum x processes."""

    flip_p: Annotated[float, Ge(0), Le(1)] = 0.0
    """Probability of mirroring an image left to right."""

    crop_jitter: Annotated[float, Ge(0), Le(1)] = 0.0
    """How far a crop may lie from the middle, as a share of the way to the edge, drawn anew each time; small distances are likelier."""

    cond_dropout: Annotated[float, Ge(0), Le(1)] = 0.04
    """Probability of training an image with the empty caption, which is what guidance at sampling time contrasts with."""

    shuffle_tags: bool = False
    """Shuffle the comma-separated tags after the main prompt, anew each epoch."""

    keep_tags: Annotated[int, Ge(0)] = 0
    """Keep the first n tags in place when tags are shuffled. In folders named as kohya's, the words before the first comma are a tag."""

    caption_prefix: str = ""
    """Text in front of every caption, with a space between; the empty caption of cond_dropout stays empty."""

    caption_lines: bool = False
    """Take each line of a .txt or .caption file as a caption of its own, of which one is drawn every time that the image is shown."""

    max_tokens: Literal[75, 150, 225] = 75
    """Tokens of a caption that are read. CLIP reads 75 at a time; more are encoded in pieces that the UNet
    attends to together, in training and in samples alike."""

    on_bad_image: Literal["skip", "error"] = "skip"
    """What to do about images and captions that cannot be used: leave them out and name them, or refuse the
    run. Damage inside an image shows when it is read: before training where latents are kept, else in the
    run, which leaves the image out either way."""

    num_workers: Annotated[int, Ge(0), Le(256)] | None = None
    """Processes that read images; null chooses by the size of the images and the number of cores, 0 reads in the training process."""

    @property
    def resolutions(self) -> tuple[int, ...]:
        """The resolutions, one or several."""
        return (self.resolution,) if isinstance(self.resolution, int) else self.resolution


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
            entry = Entry(identity, micro.bucket, self._flips(record, epoch, position))
            try:
                images[place] = self._read(entry, self._crop(epoch, position))
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
                image = self._read(Entry(identity, bucket, False), CENTRE)
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

    def _read(self, entry: Entry, crop: Place) -> np.ndarray:
        """Return uint8 pixels (H, W, 3), or the moments (2C, h, w) that were computed of them."""
        if self._latents is not None:
            return self._latents.read(entry).numpy()
        return read_pixels(self._records[entry.record].path, entry.bucket, flip=entry.flipped, crop=crop)

    def _crop(self, epoch: int, position: int) -> Place:
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
        import torch

        from data.batch import Batch, to_pixels

        if self._latents is None:
            pixels, moments = to_pixels(images or [np.zeros((bucket[1], bucket[0], 3), np.uint8)]), None
        else:  # copied: a file mapped into memory is aligned less than torch aligns its own
            blank = np.zeros(self._latents.shape.of(bucket), np.float32)
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
