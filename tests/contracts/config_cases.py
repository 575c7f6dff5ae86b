"""Case files: titles, the files of a case, its command line, and the expected messages."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from trainer.config.schema import optimizer_classes, optimizer_keys

GOOD_TRAIN = '{"resume_ckpt": "model"}\n'
GOOD_OPTIMIZER = '{"base": {"optimizer": "adamw", "lr": 1e-6}}\n'


@dataclass
class Case:
    """One case: files, command line and expected messages."""

    title: str
    files: dict[str, str] = field(default_factory=dict)
    command_line: list[str] = field(default_factory=list)
    without: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def write(self, folder: Path) -> None:
        """Write the case's files into `folder`, with a model, folders of images and prompts."""
        for name in ("model", "models/mini-sd"):
            (folder / name).mkdir(parents=True)
            (folder / name / "model_index.json").write_text("{}")
        for name in ("input", "pictures/faces", "other", "data"):
            (folder / name).mkdir(parents=True)
        for name in ("prompts.txt", "old.ckpt", "old.pth", "data/__init__.py", "data/rng.py"):
            (folder / name).write_text("a face\n")
        for name, text in {"train.json": GOOD_TRAIN, "optimizer.json": GOOD_OPTIMIZER, **self.files}.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8")
        for name in self.without:
            (folder / name).rmdir()


def _with_optimizers(line: str) -> str:
    """Fill in `{optimizers}`, `{optimizers with KEY}` and `{optimizers that ATTRIBUTE}` of a message."""
    line = line.replace("{optimizers}", ", ".join(map(repr, optimizer_classes())))
    for pattern, key in set(re.findall(r"({optimizers with (\w+)})", line)):
        line = line.replace(pattern, " and ".join(", ".join(optimizer_keys()[key]).rsplit(", ", 1)))
    for pattern, attribute in set(re.findall(r"({optimizers that (\w+)})", line)):
        names = [name for name, options in optimizer_classes().items() if getattr(options, attribute)]
        line = line.replace(pattern, " or ".join(names))
    return line


def read_cases(path: Path) -> list[Case]:
    """Return the cases of a file."""
    cases = []
    for block in re.split(r"^## ", path.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        title, _, rest = block.partition("\n")
        case = Case(title)
        for part in re.split(r"^--- ", rest, flags=re.MULTILINE)[1:]:
            name, _, text = part.partition("\n")
            lines = [line for line in text.splitlines() if line]
            match name:
                case "problems":
                    case.problems = [*map(_with_optimizers, lines)]
                case "notes":
                    case.notes = [*map(_with_optimizers, lines)]
                case "command line":
                    case.command_line = text.split()
                case "without":
                    case.without = lines
                case _:
                    case.files[name] = text.rstrip("\n") + "\n" if text.strip() else ""
        cases.append(case)
    return cases
