"""The plan, prefetched by DataLoader workers: the micro-batches of each optimizer step for one rank."""

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
from data.contents import record_hash
from data.dataset import Images
from data.errors import DataError, FileError
from data.index import Index
from data.latents import Latents, MemoryLatents, View
from data.masked import read_view
from data.options import DataOptions
from data.plan import MicroBatch, plan_epoch, slice_step, steps_before, steps_per_epoch
from data.record import BadFile

MOST_WORKERS = 4

LIGHT_IMAGE = 1 << 17
"""Pixels of an image that one core reads in about 3 ms: workers would cost more to start than they save."""


class StepLoader:
    """Read a run's images step by step.

    Args:
        tokenize: turns B captions into int64 tokens (B, T), in the workers; picklable.
        images_per_step: batch size x accumulated micro-batches x world size.
        pin: return batches in page-locked memory, for a GPU.
        start_method: of workers: fork, spawn or forkserver; None is the platform's own.
        latents: cached latents, read instead of pixels.
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
            generator=torch.Generator(),  # the loader must not draw from the global one
        )

    @property
    def bad(self) -> tuple[BadFile, ...]:
        """The files that could not be read during the run, in the order they were met."""
        return tuple(self.images.bad.values())

    def close(self) -> None:
        """End the workers.

        Otherwise the interpreter's exit would send each worker two SIGTERMs in a row. If both arrive as one,
        `_start_worker` takes it for a person's, and the exit waits forever.
        """
        iterator = getattr(self._loader, "_iterator", None)  # set only with persistent workers
        if iterator is not None:
            iterator._shutdown_workers()

    def leave_out(self, files: Iterable[BadFile]) -> None:
        """Add files to `bad` that other processes could not read."""
        for file in files:
            self.images.bad.setdefault(file.name, file)

    @property
    def left_out(self) -> tuple[BadFile, ...]:
        """All skipped files: those that the scan refused and those in `bad`."""
        return (*self._index.bad, *self.bad)

    def steps_in(self, epoch: int) -> int:
        """Return the number of optimizer steps of one epoch."""
        return steps_per_epoch(self._index, epoch=epoch, **self._planned)

    def steps_before(self, epoch: int) -> int:
        """Return the optimizer steps of all epochs before this one."""
        return steps_before(self._index, epoch=epoch, **self._planned)

    def steps(self, epoch: int, first_step: int = 0) -> Iterator[list[Batch]]:
        """Yield this rank's micro-batches of each optimizer step of an epoch, from `first_step` on.

        An unreadable file is missing from its batch and named in `bad`. A list is never empty: if nothing of
        the step is left for this rank, it holds one filler batch of weight 0.

        Raises:
            DataError: at the end of the epoch no image can be read any more.
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
        shown = (record.name for record in self._index.records if record.multiply > 0)
        if not read and all(name in self.images.bad for name in shown):
            raise DataError(["none of the images can be read any more", *map(str, self.bad[:10])])


def worker_count(index: Index, options: DataOptions, latents: Latents | None = None) -> int:
    """Return the number of DataLoader workers.

    It is 0 for latents in memory, else num_workers. Without that option it is 0 for small images and cached
    latents, and one less than the cores, up to 4, for others.
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
    """Yield the pixels of views in their order, read by as many workers as in training.

    Args:
        wanted: two neighbouring views of an image, as it is and mirrored, read the file once.
        contents: content hash by record id; a file without one or with another hash is bad.
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
    """A batch of one, as in `Batch`."""
    bad: str = ""
    """The reason why there are none."""


class _Crops:
    def __init__(self, index: Index, wanted: Sequence[View], contents: Mapping[int, str] | None) -> None:
        self._records, self._masked = index.records, index.masked
        self._contents = contents
        self._files = [list(same) for _, same in groupby(wanted, key=lambda view: (view.record, view.bucket))]

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, number: int) -> list[Crop]:
        views = self._files[number]
        record = self._records[views[0].record]
        try:
            pixels = read_view(record, views[0].bucket, masked=self._masked)
            # After the pixels, so that they are surely those of the content they are cached under.
            if self._contents is not None:
                now = record_hash(record, masked=self._masked)
                if now != self._contents.get(views[0].record):
                    raise FileError("it changed while it was read")
        except FileError as error:
            return [Crop(view, None, error.reason) for view in views]
        except OSError as error:
            return [Crop(view, None, f"it cannot be read ({error.strerror})") for view in views]
        return [Crop(view, to_pixels([pixels[:, ::-1] if view.flipped else pixels])) for view in views]


class _Order(Sampler[tuple[int, MicroBatch]]):
    """The micro-batches of the current epoch; persistent workers outlive it."""

    def __init__(self) -> None:
        self.now: list[tuple[int, MicroBatch]] = []

    def __iter__(self) -> Iterator[tuple[int, MicroBatch]]:
        return iter(self.now)

    def __len__(self) -> int:
        return len(self.now)


def _shared(item: Any) -> Any:
    """Move a worker's tensors to shared memory.

    torch does so in a thread, where an error is printed, the batch is lost and the trainer waits forever.
    """
    if get_worker_info() is not None:
        for part in item if isinstance(item, list) else [item]:
            for field in fields(part):
                value = getattr(part, field.name)
                if isinstance(value, Tensor):
                    value.share_memory_()
    return item


def _start_worker(_: int) -> None:
    # Ctrl-C, a closed terminal and a scheduler's SIGTERM reach the whole process group. The trainer handles
    # them, and workers end with their parent, or with a second SIGTERM, which is the parent's own.
    for name in ("SIGINT", "SIGHUP", "SIGBREAK"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    # A fork after tokenizing would make the tokenizers library warn in every worker.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
