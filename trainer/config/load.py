"""Turn a command line into a checked `TrainConfig`, and report the problems of all files together."""

from __future__ import annotations

import dataclasses
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data.regular import read_regular
from trainer.config.ed2 import RENAMED, in_optimizer_file, other_word, translate
from trainer.config.help import help_text
from trainer.config.optimizer_rules import apply_optimizer_rules
from trainer.config.optimizers import BASE, Rates, read_optimizers
from trainer.config.overrides import parse
from trainer.config.paths import (
    CONFIGS,
    FINDLAST,
    find,
    not_found,
    resolve_ema_model,
    resolve_images,
    resolve_json,
    resolve_model,
    resolve_prompts,
    resolve_vae,
)
from trainer.config.positions import Document, read_json
from trainer.config.report import (
    COMMAND_LINE,
    Place,
    Report,
    Written,
    checked,
    closest,
    did_you_mean,
    read_keys,
    shown,
    values_of,
)
from trainer.config.resolved import clip_skip_of_format_1
from trainer.config.rules import Settings, apply_rules, drop_overridden, resolved
from trainer.config.sample_file import read_sample_prompts
from trainer.config.schema import (
    CommandOptions,
    Key,
    OptimizerConfig,
    TrainConfig,
    accepts,
    keys_of,
    optimizer_classes,
    sections,
    train_keys,
)
from trainer.config.validation_file import read_validation
from trainer.errors import UserError
from trainer.output import WIDTH, say, shown_path

_FREEZE = "; to leave a network as it is, set disable_unet_training or disable_textenc_training"
_IN_A_FILE = "; write the keys into a .json file and name the file here"
_NAMES_FILES = ("data_root", "optimizer_config")
"""Keys whose defaults name files, and are only looked for after a file without syntax errors."""


@dataclass(frozen=True)
class Loaded:
    """A configuration that passed every check, the command line's own options, and notes for its author."""

    config: TrainConfig
    command: CommandOptions
    notes: tuple[str, ...]


def load_config(argv: Sequence[str]) -> Loaded:
    """Return the configuration of a command line, without its program's name; read text files alone.

    Raises:
        UserError: all problems of the command line and of all files, each with its place.
        SystemExit: after printing the help.
    """
    _check_names(argv)
    report = Report()
    arguments = parse(argv, report)
    if arguments.help is not None:
        columns = shutil.get_terminal_size((WIDTH, 24)).columns
        say(*help_text(arguments.help, min(WIDTH, columns)).splitlines(), stream=sys.stdout)
        raise SystemExit(0)
    source = Path.cwd() / arguments.command.config
    file = shown_path(source)
    report.files.append(file)
    document = _read(source, file, Place(COMMAND_LINE, None, "config"), report)
    if document and BASE in document.values and "resume_ckpt" not in document.values:
        report.error(
            Place(file),
            "is an optimizer file, not a train.json; name it with --optimizer_config or in a train.json",
        )
        document = None
    written = _written(document, report) if document else {}
    file_model = _overridden_model(written, arguments.values)
    written |= arguments.values
    if document and not arguments.config_is_named and {"resume_ckpt", "data_root"} <= arguments.values.keys():
        report.note(
            Place(file),
            "is read too, since --config names no other file; the command line wins over its keys",
        )
    drop_overridden(written)
    settings = _settings(written, document, Place(file), report)
    optimizers, optimizer_source = _optimizers(settings, source, report)
    if settings.values.get("sample_prompts"):
        prompts = read_sample_prompts(Path(settings["sample_prompts"]), report)
        every = prompts.generate_samples_every_n_steps if prompts else None
        if every and "sample_steps" in arguments.values and settings.values.get("sample_steps") != every:
            report.note(
                settings.place("sample_steps"),
                f"is not used: generate_samples_every_n_steps of sample_prompts is {every}",
            )
    if settings.values.get("validation_config"):
        read_validation(Path(settings["validation_config"]), report)
    apply_rules(settings)
    if optimizers is not None:
        apply_optimizer_rules(settings, optimizers, shown_path(optimizer_source))
    if report.errors or optimizers is None:
        raise UserError(report.errors)
    config = _config(resolved(settings.values), optimizers)
    config = replace(config, source=source, optimizer_source=optimizer_source, file_model=file_model)
    return Loaded(config, arguments.command, report.notes)


