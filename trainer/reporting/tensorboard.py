"""TensorBoard event files.

The events are built by `torch.utils.tensorboard` and framed by tensorboard's own `RecordWriter`, but written
here rather than by `SummaryWriter`: that one writes from a thread, which dies of a full disk with a traceback
of its own and then makes whatever call comes next raise. A report is a few dozen small records, so nothing
would be gained by a thread.
"""

from __future__ import annotations

import io
import itertools
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from trainer.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

Layout = dict[str, dict[str, list[Any]]]
"""TensorBoard's custom scalars: category -> chart -> ["Multiline", [regular expressions of tags]]."""


class TensorBoardLogger:
    """Record a run for TensorBoard.

    What was given is in the file when a call returns. When writing fails (a full disk, a folder that was
    deleted), `warn` is told once, the values are lost and training goes on; every later call tries again, so
    recording resumes when the disk does.

    Args:
        folder: where the event file goes; made if missing.
        warn: is told of trouble in one sentence.
        networks: the trained networks, as their tags name them; they name the curves of the custom charts.
        adaptive: those of them that D-Adaptation trains, which have charts of d.
        purge_step: hide what earlier event files of this folder hold from this step on.

    Raises:
        UserError: the folder cannot be written to.
    """

    def __init__(
        self,
        folder: Path,
        *,
        warn: Callable[[str], None],
        networks: Sequence[str] = ("unet", "text encoder"),
        adaptive: Collection[str] = (),
        purge_step: int | None = None,
    ) -> None:
        self._folder = folder
        self._warn = warn
        self._layout = layout(networks=networks, adaptive=adaptive)
        self._warned = False
        self._closed = False
        _use_tensorflow_stub()
        try:
            self._path, self._file = self._open(purge_step)
        except OSError as reason:
            raise UserError(
                f"{folder}: TensorBoard's events cannot be written here ({reason.strerror or reason}); make the folder writable or choose "
                "another with --logdir"
            ) from reason

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Record numbers by tag."""
        from torch.utils.tensorboard.summary import scalar

        self._record([scalar(tag, value) for tag, value in values.items()], step)

    def image(self, tag: str, picture: Image.Image, step: int) -> None:
        """Record a picture, as PNG."""
        from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[attr-defined]

        png = io.BytesIO()
        picture.convert("RGB").save(png, "PNG")
        image = Summary.Image(
            width=picture.width, height=picture.height, colorspace=3, encoded_image_string=png.getvalue()
        )
        self._record([Summary(value=[Summary.Value(tag=tag, image=image)])], step)

    def text(self, tag: str, text: str, step: int) -> None:
        """Record a text, shown as it is: TensorBoard renders Markdown, so the text is fenced as a block of code."""
        from torch.utils.tensorboard.summary import text as text_summary

        longest = max((len(ticks) for ticks in re.findall("`+", text)), default=0)
        fence = "`" * max(3, longest + 1)
        self._record([text_summary(tag, f"{fence}\n{text}\n{fence}")], step)

    def close(self) -> None:
        """Close the event file; further calls do nothing."""
        if not self._closed:
            self._closed = True
            self._file.close()

    def _record(self, summaries: Sequence[Any], step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event  # type: ignore[attr-defined]

        if self._closed:
            return
        now = time.time()
        events = [Event(wall_time=now, step=step, summary=summary) for summary in summaries]
        try:
            if not self._path.exists():  # a deleted file swallows everything without an error
                self._warn_once("its event file was deleted")
                self._file.close()
                self._path, self._file = self._open(None)
            _append(self._file, events)
        except OSError as reason:
            self._warn_once(reason.strerror or str(reason))

    def _open(self, purge_step: int | None) -> tuple[Path, io.FileIO]:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore[attr-defined]
        from torch.utils.tensorboard.summary import custom_scalars

        now = time.time()
        events = [Event(wall_time=now, file_version="brain.Event:2")]
        if purge_step is not None:
            events.append(
                Event(wall_time=now, step=purge_step, session_log=SessionLog(status=SessionLog.START))
            )
        events.append(Event(wall_time=now, summary=custom_scalars(self._layout)))

        self._folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads a folder's event files in the order of their names, also where the computer's
        # clock has been put back.
        newest = max(
            (int(found[1]) for path in self._folder.iterdir() if (found := _EVENT_FILE.match(path.name))),
            default=0,
        )
        stamp = max(int(now), newest + 1)
        path = (
            self._folder
            / f"events.out.tfevents.{stamp:010d}.{socket.gethostname()}.{os.getpid()}.{next(_file_numbers)}"
        )
        file = path.open("xb", buffering=0)
        try:
            _append(file, events)
        except OSError:
            file.close()
            path.unlink()
            raise
        return path, file

    def _warn_once(self, reason: str) -> None:
        if not self._warned:
            self._warned = True
            self._warn(
                f"{self._folder}: TensorBoard's events are not recorded ({reason}); training goes on, recording too as soon as it can"
            )


def layout(*, networks: Sequence[str], adaptive: Collection[str]) -> Layout:
    """Return the charts of TensorBoard's Custom Scalars tab: curves that belong together, over each other.

    Args:
        networks: the trained networks, as their tags name them.
        adaptive: those that D-Adaptation trains.
    """
    losses = {
        "loss of the batches trained": ["loss/log_step", "loss/epoch"],
        "loss at fixed images, noise and timesteps": ["loss/stabilize-train", "loss/val"],
    }
    rates = {"rate that acts": [f"hyperparameter/lr {network}" for network in networks]}
    dadapt = {
        "d, the estimated distance to the solution": [
            f"dadapt/d {network}" for network in networks if network in adaptive
        ]
    }
    for network in networks:
        if network in adaptive:
            dadapt[f"{network}: d and the estimate that raises it"] = [
                f"dadapt/d {network}",
                f"dadapt/d_hat {network}",
            ]
    gradients = {"gradient norm, before clipping": ["optimizer/unet_grad_norm", "optimizer/te_grad_norm"]}
    performance = {
        "images per second": ["performance/images per second"],
        "data wait: seconds a step": ["performance/data wait"],
        "minutes per epoch": ["performance/minutes per epoch"],
        "memory": ["performance/vram", "performance/ram"],
    }
    categories = {"losses": losses, "rates": rates, **({"D-Adaptation": dadapt} if adaptive else {})}
    categories |= {"gradients": gradients, "performance": performance}
    return {
        category: {
            title: ["Multiline", [f"^{re.escape(tag)}$" for tag in tags]] for title, tags in charts.items()
        }
        for category, charts in categories.items()
    }


_file_numbers = itertools.count()
_EVENT_FILE = re.compile(r"events\.out\.tfevents\.(\d+)\.")


def _append(file: io.FileIO, events: Sequence[Any]) -> None:
    """Write all events or, when that fails, none: half a record would hide everything after it."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    framed = io.BytesIO()
    writer = RecordWriter(framed)
    for event in events:
        writer.write(event.SerializeToString())
    start = file.seek(0, os.SEEK_END)
    left = memoryview(framed.getvalue())
    try:
        while left:
            left = left[file.write(left) or 0 :]
    except OSError:
        with suppress(OSError):  # the first error says why
            file.truncate(start)
        raise


def _use_tensorflow_stub() -> None:
    """Keep tensorboard from importing TensorFlow where that is installed (Colab): it takes seconds, GPU memory and prints notices.

    tensorboard looks for this module for exactly that purpose.
    """
    sys.modules.setdefault("tensorboard.compat.notf", ModuleType("tensorboard.compat.notf"))
