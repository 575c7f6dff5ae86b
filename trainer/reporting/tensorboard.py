"""TensorBoard event files.

torch builds the events and tensorboard's `RecordWriter` frames them, but they are written here instead of by
`SummaryWriter`. Its thread dies of a full disk with a traceback, and the next call raises. A report is a few
dozen small records, so a thread would gain nothing.
"""

from __future__ import annotations

import io
import itertools
import json
import math
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

from PIL import Image

from trainer.errors import UserError
from trainer.networks import NETWORKS
from trainer.reporting.jsonl import append
from trainer.reporting.tags import (
    D_HAT,
    DATA_WAIT,
    EPOCH_LOSS,
    FIXED_LOSS,
    IMAGES_PER_SECOND,
    LOSS,
    MINUTES_PER_EPOCH,
    NORM,
    RAM,
    RATE,
    VALIDATION_LOSS,
    VRAM,
    D,
    describe,
    logarithmic,
)

# tensorboard looks for this module, and then does not import TensorFlow where it is installed (Colab), which
# takes seconds and GPU memory and prints notices.
sys.modules.setdefault("tensorboard.compat.notf", ModuleType("tensorboard.compat.notf"))

Layout = dict[str, dict[str, list[Any]]]
"""TensorBoard's custom scalars: category -> chart -> ["Multiline", [regular expressions of tags]]."""

_file_numbers = itertools.count()
_EVENT_FILE = re.compile(r"events\.out\.tfevents\.(\d+)\.")


class TensorBoardLogger:
    """Record a run for TensorBoard.

    A call returns after its values are in the file. If writing fails (a full disk, a deleted folder), the
    values are lost, `warn` is called once and training continues; every later call tries again.

    Args:
        folder: made if missing.
        networks: the trained networks, as their tags name them.
        adaptive: those of them with a learned rate d, which has its own charts.
        purge_step: hide the records of earlier event files from this step on.

    Raises:
        UserError: the folder cannot be written to.
    """

    def __init__(
        self,
        folder: Path,
        *,
        warn: Callable[[str], None],
        networks: Sequence[str] = tuple(NETWORKS),
        adaptive: Collection[str] = (),
        purge_step: int | None = None,
    ) -> None:
        self._folder = folder
        self._warn = warn
        self._layout = layout(networks=networks, adaptive=adaptive)
        self._warned = False
        self._closed = False
        try:
            self._path, self._file = self._open(purge_step)
        except OSError as error:
            reason = error.strerror or error
            raise UserError(
                f"{folder}: TensorBoard's events cannot be written here ({reason}); make the folder writable "
                "or choose another with --logdir"
            ) from error

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Record numbers by tag."""
        logs = {
            twin: math.log10(value)
            for tag, value in values.items()
            if (twin := logarithmic(tag)) is not None and value > 0
        }
        self._record([_scalar(tag, value) for tag, value in {**values, **logs}.items()], step)

    def image(self, tag: str, image: Image.Image, step: int) -> None:
        """Record an image as PNG."""
        from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[attr-defined]

        png = io.BytesIO()
        image.convert("RGB").save(png, "PNG")
        value = Summary.Image(
            width=image.width, height=image.height, colorspace=3, encoded_image_string=png.getvalue()
        )
        self._record([Summary(value=[Summary.Value(tag=tag, image=value)])], step)

    def text(self, tag: str, text: str, step: int) -> None:
        """Record a text, a JSON object as a table; TensorBoard renders Markdown."""
        from torch.utils.tensorboard.summary import text as text_summary

        self._record([text_summary(tag, _markdown(text))], step)

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
            append(self._file, _framed(events))
        except OSError as error:
            self._warn_once(error.strerror or str(error))

    def _open(self, purge_step: int | None) -> tuple[Path, io.FileIO]:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore[attr-defined]
        from torch.utils.tensorboard.summary import custom_scalars

        now = time.time()
        events = [Event(wall_time=now, file_version="brain.Event:2")]
        if purge_step is not None:
            session = SessionLog(status=SessionLog.START)
            events.append(Event(wall_time=now, step=purge_step, session_log=session))
        events.append(Event(wall_time=now, summary=custom_scalars(self._layout)))

        self._folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads event files in the order of their names, even after a clock was set back.
        matches = [_EVENT_FILE.match(path.name) for path in self._folder.iterdir()]
        stamp = max(int(now), 1 + max((int(match[1]) for match in matches if match), default=0))
        name = f"{stamp:010d}.{socket.gethostname()}.{os.getpid()}.{next(_file_numbers)}"
        path = self._folder / f"events.out.tfevents.{name}"
        file = path.open("xb", buffering=0)
        try:
            append(file, _framed(events))
        except OSError:
            file.close()
            path.unlink()
            raise
        return path, file

    def _warn_once(self, reason: str) -> None:
        if not self._warned:
            self._warned = True
            self._warn(
                f"{self._folder}: TensorBoard's events are not recorded ({reason}); training continues, "
                "recording too as soon as it can"
            )


def _scalar(tag: str, value: float) -> Any:
    """Return the summary of a number, with its description for the tag's info button."""
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata  # type: ignore[attr-defined]

    plugin = SummaryMetadata.PluginData(plugin_name="scalars")
    metadata = SummaryMetadata(plugin_data=plugin, summary_description=describe(tag))
    return Summary(value=[Summary.Value(tag=tag, simple_value=value, metadata=metadata)])


