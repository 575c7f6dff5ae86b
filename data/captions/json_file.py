"""A JSON file beside the image with words and settings under the same keys as YAML."""

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
    """The file of the image's name with the extension .json."""

    suffix: str = ".json"

    def read(self, stem: str, folder: Folder) -> Entry | None:
        """Return what the file says, or None where there is none.

        Raises:
            FileError: the file is there but cannot be used.
        """
        name = folder.beside(stem, self.suffix)
        if name is None:
            return None
        values = read_json(read_text(folder.path / name), name)
        if not isinstance(values, dict):
            raise FileError(f'{name}: must hold keys and values, such as {{"caption": "a cat"}}')
        return read_entry(values, file=name, source=self.suffix)


def read_json(text: str, file: str, line: int = 1) -> Any:
    """Return what a text of JSON holds.

    Args:
        text: the JSON.
        file: what messages call its file.
        line: the line of the file where the text begins, from 1.

    Raises:
        FileError: it is not JSON; the reason names file and line.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise FileError(f"{file}:{line + error.lineno - 1}: is not JSON ({error.msg})") from error
    except (RecursionError, ValueError) as error:  # nested beyond reason, or a number of thousands of digits
        raise FileError(
            f"{file}:{line}: holds JSON that is nested too deep or has a number that is too long"
        ) from error
