"""JSON Schemas of the two files, for editors: the same keys, types, ranges and words as the checks and `--help`."""

from __future__ import annotations

from typing import Any

from trainer.config.ed2 import LATER_OPTIMIZER, SCALER_TWEAKS, UNUSED_OPTIMIZER, foreign_schema
from trainer.config.optimizers import BASE, FREEZING, OVERRIDES
from trainer.config.schema import (
    FreezingOptions,
    Key,
    OptimizerFileOptions,
    closed_object,
    described,
    keys_of,
    object_schema,
    optimizer_keys,
    train_keys,
)

_DIALECT = "https://json-schema.org/draft/2020-12/schema"


def train_schema() -> dict[str, Any]:
    """Return the JSON Schema of train.json."""
    keys = {name: key.json_schema() for name, key in train_keys().items()}
    required = [name for name, key in train_keys().items() if key.required]
    return {"$schema": _DIALECT, "title": "train.json", **closed_object({**keys, **foreign_schema()}), "required": required}


def optimizer_schema() -> dict[str, Any]:
    """Return the JSON Schema of an optimizer file."""
    foreign: dict[str, Any] = {
        name: {"enum": [*inert, None], "description": "Not supported yet by this version."} for name, inert in LATER_OPTIMIZER.items()
    }
    foreign |= {name: {"description": "Used by none of this version's optimizers."} for name in UNUSED_OPTIMIZER}
    own = {name: _section_key(users) for name, users in optimizer_keys().items()}
    section = closed_object(
        {"optimizer": own.pop("optimizer"), **own, **{name: entry for name, entry in foreign.items() if name not in own}}
    )
    top = {
        BASE: {"$ref": "#/$defs/section", "description": "The UNet's optimizer, and the default of the text encoder's."},
        OVERRIDES: {
            "anyOf": [{"$ref": "#/$defs/section"}, {"type": "null"}],
            "description": "The text encoder's optimizer; what is absent or null comes from base.",
        },
        FREEZING: {
            "anyOf": [object_schema(FreezingOptions), {"type": "null"}],
            "description": (FreezingOptions.__doc__ or "").splitlines()[0],
        },
        **{name: key.json_schema() for name, key in keys_of(OptimizerFileOptions).items()},
        SCALER_TWEAKS: {"type": ["boolean", "null"], "description": "EveryDream2's; without effect in this version."},
    }
    return {"$schema": _DIALECT, "title": "optimizer file", **closed_object(top), "required": [BASE], "$defs": {"section": section}}


def _section_key(users: dict[str, Key]) -> dict[str, Any]:
    """Return one key of a section: what any of the optimizers takes, and which optimizers use it."""
    if next(iter(users.values())).name == "optimizer":
        return {"enum": [*users, None], "description": "The optimizer's name; null is adamw8bit, in text_encoder_overrides base's."}
    schemas = [key.json_schema() for key in users.values()]
    default = schemas[0]["default"]
    for schema in schemas:
        del schema["description"], schema["default"]
    kinds = list({str(schema): schema for schema in schemas}.values())
    return {**(kinds[0] if len(kinds) == 1 else {"anyOf": kinds}), "description": described(users), "default": default}
