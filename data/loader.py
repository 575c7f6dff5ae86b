"""The plan, read ahead: each optimizer step's micro-batches for one process, from worker processes."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import groupby, islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler, get_worker_info

from data.batch import Batch, to_pixels
from data.contents import content_hash
from data.dataset import Images
from data.errors import DataError, FileError
from data.image import read_pixels
from data.index import Index
from data.latents import Latents, MemoryLatents, View
from data.options import DataOptions
from data.plan import MicroBatch, plan_epoch, slice_step, steps_before, steps_per_epoch
from data.record import BadFile

MOST_WORKERS = 4

LIGHT_IMAGE = 1 << 17
"""Pixels of an image that is read in about 3 ms on one core: below it, workers cost more to start than they spare."""


class StepLoader:
    """Read a run's images step by step.

    Args:
        index: the scanned images.
        options: batch size, resolution, workers and what is done to images and captions.
        tokenize: turns B captions into int64 tokens (B, T). It runs in the workers, and must pickle where
        these are spawned.
        seed: the run's.
        images_per_step: of a whole global batch: batch size x accumulated micro-batches x processes.
        rank: this process's number among `world`.
        world: processes that share each step.
        pin: whether batches come in page-locked memory, for a GPU.
        start_method: how workers start: fork, spawn or forkserver; None is the platform's own way.
        latents: what a VAE has made of the images, to be read in their place.
    """

    def __init__(
        self,
        index: Index,
        options: DataOptions,
        *,
        tokenize: Callable[[list[str]], Tensor],
        seed: int,
        images_per_step: int,
        rank: int = 0,
        world: int = 1,
        pin: bool = False,
        start_method: str | None = None,
        latents: Latents | None = None,
    ) -> None:
        self.images = Images(index, options, tokenize=tokenize, seed=seed, latents=latents)
        self._index = index
        self._planned = {"resolution": options.resolution, "seed": seed, "images_per_step": images_per_step}
        self._batch_size, self._rank, self._world = options.batch_size, rank, world
        self._order = _Order()
        workers = worker_count(index, options, latents)
        self._loader = DataLoader(
            self.images,  # type: ignore[arg-type]  # any object with __getitem__ serves
            sampler=self._order,
            batch_size=None,
            num_workers=workers,
            worker_init_fn=_start_worker,
            collate_fn=_shared,
            persistent_workers=workers > 0,
            pin_memory=pin,
            multiprocessing_context=start_method if workers else None,
            generator=torch.Generator(),  # of its own: the loader must not draw from the global one
        )

    @property
    def bad(self) -> tuple[BadFile, ...]:
        """Return the files that could not be read during the run, each once, in the order they were met."""
        return tuple(self.images.bad.values())

    def close(self) -> None:
        """End the workers, if there are any.

        At the exit of the interpreter two SIGTERMs would, one right after the other; where a worker is not
        scheduled in between they arrive as one, which it takes for a person's (`_start_worker`), and the exit
        would wait for it for ever.
        """
        iterator = getattr(
            self._loader, "_iterator", None
        )  # there only where workers are kept between epochs
        if iterator is not None:
            iterator._shutdown_workers()

    def leave_out(self, files: Iterable[BadFile]) -> None:
        """Count files as bad that other processes could not read."""
        for file in files:
            self.images.bad.setdefault(file.name, file)

    @property
    def left_out(self) -> tuple[BadFile, ...]:
        """Return all files that the run does without: those that the scan refused and those that could not be read later."""
        return (*self._index.bad, *self.bad)

    def steps_in(self, epoch: int) -> int:
        """Return the number of optimizer steps of one epoch; it varies where images are shown a fraction of the time."""
        return steps_per_epoch(self._index, epoch=epoch, **self._planned)

    def steps_before(self, epoch: int) -> int:
        """Return the optimizer steps of all epochs before this one; with the number of epochs, those of the whole run."""
        return steps_before(self._index, epoch=epoch, **self._planned)

    def steps(self, epoch: int, first_step: int = 0) -> Iterator[list[Batch]]:
        """Yield, for each optimizer step of an epoch from `first_step` on, this process's micro-batches.

        A file that cannot be read is missing from its batch and named in `bad`. A list is never empty: where
        nothing of the step is left for this process, it holds one filler batch of weight 0.

        Raises:
            DataError: by the end of the epoch there is no image left that can be read.
        """
        plan = plan_epoch(self._index, epoch=epoch, **self._planned)
        slices = [slice_step(step, self._batch_size, self._rank, self._world) for step in plan[first_step:]]
        self._order.now = [(epoch, micro) for micros in slices for micro in micros]
        batches = iter(self._loader)
        read = 0
        for micros in slices:
            step = list(islice(batches, len(micros)))
            for batch in step:
                self.leave_out(batch.failed)
            real = [batch for batch in step if not batch.filler]
            read += sum(len(batch) for batch in real)
            yield real or step[:1]
        if not read and all(
            record.name in self.images.bad for record in self._index.records if record.multiply > 0
        ):
            raise DataError(
                ["none of the images can be read any more", *(str(file) for file in self.bad[:10])]
            )


def worker_count(index: Index, options: DataOptions, latents: Latents | None = None) -> int:
    """Return the number of worker processes.

    That is none for latents in memory, which are at hand. Else it is as asked; and where nothing is asked,
    none for small images or latents, and one less than the cores, up to 4, for others.
    """
    if isinstance(latents, MemoryLatents):
        return 0
    if options.num_workers is not None:
        return options.num_workers
    pixels = sum(record.width * record.height for record in index.records)
    if latents is not None or pixels <= LIGHT_IMAGE * len(index.records):
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MOST_WORKERS, cores - 1)


def read_crops(
    index: Index, options: DataOptions, wanted: Sequence[View], contents: Mapping[int, str] | None = None
) -> Iterator[Crop]:
    """Yield the pixels of views in their order, read by as many workers as training would have.

    Args:
        index: the scanned images.
        options: the number of workers.
        wanted: what to read; of an image that is wanted as it is and mirrored, one after the other, the file
        is read once for both.
        contents: by record id, the content that each file must have; a file that is not in it or has another
        is bad.
    """
    crops = _Crops(index, wanted, contents)
    workers = min(worker_count(index, options), len(crops))
    loader = DataLoader(
        crops,  # type: ignore[arg-type]  # any object with __getitem__ and __len__ serves
        batch_size=None,
        num_workers=workers,
        worker_init_fn=_start_worker,
        collate_fn=_shared,
        generator=torch.Generator(),
    )
    for crop in loader:
        yield from crop


@dataclass(frozen=True)
class Crop:
    """The pixels of a view."""

    view: View
    pixels_1CHW: Tensor | None
    """float32 in [-1, 1], a batch of one."""
    bad: str = ""
    """Why there are none."""


class _Crops:
    def __init__(self, index: Index, wanted: Sequence[View], contents: Mapping[int, str] | None) -> None:
        self._records = index.records
        self._contents = contents
        self._files = [list(same) for _, same in groupby(wanted, key=lambda view: (view.record, view.bucket))]

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, place: int) -> list[Crop]:
        views = self._files[place]
        path = self._records[views[0].record].path
        try:
            pixels = read_pixels(path, views[0].bucket)
            # After the pixels: what they were read from is known to be the content that they will be filed
            # under.
            if self._contents is not None and content_hash(path) != self._contents.get(views[0].record):
                raise FileError("it changed while it was read")
        except FileError as error:
            return [Crop(view, None, error.reason) for view in views]
        except OSError as error:
            return [Crop(view, None, f"it cannot be read ({error.strerror})") for view in views]
        return [Crop(view, to_pixels([pixels[:, ::-1] if view.flipped else pixels])) for view in views]


class _Order(Sampler[tuple[int, MicroBatch]]):
    """Hands the loader the micro-batches of the epoch at hand; it changes between epochs while the workers live on."""

    def __init__(self) -> None:
        self.now: list[tuple[int, MicroBatch]] = []

    def __iter__(self) -> Iterator[tuple[int, MicroBatch]]:
        return iter(self.now)

    def __len__(self) -> int:
        return len(self.now)


def _shared(item: Any) -> Any:
    """Return what a worker hands over, its tensors in shared memory.

    torch puts them there in a thread of its own, where an error is printed, the batch is lost and the trainer
    waits for it for ever.
    """
    if get_worker_info() is not None:
        for part in item if isinstance(item, list) else [item]:
            for field in fields(part):
                value = getattr(part, field.name)
                if isinstance(value, Tensor):
                    value.share_memory_()
    return item


def _start_worker(_: int) -> None:
    # What asks a run to end reaches the whole process group (Ctrl-C, a closed terminal, a scheduler's
    # SIGTERM). The trainer decides what it means, and workers end with their parent; a second SIGTERM, which
    # is the parent's own, ends them too.
    for name in ("SIGINT", "SIGHUP", "SIGBREAK"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    # A fork after tokenizing would make the tokenizers library warn in every worker.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
