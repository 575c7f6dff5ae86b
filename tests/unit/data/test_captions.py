import codecs
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.captions import choose_caption, read_sidecars, sidecar_chain
from data.captions.caption import Caption, Tag, chosen, parse_caption, render
from data.captions.text import LARGEST_TEXT
from data.captions.wildcards import first
from data.errors import FileError
from data.folder import walk
from data.rng import stream


def caption_of(folder: Path, image: str, **chain) -> Caption:
    stem = Path(image).stem
    return choose_caption(read_sidecars(stem, next(walk(folder)), sidecar_chain(**chain)), (), stem)


def shown(caption, position=0, **options):
    plain = {"cond_dropout": 0.0, "shuffle_tags": False, "keep_tags": 0}
    return render(caption, lambda name: stream(1, name, 0, position), **plain | options)


@pytest.mark.parametrize(
    ("text", "main", "tags"),
    [
        ("a cat", "a cat", []),
        ("a cat, sitting,outdoors ", "a cat", ["sitting", "outdoors"]),
        ("a\r\ncat,\r\n\tsitting\r\n", "a cat", ["sitting"]),
        (", sitting", "", ["sitting"]),
        ("a cat,, ,", "a cat", []),
        ("", "", []),
        (" \n", "", []),
    ],
)
def test_a_caption_is_split_on_commas(text, main, tags):
    caption = parse_caption(text, ".txt")
    assert (caption.main, [tag.text for tag in caption.tags], caption.source) == (main, tags, ".txt")
    assert caption.text == ", ".join(filter(None, [main, *tags]))


@pytest.mark.parametrize(
    "content",
    [
        "ein Kätzchen, süß".encode(),
        codecs.BOM_UTF8 + "ein Kätzchen, süß\r\n".encode(),
        "ein Kätzchen, süß".encode("utf-16"),
        codecs.BOM_UTF16_BE + "ein Kätzchen, süß".encode("utf-16-be"),
        "ein Kätzchen, süß".encode("latin-1"),
    ],
    ids=["utf-8", "utf-8 with BOM, CRLF", "utf-16", "utf-16-be", "latin-1"],
)
def test_encodings(tmp_path, content):
    (tmp_path / "cat.txt").write_bytes(content)
    assert caption_of(tmp_path, "cat.jpg").text == "ein Kätzchen, süß"


def test_windows_quotes_and_bytes_that_fit_no_encoding(tmp_path):
    (tmp_path / "a.txt").write_bytes("it’s".encode("cp1252"))
    (tmp_path / "b.txt").write_bytes(b"caf\xe9 \x81")
    assert caption_of(tmp_path, "a.jpg").text == "it’s"
    assert caption_of(tmp_path, "b.jpg").text == "café \x81"


def test_order_of_sources(tmp_path):
    assert caption_of(tmp_path, "a red cat_0012.jpg") == Caption("a red cat", (), "file name")
    (tmp_path / "a red cat_0012.txt").write_text("from txt")
    assert caption_of(tmp_path, "a red cat_0012.jpg").text == "from txt"
    (tmp_path / "a red cat_0012.CAPTION").write_text("from caption")
    assert caption_of(tmp_path, "a red cat_0012.jpg").text == "from caption"


def test_an_empty_text_file_is_an_empty_caption_not_a_missing_one(tmp_path):
    (tmp_path / "cat.txt").write_text("\n")
    assert caption_of(tmp_path, "cat.jpg") == Caption("", (), ".txt")


def test_a_caption_that_names_a_file_is_not_read_as_one(tmp_path):
    (tmp_path / "other.txt").write_text("secret")
    (tmp_path / "cat.txt").write_text("other.txt")
    assert caption_of(tmp_path, "cat.jpg").text == "other.txt"


def test_text_that_is_no_caption(tmp_path):
    (tmp_path / "cat.txt").write_bytes(b"x" * (LARGEST_TEXT + 1))
    with pytest.raises(FileError, match=r"cat\.txt: is larger than 1024 KiB"):
        caption_of(tmp_path, "cat.jpg")


