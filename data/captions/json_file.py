"""A JSON file beside the image, with the same keys as YAML."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from data.captions.entry import Entry, read_entry
from data.captions.text import read_text
from data.errors import FileError
from data.folder import Folder


@dataclass(frozen=True)
class JsonFile:
    """The file with the image's name and the extension .json."""

    suffix: str = ".json"

    def read(self, stem: str, folder: Folder) -> Entry | None:
        """Read the file, if there is one."""
        name = folder.beside(stem, self.suffix)
        if name is None:
            return None
        values = read_json(read_text(folder.path / name), name)
        if not isinstance(values, dict):
            raise FileError(f'{name}: must hold keys and values, such as {{"caption": "a cat"}}')
        return read_entry(values, file=name, source=self.suffix)


def read_json(text: str, file: str, line: int = 1) -> Any:
    """Parse JSON that starts at a line of a file; FileError names file and line."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise FileError(f"{file}:{line + error.lineno - 1}: is not JSON ({error.msg})") from error
    except (RecursionError, ValueError) as error:  # too many brackets or digits
        reason = "holds JSON that is nested too deep or has a number that is too long"
        raise FileError(f"{file}:{line}: {reason}") from error
