"""Validation images: split off the data, or from folders of their own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from data.contents import content_hashes
from data.errors import DataError
from data.index import Index, build_index
from data.options import DataOptions
from data.split import hold_out, take_out
from trainer.evaluation.options import ValidationFile
from trainer.output import counted
from trainer.reporting.tags import VALIDATION_LOSS


@dataclass(frozen=True)
class HeldOut:
    """A set of validation images."""

    tag: str
    index: Index
    keys: tuple[tuple[int, ...], ...]
    """By record id, the key of the image's fixed noise, made of the seed and the file's content."""


@dataclass(frozen=True)
class Split:
    """Training images and sets of validation images."""

    train: Index
    held_out: tuple[HeldOut, ...] = ()
    notes: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """Describe the validation sets."""
        return [f"{counted(len(held.index.records), 'image')} as {held.tag}" for held in self.held_out]


def split_images(
    file: ValidationFile, data: DataOptions, index: Index, cache: Path, *, save: bool = True
) -> Split:
    """Split the images of data_root, and scan the folders of further validation images.

    Args:
        index: all images of data_root.
        cache: the folder of content hashes.
        save: store new hashes there.

    Raises:
        DataError: a folder holds no images, or nothing is left to train on.
    """
    automatic = file.validate_training and file.val_split_mode == "automatic"
    notes: list[str] = []
    found: dict[str, Index] = {}
    for tag, root in _roots(file).items():
        found[tag] = _scan(tag, replace(data, data_root=root))
        inside = {record.path.resolve() for record in found[tag].records}
        shared = {
            identity for identity, record in enumerate(index.records) if record.path.resolve() in inside
        }
        if shared:
            index, _ = take_out(index, shared)
            notes.append(
                f"{len(shared)} images of data_root are not trained: they are validation images of {tag}"
            )
    if automatic:
        contents = content_hashes(index.records, cache / "contents-split.json", save=save)
        index, held = hold_out(index, contents, proportion=file.auto_split_proportion, seed=file.seed)
        found = {VALIDATION_LOSS: held, **found}
    if not any(record.multiply > 0 for record in index.records):
        raise DataError(
            "validation: every image of data_root is for validation, and none is left to train on; name "
            "other folders"
        )
    sets = []
    for number, (tag, held) in enumerate(found.items()):
        memory = "split" if automatic and tag == VALIDATION_LOSS else f"val-{number}"
        path = cache / f"contents-{memory}.json"
        contents = content_hashes(held.records, path, save=save and memory != "split")
        keys = tuple(
            (file.seed, int(contents.get(record, "0")[:15], 16)) for record in range(len(held.records))
        )
        sets.append(HeldOut(tag, held, keys))
    return Split(index, tuple(sets), tuple(notes))


def _roots(file: ValidationFile) -> dict[str, str]:
    """Return the folders of validation images by tag."""
    roots: dict[str, str] = {}
    if file.validate_training and file.val_split_mode == "manual" and file.manual_data_root is not None:
        roots[VALIDATION_LOSS] = file.manual_data_root
    extra = file.extra_manual_datasets or {}
    return roots | {f"{VALIDATION_LOSS} {name}": root for name, root in extra.items()}


def _scan(tag: str, data: DataOptions) -> Index:
    try:
        return build_index(data)
    except DataError as error:
        problems = [problem.replace("data_root: ", f"validation ({tag}): ", 1) for problem in error.problems]
        raise DataError(problems) from error
