"""Export the keys of both files from the options: JSON Schemas for editors, a page for readers."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from trainer.config.ed2 import RENAMED, UNUSED_OPTIMIZER, foreign_schema
from trainer.config.help import names_of_optimizers
from trainer.config.optimizers import BASE, FREEZING, OVERRIDES
from trainer.config.schema import (
    CommandOptions,
    FileOptions,
    FreezingOptions,
    Key,
    OptimizerFileOptions,
    accepts,
    closed_object,
    described,
    keys_of,
    object_schema,
    optimizer_keys,
    plain,
    sections,
    train_keys,
)

_DIALECT = "https://json-schema.org/draft/2020-12/schema"


def train_schema() -> dict[str, Any]:
    """Return the JSON Schema of train.json."""
    keys = {name: key.json_schema() for name, key in train_keys().items()}
    (required,) = (name for name, key in train_keys().items() if key.required)
    either = [
        {"required": [name]} for name in (required, *(old for old, now in RENAMED.items() if now == required))
    ]
    return {
        "$schema": _DIALECT,
        "title": "train.json",
        **closed_object({**keys, **foreign_schema()}),
        "anyOf": either,
    }


def optimizer_schema() -> dict[str, Any]:
    """Return the JSON Schema of an optimizer file."""
    foreign = {
        name: {"description": "Used by none of this version's optimizers."} for name in UNUSED_OPTIMIZER
    }
    own = {name: _section_key(users) for name, users in optimizer_keys().items()}
    known = closed_object(
        {
            "optimizer": own.pop("optimizer"),
            **own,
            **{name: entry for name, entry in foreign.items() if name not in own},
        }
    )
    path = {"pattern": r"\.", "description": "A class path, with the keyword arguments of its constructor."}
    by_class = {"type": "object", "properties": {"optimizer": path}, "required": ["optimizer"]}
    section = {"anyOf": [known, by_class]}
    top = {
        BASE: {
            "$ref": "#/$defs/section",
            "description": "The UNet's optimizer, and the default of the text encoder's.",
        },
        OVERRIDES: {
            "anyOf": [{"$ref": "#/$defs/section"}, {"type": "null"}],
            "description": "The text encoder's optimizer; what is absent or null comes from base.",
        },
        FREEZING: {
            "anyOf": [object_schema(FreezingOptions), {"type": "null"}],
            "description": (FreezingOptions.__doc__ or "").splitlines()[0],
        },
        **{name: key.json_schema() for name, key in keys_of(OptimizerFileOptions).items()},
    }
    return {
        "$schema": _DIALECT,
        "title": "optimizer file",
        **closed_object(top),
        "required": [BASE],
        "$defs": {"section": section},
    }


def key_reference() -> str:
    """Return every key of both files and of the command line as Markdown, from the docstrings."""
    section = {name: users for name, users in optimizer_keys().items() if name != "optimizer"}
    chosen = next(iter(optimizer_keys()["optimizer"].values())).doc
    lines = [
        "# Every key",
        "",
        "Written by `python scripts/export_schema.py` from the docstrings; `python train.py --help all` says "
        "the same. `null` always means the default. Every key of train.json is also an option of the "
        "command line, `--batch_size 2`.",
    ]
    for attribute, options in sections().items():
        lines += ["", f"## train.json: {attribute}", "", _first_line(options), "", *_table_of(options)]
    lines += ["", "## train.json: the optimizer file", "", *_table_of(FileOptions)]
    lines += [
        "",
        f"## The optimizer file: {BASE} and {OVERRIDES}",
        "",
        f"`optimizer`: {chosen} {names_of_optimizers()}",
        "",
    ]
    lines += _table((next(iter(users.values())), described(users)) for users in section.values())
    for title, owner in ((FREEZING, FreezingOptions), ("beside its sections", OptimizerFileOptions)):
        lines += ["", f"## The optimizer file: {title}", "", _first_line(owner), "", *_table_of(owner)]
    lines += ["", "## The command line alone", "", *_table_of(CommandOptions)]
    return "\n".join(lines) + "\n"


def _table_of(owner: Any) -> list[str]:
    return _table((key, key.doc) for key in keys_of(owner).values())


def _table(rows: Iterable[tuple[Key, str]]) -> list[str]:
    lines = ["| key | takes | default | |", "|---|---|---|---|"]
    for key, words in rows:
        default = "required" if key.required else f"`{json.dumps(plain(key.default))}`"
        lines.append(f"| `{key.name}` | {_cell(accepts(key.annotation))} | {default} | {_cell(words)} |")
    return lines


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _first_line(options: Any) -> str:
    return (options.__doc__ or "").splitlines()[0]


def _section_key(users: dict[str, Key]) -> dict[str, Any]:
    """Return one key of a section: the types of all optimizers, and the optimizers that use it."""
    if next(iter(users.values())).name == "optimizer":
        return {
            "enum": [*users, None],
            "description": "The optimizer's name; null is adamw8bit, in text_encoder_overrides base's.",
        }
    schemas = [key.json_schema() for key in users.values()]
    default = schemas[0]["default"]
    for schema in schemas:
        del schema["description"], schema["default"]
    kinds = list({str(schema): schema for schema in schemas}.values())
    return {
        **(kinds[0] if len(kinds) == 1 else {"anyOf": kinds}),
        "description": described(users),
        "default": default,
    }