def _check_names(argv: Sequence[str]) -> None:
    """Refuse names that libraries cannot open, and a working directory that is gone."""
    try:
        place = str(Path.cwd())
    except FileNotFoundError as error:
        raise UserError(
            "the working directory has been deleted; change to a folder that is there."
        ) from error
    for name in (place, *argv):
        try:
            name.encode()
        except UnicodeEncodeError as error:
            where = "the working directory" if name == place else "command line"
            raise UserError(f"{where}: {name} is not UTF-8; rename it, or name it by a link.") from error


def _read(path: Path, file: str, named: Place, report: Report) -> Document | None:
    """Return a JSON file; None after reporting at `named` that it cannot be opened, or its syntax error."""
    try:
        if path.is_dir():
            inner = " (it holds train.json)" if (path / "train.json").exists() else ""
            problem = f"{file} is a folder{inner}; name the file"
        else:
            return read_json(read_regular(path), file, report, path.parent)
    except FileNotFoundError:
        names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        close = closest(path.name, [name for name in names if name.endswith(".json")])
        first = f"name yours, or to try the program {shown_path(CONFIGS.parent / 'train.json')}"
        hint = f"did you mean '{shown_path(path.parent / close)}'?" if close else first
        problem = f"file not found: {file}; {hint}"
    except OSError as error:
        problem = f"{file} cannot be read: {error.strerror}"
    report.error(named, problem)
    return None


def _written(document: Document, report: Report) -> dict[str, Written]:
    """Return the entries of train.json by this program's keys, and report foreign and unknown keys."""
    known = train_keys()
    result: dict[str, Written] = {}
    for name, entry in document.members(document.values).items():
        key = RENAMED.get(name, name)
        if key in known:
            same = result.setdefault(key, entry)
            if same.value != entry.value and {name, same.place.key} & RENAMED.keys():
                report.error(
                    entry.place,
                    f"{shown(entry.value)} contradicts {same.place.key}, which means the same; remove one "
                    "of the two",
                )
            continue
        foreign = translate(name, entry, report)
        if foreign is None:
            report.error(entry.place, _unknown_key(name))
        result |= foreign or {}
    skip = result.get("clip_skip")
    of_earlier_run = "_format" not in document.values and Path(document.folder or "", "run.log").is_file()
    if of_earlier_run and skip and isinstance(skip.value, int) and skip.value > 0:
        now = clip_skip_of_format_1(skip.value)
        was = f"the {skip.value} of an earlier version's run"
        report.note(skip.place, f"{was} is read as {now}: the penultimate layer was 1, and is 2 now")
        result["clip_skip"] = replace(skip, value=now)
    return result


def _overridden_model(written: Mapping[str, Written], given: Mapping[str, Written]) -> str | None:
    """Return the file's resume_ckpt, resolved, if the command line names another model."""
    own = written.get("resume_ckpt")
    if own is None or "resume_ckpt" not in given or not isinstance(own.value, str) or own.value == FINDLAST:
        return None
    return resolve_model(own, Report())


def _unknown_key(name: str) -> str:
    if name in keys_of(CommandOptions):
        return f"belongs on the command line, as --{name}"
    if inside := in_optimizer_file(name):
        return f"belongs in the optimizer file, as {inside}"
    word = other_word(name)
    return "unknown key" + (
        f"; did you mean '{word}'?" if word else did_you_mean(name, train_keys()) or "; --help all lists them"
    )


def _settings(
    written: dict[str, Written], document: Document | None, default: Place, report: Report
) -> Settings:
    """Check every value and input path; a key whose value is wrong is absent from the settings' values."""
    values: dict[str, Any] = {}
    given = {name: entry for name, entry in written.items() if entry.value is not None}
    for name, key in train_keys().items():
        if name in given:
            hint = _hint(name, given[name].value)
            if dataclasses.is_dataclass(key.kind):
                right, value = _object(key, given[name], document, report)
            else:
                right, value = checked(key, given[name].value, given[name].place, report, hint)
            if right:
                values[name] = value
                given[name] = replace(given[name], value=value)
        elif key.required:
            if document is not None:
                report.error(
                    default, f"{name} is missing: name the model to start from, for instance models/mini-sd"
                )
        elif document is not None or name not in _NAMES_FILES:
            values[name] = key.default
    settings = Settings(values, given, default, report)
    _resolve_paths(values, settings, report)
    return settings


