"""The options of every part of a run, and their keys in two JSON files.

Nothing here lists a key twice. `train.json` is flat: its keys are the fields of the sections of
`TrainConfig`, the dataclasses that stand beside the code they configure. The sections of an optimizer file
are the fields of the members of `OptimizerOptions`.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import textwrap
import types
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt, MinLen, MultipleOf
from pydantic import TypeAdapter, ValidationError

from data.options import DataOptions
from trainer.checkpoints.options import SaveOptions
from trainer.diffusion.options import ObjectiveOptions
from trainer.evaluation.options import FixedLossOptions, SampleOptions, ValidationOptions
from trainer.models.options import EmaOptions, FreezingOptions, ModelOptions, TrainableOptions
from trainer.optim import OptimizerOptions
from trainer.optim.gradients import GradientOptions
from trainer.optim.schedules import RateOptions
from trainer.reporting.options import LogOptions
from trainer.training.options import CacheOptions, LoopOptions, PrecisionOptions

DEFAULT_OPTIMIZER = "adamw8bit"


@dataclass(frozen=True, kw_only=True)
class FileOptions:
    """The names of further configuration files."""

    optimizer_config: str = "optimizer.json"
    """The optimizer file: optimizers, rates and the frozen layers of the text encoder. It is also looked for
    in the program's configs/, so that a copy of configs/sd15.json works in any folder."""


@dataclass(frozen=True, kw_only=True)
class CommandOptions:
    """Options of the command line alone."""

    config: str = "train.json"
    """The file that describes the run."""

    check: Literal["text", "json"] | None = None
    """Check everything, scan the images, print the plan of the run and its memory estimate, and stop
    without loading weights; json prints it for programs. The exit code is 1 where on_bad_image is error and
    there is one."""

    contact_sheets: str | None = None
    """With check, a folder for contact sheets: all images of each bucket, cropped, with their captions."""

    vram: Annotated[float, Gt(0)] | None = None
    """With check, the GiB of a GPU, which need not be in this machine: report whether the run fits, and if
    not, the change that makes it fit."""

    resume_weights_only: bool = False
    """Start a new run, at step 0, from the weights of the checkpoint resume_ckpt, instead of resuming it."""


@dataclass(frozen=True, kw_only=True)
class OptimizerFileOptions:
    """Keys at the top of the optimizer file, outside its sections."""

    text_encoder_lr_scale: Annotated[float, Gt(0)] = 1.0
    """Multiplies the text encoder's lr if it comes from base or train.json, not text_encoder_overrides."""

    log_grad_norm: bool = True
    """Log the norm of each network's gradient."""

    apply_grad_scaler_step_tweaks: bool = True
    """fp16 only: let the loss scale grow by 2 every 25 steps at first and ever more gently from step 500 on,
    by 1.15 every 2000 in the end; false doubles it every 2000 steps."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizers of both networks, their rates resolved: `lr` and `lr_scheduler` are never None."""

    unet: OptimizerOptions
    text_encoder: OptimizerOptions
    freezing: FreezingOptions = field(default_factory=FreezingOptions)
    log_grad_norm: bool = True
    apply_grad_scaler_step_tweaks: bool = True


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """All options of a run, in the sections that its parts take.

    Input paths are absolute, output paths as they were written. Two configurations are equal if they describe
    the same run; the files they were read from do not count, nor does `file_model`.
    """

    model: ModelOptions
    data: DataOptions = field(default_factory=DataOptions)
    cache: CacheOptions = field(default_factory=CacheOptions)
    parts: TrainableOptions = field(default_factory=TrainableOptions)
    objective: ObjectiveOptions = field(default_factory=ObjectiveOptions)
    loop: LoopOptions = field(default_factory=LoopOptions)
    rates: RateOptions = field(default_factory=RateOptions)
    gradients: GradientOptions = field(default_factory=GradientOptions)
    ema: EmaOptions = field(default_factory=EmaOptions)
    precision: PrecisionOptions = field(default_factory=PrecisionOptions)
    saving: SaveOptions = field(default_factory=SaveOptions)
    samples: SampleOptions = field(default_factory=SampleOptions)
    fixed_loss: FixedLossOptions = field(default_factory=FixedLossOptions)
    validation: ValidationOptions = field(default_factory=ValidationOptions)
    logging: LogOptions = field(default_factory=LogOptions)
    optimizers: OptimizerConfig
    source: Path = field(default=Path("train.json"), compare=False)
    optimizer_source: Path = field(default=Path("optimizer.json"), compare=False)
    file_model: str | None = field(default=None, compare=False)
    """The file's resume_ckpt, if the command line names another: the base of a LoRA that lacks its own."""