def test_a_caption_file_that_cannot_be_opened(tmp_path):
    (tmp_path / "cat.txt").write_text("gone")
    folder = next(walk(tmp_path))
    (tmp_path / "cat.txt").unlink()
    with pytest.raises(FileError, match=r"cat\.txt: cannot be read \(No such file"):
        read_sidecars("cat", folder, sidecar_chain())


CAPTION = Caption("main", tuple(Tag(letter) for letter in "abcdef"))


def test_without_options_the_text_is_as_written():
    assert {shown(CAPTION, position) for position in range(50)} == {"main, a, b, c, d, e, f"}


@given(st.integers(0, 10_000), st.integers(0, 8))
def test_shuffling_keeps_the_main_prompt_the_kept_tags_and_every_word(position, keep):
    pieces = shown(CAPTION, position, shuffle_tags=True, keep_tags=keep).split(", ")
    assert pieces[: 1 + keep] == ["main", *"abcdef"][: 1 + keep]
    assert sorted(pieces) == sorted(["main", *"abcdef"])


def test_every_tag_can_come_first():
    firsts = Counter(shown(CAPTION, position, shuffle_tags=True).split(", ")[1] for position in range(600))
    assert set(firsts) == set("abcdef") and min(firsts.values()) > 60


def test_heavier_tags_tend_to_come_first():
    caption = Caption("main", (Tag("light", 1.0), Tag("heavy", 3.0), Tag("nothing", 0.0)))
    orders = Counter(shown(caption, position, shuffle_tags=True) for position in range(400))
    assert set(orders) == {"main, heavy, light, nothing", "main, light, heavy, nothing"}
    assert 260 < orders["main, heavy, light, nothing"] < 340


def test_dropout_gives_the_empty_string_at_its_rate():
    dropped = sum(shown(CAPTION, position, cond_dropout=0.25) == "" for position in range(1000))
    assert 200 < dropped < 300
    assert shown(CAPTION, cond_dropout=1.0) == ""


def test_dropout_does_not_disturb_the_order_of_the_others():
    for position in range(50):
        text = shown(CAPTION, position, shuffle_tags=True, cond_dropout=0.5)
        assert text in ("", shown(CAPTION, position, shuffle_tags=True))


def test_tags_are_dropped_at_their_rate_and_the_main_prompt_and_kept_tags_stay():
    caption = parse_caption("a cat, " + ", ".join(map(str, range(10))), ".txt")
    texts = [shown(caption, place, keep_tags=2, tag_dropout=0.25).split(", ") for place in range(500)]
    assert all(text[:3] == ["a cat", "0", "1"] and text[1:] == sorted(text[1:], key=int) for text in texts)
    for tag in map(str, range(2, 10)):
        assert sum(tag in text for text in texts) / 500 == pytest.approx(0.75, abs=0.06)
    assert shown(caption, keep_tags=2, tag_dropout=1) == "a cat, 0, 1"
    assert shown(caption, 3, tag_dropout=0.5) == shown(caption, 3, tag_dropout=0.5)


def test_the_same_tags_are_dropped_whether_they_are_shuffled_or_not():
    caption = parse_caption("a cat, " + ", ".join(map(str, range(10))), ".txt")
    for place in range(20):
        plain = shown(caption, place, tag_dropout=0.5).split(", ")
        shuffled = shown(caption, place, tag_dropout=0.5, shuffle_tags=True).split(", ")
        whole = shown(caption, place, shuffle_tags=True).split(", ")
        assert sorted(plain) == sorted(shuffled), place
        assert shuffled == [tag for tag in whole if tag in shuffled], "in the order without dropout"


