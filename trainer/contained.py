"""Keep the paths that a folder of unknown origin names inside that folder: names and links may lead out."""

from __future__ import annotations

from pathlib import Path

from trainer.errors import UserError


def inside(folder: Path, name: str | Path) -> Path:
    """Return the path of `name` in `folder`; a name or link that leads outside is refused.

    Links of the hub cache into its own blobs are accepted.
    """
    path, root = folder / name, folder.resolve()
    try:
        place = path.resolve()
    except (OSError, ValueError, RuntimeError) as error:  # a loop of links, a null character
        raise UserError(
            f"{folder}: the path {str(name)!r} in it is not valid ({error}); choose another model."
        ) from error
    if place.is_relative_to(root) or place.parent in _blobs(root):
        return path
    raise UserError(
        f"{folder}: {str(name)!r} leads outside the folder, to {place}; nothing of it is read or copied. "
        "If it is yours, put the file itself there; otherwise choose another model."
    )


def files_inside(folder: Path) -> list[Path]:
    """Return the regular files in a folder and its subfolders; links to folders are not followed."""
    return sorted(path for path in folder.rglob("*") if inside(folder, path.relative_to(folder)).is_file())


def _blobs(root: Path) -> list[Path]:
    """Return the hub cache's folders of blobs for a folder in it: models--owner--name/blobs."""
    return [parent.parent / "blobs" for parent in (root, *root.parents) if parent.name == "snapshots"]
