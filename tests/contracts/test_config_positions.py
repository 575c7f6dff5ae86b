"""The JSON reader: it agrees with `json` on what is right, knows every line, and survives what is wrong."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.config.positions import _DRIVE, read_json

# A path of Windows with single backslashes, "C:\new", is JSON for something else, and reported all the same.
texts = st.text().filter(
    lambda text: (
        not any(_DRIVE.match(json.dumps(text, ensure_ascii=ascii_only)[1:]) for ascii_only in (True, False))
    )
)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=12,
)
objects = st.dictionaries(texts, values, max_size=6)


@given(objects, st.sampled_from([None, 0, 2]), st.booleans())
@settings(max_examples=100, deadline=None)
def test_what_json_writes_is_read_back(content: dict[str, Any], indent: int | None, ascii_only: bool):
    document = read_json(
        json.dumps(content, indent=indent, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    )
    assert not document.issues and not document.unread
    assert document.values == content


def test_an_escape_after_a_backslash_is_no_network_path():
    assert read_json(json.dumps({"\\0\x1f": "\\1\n"}).encode()).values == {"\\0\x1f": "\\1\n"}


@given(objects, st.data())
@settings(max_examples=150, deadline=None)
def test_a_damaged_text_is_reported_or_still_right(content: dict[str, Any], data: st.DataObject):
    text = json.dumps(content, indent=1, ensure_ascii=False)
    at = data.draw(st.integers(0, len(text)))
    damage = data.draw(st.text(st.sampled_from(list("{}[]\",:\\/#'“ \n\tnNI0.-e")), max_size=3))
    damaged = text[:at] + damage + text[data.draw(st.integers(at, min(len(text), at + 3))) :]
    document = read_json(damaged.encode())
    lines = damaged.count("\n") + 1
    assert all(issue.line is None or 1 <= issue.line <= lines for issue in document.issues)
    if not document.issues:
        read = json.loads(damaged)  # what is not reported is JSON; the reader is stricter, never laxer
        assert document.values == read


@given(st.binary(max_size=60))
@settings(max_examples=150, deadline=None)
def test_any_bytes_are_read_without_failing(content: bytes):
    document = read_json(content)
    assert document.issues or isinstance(document.values, dict)


def test_every_line_is_known():
    text = '{\n"a": 1,\n\n"b": {\n"c": [\n1,\n2], "d": {}},\n"e": null}'
    lines = read_json(text.encode()).lines
    assert lines == {
        ("a",): 2,
        ("b",): 4,
        ("b", "c"): 5,
        ("b", "c", 0): 6,
        ("b", "c", 1): 7,
        ("b", "d"): 7,
        ("e",): 8,
    }


def test_reading_goes_on_after_every_mistake():
    text = '{\n"a": NaN,\n"b" 1,\n"c": [1, tru],\n"d": "C:\\x",\n"e": 5,\n"e": 6,\n}'
    document = read_json(text.encode())
    assert [issue.line for issue in document.issues] == [2, 3, 4, 5, 7, 7]
    assert document.values["e"] == 5
    assert document.unread == {("a",), ("b",), ("c",), ("d",)}


def test_infinity_is_a_growth_rate_only():
    assert not read_json(b'{"base": {"growth_rate": Infinity}}').issues
    assert [
        issue.path
        for issue in read_json(b'{"growth_rate": -Infinity, "lr": Infinity, "x": [Infinity]}').issues
    ] == [
        ("growth_rate",),
        ("lr",),
        ("x", 0),
    ]