@pytest.mark.parametrize(
    ("written", "texts"),
    [
        ("a {red|blue} cat", {"a red cat", "a blue cat"}),
        ("a {red |}cat, sitting", {"a red cat, sitting", "a cat, sitting"}),
        ("a {red, big|blue} cat", {"a red, big cat", "a blue cat"}),
        ("{a|b} {c|d}", {"a c", "a d", "b c", "b d"}),
        ("a {{red|blue}} cat", {"a {red|blue} cat"}),
        ("a {red, open", {"a {red, open"}),
        ("a } and {one}", {"a } and one"}),
        ("{|a cat}, x", {"x", "a cat, x"}),
    ],
)
def test_wildcards(written, texts):
    caption = parse_caption(written, ".txt")
    assert {shown(caption, place, wildcards=True) for place in range(60)} == texts
    assert shown(caption) == written, "as it is, unless asked for"
    assert shown(caption, 5, wildcards=True) == shown(caption, 5, wildcards=True)
    assert chosen(caption, first).text in texts


def test_alternatives_are_tags_and_equally_likely():
    caption = parse_caption("a cat, {red, big|blue}, x", ".txt")
    texts = [shown(caption, place, wildcards=True, shuffle_tags=True) for place in range(600)]
    assert {frozenset(text.split(", ")[1:]) for text in texts} == {
        frozenset({"red", "big", "x"}),
        frozenset({"blue", "x"}),
    }
    assert len(set(texts)) == 6 + 2, "every order"
    assert sum("blue" in text for text in texts) / 600 == pytest.approx(0.5, abs=0.06)


def test_wildcards_of_weighted_tags_whole_prompts_and_prefixes():
    caption = Caption("a cat, {red|red}", (Tag("b, c"), Tag("{x|x}", 2.0)), prefix="{my|my}")
    assert chosen(caption, first) == Caption("a cat, red", (Tag("b, c"), Tag("x", 2.0)), prefix="my")


def test_wildcards_do_not_disturb_the_other_draws():
    plain = parse_caption("a cat, " + ", ".join(map(str, range(10))), ".txt")
    caption = parse_caption("a {cat|cat}, " + ", ".join(map(str, range(10))), ".txt")
    options = {"shuffle_tags": True, "tag_dropout": 0.5, "cond_dropout": 0.5}
    for place in range(20):
        assert shown(plain, place, **options) == shown(caption, place, **options, wildcards=True)


def test_a_place_always_draws_the_same():
    assert [shown(CAPTION, n, shuffle_tags=True) for n in range(9)] == [
        shown(CAPTION, n, shuffle_tags=True) for n in range(9)
    ]


def test_each_showing_draws_one_of_several_captions():
    caption = Caption("one", others=(Caption("two", (Tag("a"), Tag("b"))), Caption("three")))
    drawn = Counter(shown(caption, position) for position in range(600))
    assert set(drawn) == {"one", "two, a, b", "three"} and min(drawn.values()) > 150
    assert {shown(caption, position, shuffle_tags=True) for position in range(60)} == {
        "one",
        "two, a, b",
        "two, b, a",
        "three",
    }
    for position in range(50):
        assert shown(caption, position, cond_dropout=0.5) in ("", shown(caption, position))


def test_tags_that_make_a_caption_too_long_are_left_off_whole_from_the_end():
    tags = tuple(map(Tag, ("black", "sitting", "indoors")))
    assert [Caption("a cat", tags, longest=longest).text for longest in (100, 30, 29, 21, 20, 12, 11, 1)] == [
        "a cat, black, sitting, indoors",
        "a cat, black, sitting, indoors",
        "a cat, black, sitting",
        "a cat, black, sitting",
        "a cat, black",
        "a cat, black",
        "a cat",
        "a cat",
    ]
    assert Caption("a cat", tags, prefix="sks", longest=16).text == "sks a cat, black"
    assert Caption("a cat", tags, prefix="sks", longest=15).text == "sks a cat"
    assert Caption("", tags, longest=3).text == "black"


def test_which_tags_are_left_off_changes_when_they_are_shuffled():
    caption = Caption("main", tuple(map(Tag, "abcdef")), longest=len("main, a, b"))
    drawn = {shown(caption, position, shuffle_tags=True) for position in range(300)}
    assert len(drawn) == 30 and all(len(text) == 10 for text in drawn)


def test_a_thousand_tags_are_cut_in_no_time():
    assert (
        Caption("main", tuple(Tag(f"tag {number}") for number in range(20_000)), longest=50).text.count(",")
        == 6
    )