@dataclass(frozen=True)
class Key:
    """One key of a JSON file or of the command line."""

    name: str
    annotation: Any
    default: Any
    owner: type
    """The options class with this field."""

    @property
    def required(self) -> bool:
        """True if a configuration without it is refused."""
        return self.default is MISSING

    @property
    def doc(self) -> str:
        """The docstring under the field."""
        return docstrings(self.owner)[self.name]

    @property
    def variants(self) -> tuple[Any, ...]:
        """The types that it takes, without null."""
        return tuple(member for member in _members(self.annotation) if member is not types.NoneType)

    @property
    def kind(self) -> Any:
        """The type without null."""
        return self.variants[0] if len(self.variants) == 1 else Union[self.variants]  # noqa: UP007

    def validate(self, value: Any) -> Any:
        """Return `value`, as JSON holds it, as the field's type.

        Raises:
            pydantic.ValidationError: wrong type, or out of range.
        """
        return _adapter(self.kind).validate_json(json.dumps(value), strict=True, extra="forbid")

    def fits(self, value: Any) -> bool:
        """Return whether `value`, as JSON holds it, is one of the field's type."""
        try:
            self.validate(value)
        except ValidationError:
            return False
        return True

    def json_schema(self) -> dict[str, Any]:
        """Return the key's JSON Schema: type, range, description and default; null stands for the default."""
        is_object = dataclasses.is_dataclass(self.kind)
        schema = object_schema(self.kind) if is_object else _adapter(self.kind).json_schema()
        variants = schema.pop("anyOf", [schema])
        if not self.required:
            variants = [*variants, {"type": "null"}]
        schema = variants[0] if len(variants) == 1 else {"anyOf": variants}
        schema["description"] = self.doc
        if not self.required:
            schema["default"] = plain(self.default)
        return schema


@cache
def sections() -> dict[str, Any]:
    """Return the classes whose fields are the keys of train.json, by their attribute of `TrainConfig`."""
    hints = get_type_hints(TrainConfig)
    return {
        name: hint
        for name, hint in hints.items()
        if dataclasses.is_dataclass(hint) and hint is not OptimizerConfig
    }


@cache
def train_keys() -> dict[str, Key]:
    """Return the keys of train.json."""
    return {
        key.name: key for options in (*sections().values(), FileOptions) for key in keys_of(options).values()
    }


@cache
def optimizer_classes() -> dict[str, Any]:
    """Return the members of the union of optimizers by name."""
    return {keys_of(options)["optimizer"].default: options for options in get_args(OptimizerOptions)}


@cache
def optimizer_keys() -> dict[str, dict[str, Key]]:
    """Return the keys of all optimizers, and each by optimizer name."""
    found: dict[str, dict[str, Key]] = {}
    for name, options in optimizer_classes().items():
        for key in keys_of(options).values():
            found.setdefault(key.name, {})[name] = key
    return found


def described(users: Mapping[str, Key]) -> str:
    """Return the help for a key of the optimizer file: its docstring, its users and their differences."""
    names, first = list(users), next(iter(users.values()))
    words = [first.doc]
    if len(users) < len(optimizer_classes()):
        words.append(f"Used by {', '.join(names)}.")
    others: dict[tuple[str, str], list[str]] = {}
    for name, key in users.items():
        doc = "" if key.doc == first.doc else f"{key.doc} "
        default = "" if key.default == first.default else f"Default {json.dumps(plain(key.default))}."
        others.setdefault((doc, default), []).append(name)
    words += [
        f"{', '.join(same)}: {doc}{default}".strip()
        for (doc, default), same in others.items()
        if doc or default
    ]
    return " ".join(words)


