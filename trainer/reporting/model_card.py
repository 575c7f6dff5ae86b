"""The page that a checkpoint is published with: README.md with the hub's header, the run's curves, samples and configuration."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.checkpoints.atomic import appearing
from trainer.errors import UserError
from trainer.models.family import OPENRAIL, licence_of
from trainer.state_file import as_kind

if TYPE_CHECKING:
    from trainer.checkpoints.artifact import Artifact
    from trainer.checkpoints.format import TrainState
    from trainer.reporting.curves import Curves

PAGE, CURVES, SAMPLES = "README.md", "curves.png", "samples.png"


@dataclass(frozen=True)
class Origin:
    """What a run was begun from, as far as it is known."""

    name: str
    """What people call it: a hub id, or the last part of a path."""
    hub: str | None = None
    """Its id on the hub, or that of the model that it was made from."""
    license: str | None = None
    """The hub's name of its licence."""
    revision: str | None = None
    """Its commit, where it came from the hub."""

    def __post_init__(self) -> None:
        """Drop what is no id and no name of the hub: both come from the base's files, which anyone may have written."""
        for field, pattern in (
            ("hub", r"[A-Za-z0-9][A-Za-z0-9_.-]*(/[A-Za-z0-9][A-Za-z0-9_.-]*)?"),
            ("license", r"[a-z0-9.+-]+"),
            ("revision", r"[\w./-]+"),
        ):
            value = getattr(self, field)
            if not isinstance(value, str) or not re.fullmatch(pattern, value):
                object.__setattr__(self, field, None)


