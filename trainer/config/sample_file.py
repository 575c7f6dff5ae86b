"""The file of sample prompts: plain lines, or EveryDream2's JSON, checked like every other part of the configuration."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from data.regular import read_regular
from trainer.config.paths import shown_path
from trainer.config.positions import Document, read_json
from trainer.config.report import Place, Report, checked, did_you_mean, shown
from trainer.config.schema import keys_of
from trainer.errors import UserError
from trainer.evaluation.sampling import SamplePrompt, SamplePrompts

_SAMPLES = "samples"
_UNUSED = {"cfgs": "EveryDream2 ignores it too; the cfgs beside samples draw every prompt"}


def load_sample_prompts(path: Path | None) -> SamplePrompts:
    """Return what a file of prompts asks for; None is no file, which leaves everything at its default.

    Raises:
        UserError: all problems of the file, each with its line.
    """
    report = Report()
    prompts = SamplePrompts() if path is None else read_sample_prompts(path, report)
    if prompts is None or report.errors:
        raise UserError(report.errors)
    return prompts


def read_sample_prompts(path: Path, report: Report) -> SamplePrompts | None:
    """Return what a file of prompts asks for; None after reporting what is wrong.

    Args:
        path: a .txt file with one prompt a line, empty lines and lines that begin with # left out, or a .json
        file.
        report: is given the problems, and notes about what has no effect.
    """
    file = shown_path(path)
    report.files.append(file)
    before = len(report.errors)
    try:
        content = read_regular(path)
    except OSError as reason:
        report.error(Place(file), f"the sample prompts cannot be read: {reason.strerror or reason}")
        return None
    is_json = path.suffix.lower() == ".json"
    prompts = _from_json(read_json(content), file, report) if is_json else _from_lines(content, file, report)
    if len(report.errors) > before:
        return None
    if not prompts.samples:
        report.note(Place(file), "names no prompts; four captions of the data are drawn")
    return prompts


def _from_lines(content: bytes, file: str, report: Report) -> SamplePrompts:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        report.error(
            Place(file, line), f"byte 0x{content[error.start]:02x} is not UTF-8; save the file as UTF-8"
        )
        return SamplePrompts()
    lines = [line.strip() for line in text.splitlines()]
    return SamplePrompts(
        samples=tuple(SamplePrompt(prompt=line) for line in lines if line and not line.startswith("#"))
    )


def _from_json(document: Document, file: str, report: Report) -> SamplePrompts:
    for issue in document.issues:
        report.error(Place(file, issue.line), issue.sentence)
    values = _values(SamplePrompts, document.values, (), document, file, report)
    items = document.values.get(_SAMPLES)
    place = Place(file, document.lines.get((_SAMPLES,)), _SAMPLES)
    samples: list[SamplePrompt] = []
    if isinstance(items, list):
        for number, item in enumerate(items):
            inner = Place(file, document.lines.get((_SAMPLES, number)), f"{_SAMPLES}[{number}]")
            if isinstance(item, dict):
                samples.append(
                    SamplePrompt(**_values(SamplePrompt, item, (_SAMPLES, number), document, file, report))
                )
            else:
                report.error(inner, f'must be an object such as {{"prompt": "..."}}; got {shown(item)}')
    elif items is not None:
        report.error(place, f'must be a list of objects such as {{"prompt": "..."}}; got {shown(items)}')
    if values.get("scheduler") == "lms" and importlib.util.find_spec("scipy") is None:
        report.error(
            Place(file, document.lines[("scheduler",)], "scheduler"),
            "lms needs the package scipy: pip install scipy, or choose another",
        )
    return SamplePrompts(**values, samples=tuple(samples))


def _values(
    options: type,
    written: dict[str, Any],
    inside: tuple[str | int, ...],
    document: Document,
    file: str,
    report: Report,
) -> dict[str, Any]:
    """Return the keys of one object as fields of `options`, without `samples`; null is the default."""
    known = keys_of(options)
    prefix = "".join(f"[{part}]" if isinstance(part, int) else part for part in inside)
    values: dict[str, Any] = {}
    for name, value in written.items():
        place = Place(file, document.lines.get((*inside, name)), f"{prefix}.{name}".removeprefix("."))
        if (*inside, name) in document.unread or name in ("$schema", "doc") or name.startswith("_"):
            continue
        if inside and name in _UNUSED:
            report.note(place, f"has no effect; {_UNUSED[name]}")
        elif name not in known:
            report.error(
                place, "unknown key" + (did_you_mean(name, known) or f"; accepted are {', '.join(known)}")
            )
        elif name != _SAMPLES and value is not None:
            right, read = checked(known[name], value, place, report)
            values |= {name: read} if right else {}
    return values
