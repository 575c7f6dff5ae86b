"""The file of sample prompts: plain lines, or EveryDream2's JSON."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from data.regular import read_regular
from trainer.config.positions import Document, read_json, read_text
from trainer.config.report import Place, Report, read_keys, shown, values_of
from trainer.config.schema import keys_of
from trainer.errors import UserError
from trainer.evaluation.options import SamplePrompt, SamplePrompts
from trainer.output import shown_path

_SAMPLES = "samples"
_KOHYA_OPTION = re.compile(r"[^#].* --[nwhdlsfg] ")
_UNUSED = {"cfgs": "EveryDream2 ignores it too; the cfgs beside samples draw every prompt"}


def load_sample_prompts(path: Path | None) -> SamplePrompts:
    """Return the contents of a file of prompts; without a file (None) the defaults.

    Raises:
        UserError: all problems of the file, each with its line.
    """
    report = Report()
    prompts = SamplePrompts() if path is None else read_sample_prompts(path, report)
    if prompts is None or report.errors:
        raise UserError(report.errors)
    return prompts


def read_sample_prompts(path: Path, report: Report) -> SamplePrompts | None:
    """Return the contents of a file of prompts; None after reporting its problems.

    A .txt file has one prompt a line; empty lines and lines that start with # are skipped.
    """
    file = shown_path(path)
    report.files.append(file)
    before = len(report.errors)
    try:
        content = read_regular(path)
    except OSError as reason:
        report.error(Place(file), f"the sample prompts cannot be read: {reason.strerror or reason}")
        return None
    if path.suffix.lower() == ".json":
        document = read_json(content, file, report, path.parent)
        prompts = _from_json(document, report) if document else None
    else:
        text = read_text(content, file, report)
        lines = [line.strip() for line in (text or "").splitlines()]
        foreign = (number for number, line in enumerate(lines, 1) if _KOHYA_OPTION.match(line))
        if number := next(foreign, None):
            advice = "a .json file has negative_prompt, size, seed and cfgs"
            report.note(Place(file, number), f"options such as --w 512 are drawn as words; {advice}")
        prompts = SamplePrompts(
            samples=tuple(SamplePrompt(prompt=line) for line in lines if line and not line.startswith("#"))
        )
    if prompts is None or len(report.errors) > before:
        return None
    if not prompts.samples:
        report.note(
            Place(file), "names no prompts; two captions of the data and two unrelated prompts are drawn"
        )
    return prompts


def _from_json(document: Document, report: Report) -> SamplePrompts:
    top, known = document.members(document.values), keys_of(SamplePrompts)
    listed = top.pop(_SAMPLES, None)
    values = read_keys(top, known, report)
    samples: list[SamplePrompt] = []
    items = listed.value if listed else None
    if listed and items is not None and not isinstance(items, list):
        report.error(
            listed.place, f'must be a list of objects such as {{"prompt": "..."}}; got {shown(items)}'
        )
        items = None
    for number, item in enumerate(items or ()):
        if not isinstance(item, dict):
            place = document.place(_SAMPLES, number)
            report.error(place, f'must be an object such as {{"prompt": "..."}}; got {shown(item)}')
            continue
        members = document.members(item, _SAMPLES, number)
        for name in _UNUSED.keys() & members.keys():
            report.note(members.pop(name).place, f"has no effect; {_UNUSED[name]}")
        samples.append(SamplePrompt(**values_of(read_keys(members, keys_of(SamplePrompt), report))))
    scheduler = values.get("scheduler")
    if scheduler and scheduler.value == "lms" and importlib.util.find_spec("scipy") is None:
        report.error(scheduler.place, "lms needs the package scipy: pip install scipy, or choose another")
    return SamplePrompts(**values_of(values), samples=tuple(samples))
