"""The documentation stays short, its sentences readable, and its links alive."""

import dataclasses
import json
import re
import shlex
from pathlib import Path

import pytest

from tests.contracts.test_imports import LAYERS
from trainer.config.overrides import parse
from trainer.config.report import Report
from trainer.config.schema import (
    CommandOptions,
    FreezingOptions,
    OptimizerFileOptions,
    keys_of,
    optimizer_keys,
    plain,
    train_keys,
)
from trainer.evaluation.options import SamplePrompts, ValidationFile
from trainer.models.options import LoraOptions

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
LINES, WORDS = 250, 2_200
LONG_SENTENCE, LONG_SENTENCES = 35, 10

FENCE = re.compile(r"^ *```.*?^ *```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
PICTURE = re.compile(r'<img src="([^"]+)"[^>]*>')
RULE = re.compile(r"^[ |:-]+$", re.MULTILINE)


def sentences(text: str) -> list[str]:
    """Return the sentences of a page: paragraphs, list entries, headings and table cells, no code blocks."""
    text = PICTURE.sub("", RULE.sub("", FENCE.sub("", text)))
    text = re.sub(r"`[^`]*`", "code", text)
    while LINK.search(text):
        text = LINK.sub(r"\1", text)
    text = re.sub(r"^#+ (.*)$", r"\n\n\1\n\n", text, flags=re.MULTILINE)
    text = re.sub(r"^(?:\s*[-*] |\s*\d+\. )", "\n\n", text, flags=re.MULTILINE)
    text = re.sub(
        r"^\|.*$", lambda row: "\n\n" + row[0].replace("|", "\n\n") + "\n\n", text, flags=re.MULTILINE
    )
    blocks = [" ".join(block.split()) for block in re.split(r"\n\s*\n", text)]
    return [part for block in blocks for part in re.split(r"(?<=[.!?])[\")*]*\s+(?=\S)", block) if part]


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE):
        plain = LINK.sub(r"\1", heading).replace("`", "").strip().lower()
        anchor = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        number = next(n for n in range(len(found) + 2) if (f"{anchor}-{n}" if n else anchor) not in found)
        found.add(f"{anchor}-{number}" if number else anchor)
    return found


def dead_links(page: Path) -> list[str]:
    """Return the links of a page to missing files or anchors; web addresses are not followed."""
    dead = []
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in [*(target for _, target in LINK.findall(text)), *PICTURE.findall(text)]:
        name, _, anchor = target.partition("#")
        if "://" in target:
            continue
        goal = page.parent / name if name else page
        if not goal.exists() or (anchor and goal.suffix == ".md" and anchor not in anchors(goal)):
            dead.append(target)
    return dead


def test_the_readme_is_short():
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LINES
    assert len(text.split()) <= WORDS


def test_few_sentences_are_long():
    found = [
        f"{page.relative_to(ROOT)}: {sentence}"
        for page in PAGES
        for sentence in sentences(page.read_text(encoding="utf-8"))
        if len(sentence.split()) > LONG_SENTENCE
    ]
    assert len(found) <= LONG_SENTENCES, "\n".join(found)


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"], ids=lambda page: page.name
)
def test_links_and_anchors_lead_somewhere(page: Path):
    assert dead_links(page) == []


def test_the_readme_links_every_page():
    linked = {target.partition("#")[0] for _, target in LINK.findall(README.read_text(encoding="utf-8"))}
    assert {page.relative_to(ROOT).as_posix() for page in PAGES[1:]} <= linked


QUOTED = [
    "x the d it finds",
    "that are free",
    "tensors alone: ",
    "fits into ",
    " GiB of the ",
    "what would spare memory, the cheapest first",
    "it keeps its state in 8 bits",
    "training waited",
    "Resuming after step ",
    "write the number without the quotes",
    "unknown key; did you mean",
    " could not be written",
    "an older checkpoint could not be deleted",
    "its event file was deleted",
    "training continues (",
    "compare the samples",
    "possible overfitting",
    "the rate may be too high",
]
"""Pieces of the program's messages that the documentation quotes."""


def test_quoted_messages_are_the_program_s():
    pages = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    source = "\n".join(
        path.read_text(encoding="utf-8")
        for folder in ("trainer", "data")
        for path in (ROOT / folder).rglob("*.py")
    )
    assert [piece for piece in QUOTED if piece not in pages] == [], "not quoted any more"
    assert [piece for piece in QUOTED if piece not in source] == [], "reworded: change the documentation too"


