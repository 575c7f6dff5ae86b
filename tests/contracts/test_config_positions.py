"""The JSON reader agrees with `json` on valid text, knows every line, and explains the first syntax error."""

from __future__ import annotations

import json
import re
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.config.positions import Document, read_json
from trainer.config.report import Report

# A path of Windows with single backslashes, "C:\new", is JSON for something else, and reported all the same.
texts = st.text().filter(lambda text: not re.match(r"[A-Za-z]:|\\", text))
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=12,
)
objects = st.dictionaries(texts, values, max_size=6)


def read(content: bytes) -> tuple[Document | None, tuple[str, ...]]:
    """Return the document and the problems of a file."""
    report = Report()
    return read_json(content, "x.json", report), report.errors


@given(objects, st.sampled_from([None, 0, 2]), st.booleans())
@settings(max_examples=100, deadline=None)
def test_what_json_writes_is_read_back(content: dict[str, Any], indent: int | None, ascii_only: bool):
    text = json.dumps(content, indent=indent, ensure_ascii=ascii_only)
    document, problems = read(text.encode("utf-8", "surrogatepass"))
    assert document and not problems
    assert document.values == content


def test_an_escape_after_a_backslash_is_no_network_path():
    text = json.dumps({"\\0\x1f": "\\1\n"})
    assert read(text.encode()) == (Document("x.json", None, json.loads(text), {("\\0\x1f",): 1}), ())


@given(objects, st.data())
@settings(max_examples=150, deadline=None)
def test_a_damaged_text_is_reported_or_still_right(content: dict[str, Any], data: st.DataObject):
    text = json.dumps(content, indent=1, ensure_ascii=False)
    at = data.draw(st.integers(0, len(text)))
    damage = data.draw(st.text(st.sampled_from(list("{}[]\",:\\/#'“ \n\tnNI0.-e")), max_size=3))
    damaged = text[:at] + damage + text[data.draw(st.integers(at, min(len(text), at + 3))) :]
    document, problems = read(damaged.encode())
    if document is None:
        (problem,) = problems
        place = re.match(r"x\.json(:(\d+):(\d+))?: ", problem)
        assert place and 1 <= int(place[2] or 1) <= damaged.count("\n") + 1
        assert int(place[3] or 1) <= len(damaged.split("\n")[int(place[2] or 1) - 1]) + 1
    elif not problems:
        assert document.values == json.loads(damaged)  # text that is not reported is JSON


@given(st.binary(max_size=60))
@settings(max_examples=150, deadline=None)
def test_any_bytes_are_read_without_failing(content: bytes):
    document, problems = read(content)
    assert problems or document


def test_every_line_is_known():
    text = '{\n"a": 1,\n\n"b": {\n"c": [\n1,\n2], "d": {}},\n"e": null}'
    document, _ = read(text.encode())
    assert document and document.lines == {
        ("a",): 2,
        ("b",): 4,
        ("b", "c"): 5,
        ("b", "c", 0): 6,
        ("b", "c", 1): 7,
        ("b", "d"): 7,
        ("e",): 8,
    }


def test_every_key_that_is_written_twice_is_reported_with_both_lines():
    _, problems = read(b'{\n"a": 1,\n"b": {"c": 1,\n"c": 2},\n"a": 3\n}')
    assert problems == (
        "x.json:4: b.c: written twice, first in line 3; keep one of the two",
        "x.json:5: a: written twice, first in line 2; keep one of the two",
    )


def test_only_the_first_syntax_error_is_reported():
    text = '{\n"a": 1,\n"b" 1,\n"c": [1, tru],\n"d": "C:\\x",\n}'
    assert read(text.encode()) == (None, ("x.json:3:5: found 1 where a : must follow the key",))
