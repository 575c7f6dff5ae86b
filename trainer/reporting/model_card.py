"""The model card of a checkpoint: README.md with the run's curves, samples and configuration."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData, metadata_load
from jinja2 import Environment, StrictUndefined

from data.atomic import appearing
from trainer.checkpoints.artifact import Artifact
from trainer.checkpoints.format import TrainState
from trainer.errors import UserError
from trainer.models.family import OPENRAIL, licence_of
from trainer.models.tensor_file import read_metadata
from trainer.output import duration
from trainer.reporting.curves import Curves
from trainer.state_file import as_kind

PAGE, CURVES, SAMPLES = "README.md", "curves.png", "samples.png"

_TAGS = ["stable-diffusion", "stable-diffusion-diffusers", "text-to-image", "diffusers", "sd-dadapt"]
_SAMPLE_FILE = re.compile(r"gs(\d+)(-\w+)?\.png")


@dataclass(frozen=True)
class Origin:
    """The base model of a run, as far as it is known."""

    name: str
    """A hub id, or the last part of a path."""
    hub: str | None = None
    """Its id on the hub, or that of the model it was made from."""
    license: str | None = None
    """The hub's name of its licence."""
    revision: str | None = None
    """Its commit on the hub."""

    def __post_init__(self) -> None:
        """Drop malformed values, since anyone may have written the base's files."""
        for field, pattern in (
            ("hub", r"[A-Za-z0-9][A-Za-z0-9_.-]*(/[A-Za-z0-9][A-Za-z0-9_.-]*)?"),
            ("license", r"[a-z0-9.+-]+"),
            ("revision", r"[\w./-]+"),
        ):
            value = getattr(self, field)
            if not isinstance(value, str) or not re.fullmatch(pattern, value):
                object.__setattr__(self, field, None)


def origin_of(model: str, revision: str | None = None) -> Origin:
    """Look up a base model: a hub id, a folder with a card, or a .safetensors file with a licence."""
    path = Path(model).expanduser()
    if path.is_dir():
        card = _header(path / PAGE)
        return Origin(path.resolve().name, card.get("base_model"), card.get("license"))
    if path.is_file():
        try:
            text = read_metadata(path).get("modelspec.license", "")
        except (OSError, UserError):  # another kind of file; loading it reports problems
            text = ""
        # Written for people; the hub takes its own names only.
        openrail = re.sub(r"[^a-z+]", "", text.lower()) == "creativemlopenrailm"
        return Origin(path.stem, license=OPENRAIL if openrail else None)
    return Origin(model, model, licence_of(model), revision)


@dataclass(kw_only=True)
class Card:
    """The model card of each checkpoint of a run. Its state is the origin, which resumed runs cannot see."""

    project: str
    origin: Origin
    curves: Curves
    state: TrainState
    total_steps: int
    losses: Mapping[str, str]
    """By tag, the names of losses to report as numbers."""
    rates: Mapping[str, str]
    """By network, the tag of its learning rate."""
    plan: Sequence[tuple[str, str]]
    """Rows about the run, as name and text."""
    files: Mapping[str, str]
    """The configuration's files as JSON texts."""
    artifact: Artifact
    """The content of the checkpoint."""

    def state_dict(self) -> dict[str, Any]:
        """Return the origin."""
        return asdict(self.origin)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the origin."""
        self.origin = as_kind(Origin, state)

    def write(self, folder: Path, samples: Path) -> None:
        """Write the page, curves and newest of the run's samples into a checkpoint's folder."""
        drawn, newest = self.curves.begun, self._newest(samples)
        if drawn:
            with appearing(folder / CURVES) as draft:
                self.curves.draw(draft)
        if newest is not None:
            with appearing(folder / SAMPLES) as draft:
                shutil.copyfile(newest[1], draft)
        with appearing(folder / PAGE) as draft:
            draft.write_text(self._page(drawn, newest and newest[0]), encoding="utf-8")

    def _page(self, drawn: bool, sampled: str | None) -> str:
        origin, artifact = self.origin, self.artifact
        header: dict[str, Any] = {"license": origin.license} if origin.license else {}
        if origin.hub:
            header |= {"base_model": origin.hub, "base_model_relation": artifact.relation}
        tags = [*_TAGS, *artifact.tags]
        data = ModelCardData(library_name="diffusers", pipeline_tag="text-to-image", tags=tags, **header)
        repository = "YOUR_NAME/" + re.sub(r"[^\w.-]+", "-", self.project)
        files = {name: json.dumps(json.loads(text), indent=1) for name, text in self.files.items()}
        markdown = Environment(
            trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined
        )
        markdown.filters |= {"text": _text, "code": _code}
        template = Path(__file__).with_name("model_card.md.jinja").read_text(encoding="utf-8")
        return markdown.from_string(template).render(
            header=data.to_yaml().strip(),
            project=self.project,
            origin=origin,
            on_hub=origin.hub == origin.name,
            openrail=origin.license == OPENRAIL,
            artifact=artifact,
            usage=artifact.usage(repository, origin.name),
            state=self.state,
            total_steps=self.total_steps,
            sampled=sampled,
            rows=[*self.plan, *self._numbers()],
            drawn=drawn,
            files=files,
        )

    def _numbers(self) -> list[tuple[str, str]]:
        rows = []
        for tag, name in self.losses.items():
            if points := self.curves.points(tag):
                (first, before), (last, now) = points[0], points[-1]
                step, lowest = min(points, key=lambda point: point[1])
                text = f"{before:.4f} at step {first}, {now:.4f} at step {last}"
                rows.append((name, f"{text}; lowest {lowest:.4f} at step {step}"))
        for network, tag in self.rates.items():
            if points := self.curves.points(tag):
                rows.append((f"rate of the {network}", f"{points[-1][1]:.3g} at step {points[-1][0]}"))
        return [*rows, ("time", f"{duration(self.state.seconds)} of training")]

    def _newest(self, samples: Path) -> tuple[str, Path] | None:
        """Return the newest samples in words, and their path; those of EMA weights if there are no others."""
        matches = [(path, _SAMPLE_FILE.fullmatch(path.name)) for path in samples.glob("gs*.png")]
        found = [(int(match[1]), not match[2], path) for path, match in matches if match]
        step, own, path = max((each for each in found if each[0] <= self.state.step), default=(0, True, None))
        return None if path is None else (f"step {step}" if own else f"step {step}, of EMA weights", path)


def _text(text: str) -> str:
    """Escape Markdown and HTML, and keep the text on one line."""
    return re.sub(r"([\\`*\[\]<>|&])", r"\\\1", _line(text))


def _code(text: str) -> str:
    """Return a code span that nothing in the text can end."""
    return f"`{_line(text).replace('`', chr(39))}`"


def _line(text: str) -> str:
    return "".join(letter if letter.isprintable() else " " for letter in text)


def _header(path: Path) -> Mapping[str, Any]:
    """Return the header of a card, empty if it cannot be read."""
    try:
        return (metadata_load(path) if path.is_file() else None) or {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