def _hint(name: str, value: Any) -> str:
    """Return the remedy to add to the sentence about a wrong value, if the intention is clear."""
    if name == "lr" and value == 0:
        return _FREEZE
    if name in ("optimizer_config", "sample_prompts", "validation_config") and isinstance(value, dict):
        return _IN_A_FILE
    sides = re.fullmatch(r"(\d+)\s*[x,×]\s*(\d+)", value) if isinstance(value, str) else None
    if name != "resolution" or sides is None:
        return ""
    side = max(64, 64 * round((int(sides[1]) * int(sides[2])) ** 0.5 / 64))
    return f"; write {side}: images keep their shape and are resized to about its square in area"


def _object(key: Key, entry: Written, document: Document | None, report: Report) -> tuple[bool, Any]:
    """Return whether an object fits a key's options class, and the options; report its problems."""
    if not isinstance(entry.value, dict):
        typed = isinstance(entry.value, str) and entry.value.startswith("{")
        quotes = "; its keys need double quotes, which shells drop outside of single ones" if typed else ""
        report.error(entry.place, f"must be {accepts(key.annotation)}; got {shown(entry.value)}{quotes}")
        return False, None
    if document is None or entry.place.file == COMMAND_LINE:
        document = Document(COMMAND_LINE)
    before = len(report.errors)
    read = read_keys(document.members(entry.value, key.name), keys_of(key.kind), report)
    return len(report.errors) == before, key.kind(**values_of(read))


def _resolve_paths(values: dict[str, Any], settings: Settings, report: Report) -> None:
    """Make input paths absolute; report those that do not exist, and remove them from `values`."""
    single = {
        "resume_ckpt": resolve_model,
        "vae": resolve_vae,
        "sample_prompts": resolve_prompts,
        "validation_config": resolve_json,
        "ema_resume_model": resolve_ema_model,
    }
    for name, resolve in single.items():
        if values.get(name) is not None:
            path = resolve(settings.written[name], report)
            values |= {name: path}
            if path is None:
                del values[name]
    if "data_root" not in values:
        return
    root = values["data_root"]
    folder = (Path.cwd() / settings.default.file).parent
    default = Written(root, replace(settings.default, key="data_root"), folder)
    entry = settings.written.get("data_root", default)
    if root == ():
        report.error(entry.place, "is an empty list; name at least one folder of images")
    roots = [root] if isinstance(root, str) else root
    found = [resolve_images(replace(entry, value=folder), report) for folder in roots]
    if None in found or not found:
        del values["data_root"]
    else:
        values["data_root"] = found[0] if isinstance(root, str) else tuple(path for path in found if path)


def _optimizers(settings: Settings, source: Path, report: Report) -> tuple[OptimizerConfig | None, Path]:
    """Read the optimizer file, unless its name is wrong or unknown."""
    if "optimizer_config" not in settings.values:
        return None, source
    entry = settings.written.get("optimizer_config") or Written(
        settings["optimizer_config"], replace(settings.default, key="optimizer_config"), source.parent
    )
    path = find(entry)
    if path is None or path.is_dir():
        sentence = (
            not_found(entry, "optimizer file")
            if path is None
            else f"{entry.value} is a folder; name the file"
        )
        if path is None and entry.value.lower() in optimizer_classes():
            sentence = (
                f"{entry.value} is an optimizer, not a file; name a file such as optimizer.json whose "
                "base.optimizer it is"
            )
        report.error(entry.place, sentence)
        return None, source
    file = shown_path(path)
    if file in report.files:
        report.error(entry.place, f"{file} is this very file; name an optimizer file such as optimizer.json")
        return None, source
    report.files.append(file)
    document = _read(path, file, entry.place, report)
    if document is None:
        return None, path
    taken = ("lr", "lr_scheduler", "lr_warmup_steps", "lr_decay_steps")
    rates = Rates(
        written={
            name: settings.written[name]
            for name in taken
            if name in settings.written and name in settings.values
        },
        unet=not settings.values.get("disable_unet_training"),
        text_encoder=not settings.values.get("disable_textenc_training"),
    )
    return read_optimizers(document, rates, report), path


def _config(values: dict[str, Any], optimizers: OptimizerConfig) -> TrainConfig:
    built = {
        section: options(**{name: values[name] for name in keys_of(options)})
        for section, options in sections().items()
    }
    return TrainConfig(**built, optimizers=optimizers)