def origin_of(model: str, revision: str | None = None) -> Origin:
    """Return what is known of a model: a hub id, a folder with a card, or a .safetensors file whose header names its licence.

    Args:
        model: what `load_models` loads.
        revision: its commit, where it came from the hub.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        card = _header(path / PAGE)
        base, license_ = card.get("base_model"), card.get("license")
        return Origin(path.resolve().name, base, license_)
    if path.is_file():
        from trainer.models.tensor_file import read_metadata

        try:
            said = read_metadata(path).get("modelspec.license", "")
        except (OSError, UserError):  # another kind of file; loading it says what is wrong, if anything is
            said = ""
        # A text for people, of which the hub takes none but its own names.
        return Origin(
            path.stem,
            license=OPENRAIL if re.sub(r"[^a-z+]", "", said.lower()) == "creativemlopenrailm" else None,
        )
    return Origin(model, model, licence_of(model), revision)


class Card:
    """Write a checkpoint's page. What the run began from goes into its checkpoints, since a continued run begins from one of them.

    Args:
        project: the project's name.
        origin: what the run began from.
        curves: of the run.
        state: the run's counters.
        total_steps: of the whole run.
        losses: tags of losses that are told in numbers, with their names.
        rates: by network, the tag of its rate.
        plan: rows about the run, as name and text.
        files: the configuration's files as JSON texts.
        artifact: what the checkpoint holds.
    """

    def __init__(
        self,
        *,
        project: str,
        origin: Origin,
        curves: Curves,
        state: TrainState,
        total_steps: int,
        losses: Mapping[str, str],
        rates: Mapping[str, str],
        plan: Sequence[tuple[str, str]],
        files: Mapping[str, str],
        artifact: Artifact,
    ) -> None:
        self._project, self._origin, self.curves, self._state = project, origin, curves, state
        self._total, self._losses, self._rates, self._plan = (
            total_steps,
            dict(losses),
            dict(rates),
            tuple(plan),
        )
        self._files, self._artifact = dict(files), artifact

    def state_dict(self) -> dict[str, Any]:
        """Return what the run began from."""
        return asdict(self._origin)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self._origin = as_kind(Origin, state)

    def write(self, folder: Path, samples: Path) -> None:
        """Write the page and its two pictures into a checkpoint's folder, in the place of older ones.

        Args:
            folder: the checkpoint's.
            samples: the folder of the run's samples.

        Raises:
            OSError: they cannot be written.
        """
        drawn, newest = self.curves.begun, self._newest_of(samples)
        if drawn:
            with appearing(folder / CURVES) as draft:
                self.curves.draw(draft)
        if newest is not None:
            with appearing(folder / SAMPLES) as draft:
                shutil.copyfile(newest[1], draft)
        with appearing(folder / PAGE) as draft:
            draft.write_text(self._page(drawn, newest and newest[0]), encoding="utf-8")

    def _page(self, drawn: bool, sampled: int | None) -> str:
        from huggingface_hub import ModelCardData

        origin, artifact = self._origin, self._artifact
        tags = [
            "stable-diffusion",
            "stable-diffusion-diffusers",
            "text-to-image",
            "diffusers",
            "sd-dadapt",
            *artifact.tags,
        ]
        known: dict[str, Any] = {"license": origin.license} if origin.license else {}
        known |= {"base_model": origin.hub, "base_model_relation": artifact.relation} if origin.hub else {}
        header = (
            ModelCardData(library_name="diffusers", pipeline_tag="text-to-image", tags=tags, **known)
            .to_yaml()
            .strip()
        )
        began = (
            f"[{origin.hub}](https://huggingface.co/{origin.hub})"
            if origin.hub == origin.name
            else _code(origin.name)
        )
        began += f" at revision {_code(origin.revision)}" if origin.revision else ""
        made_from = f", which was made from {origin.hub}" if origin.hub not in (None, origin.name) else ""
        rows = [f"| {_text(name)} | {_text(text)} |" for name, text in [*self._plan, *self._numbers()]]
        lines = [
            *("---", header, "---", "", f"# {_text(self._project)}", ""),
            f"{artifact.opening} {began}{made_from}: {self._state.step:,} of {self._total:,} steps, {self._state.images:,} images.",
            *([] if sampled is None else ["", f"![samples of step {sampled}]({SAMPLES})"]),
            *("", "## Use", "", "```python", *self._use(), "```"),
            *(
                "",
                "## Training",
                "",
                "| | |",
                "|---|---|",
                *rows,
            ),
            *(["", f"![curves of the run]({CURVES})"] if drawn else []),
        ]
        for name, text in self._files.items():
            lines += [
                "",
                f"<details><summary>{name}</summary>",
                "",
                "```json",
                json.dumps(json.loads(text), indent=1),
                "```",
                "",
                "</details>",
            ]
        return "\n".join([*lines, "", "## Licence", "", self._licence(), ""])

    def _use(self) -> list[str]:
        name = re.sub(r"[^\w.-]+", "-", self._project)
        return [
            f"from diffusers import {self._artifact.models.family.pipeline}",
            "",
            *self._artifact.usage(f"YOUR_NAME/{name}", self._origin.name),
            'pipeline("...").images[0]',
        ]

    def _numbers(self) -> list[tuple[str, str]]:
        rows = []
        for tag, name in self._losses.items():
            points = self.curves.points(tag)
            if points:
                (first, before), (last, now) = points[0], points[-1]
                step, lowest = min(points, key=lambda point: point[1])
                rows.append(
                    (
                        name,
                        f"{before:.4f} at step {first}, {now:.4f} at step {last}; lowest {lowest:.4f} at step {step}",
                    )
                )
        for network, tag in self._rates.items():
            points = self.curves.points(tag)
            if points:
                rows.append((f"rate of the {network}", f"{points[-1][1]:.3g} at step {points[-1][0]}"))
        return [*rows, ("time", f"{self._state.seconds / 60:.0f} minutes of training")]

    def _licence(self) -> str:
        origin, name = self._origin, _code(self._origin.name)
        if origin.license == OPENRAIL:
            return (
                f"{name} is under [CreativeML Open RAIL-M](https://huggingface.co/spaces/CompVis/stable-diffusion-license), and "
                "so is what is made from it, with the same restrictions of use."
            )
        if origin.license:
            return f"{name} is under {_code(origin.license)}."
        return (
            f"The program that wrote this page does not know the licence of {name}. What is made from it is bound by it: name it "
            "as `license:` at the top of this page before you publish."
        )

    def _newest_of(self, samples: Path) -> tuple[int, Path] | None:
        """Return step and path of the newest samples up to now, those of averaged weights where they alone were drawn."""
        found = [
            (int(match[1]), not match[2], path)
            for path in samples.glob("gs*.png")
            if (match := _SAMPLES.fullmatch(path.name))
        ]
        steps = [entry for entry in found if entry[0] <= self._state.step]
        return (max(steps)[0], max(steps)[2]) if steps else None


def _text(text: str) -> str:
    """Return text as Markdown shows it: no markup, no HTML, one line."""
    return re.sub(r"([\\`*\[\]<>|&])", r"\\\1", _line(text))


def _code(text: str) -> str:
    """Return text as a code span, which nothing in it can end."""
    return f"`{_line(text).replace('`', chr(39))}`"


def _line(text: str) -> str:
    return "".join(letter if letter.isprintable() else " " for letter in text)


_SAMPLES = re.compile(r"gs(\d+)(-\w+)?\.png")


def _header(path: Path) -> Mapping[str, Any]:
    """Return the header of a card, empty where there is none that can be read."""
    import yaml
    from huggingface_hub import metadata_load

    try:
        return (metadata_load(path) if path.is_file() else None) or {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