def options_of_commands(text: str) -> list[str]:
    """Return the options of each command of train.py in a page, which may go on after a backslash."""
    commands = re.findall(r"\btrain\.py((?: +[^\s|>&;#`]+)+)", text.replace("\\\n", " "))
    return [command for command in commands if " --" in command]


def test_commands_have_options_that_exist():
    checked = 0
    for page in PAGES:
        for options in options_of_commands(page.read_text(encoding="utf-8")):
            report = Report()
            parse(shlex.split(options), report)
            assert report.errors == (), f"{page.name}: train.py{options}"
            checked += 1
    assert checked > 25


def defaults() -> dict[str, set[str]]:
    """Return the defaults of each key of any file or section, as the documentation writes them."""
    found: dict[str, set[str]] = {}
    optimizer = [key for users in optimizer_keys().values() for key in users.values()]
    others = [
        key
        for owner in (
            CommandOptions,
            FreezingOptions,
            OptimizerFileOptions,
            SamplePrompts,
            ValidationFile,
            LoraOptions,
        )
        for key in keys_of(owner).values()
    ]
    for key in [*train_keys().values(), *optimizer, *others]:
        if not key.required:
            value = plain(key.default)
            text = ", ".join(
                f"{one}".removesuffix(".0") for one in (value if isinstance(value, list) else [value])
            )
            found.setdefault(key.name, set()).add(text.lower())
    return found


def test_defaults_in_tables_are_those_of_the_code():
    known, checked = defaults(), 0
    for page in PAGES:
        rows = [
            re.split(r" *(?<!\\)\| *", line)[1:3]
            for line in page.read_text("utf-8").splitlines()
            if line[:1] == "|"
        ]
        inside = False
        for name, value in (row for row in rows if len(row) == 2):
            if name == "key":
                inside = value == "default"
            names = re.findall(r"`(\w+)`", name)
            values = [value] if len(names) == 1 else value.split(", ")
            if not inside or len(values) != len(names):
                continue
            for key, text in zip(names, values, strict=True):
                another = text.strip("`") in known  # the default is that key's value
                if re.fullmatch(r"`\w+`|[\d., ]+|true|false", text) and not another:
                    assert text.strip("`") in known[key], f"{page.name}: {key}: {text}, but {known[key]}"
                    checked += 1
    assert checked > 10


def test_settings_in_the_text_are_accepted():
    checked = 0
    for page in PAGES:
        for name, value in re.findall(r'`"(\w+)": ([^`]+)`', page.read_text(encoding="utf-8")):
            key = {**{n: next(iter(u.values())) for n, u in optimizer_keys().items()}, **train_keys()}.get(
                name
            )
            if key is not None:
                assert dataclasses.is_dataclass(key.kind) or key.fits(json.loads(value)), (
                    f"{page.name}: {name}"
                )
                checked += 1
    assert checked > 8


def test_the_map_of_packages_is_in_the_order_of_imports():
    page = (ROOT / "docs" / "code.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \[([\w/]+)\]", page, re.MULTILINE)
    packages = [
        name.replace(".", "/")
        for layer in LAYERS
        for name in layer
        if name not in ("train", "scripts", "trainer")
    ]
    assert rows == [*packages, "scripts", "tests"]


def test_no_sentence_stands_twice():
    seen: dict[str, str] = {}
    twice = []
    for page in PAGES:
        if page.name == "keys.md":
            continue  # made from docstrings
        for sentence in sentences(page.read_text(encoding="utf-8")):
            if len(sentence.split()) < 8 or not sentence.endswith((".", "?", "!")):
                continue
            if sentence in seen:
                twice.append(f"{seen[sentence]} and {page.name}: {sentence}")
            seen[sentence] = page.name
    assert twice == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One two. Three `a b c` four.", ["One two.", "Three code four."]),
        ("| a cell | b. c |\n|---|---|\n| d | |\n", ["a cell", "b.", "c", "d"]),
        ("# A heading\nand text", ["A heading", "and text"]),
        ("- one\n  goes on\n- two\n", ["one goes on", "two"]),
        ("See [the page](a.md#b).\n\n```sh\nnot this\n```\n", ["See the page."]),
    ],
)
def test_what_counts_as_a_sentence(text: str, expected: list[str]):
    assert sentences(text) == expected


def test_a_dead_anchor_and_a_dead_file_are_found(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text(
        "# A `b` heading\n\n# Twice\n\n# Twice\n\n[x](#a-b-heading) [y](#twice-1) [z](#gone) [w](gone.md)\n"
    )
    assert dead_links(page) == ["#gone", "gone.md"]
