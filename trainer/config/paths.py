"""Find input paths: relative to the file that names them, then to the working directory.

Paths of the command line are relative to the working directory alone. Optimizer files are also looked for in
the program's configs/, so that a copy of one of its configurations works anywhere.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from data.regular import irregular
from trainer.checkpoints.run_folder import by_timestamp
from trainer.config.report import Place, Report, Written, closest
from trainer.models.options import BASE_FILE
from trainer.output import shown_path

FINDLAST = "findlast"
CONFIGS = Path(__file__).resolve().parents[2] / "configs"
"""The configurations that come with the program."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_LOCAL = ("checkpoints", "ckpts", "input", "logs", "model", "models", "output")
"""First parts of paths that look like a hub id's owner, and never are one."""

_READABLE = (".safetensors", ".ckpt")
_MODEL_FILES = (*_READABLE, ".pt", ".pth", ".bin")
_PROMPT_FILES = (".txt", ".json")
_IMAGE_LISTS = (".json", ".jsonl", ".csv", ".parquet")


def find(written: Written) -> Path | None:
    """Return an existing path as an absolute one; None if there is none."""
    for folder in _folders(written):
        candidate = _inside(folder, written.value)
        if _exists(candidate):
            return candidate
    return None


def resolve_model(written: Written, report: Report) -> str | None:
    """Return `resume_ckpt`: an absolute path, a hub id or `findlast`; None after reporting a problem."""
    if written.value == FINDLAST:
        return FINDLAST
    found = _model_path(written, report, "the model")
    if isinstance(found, str) or found is None:
        return found
    if found.is_file():
        return _model_file(found, written.place, report)
    if any((found / name).exists() for name in ("model_index.json", "ckpts", "resume", BASE_FILE)):
        return str(found)
    entries = sorted(found.iterdir()) if os.access(found, os.R_OK) else []
    runs = sorted((entry for entry in entries if (entry / "ckpts").is_dir()), key=by_timestamp, reverse=True)
    inside = [
        entry.name
        for entry in [*runs, *(entry for entry in entries if (entry / "model_index.json").exists())]
    ]
    newest = ", its newest run" if runs else ""
    close = f"; did you mean '{written.value.rstrip('/')}/{inside[0]}'{newest}?" if inside else ""
    if found.name == "ckpts":  # of its checkpoints the run chooses the newest
        close = f"; did you mean its run, '{shown_path(found.parent)}'?"
    report.error(
        written.place,
        f"no model in {written.value}: a diffusers folder holds model_index.json beside unet, text_encoder, "
        f"vae, tokenizer and scheduler, and a run's folder holds ckpts{close}",
    )
    return None


def resolve_ema_model(written: Written, report: Report) -> str | None:
    """Return `ema_resume_model`: an absolute path or a hub id; None after reporting a problem."""
    if written.value == FINDLAST:
        report.error(
            written.place,
            "findlast needs no key: a resumed run brings its EMA weights; set it to null",
        )
        return None
    return resolve_model(written, report)


def resolve_vae(written: Written, report: Report) -> str | None:
    """Return `vae`: an absolute path or a hub id; None after reporting a problem."""
    found = _model_path(written, report, "the VAE")
    if isinstance(found, str) or found is None:
        return found
    if found.is_file():
        return _model_file(found, written.place, report)
    if (found / "config.json").exists() or (found / "vae" / "config.json").exists():
        return str(found)
    report.error(
        written.place,
        f"no VAE in {written.value}: its folder holds config.json and weights, a model's folder holds them "
        "in vae/",
    )
    return None


def resolve_images(written: Written, report: Report) -> str | None:
    """Return one folder or list of images as an absolute path; None after reporting a problem."""
    is_list = written.value.lower().endswith(_IMAGE_LISTS)
    path = _found(written, report, "file" if is_list else "folder")
    if path is None:
        return None
    if path.is_file() and is_list:
        return str(path)
    if not path.is_dir():
        accepted = (
            f"name the folder that holds the images, or a list of them that ends in {', '.join(_IMAGE_LISTS)}"
        )
        report.error(written.place, f"not a folder: {written.value}; {accepted}")
        return None
    for package in (path, path / "data"):
        if (package / "__init__.py").exists() and (package / "rng.py").exists():
            report.error(
                written.place,
                f"{written.value} holds the program itself (data/__init__.py), not your images; put them "
                "into a folder of their own",
            )
            return None
    return str(path)


def resolve_prompts(written: Written, report: Report) -> str | None:
    """Return the prompts file as an absolute path; None after reporting a problem."""
    return _file_of_kind(written, report, _PROMPT_FILES, "a .txt or .json file of prompts")


def resolve_json(written: Written, report: Report) -> str | None:
    """Return a .json file as an absolute path; None after reporting a problem."""
    return _file_of_kind(written, report, (".json",), "a .json file")