@cache
def keys_of(options: type) -> dict[str, Key]:
    """Return a key for every field of an options class."""
    hints = get_type_hints(options, include_extras=True)
    return {
        entry.name: Key(entry.name, hints[entry.name], entry.default, options)
        for entry in dataclasses.fields(options)
    }


@cache
def docstrings(options: type) -> dict[str, str]:
    """Return the docstring under each field of a dataclass, on one line, inherited ones included."""
    found: dict[str, str] = {}
    for owner in reversed(options.__mro__):
        if not dataclasses.is_dataclass(owner):
            continue
        tree = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0]
        assert isinstance(tree, ast.ClassDef)
        for entry, below in zip(tree.body, tree.body[1:], strict=False):
            match entry, below:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    found[name] = " ".join(text.split())
    return found


def object_schema(options: Any) -> dict[str, Any]:
    """Return the JSON Schema of an object whose keys are the fields of an options class."""
    return closed_object({name: key.json_schema() for name, key in keys_of(options).items()})


def closed_object(properties: dict[str, Any]) -> dict[str, Any]:
    """Return the JSON Schema of an object that has these keys, text for readers, and no others."""
    return {
        "type": "object",
        "properties": {
            "$schema": {"type": "string"},
            "doc": {"description": "Text for readers."},
            **properties,
        },
        "patternProperties": {"^_": {"description": "Text for readers."}},
        "additionalProperties": False,
    }


def accepts(annotation: Any) -> str:
    """Return the values of a type in words: "a whole number, at least 1", "one of 'mse', 'huber'"."""
    members = [member for member in _members(annotation) if member is not types.NoneType]
    if len(members) == 2 and get_args(_limits(members[1])[0]) == (members[0], ...):
        return f"{accepts(members[0])}, or a list of such"
    if len(members) > 1:
        return ", or ".join(accepts(member) for member in members)
    kind, limits = _limits(members[0])
    if get_origin(kind) is Literal:
        choices = ", ".join(repr(choice) for choice in get_args(kind))
        return f"one of {choices}" if len(get_args(kind)) > 1 else choices
    if get_origin(kind) is tuple:
        inner = get_args(kind)
        if inner[-1] is Ellipsis:
            return f"a list, each {accepts(inner[0])}"
        return f"a list of {len(inner)}, each {accepts(inner[0])}"
    if get_origin(kind) is dict:
        return f"an object in braces, {{ ... }}, each value {accepts(get_args(kind)[1])}"
    if dataclasses.is_dataclass(kind):
        names = ", ".join(keys_of(kind))  # pyright: ignore[reportArgumentType]
        return f"an object in braces, {{ ... }}, of {names}"
    name = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[kind]
    return ", ".join([name, *(words for limit in limits if (words := _limit(limit)))])


def plain(value: Any) -> Any:
    """Return a field's value as JSON holds it: tuples as lists, no limit as null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {entry.name: plain(getattr(value, entry.name)) for entry in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    return None if value == float("inf") else value


@cache
def _adapter(annotation: Any) -> TypeAdapter[Any]:
    return TypeAdapter(annotation)


def _members(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def _limits(annotation: Any) -> tuple[Any, list[Any]]:
    if get_origin(annotation) is Annotated:
        kind, *limits = get_args(annotation)
        return kind, limits
    return annotation, []


def _limit(limit: Any) -> str:
    match limit:
        case Ge(value):
            return f"at least {value}"
        case Gt(value):
            return f"greater than {value}"
        case Le(value):
            return f"at most {value}"
        case Lt(value):
            return f"less than {value}"
        case MultipleOf(value):
            return f"a multiple of {value}"
        case MinLen(1):
            return "not empty"
    return ""
