"""The validation file, `validation_config`, with EveryDream2's keys."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from data.regular import read_regular
from trainer.config.paths import resolve_images
from trainer.config.positions import read_json
from trainer.config.report import Place, Report, Written, read_keys, unknown_key, values_of
from trainer.config.schema import keys_of
from trainer.errors import UserError
from trainer.evaluation.options import ValidationFile
from trainer.output import shown_path

_OLD = {"val_data_root": "manual_data_root", "val_split_proportion": "auto_split_proportion"}
"""EveryDream2's earlier names of keys, and today's."""

_RELATIVE = "use_relative_loss"


def load_validation(path: Path | None) -> ValidationFile:
    """Return the contents of a validation file; without a file (None) there are no validation images.

    Raises:
        UserError: all problems of the file, each with its line.
    """
    if path is None:
        return ValidationFile(validate_training=False)
    report = Report()
    file = read_validation(path, report)
    if file is None or report.errors:
        raise UserError(report.errors)
    return file


def read_validation(path: Path, report: Report) -> ValidationFile | None:
    """Return the contents of a validation file, folders as absolute paths; None after reporting problems."""
    file = shown_path(path)
    report.files.append(file)
    before = len(report.errors)
    try:
        content = read_regular(path)
    except OSError as reason:
        report.error(Place(file), f"the validation file cannot be read: {reason.strerror or reason}")
        return None
    document = read_json(content, file, report, path.parent)
    if document is None:
        return None
    members: dict[str, Written] = {}
    for name, written in document.members(document.values).items():
        if name == "documentation":
            continue
        same = members.setdefault(_OLD.get(name, name), written)
        if written.value is not None and same is not written:
            if same.value is not None:
                report.error(written.place, f"duplicates {same.place.key}; remove one of the two")
            members[_OLD.get(name, name)] = written

    def foreign(name: str, written: Written) -> None:
        if name != _RELATIVE:
            report.error(written.place, unknown_key(name, known))
        elif written.value not in (None, False):
            report.note(written.place, "has no effect; EveryDream2 reads it and never uses it")

    known = keys_of(ValidationFile)
    read = read_keys(members, known, report, foreign=foreign)
    values, places = values_of(read), {name: written.place for name, written in read.items()}
    _resolve_folders(values, places, path, report)
    found = ValidationFile(**values)
    if len(report.errors) == before:
        _check(found, places, Place(file), report)
    return found if len(report.errors) == before else None


def _resolve_folders(values: dict[str, Any], places: dict[str, Place], path: Path, report: Report) -> None:
    root = values.get("manual_data_root")
    if root is not None and values.get("val_split_mode") == "manual":
        values["manual_data_root"] = resolve_images(
            Written(root, places["manual_data_root"], path.parent), report
        )
    extra = values.get("extra_manual_datasets")
    if extra:
        place = places["extra_manual_datasets"]
        entries = {
            name: Written(folder, replace(place, key=f"{place.key}.{name}"), path.parent)
            for name, folder in extra.items()
        }
        values["extra_manual_datasets"] = {
            name: resolve_images(entry, report) for name, entry in entries.items()
        }


def _check(found: ValidationFile, places: dict[str, Place], file: Place, report: Report) -> None:
    """Report contradictions and keys without effect."""
    mode = found.val_split_mode
    if found.validate_training and mode == "manual" and found.manual_data_root is None:
        report.error(
            places["val_split_mode"],
            "manual needs manual_data_root, the folder of images to measure; name it",
        )
    idle = {"manual_data_root": "manual", "auto_split_proportion": "automatic"}
    for name, needed in idle.items():
        if (
            name in places
            and mode != needed
            and (name == "manual_data_root" or getattr(found, name) != ValidationFile().auto_split_proportion)
        ):
            report.note(places[name], f"has no effect: val_split_mode is {mode}")
    if (
        (not found.validate_training or mode == "none")
        and not found.extra_manual_datasets
        and not found.stabilize_training_loss
    ):
        report.note(
            file, "asks for no validation: nothing is measured but the fixed-noise loss of training images"
        )
