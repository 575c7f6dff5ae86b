"""The command line: `--key value` and `--no-key` for every key of train.json, and `--help`, all from the options' docstrings."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from inspect import getdoc
from typing import Any, Literal

from pydantic import ValidationError

from trainer.config.ed2 import RENAMED, foreign_options, in_optimizer_file, other_word, translate
from trainer.config.positions import read_json
from trainer.config.report import COMMAND_LINE, Place, Report, Written, checked, closest
from trainer.config.schema import (
    DEFAULT_OPTIMIZER,
    CommandOptions,
    FileOptions,
    FreezingOptions,
    Key,
    OptimizerFileOptions,
    accepts,
    described,
    keys_of,
    optimizer_classes,
    optimizer_keys,
    plain,
    sections,
    train_keys,
)


@dataclass
class Arguments:
    """What the command line says: the file, what to do, and values by key that win over the file's."""

    config: str | None = None
    check: Literal["text", "json"] | None = None
    contact_sheets: str | None = None
    vram: float | None = None
    resume_weights_only: bool = False
    help: bool = False
    values: dict[str, Written] = field(default_factory=dict)


def parse(argv: Sequence[str], report: Report) -> Arguments:
    """Return what `argv`, without the program's name, says; what cannot be understood is reported.

    Names take - for _. A value is read as JSON where the key takes no text, and as text where it does, except
    null and lists.
    """
    result = Arguments()
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if word in ("-h", "--help"):
            result.help = True
            continue
        if not word.startswith("--") or word == "--":
            close = " (did you mean --config " + word + "?)" if word.endswith(".json") else ""
            report.error(
                Place(COMMAND_LINE),
                f"{word} is not an option{close}; options are written --key value, see --help",
            )
            continue
        name, equals, attached = word[2:].partition("=")
        place = Place(COMMAND_LINE, None, name)
        key, off = _find(name.replace("-", "_"))
        if key is None:
            _unknown(name, report)
            if not equals and rest and not rest[0].startswith("--"):
                rest.pop(0)
            continue
        if key.kind is bool:
            value: Any = not off
            if equals or (rest and not rest[0].startswith("--")):
                given = attached if equals else rest.pop(0)
                spelled = {"true": not off, "false": off, "null": None}
                if given.lower() not in spelled:
                    report.error(place, f"takes true or false, got '{given}'")
                    continue
                value = spelled[given.lower()]
        elif equals:
            value = _value(key, attached)
        elif key.name == "check" and not (
            rest and not rest[0].startswith("--") and not rest[0].endswith(".json")
        ):
            value = "text"
        elif rest and not (rest[0].startswith("--") and rest[0] != "--"):
            value = _value(key, rest.pop(0))
        else:
            report.error(place, f"needs a value: {accepts(key.annotation)}")
            continue
        if key.owner is CommandOptions:
            right, value = (True, key.default) if value is None else checked(key, value, place, report)
            if right:
                setattr(result, key.name, value)
        elif key.name in train_keys():
            result.values[key.name] = Written(value, place)
        else:
            result.values |= translate(key.name, Written(value, place), report) or {}
    for name, sentence in (
        ("contact_sheets", "is made by a check; add --check"),
        ("vram", "is for a check; add --check"),
    ):
        if getattr(result, name) is not None and result.check is None:
            report.error(Place(COMMAND_LINE, None, name), sentence)
    return result


def help_text(width: int = 100) -> str:
    """Return the text of `--help`: every key by section, with what it takes, its default and its docstring."""
    lines = [
        "usage: python train.py [--config train.json] [--check [json]] [--key value ...]",
        "",
        *textwrap.wrap(
            "Fine-tunes Stable Diffusion as train.json says. Every key below is a key of train.json and an option here; the command "
            "line wins over the file, the file over the default. --no-key turns a switch off, null stands for the default. The "
            "optimizer file's keys are listed at the end.",
            width,
        ),
    ]
    model, *rest = sections().values()
    for options in (CommandOptions, model, FileOptions, *rest):
        lines += ["", (getdoc(options) or "").splitlines()[0], *_rows(options, "--", width)]
    for key in train_keys().values():
        if isinstance(key.kind, type) and dataclasses.is_dataclass(key.kind):
            example = json.dumps({name: plain(inner.default) for name, inner in keys_of(key.kind).items()})
            lines += [
                "",
                f"Keys inside {key.name} (on the command line --{key.name} '{example}'):",
                *_rows(key.kind, "", width),
            ]
    lines += ["", "Keys of the optimizer file's sections base and text_encoder_overrides:"]
    names = ", ".join(optimizer_classes())
    for name, users in optimizer_keys().items():
        key = next(iter(users.values()))
        if name == "optimizer":
            lines += _row(
                replace(key, default=DEFAULT_OPTIMIZER), "", width, takes="text", words=f"One of {names}."
            )
        else:
            lines += _row(key, "", width, words=described(users))
    lines += ["", "Keys of its text_encoder_freezing:", *_rows(FreezingOptions, "", width)]
    lines += ["", "Keys beside its sections:", *_rows(OptimizerFileOptions, "", width)]
    return "\n".join(lines) + "\n"


def _rows(options: type, dashes: str, width: int) -> list[str]:
    return [line for key in keys_of(options).values() for line in _row(key, dashes, width)]


def _row(key: Key, dashes: str, width: int, *, takes: str = "", words: str = "") -> list[str]:
    default = plain(key.default) if not key.required else None
    shown = (
        "required"
        if key.required
        else f"default {default if isinstance(default, str) else json.dumps(default)}"
    )
    text = textwrap.wrap(words or key.doc, width - 6, break_on_hyphens=False)
    return [
        f"  {dashes}{key.name}: {takes or accepts(key.annotation)}; {shown}",
        *(f"      {line}" for line in text),
    ]


def _find(name: str) -> tuple[Key | None, bool]:
    """Return the key that an option names and whether it is being turned off; a key `no_x` is turned off by `--x`."""
    known = {**train_keys(), **keys_of(CommandOptions), **foreign_options()}
    name = RENAMED.get(name, name)
    if name in known:
        return known[name], False
    if name.startswith("no_") and name[3:] in known and known[name[3:]].kind is bool:
        return known[name[3:]], True
    if f"no_{name}" in known and known[f"no_{name}"].kind is bool:
        return known[f"no_{name}"], True
    return None, False


def _unknown(name: str, report: Report) -> None:
    place, key = Place(COMMAND_LINE, None, name), name.replace("-", "_")
    if inside := in_optimizer_file(key):
        report.error(place, f"belongs in the optimizer file, as {inside}")
    else:
        close = other_word(key) or closest(key, ["help", *train_keys(), *keys_of(CommandOptions)])
        report.error(
            place, f"unknown option; did you mean --{close}?" if close else "unknown option; --help lists all"
        )


def _value(key: Key, text: str) -> Any:
    """Return the JSON value that a word on the command line stands for."""
    if text == "null":
        return None
    scratch = Report()
    document = read_json(b'{"value": ' + text.encode("utf-8", "surrogatepass") + b"}", COMMAND_LINE, scratch)
    value = text if document is None or scratch.errors else document.values["value"]
    return value if isinstance(value, list | dict) or not _fits(key, text) else text


def _fits(key: Key, value: Any) -> bool:
    try:
        key.validate(value)
    except ValidationError:
        return False
    return True