def _markdown(text: str) -> str:
    """Return a JSON object as a table of keys and values, any other text fenced as code."""
    with suppress(ValueError):
        if isinstance(found := json.loads(text), dict):
            rows = [f"| {_code(key)} | {_code(json.dumps(value))} |" for key, value in _leaves(found)]
            return "\n".join(["| key | value |", "|---|---|", *rows])
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}\n{text}\n{fence}"


def _leaves(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{above}{key}.")
        else:
            yield above + key, value


def _code(text: str) -> str:
    """Return text for a table's cell, verbatim: Markdown's and HTML's signs are character references."""
    return "<code>" + re.sub(r"[^\w\s.,:/-]|_", lambda match: f"&#{ord(match[0])};", text) + "</code>"


def layout(*, networks: Sequence[str], adaptive: Collection[str]) -> Layout:
    """Return the charts of TensorBoard's Custom Scalars tab; `adaptive` networks have a learned rate d."""
    learned = [network for network in networks if network in adaptive]
    # A colour is a run there, so each network has charts of its own.
    categories = {
        "losses": {
            "loss of the batches trained": [LOSS, EPOCH_LOSS],
            "loss at fixed images, noise and timesteps": [FIXED_LOSS, VALIDATION_LOSS],
        },
        "effective learning rate": {
            f"{network}{title}": [tag]
            for network in networks
            for title, tag in (("", RATE + network), (", log10", logarithmic(RATE + network)))
        },
        "D-Adaptation": {
            f"{network}: d, and the estimate d_hat that it follows": [D + network, D_HAT + network]
            for network in learned
        },
        "gradient norm, before clipping": {network: [NORM + network] for network in networks},
        "performance": {
            "images per second": [IMAGES_PER_SECOND],
            "data wait: seconds a step": [DATA_WAIT],
            "minutes per epoch": [MINUTES_PER_EPOCH],
            "memory, GiB": [VRAM, RAM],
        },
    }
    if not adaptive:
        del categories["D-Adaptation"]
    return {
        category: {
            title: ["Multiline", [f"^{re.escape(tag)}$" for tag in tags]] for title, tags in charts.items()
        }
        for category, charts in categories.items()
    }


def _framed(events: Sequence[Any]) -> bytes:
    from tensorboard.summary.writer.record_writer import RecordWriter

    framed = io.BytesIO()
    writer = RecordWriter(framed)
    for event in events:
        writer.write(event.SerializeToString())
    return framed.getvalue()