def _file_of_kind(written: Written, report: Report, suffixes: Sequence[str], kind: str) -> str | None:
    path = _found(written, report, "file")
    if path is None or (path.is_file() and path.suffix.lower() in suffixes):
        return None if path is None else str(path)
    actual = "not one" if path.is_file() else "a folder"
    report.error(written.place, f"must be {kind}; {written.value} is {actual}")
    return None


def not_found(written: Written, kind: str) -> str:
    """Return the sentence about a missing path: the searched places, and the closest name in them."""
    close = next((close for folder in _folders(written) if (close := _close(folder, written))), "")
    configs = " and to the program's configs" if CONFIGS in _folders(written) else ""
    if Path(os.path.expanduser(written.value)).is_absolute():  # noqa: PTH111
        looked = ""
    elif written.folder is None:
        looked = (
            f" (relative to the working directory{configs})" if configs else " (in the working directory)"
        )
    elif written.folder == Path.cwd():
        looked = f" (relative to {written.place.file}{configs})"
    else:
        cwd = ", to the working directory" if configs else " and to the working directory"
        looked = f" (relative to {written.place.file}{cwd}{configs})"
    default = ", the default" if written.folder is not None and written.place.line is None else ""
    return f"{kind} not found: {written.value}{default}{looked}{close}"


def _found(written: Written, report: Report, kind: str) -> Path | None:
    value = written.value
    if not value.strip():
        report.error(written.place, f"is empty; name a {kind}, or write null for the default")
        return None
    if any(character < " " for character in value):
        shown = value.encode("unicode_escape").decode()
        report.error(
            written.place,
            f"the path holds a control character ({shown}); write \\ of a Windows path as / or as \\\\",
        )
        return None
    path = find(written)
    if path is None:
        report.error(written.place, not_found(written, kind))
    elif odd := irregular(path):
        report.error(written.place, f"{value} is a {odd}; name a {kind}")
        return None
    return path


def _model_path(written: Written, report: Report, what: str) -> Path | str | None:
    """Return an existing path or a hub id; None after reporting that it is neither."""
    value = written.value
    if find(written) is None and _HUB_ID.fullmatch(value) and not value.lower().endswith(_MODEL_FILES):
        owner = Written(value.split("/")[0], written.place, written.folder)
        if find(owner) is None and owner.value.lower() not in _LOCAL:
            return value
    if (
        value.strip()
        and find(written) is None
        and "/" not in value
        and "\\" not in value
        and not value.lower().endswith(_MODEL_FILES)
    ):
        sentence = not_found(written, "folder")
        hint = (
            ""
            if "did you mean" in sentence
            else f"; {what} is a folder, a .safetensors file or a hub id such as owner/name"
        )
        report.error(written.place, sentence + hint)
        return None
    return _found(written, report, "file" if value.lower().endswith(_MODEL_FILES) else "folder")


def _model_file(path: Path, place: Place, report: Report) -> str | None:
    if path.suffix.lower() in _READABLE:
        return str(path)
    if path.name == "model_index.json":
        report.error(place, "name the folder that holds model_index.json, not the file")
    else:
        report.error(place, f"not a model: {path.name}; a model's file ends in {' or '.join(_READABLE)}")
    return None


def _folders(written: Written) -> list[Path]:
    own = [] if written.folder is None else [written.folder]
    configs = [CONFIGS] if written.place.key == "optimizer_config" else []
    return list(dict.fromkeys([*own, Path.cwd(), *configs]))


def _inside(folder: Path, value: str) -> Path:
    # Not resolve(): a link keeps the name that the user knows.
    return Path(os.path.abspath(folder / os.path.expanduser(value)))  # noqa: PTH100, PTH111


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name that is too long, or no name at all
        return False


def _close(folder: Path, written: Written) -> str:
    """Return "; did you mean ...?" with the closest name instead of the first missing part of the path."""
    value = written.value
    parts = Path(value).parts
    missing = next(
        (i for i in range(len(parts)) if not _exists(_inside(folder, str(Path(*parts[: i + 1]))))), None
    )
    if missing is None:
        return ""
    try:
        names = [entry.name for entry in _inside(folder, str(Path(*parts[:missing]))).iterdir()]
    except OSError:
        return ""
    spelled = {name: Path(*parts[:missing], name, *parts[missing + 1 :]).as_posix() for name in names}
    there = [name for name in names if _exists(_inside(folder, spelled[name]))]
    if written.place.key == "optimizer_config":
        there = [name for name in there if _misspelt(parts[missing], name)]
    close = closest(parts[missing], there)
    return f"; did you mean '{spelled[close]}'?" if close else ""


def _misspelt(written: str, name: str) -> bool:
    """Return whether two names differ in spelling alone; another word or number means another GPU's file."""
    words, others = (re.split(r"[\W_]+", text.lower()) for text in (written, name))
    numbers, other_numbers = (re.findall(r"\d+", text) for text in (written, name))
    return (
        numbers == other_numbers
        and len(words) == len(others)
        and all(map(closest, words, ([o] for o in others)))
    )
