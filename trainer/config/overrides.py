"""The command line: `--key value` and `--no-key` for every key of train.json, and `--help`."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trainer.config.ed2 import RENAMED, foreign_options, in_optimizer_file, other_word, translate
from trainer.config.positions import read_json
from trainer.config.report import COMMAND_LINE, Place, Report, Written, closest, read_keys, values_of
from trainer.config.schema import (
    CommandOptions,
    Key,
    accepts,
    keys_of,
    train_keys,
)

_NAME = re.compile(r"(?<=^--)[^=]+")
_VALUE = re.compile(r"^-(?!-|h$)")
"""The start of values such as -1e-6, which argparse takes for options unless something precedes it."""
_NEED_CHECK = {
    "contact_sheets": "is made by a check; add --check",
    "vram": "is for a check; add --check",
}


@dataclass(frozen=True)
class Arguments:
    """The command line: its own options, and values by key that win over the file's."""

    command: CommandOptions
    config_is_named: bool
    help: str | None
    """The topic of the help, "" without one; None if no help is asked for."""
    values: dict[str, Written]


class _Append(argparse.Action):
    """Append the option and its value, None if it has none, to `given`."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        namespace.given.append((option_string, values))


def parse(argv: Sequence[str], report: Report) -> Arguments:
    """Return the options in `argv`, without the program's name; report wrong options and values.

    Names take - for _. A value is read as JSON if the key takes no text; if it does, only null and lists are.
    """
    options = _options()
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-h", "--help", nargs="?", const="")
    for option in options:
        parser.add_argument(option, nargs="?", action=_Append, default=argparse.SUPPRESS)
    words = [_NAME.sub(lambda name: name[0].replace("-", "_"), _VALUE.sub("\0-", word)) for word in argv]
    found, rest = parser.parse_known_args(words, argparse.Namespace(given=[]))
    command: dict[str, Written] = {}
    values: dict[str, Written] = {}
    for option, given in found.given:
        (key, off), text = options[option], given and given.removeprefix("\0")
        if key.name == "check" and (not text or text.endswith(".json")):
            rest, text = [*filter(None, [text]), *rest], "text"
        written = _written(key, off, text, Place(COMMAND_LINE, None, option[2:]), report)
        if written is not None and key.name in (known := train_keys()) | keys_of(CommandOptions):
            (values if key.name in known else command)[key.name] = written
        elif written is not None:
            values |= translate(key.name, written, report) or {}
    typed = dict(zip(words, argv, strict=True))
    _report_rest([typed.get(word, word) for word in rest], report)
    own = CommandOptions(**values_of(read_keys(command, keys_of(CommandOptions), report)))
    for name, sentence in _NEED_CHECK.items():
        if getattr(own, name) is not None and own.check is None:
            report.error(Place(COMMAND_LINE, None, name), sentence)
    return Arguments(own, "config" in command, found.help, values)


def _options() -> dict[str, tuple[Key, bool]]:
    """Return the key of every option, and whether it turns it off; `--x` turns off a key `no_x`."""
    keys = {**train_keys(), **keys_of(CommandOptions), **foreign_options()}
    keys |= {name: keys[now] for name, now in RENAMED.items()}
    options = {f"--{name}": (key, False) for name, key in keys.items()}
    for name, key in keys.items():
        if key.kind is bool:
            options.setdefault(f"--no_{name}", (key, True))
            if name.startswith("no_"):
                options.setdefault(f"--{name[3:]}", (key, True))
    return options


def _written(key: Key, off: bool, text: str | None, place: Place, report: Report) -> Written | None:
    """Return an option's value; None after reporting that it has none."""
    if key.kind is bool:
        spelled = {"": not off, "true": not off, "false": off, "null": None}
        if (word := (text or "").lower()) in spelled:
            return Written(spelled[word], place)
        report.error(place, f"takes true or false, got '{text}'")
    elif text is not None:
        return Written(_value(key, text), place)
    else:
        report.error(place, f"needs a value: {accepts(key.annotation)}")
    return None


def _report_rest(words: Sequence[str], report: Report) -> None:
    """Report unknown options, whose values are skipped, and words that are no option."""
    skip = False
    for word in words:
        name = word[2:].partition("=")[0] if word.startswith("--") else ""
        key = name.replace("-", "_")
        if not name and not skip:
            close = f" (did you mean --config {word}?)" if word.endswith(".json") else ""
            sentence = f"{word} is not an option{close}; options are written --key value, see --help"
            report.error(Place(COMMAND_LINE), sentence)
        elif inside := in_optimizer_file(key):
            report.error(Place(COMMAND_LINE, None, name), f"belongs in the optimizer file, as {inside}")
        elif name:
            close = other_word(key) or closest(key, ["help", *train_keys(), *keys_of(CommandOptions)])
            sentence = (
                f"unknown option; did you mean --{close}?"
                if close
                else "unknown option; --help all lists them"
            )
            report.error(Place(COMMAND_LINE, None, name), sentence)
        skip = bool(name) and "=" not in word


def _value(key: Key, text: str) -> Any:
    """Return a word of the command line as a JSON value."""
    if text == "null":
        return None
    scratch = Report()
    document = read_json(b'{"value": ' + text.encode("utf-8", "surrogatepass") + b"}", COMMAND_LINE, scratch)
    value = text if document is None or scratch.errors else document.values["value"]
    return value if isinstance(value, list | dict) or not key.fits(text) else text
