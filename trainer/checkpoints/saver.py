"""Saving a run: write, time and rotate its checkpoints, and handle failed saves."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from data.atomic import appearing, free_bytes, in_gib
from trainer.checkpoints.artifact import Artifact
from trainer.checkpoints.format import BRANCH, EMA, KIND, RUN, STEP, TrainState, save_checkpoint
from trainer.checkpoints.listing import checkpoints, rotate
from trainer.checkpoints.options import SaveOptions
from trainer.errors import UserError
from trainer.models.ema import SUFFIX, Ema
from trainer.networks import by_network
from trainer.output import shown_path
from trainer.state_file import size_of_state, write_state

Kind = Literal["", "last", "interrupted", "errored", "best"]
"""The reason for a checkpoint, which its name starts with: on schedule, at the run's end, at a signal, at an
error, at the lowest validation loss."""

MOST_FAILURES = 3
"""Failed saves in a row that end the run: further training could not be saved."""

_SLACK = 1 << 24
"""Bytes allowed for configurations, tokenizer and manifests."""


class SavingError(UserError):
    """The run ends because its checkpoints cannot be saved."""


class Stateful(Protocol):
    """A part of a run whose state is in its checkpoints."""

    def state_dict(self) -> Any:
        """Return tensors, numbers and texts in dicts and lists."""
        ...

    def load_state_dict(self, state: Any, /) -> Any:
        """Restore what `state_dict` returned."""
        ...


class Saver:
    """Write a run's checkpoints, the resumable folder before the single file, and rotate older ones.

    A failed save is reported, and training continues with the last good checkpoint. The third in a row ends
    the run.

    Args:
        parts: state that a resumed run needs beside weights and counters, by name.
        about: the configuration, and the values that a resumed run must share.
        metadata: further header fields of single files.
        say: shows a sentence.
        ema: written as a single file with -ema in its name, or as the folder ema inside a checkpoint without
            single files.
        branch: how often the run has gone back to an older checkpoint.
        writes: false on ranks other than 0, which write nothing.
        describe: writes the files that users may edit, such as the model card, into a checkpoint's folder.
        clock: returns monotonic seconds.
    """

    def __init__(
        self,
        options: SaveOptions,
        *,
        run: Path,
        project: str,
        artifact: Artifact,
        state: TrainState,
        parts: Mapping[str, Stateful],
        about: Mapping[str, Any],
        metadata: Mapping[str, str],
        say: Callable[[str], None],
        ema: Ema | None = None,
        branch: int = 0,
        writes: bool = True,
        describe: Callable[[Path], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._options = options
        self._run = run
        self._project = project
        self._artifact = artifact
        self._state = state
        self._parts = parts
        self._about = about
        self._metadata = metadata
        self._say = say
        self._ema = ema
        self._branch = branch
        self._writes = writes
        self._describe = describe
        self._clock = clock
        self._last_time = clock()
        self._last_step = state.step  # the checkpoint or base model of the start
        self._failures = 0
        self._single_folder = Path(options.save_ckpt_dir) if options.save_ckpt_dir else run / "ckpts"

    @property
    def up_to_date(self) -> bool:
        """True if the current step needs no checkpoint: it has one, or the run started from it."""
        return self._last_step == self._state.step

    @property
    def keeps_best(self) -> bool:
        """True if the checkpoint of the lowest validation loss is kept."""
        return self._options.keep_best

    @property
    def timed(self) -> bool:
        """True if checkpoints are due by the clock."""
        return self._options.ckpt_every_n_minutes is not None

    def due(self) -> bool:
        """Return whether a checkpoint is due by the clock."""
        minutes = self._options.ckpt_every_n_minutes
        return minutes is not None and self._clock() - self._last_time >= 60 * minutes

    def save(self, kind: Kind = "") -> list[Path]:
        """Write a checkpoint of the current step and return its paths.

        At a signal or an error, a step that already has one gets no second.

        Raises:
            SavingError: the weights are not finite, or a save failed that was the third in a row or the run's
            last.
        """
        if not self._writes or (kind in ("interrupted", "errored") and self.up_to_date):
            return []
        began, written = time.perf_counter(), []
        if networks := self._not_finite():
            raise SavingError(
                f"step {self._state.step}: weights of the {' and the '.join(networks)} are not finite, so no "
                f"checkpoint is saved and the run ends; {self._last_good()}; "
                "resume from it with a lower rate.",
                exit_code=1,
            )
        try:
            self._write(kind, written)
        except (OSError, MemoryError) as error:
            self._failed(kind, error, written)
        else:
            self._failures, self._last_step = 0, self._state.step
            self._publish(written[0])
            seconds = time.perf_counter() - began
            self._say(f"step {self._state.step}: saved {_named(written)}; training waited {seconds:.1f} s")
            try:
                rotate(self._run, self._options, self._single_folder)
            except OSError as error:
                self._say(
                    f"Note: an older checkpoint could not be deleted ({_reason(error)}); "
                    "the next save tries again."
                )
        self._last_time = self._clock()
        return written

    def _publish(self, folder: Path) -> None:
        """Write the files that users may edit, which the manifest therefore does not list."""
        if self._describe is None:
            return
        try:
            self._describe(folder)
        except Exception as error:  # a bad page must not cost the checkpoint
            place = shown_path(folder)
            self._say(f"Note: {place} is whole, and its model card could not be written ({_reason(error)}).")

    def _write(self, kind: Kind, written: list[Path]) -> None:
        state = self._state
        epoch = state.epoch + (1 if state.step_in_epoch else 0)
        prefix = "" if kind == "" or (kind == "last" and self._options.no_prepend_last) else f"{kind}-"
        name = f"{prefix}{self._project}-ep{epoch:02d}-gs{state.step:05d}"
        stem = name + self._artifact.suffix
        folder, file = self._run / "ckpts" / name, self._single_folder / f"{stem}.safetensors"
        single = torch.float32 if self._options.save_full_precision else torch.float16
        training = {part: member.state_dict() for part, member in self._parts.items()}

        averaged = self._ema is not None and not self._options.writes_single
        require_room(
            folder.parent, self._artifact.folder_bytes() * (2 if averaged else 1) + size_of_state(training)
        )

        def write_model(draft: Path) -> None:
            self._artifact.write_folder(draft)
            if self._ema is not None and averaged:
                with self._ema.applied():
                    self._artifact.write_folder(draft / SUFFIX)

        def write_resume(draft: Path) -> None:
            write_state(training, draft / "training")
            self._artifact.keep_base(draft)

        save_checkpoint(
            folder,
            write_model=write_model,
            write_resume=write_resume,
            state=state,
            about=dict(self._about),
            kind=kind,
            branch=self._branch,
        )
        written.append(folder)
        if self._options.writes_single:
            require_room(file.parent, self._artifact.file_bytes(single))
            metadata = {
                **self._metadata,
                "modelspec.title": stem,
                RUN: self._run.name,
                STEP: str(state.step),
                KIND: kind,
                **({BRANCH: str(self._branch)} if self._branch else {}),
            }
            with appearing(file) as draft:
                self._artifact.write_file(draft, single, metadata)
            written.append(file)
            if self._ema is not None:
                file = file.with_name(f"{stem}-{SUFFIX}.safetensors")
                require_room(file.parent, self._artifact.file_bytes(single))
                with self._ema.applied(), appearing(file) as draft:
                    self._artifact.write_file(
                        draft, single, {**metadata, "modelspec.title": file.stem, EMA: "true"}
                    )
                written.append(file)

    def _failed(self, kind: Kind, error: Exception, written: list[Path]) -> None:
        self._failures += 1
        what = f"{written[0]} is saved, its single file" if written else "the checkpoint"
        sentence = (
            f"step {self._state.step}: {what} could not be written ({_reason(error)}); {self._last_good()}"
        )
        if kind == "last":
            again = f"resume with --resume_ckpt {self._run}" if checkpoints(self._run) else "train once more"
            raise SavingError(
                f"{sentence}; free disk space or choose another folder, and {again}.", exit_code=1
            )
        if self._failures >= MOST_FAILURES:
            raise SavingError(f"{sentence}; this was the third time in a row, so the run ends.", exit_code=1)
        self._say(f"Note: {sentence}; training continues ({self._failures} of {MOST_FAILURES}).")

    def _last_good(self) -> str:
        found = checkpoints(self._run)
        return f"the last good one is {found[0]}" if found else "there is none yet"

    def _not_finite(self) -> list[str]:
        """Return the networks with non-finite weights, of which `findlast` must find no checkpoint."""
        found = []
        for name, network in by_network(self._artifact.models).items():
            # Minimum and maximum need no memory beside the weights, and both are NaN if any weight is.
            extremes = [
                end.float()
                for parameter in network.parameters()
                if parameter.requires_grad
                for end in parameter.aminmax()
            ]
            if extremes and not torch.stack(extremes).isfinite().all():
                found.append(name)
        return found


def require_room(folder: Path, size: int) -> None:
    """Refuse to write `size` bytes to a disk without the free space."""
    free = free_bytes(folder)
    if free < size + _SLACK:
        raise OSError(
            errno.ENOSPC, f"{in_gib(size)} are needed and {in_gib(free)} are free on the disk of {folder}"
        )


def _named(written: Sequence[Path]) -> str:
    """Return the paths of a save: its folder's, and the endings of files of the same name beside it."""
    folder, *files = written
    endings = [
        f"its {file.name.removeprefix(folder.name)}"
        if file.parent == folder.parent and file.name.startswith(folder.name)
        else shown_path(file)
        for file in files
    ]
    return " and ".join([shown_path(folder), *endings])


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return (error.strerror or str(error)) + (f": {error.filename}" if error.filename else "")
    return str(error) or type(error).__name__
