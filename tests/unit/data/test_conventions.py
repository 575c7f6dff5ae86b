"""Every way in which people write captions and settings beside their images, and which of them wins."""

import json
import math
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data.captions.caption import render
from data.captions.entry import SETTINGS as SETTINGS_BY_KEY
from data.captions.entry import WORDS, Entry, read_entry
from data.captions.yaml_file import read_yaml
from data.errors import DataError, FileError
from data.folder import FOLDER_FILES
from data.index import build_index, refuse_bad
from data.options import DataOptions
from data.repeats import read_repeats
from data.table import FILE_KEYS, METADATA
from trainer.diffusion.conditioning import Tokenize
from trainer.models.tokenizer import clip_tokenizer


@pytest.fixture
def root(tmp_path):
    (tmp_path / "pets").mkdir()
    return tmp_path / "pets"


def picture(path, colour="red", size=(64, 48)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def index_of(*roots, **options):
    return build_index(
        DataOptions(data_root=tuple(map(str, roots)) if len(roots) > 1 else str(roots[0]), **options)
    )


def only(*roots, **options):
    (record,) = index_of(*roots, **options).records
    return record


def texts(index):
    return {record.name: record.caption.text for record in index.records}


# --- which words win, from the strongest to the weakest
# -------------------------------------------------------------------------------

CHAIN = (
    ("a_1.yaml", "main_prompt: from yaml\n", "from yaml"),
    ("a_1.yml", "main_prompt: from yml\n", "from yml"),
    ("a_1.caption", "from caption", "from caption"),
    ("a_1.txt", "from txt", "from txt"),
    ("a_1.json", {"caption": "from json"}, "from json"),
    ("metadata.jsonl", {"file_name": "a_1.png", "text": "from jsonl"}, "from jsonl"),
    ("../metadata.csv", "file_name,text\npets/a_1.png,from the csv above\n", "from the csv above"),
    ("local.yaml", "main_prompt: from local.yaml\n", "from local.yaml"),
    ("local.yml", "main_prompt: from local.yml\n", "from local.yml"),
    ("global.yaml", "main_prompt: from global.yaml\n", "from global.yaml"),
    ("global.yml", "main_prompt: from global.yml\n", "from global.yml"),
    ("../global.yaml", "main_prompt: from global.yaml above\n", "from global.yaml above"),
)


@pytest.mark.parametrize("rank", range(len(CHAIN)))
def test_each_source_of_words_wins_over_all_below_it(root, rank):
    picture(root / "a_1.png")
    for file, content, _ in CHAIN[rank:]:
        write(root / file, content)
    assert only(root.parent).caption.text == CHAIN[rank][2]


@pytest.mark.parametrize(
    ("file", "content", "words"), [row for row in CHAIN if row[0] not in ("a_1.caption", "a_1.txt")]
)
def test_an_empty_text_file_leaves_the_words_to_others(root, file, content, words):
    picture(root / "a_1.png")
    write(root / "a_1.caption", "\n")
    write(root / "a_1.txt", "")
    assert (only(root).caption.text, only(root).caption.source) == ("", ".caption")
    write(root / file, content)
    assert only(root.parent).caption.text == words


def test_an_empty_text_file_leaves_the_words_to_a_text_file_after_it_and_to_kohyas_folder(tmp_path):
    picture(tmp_path / "10_sks dog/a.png")
    write(tmp_path / "10_sks dog/a.caption", "")
    assert only(tmp_path).caption.text == "sks dog"
    write(tmp_path / "10_sks dog/a.txt", "a dog")
    assert only(tmp_path).caption.text == "a dog"


def test_the_file_name_is_last(root):
    picture(root / "a red cat, sitting_0012.png")
    caption = only(root).caption
    assert (caption.text, caption.source) == ("a red cat, sitting", "file name")


SETTINGS = (
    ("a.yaml", "multiply: 2\n", 2.0),
    ("a.yml", "multiply: 3\n", 3.0),
    ("a.json", {"multiply": 4}, 4.0),
    ("metadata.jsonl", {"file_name": "a.png", "multiply": 5}, 5.0),
    ("local.yaml", "multiply: 6\n", 6.0),
    ("multiply.txt", "7\n", 7.0),
    ("global.yaml", "multiply: 8\n", 8.0),
    ("../global.yaml", "multiply: 9\n", 9.0),
)


@pytest.mark.parametrize("rank", range(len(SETTINGS)))
def test_each_source_of_settings_wins_over_all_below_it(root, rank):
    picture(root / "a.png")
    for file, content, _ in SETTINGS[rank:]:
        write(root / file, content)
    assert only(root.parent).multiply == SETTINGS[rank][2]


def test_kohyas_repeats_are_weaker_than_all_of_them(tmp_path):
    picture(tmp_path / "10_sks dog/a.png")
    assert (only(tmp_path).multiply, only(tmp_path).caption.text) == (10.0, "sks dog")
    write(tmp_path / "global.yaml", "multiply: 3\nmain_prompt: a dog\n")
    assert (only(tmp_path).multiply, only(tmp_path).caption.text) == (3.0, "a dog")
    write(tmp_path / "10_sks dog/multiply.txt", "2")
    assert only(tmp_path).multiply == 2.0


# --- every setting, everywhere
# --------------------------------------------------------------------------------------------------------

ALL = {
    "multiply": (1.5, 1.5),
    "cond_dropout": (0.25, 0.25),
    "flip_p": (0.5, 0.5),
    "shuffle_tags": (True, True),
    "keep_tags": (2, 2),
    "loss_scale": (0.1, 0.1),
    "batch_id": ("cats", "cats"),
}


@pytest.mark.parametrize(
    "file", ["a.yaml", "a.yml", "a.json", "local.yaml", "global.yml", "metadata.jsonl", "metadata.csv"]
)
def test_every_setting_can_stand_in_every_file_of_keys(root, file):
    picture(root / "a.png")
    values = {key: written for key, (written, _) in ALL.items()}
    if file.endswith(".csv"):
        write(
            root / file,
            "file_name," + ",".join(values) + "\na.png," + ",".join(map(str, values.values())) + "\n",
        )
    elif file.endswith(".jsonl"):
        write(root / file, {"file_name": "a.png", **values})
    elif file.endswith(".json"):
        write(root / file, values)
    else:
        write(root / file, "".join(f"{key}: {json.dumps(value)}\n" for key, value in values.items()))
    record = only(root)
    assert {key: getattr(record, key) for key in ALL} == {key: read for key, (_, read) in ALL.items()}


@pytest.mark.parametrize("key", ["multiply", "cond_dropout", "flip_p", "loss_scale", "batch_id"])
def test_a_folder_s_file_holds_one_setting(root, key):
    picture(root / "a.png")
    write(root / f"{key}.TXT", f"\ufeff {ALL[key][0]}\r\n")
    assert getattr(only(root), key) == ALL[key][1]


def test_shuffle_tags_txt_need_only_be_there(root):
    picture(root / "a.png")
    for content, expected in (("", True), ("1", True), ("anything", True), ("false\n", False)):
        write(root / "shuffle_tags.txt", content)
        assert only(root).shuffle_tags is expected


def test_a_folder_s_files_stay_in_their_folder_and_global_reaches_below(root):
    for name in ("a.png", "kittens/b.png", "kittens/deep/c.png"):
        picture(root / name)
    write(root / "multiply.txt", "2")
    write(root / "local.yaml", "flip_p: 0.5\n")
    write(root / "global.yaml", "loss_scale: 0.3\n")
    write(root / "kittens/global.yaml", "loss_scale: 0.7\n")
    found = {
        record.name: (record.multiply, record.flip_p, record.loss_scale) for record in index_of(root).records
    }
    assert found == {
        "a.png": (2.0, 0.5, 0.3),
        "kittens/b.png": (1.0, None, 0.7),
        "kittens/deep/c.png": (1.0, None, 0.7),
    }


def test_multiply_0_leaves_a_folder_out(root):
    picture(root / "a.png")
    picture(root / "out/b.png")
    write(root / "out/multiply.txt", "0")
    assert {record.name: record.multiply for record in index_of(root).records} == {
        "a.png": 1.0,
        "out/b.png": 0.0,
    }


def test_a_regularisation_root_has_its_own_multiply_and_loss_scale(tmp_path):
    picture(tmp_path / "mine/a.png")
    picture(tmp_path / "regularisation/dogs/b.png")
    write(tmp_path / "regularisation/global.yaml", "main_prompt: a dog\nmultiply: 0.5\nloss_scale: 0.3\n")
    mine, other = index_of(tmp_path / "mine", tmp_path / "regularisation").records
    assert (mine.caption.text, other.caption.text) == ("a", "a dog")
    assert (mine.multiply, mine.loss_scale, other.multiply, other.loss_scale) == (1.0, 1.0, 0.5, 0.3)


def test_eds_default_batch_is_no_batch_of_its_own(root):
    picture(root / "a.png")
    write(root / "a.yaml", "batch_id: default_batch\n")
    assert only(root).batch_id == ""


# --- words
# ------------------------------------------------------------------------------------------------------------


def test_tags_of_all_levels_are_added_once_and_heavier_ones_come_first(root):
    picture(root / "a.png")
    write(root / "a.txt", "a cat, sitting, black")
    write(
        root / "a.yaml",
        "tags:\n  - tag: low angle\n    weight: 2\n  - sitting\n  - tag: blurred\n    weight: 0.5\n",
    )
    write(root / "local.yaml", "tags: [indoors, black]\n")
    write(root / "global.yaml", "tags: photo\n")
    assert only(root).caption.text == "a cat, low angle, sitting, black, indoors, photo, blurred"


def test_eds_yaml(root):
    picture(root / "a_1.png")
    write(
        root / "a_1.yaml",
        "main_prompt: A portrait of Cloud\nrating: 1.1\nmax_caption_length: 45\n"
        "tags:\n  - tag: low angle shot\n  - tag: holding sword\n    weight: 1.5\n  - tag:\n  - null\n",
    )
    index = index_of(root)
    (record,) = index.records
    assert record.caption.main == "A portrait of Cloud"
    assert [(tag.text, tag.weight) for tag in record.caption.tags] == [
        ("holding sword", 1.5),
        ("low angle shot", 1.0),
    ]
    assert record.caption.text == "A portrait of Cloud, holding sword"  # a third piece would make 50 letters
    assert [notice.text.split(":")[0] for notice in index.notices] == ["rating has no effect"]


def test_a_main_prompt_is_not_split_and_a_caption_is(root):
    picture(root / "a.png")
    write(root / "a.yaml", "main_prompt: one, two\n")
    assert (only(root).caption.main, only(root).caption.tags) == ("one, two", ())
    write(root / "a.yaml", "caption: one, two\n")
    assert (only(root).caption.main, [tag.text for tag in only(root).caption.tags]) == ("one", ["two"])


def test_tags_of_an_image_stand_alone_where_it_has_no_main_prompt(root):
    picture(root / "IMG_1.png")
    write(root / "IMG_1.yaml", "tags: [cat, sitting]\n")
    assert only(root).caption.text == "cat, sitting"
    (root / "IMG_1.yaml").unlink()
    write(root / "global.yaml", "tags: [cat, sitting]\n")
    assert only(root).caption.text == "IMG, cat, sitting"


@pytest.mark.parametrize(
    ("limits", "rows", "said"),
    [
        (
            (100, 3),
            4 * "x\n",
            "has more than 3 rows that cannot be used; metadata.jsonl:4 was the last one read",
        ),
        (
            (5, 3),
            6 * '{"file_name": "a.png"}\n',
            "has more than 5 rows; metadata.jsonl:6 was the last one read",
        ),
    ],
)
def test_lists_of_nothing_are_not_read_to_their_end(root, monkeypatch, limits, rows, said):
    monkeypatch.setattr("data.table.MOST_ROWS", limits[0])
    monkeypatch.setattr("data.table.MOST_BAD", limits[1])
    picture(root / "a.png")
    (root / "metadata.jsonl").write_text(rows)
    with pytest.raises(DataError, match=f"metadata.jsonl: {said}"):
        index_of(root)


def test_aliases_repeat_what_is_written_and_do_not_multiply(root):
    picture(root / "a.png")
    write(root / "a.yaml", "main_prompt: &it a cat\ntags: [&b {tag: small, weight: 2}, *it]\n")
    assert only(root).caption.text == "a cat, small, a cat"
    nested = "".join(
        f"x{level}: &l{level} [{', '.join([f'*l{level - 1}'] * 100)}]\n" for level in range(1, 6)
    )
    for bomb in ('tags: [&a "' + 50_000 * "x" + '"' + 10_000 * ", *a" + "]\n", f"x0: &l0 [a]\n{nested}"):
        write(root / "a.yaml", bomb)
        with pytest.raises(
            FileError, match=r"a\.yaml:\d: aliases repeat more than 128 KiB; write fewer of them"
        ):
            read_yaml(root / "a.yaml", ".yaml")


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="names there are Unicode")
def test_halves_of_surrogate_pairs_become_words_that_can_be_tokenized(root):
    picture(root / os.fsdecode(b"caf\xe9.png"))
    for name in "abc":
        picture(root / f"{name}.png")
    (root / "a.json").write_text(
        '{"caption": "half \\ud83d", "tags": ["\\udc00 tag"], "batch_id": "\\ud83d"}'
    )
    (root / "metadata.jsonl").write_text('{"file_name": "b.png", "text": "\\udfff and \\ud83d\\ude00"}\n')
    (root / "c.yaml").write_text("tags: [x]\n")
    tokens = Tokenize(clip_tokenizer())([record.caption.text for record in index_of(root).records])
    assert tokens.shape == (4, 77)
    assert texts(index_of(root)) == {
        "a.png": "half \ufffd, \ufffd tag",
        "b.png": "\ufffd and 😀",
        "c.png": "x",
        "caf\ufffd.png": "caf\ufffd",
    }


def test_yaml_scalars_are_the_words_that_were_written(root):
    picture(root / "a.png")
    for written, read in (
        ("no", "no"),
        ("2024-01-01", "2024-01-01"),
        ("1e3", "1e3"),
        ("'null'", "null"),
        ("12", "12"),
    ):
        write(root / "a.yaml", f"caption: {written}\nloss_scale: 1e-1\nshuffle_tags: yes\n")
        assert (only(root).caption.text, only(root).loss_scale, only(root).shuffle_tags) == (read, 0.1, True)
    for nothing in ("", "~", "null"):
        write(root / "a.yaml", f"caption: {nothing}\nmultiply: {nothing}\n")
        assert (only(root).caption.text, only(root).multiply) == ("a", 1.0)
    for empty in ("", "# only a remark\n", "---\n", "null\n"):
        write(root / "a.yaml", empty)
        assert only(root).caption.source == "file name"


def test_anchors_and_long_texts(root):
    picture(root / "a.png")
    write(root / "a.yaml", "caption: >\n  a cat,\n  sitting\ntags: &t [black, &w white]\nbatch_id: *w\n")
    assert (only(root).caption.text, only(root).batch_id) == ("a cat, sitting, black, white", "white")


def test_a_prefix_comes_before_every_caption(root):
    for name, words in (("a", "a cat, sitting"), ("b", ""), ("c", None)):
        picture(root / f"{name}.png")
        if words is not None:
            write(root / f"{name}.txt", words)
    index = index_of(root, caption_prefix="sks style,")
    assert texts(index) == {
        "a.png": "sks style, a cat, sitting",
        "b.png": "sks style,",
        "c.png": "sks style, c",
    }
    assert [record.caption.empty for record in index.records] == [False, True, False]
    assert index.fingerprint() != index_of(root).fingerprint()


def test_lines_are_captions_of_their_own_when_asked(root):
    picture(root / "a.png")
    write(root / "a.txt", "a cat, black\r\n\r\n  a pet\n")
    index = index_of(root)
    assert index.records[0].caption.versions == (index.records[0].caption,)
    assert index.records[0].caption.text == "a cat, black a pet"
    assert "caption_lines" in index.notices[0].text and index.notices[0].places == ("a.txt",)
    lined = index_of(root, caption_lines=True)
    assert [caption.text for caption in lined.records[0].caption.versions] == ["a cat, black", "a pet"]
    assert lined.notices == ()


@pytest.mark.parametrize("file", ["a.yaml", "a.json", "metadata.jsonl"])
def test_a_list_of_captions_needs_no_asking(root, file):
    picture(root / "a.png")
    captions = ["a cat, black", "a pet"]
    write(
        root / file,
        {"file_name": "a.png", "text": captions} if file.endswith("jsonl") else {"caption": captions},
    )
    assert [caption.text for caption in only(root).caption.versions] == captions


def test_two_text_files_for_one_image_are_remarked(root):
    picture(root / "a.png")
    write(root / "a.caption", "the first")
    write(root / "a.txt", "the second")
    index = index_of(root)
    assert texts(index) == {"a.png": "the first"}
    assert list(map(str, index.notices)) == [
        "a.txt: it is not used: the .caption file of the same image has the caption"
    ]


def test_what_a_downloader_left_is_not_added_to_a_caption(root):
    picture(root / "a.png")
    write(root / "a.json", {"tags": ["1girl", "solo"], "rating": "s", "loss_scale": 0.5})
    assert texts(index_of(root)) == {"a.png": "1girl, solo"}
    write(root / "a.txt", "a portrait")
    index = index_of(root)
    assert (texts(index), index.records[0].loss_scale) == ({"a.png": "a portrait"}, 0.5)
    assert "a.json: its words are not used: the .txt file of the same image has the caption" in map(
        str, index.notices
    )


def test_a_caption_that_looks_like_a_path_is_a_caption(root):
    picture(root / "a.png")
    picture(root / "b.png")
    write(root / "secret.txt", "secret")
    write(root / "a.txt", str(root / "secret.txt"))
    write(root / "b.yaml", {"caption": str(root / "secret.txt")})
    assert texts(index_of(root)) == {"a.png": str(root / "secret.txt"), "b.png": str(root / "secret.txt")}


def test_files_of_the_folder_are_no_sidecars(root):
    picture(root / "multiply.png")
    picture(root / "local.png")
    write(root / "multiply.txt", "2")
    write(root / "local.yaml", "loss_scale: 0.5\n")
    index = index_of(root)
    assert [(record.caption.source, record.multiply, record.loss_scale) for record in index.records] == [
        ("file name", 2.0, 0.5)
    ] * 2


# --- what is wrong, and where
# ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("multiply: lots\n", "a.yaml:1: multiply: must be a number from 0 to 10000; got 'lots'"),
        ("multiply: -1\n", "a.yaml:1: multiply: must be a number from 0 to 10000; got '-1'"),
        ("main_prompt: x\n\nflip_p: 2\n", "a.yaml:3: flip_p: must be a number from 0 to 1; got '2'"),
        ("cond_dropout: .nan\n", "a.yaml:1: cond_dropout: must be a number from 0 to 1; got '.nan'"),
        ("loss_scale: 1e999\n", "a.yaml:1: loss_scale: must be a number, at least 0; got '1e999'"),
        ("keep_tags: 1.5\n", "a.yaml:1: keep_tags: must be a whole number, at least 0; got '1.5'"),
        (
            "max_caption_length: 0\n",
            "a.yaml:1: max_caption_length: must be a whole number, at least 1; got '0'",
        ),
        ("shuffle_tags: maybe\n", "a.yaml:1: shuffle_tags: must be true or false; got 'maybe'"),
        ("batch_id: []\n", "a.yaml:1: batch_id: must be a name; got a list"),
        ("tags: {cat: 1}\n", "a.yaml:1: tags: must be a list of tags; got an object"),
        ("tags: [[cat]]\n", "a.yaml:1: tags: each must be a text or hold a tag and a weight; got a list"),
        (
            "tags: [{tag: cat, weight: big}]\n",
            "a.yaml:1: tags: the weight of 'cat' must be a number, at least 0; got 'big'",
        ),
        (
            "caption: {a: b}\n",
            "a.yaml:1: caption: must be text, or a list of texts of which one is "
            "drawn each time; got an object",
        ),
        (
            "multiply: x\nflip_p: y\n",
            "a.yaml:1: multiply: must be a number from 0 to 10000; got 'x'; a.yaml:2: "
            "flip_p: must be a number",
        ),
        (
            "caption: a: b\n",
            "a.yaml:1: is not YAML (mapping values are not allowed in this context); "
            "put a text that holds a colon",
        ),
        ("caption: 'a\n\n", "a.yaml:"),
        ("a cat, sitting\n", "a.yaml:1: must hold keys and values such as main_prompt: a cat"),
        ("- a\n- b\n", "a.yaml:1: must hold keys and values such as main_prompt: a cat"),
        ("multiply: 1\nmultiply: 2\n", "a.yaml:2: multiply: stands here twice; keep one"),
        ("multiply: 1\n---\nmultiply: 2\n", "a.yaml:2: a second document starts here; keep one"),
        ("caption: *nowhere\n", "a.yaml:1: nothing above is marked &nowhere"),
        ("? [a, b]\n: c\n", "a.yaml:1: a key must be a word"),
        (
            "caption: !!python/object/apply:os.system ['true']\n",
            "a.yaml:1: the tag tag:yaml.org,2002:python/object/apply:os.system is",
        ),
        (
            "caption: !!python/name:os.system\n",
            "a.yaml:1: the tag tag:yaml.org,2002:python/name:os.system is not accepted; remove it",
        ),
        ("caption: !secret x\n", "a.yaml:1: the tag !secret is not accepted; remove it"),
        ("tags: " + "[" * 30 + "]" * 30 + "\n", "a.yaml:1: brackets or indents are nested more than 8 deep"),
        ("caption: " + "[" * 60_000, "a.yaml:1: brackets or indents are nested more than 8 deep"),
        ("caption: a\x00b\n", "a.yaml:1: is not YAML (control characters are not allowed)"),
        ("x" * 140_000, "a.yaml: is larger than 128 KiB, which is too much for what it is"),
    ],
)
def test_a_sidecar_that_cannot_be_used_costs_its_image_and_is_named_once_with_its_line(root, content, reason):
    picture(root / "a.png")
    picture(root / "b.png")
    write(root / "a.yaml", content)
    index = index_of(root)
    assert [record.name for record in index.records] == ["b.png"]
    ((name, said),) = [(file.name, file.reason) for file in index.bad]
    assert name == "a.png" and said.startswith(reason)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"caption": "a"', "a.json:1: is not JSON (Expecting ',' delimiter)"),
        ('{\n"caption": "a",\n}', "a.json:3: is not JSON"),
        ('["a"]', 'a.json: must hold keys and values, such as {"caption": "a cat"}'),
        ('{"multiply": true}', "a.json: multiply: must be a number from 0 to 10000; got true"),
        ('{"multiply": 1e400}', "a.json: multiply: must be a number from 0 to 10000; got inf"),
        (
            '{"multiply": ' + "9" * 5000 + "}",
            "a.json:1: holds JSON that is nested too deep or has a number that is too long",
        ),
        ('{"caption": ' + "[" * 200_000, "a.json:1: holds JSON that is nested too deep"),
        (
            '{"caption": 5}',
            "a.json: caption: must be text, or a list of texts of which one is drawn each time; got 5",
        ),
        (
            '{"caption": []}',
            "a.json: caption: must be text, or a list of texts of which one is drawn each time; got a list",
        ),
        ('{"tags": ["a", 1]}', "a.json: tags: each must be a text or hold a tag and a weight; got 1"),
    ],
)
def test_json_beside_an_image(root, content, reason):
    picture(root / "a.png")
    picture(root / "b.png")
    write(root / "a.json", content)
    index = index_of(root)
    ((name, said),) = [(file.name, file.reason) for file in index.bad]
    assert name == "a.png" and said.startswith(reason)


def test_an_image_and_its_sidecar_may_both_be_wrong(root):
    picture(root / "b.png")
    (root / "a.png").write_bytes(b"")
    write(root / "a.yaml", "multiply: x\n")
    (bad,) = index_of(root).bad
    assert bad.reason.startswith("it is empty (0 bytes); a.yaml:1: multiply: must be")


@pytest.mark.parametrize(
    ("file", "content", "bad"),
    [
        (
            "multiply.txt",
            "twice",
            "cats/multiply.txt: must be a number from 0 to 10000; got 'twice'; 2 images are skipped for it",
        ),
        (
            "multiply.txt",
            "",
            "cats/multiply.txt: must be a number from 0 to 10000; got ''; 2 images are skipped for it",
        ),
        (
            "local.yaml",
            "\nflip_p: 7\n",
            "cats/local.yaml:2: flip_p: must be a number from 0 to 1; got '7'; 2 images are skipped for it",
        ),
        (
            "global.yaml",
            "a: b: c\n",
            "cats/global.yaml:1: is not YAML (mapping values are not allowed in this "
            "context); put a text that holds",
        ),
        (
            "metadata.jsonl",
            '{"a": "b"}\n',
            "cats/metadata.jsonl: names no images; each row needs a file_name; 3 images are skipped for it",
        ),
    ],
)
def test_a_folder_s_file_that_cannot_be_used_costs_its_images_and_is_named_once(root, file, content, bad):
    for name in ("a.png", "cats/b.png", "cats/c.png", "cats/more/d.png"):
        picture(root / name)
    write(root / "cats" / file, content)
    index = index_of(root)
    (found,) = map(str, index.bad)
    assert found.startswith(bad)
    local = not file.startswith(("global", "metadata"))
    assert [record.name for record in index.records] == ["a.png", *(["cats/more/d.png"] if local else [])]


def test_unknown_keys_are_remarked_with_the_nearest_known_one(root):
    for name in "abcd":
        picture(root / f"{name}.png")
        write(root / f"{name}.yaml", "caption: x\nmutliply: 2\n")
    write(root / "a.json", {"url": "http://x", "sha256": "1", "width": 5})
    write(root / "b.json", {"url": "http://y"})
    assert list(map(str, index_of(root).notices)) == [
        "a.yaml:2, b.yaml:2, c.yaml:2 and 1 more: unknown key 'mutliply'; did you mean 'multiply'?",
        "a.json: keys that mean nothing here: 'url' (2), 'sha256' (1), 'width' (1)",
    ]


def test_captions_without_an_image_and_formats_that_are_not_read_are_remarks(root):
    for name in ("a.png", "b.png", "sub/c.png"):
        picture(root / name)
    for name in ("A.txt", "b.png.txt", "b.txt", "d.txt", "sub/e.CAPTION", "global.yaml", "multiply.txt"):
        write(root / name, "" if name == "global.yaml" else "1")
    for name in ("d.CR2", "sub/f.jxl"):
        write(root / name, "x")
    write(root / "texts/x.txt", "no image lies here, so this is no mistyped name")
    assert sorted(map(str, index_of(root).notices)) == [
        "A.txt, b.png.txt, sub/e.CAPTION: no image has this name, so nothing is captioned by it",
        "d.CR2, sub/f.jxl: its format is not read; save it as PNG",
    ]


def test_remarks_about_folder_files(root):
    picture(root / "in/a.png")
    write(root / "multiply.txt", "2")
    write(root / "in/multiply.txt.txt", "2")
    write(root / "in/flip_p.txt", "0.5")
    write(root / "in/local.yaml", "flip_p: 0.25\n")
    index = index_of(root)
    assert only(root).flip_p == 0.25
    assert sorted(map(str, index.notices)) == [
        "in/flip_p.txt: it says 0.5 and local.yaml 0.25, which is used",
        "in/multiply.txt.txt: it is not read; did you mean multiply.txt?",
        "multiply.txt: it has no effect: no image lies beside it, and of these files "
        "only global.yaml reaches the folders below",
    ]


def test_refusing_bad_files_names_them_all(root):
    for number in range(15):
        picture(root / f"{number}.png")
        (root / f"bad {number}.png").write_bytes(b"")
    with pytest.raises(DataError) as caught:
        refuse_bad(index_of(root))
    first, *files = caught.value.problems
    assert (
        first == 'data_root: 15 files cannot be used, and on_bad_image is "error"; mend or '
        'remove them, or set it to "skip"'
    )
    assert files == [f"bad {number}.png: it is empty (0 bytes)" for number in range(15)]
    for number in range(15):
        (root / f"bad {number}.png").unlink()
    refuse_bad(index_of(root))


def test_each_of_several_roots_must_hold_something(tmp_path):
    picture(tmp_path / "mine/a.png")
    (tmp_path / "empty").mkdir()
    write(tmp_path / "broken/b.png", "")
    write(tmp_path / "list.json", [])
    with pytest.raises(DataError) as caught:
        index_of(tmp_path / "mine", tmp_path / "empty", tmp_path / "broken", tmp_path / "list.json")
    assert [problem.split(";")[0] for problem in caught.value.problems] == [
        f"data_root: no images in {tmp_path / 'empty'} or its sub-folders",
        f"data_root: {tmp_path / 'broken'}: none of its images can be used",
        "broken/b.png: it is empty (0 bytes)",
        f"data_root: {tmp_path / 'list.json'} lists no images",
    ]


def test_multiply_0_for_everything_is_refused(root):
    picture(root / "a.png")
    write(root / "multiply.txt", "0")
    with pytest.raises(DataError, match="all 1 images are excluded by multiply 0"):
        index_of(root)


# --- lists
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["image", "file_name", "image_path", "path"])
@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv"])
def test_a_list_of_images_is_a_data_root(tmp_path, suffix, key):
    picture(tmp_path / "pictures/a.png")
    picture(tmp_path / "elsewhere/b.png")
    rows = [
        {key: "pictures/a.png", "caption": "a cat, black"},
        {key: str(tmp_path / "elsewhere/b.png"), "caption": 'it is "b"'},
    ]
    contents = {
        ".json": json.dumps(rows),
        ".jsonl": "\n".join(map(json.dumps, rows)) + "\n\n",
        ".csv": f'{key},caption\npictures/a.png,"a cat, black"\n{rows[1][key]},"it is ""b"""\n',
    }
    write(tmp_path / f"list{suffix}", contents[suffix])
    index = index_of(tmp_path / f"list{suffix}")
    assert [(record.path, record.caption.text) for record in index.records] == [
        (tmp_path / "elsewhere/b.png", 'it is "b"'),
        (tmp_path / "pictures/a.png", "a cat, black"),
    ]
    assert (index.bad, index.notices) == ((), ())


def test_a_list_that_maps_paths_to_captions(tmp_path):
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png")
    write(tmp_path / "meta.json", {"a.png": "a cat", "b.png": {"caption": "a dog", "tags": "black, sitting"}})
    assert texts(index_of(tmp_path / "meta.json")) == {"a.png": "a cat", "b.png": "a dog, black, sitting"}


def test_a_list_s_row_wins_over_the_files_beside_the_image_which_fill_in(tmp_path):
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png")
    for name in "ab":
        write(tmp_path / f"{name}.yaml", "caption: beside\nloss_scale: 0.5\n")
    write(tmp_path / "multiply.txt", "3")
    write(
        tmp_path / "list.json",
        [{"image": "a.png", "caption": "listed", "loss_scale": 0.1}, {"image": "b.png"}],
    )
    index = index_of(tmp_path / "list.json")
    assert [(record.caption.text, record.loss_scale, record.multiply) for record in index.records] == [
        ("listed", 0.1, 1.0),
        ("beside", 0.5, 1.0),
    ]


def test_an_image_may_be_listed_with_several_captions(tmp_path):
    picture(tmp_path / "a.png")
    write(tmp_path / "list.json", [{"image": "a.png", "text": "one"}, {"image": "a.png", "text": "two"}])
    assert texts(index_of(tmp_path / "list.json")) == {"a.png": "one", "a.png (2)": "two"}


def test_a_list_beside_a_folder(tmp_path):
    picture(tmp_path / "mine/a.png")
    picture(tmp_path / "other/b.png")
    write(tmp_path / "list.jsonl", {"file_name": "other/b.png", "text": "listed"})
    assert texts(index_of(tmp_path / "mine", tmp_path / "list.jsonl")) == {
        "mine/a.png": "a",
        "other/b.png": "listed",
    }


def test_rows_that_cannot_be_used_are_named_with_their_line(tmp_path):
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png")
    rows = [
        '{"file_name": "a.png", "text": "fine"}',
        '{"file_name": "gone.png", "text": "x"}',
        "not json",
        '{"text": "no image"}',
        '{"file_name": "b.png", "multiply": "x"}',
        "[1]",
        '{"file_name": 5}',
        '{"file_name": "a\\u0000.png"}',
    ]
    write(tmp_path / "list.jsonl", "\r\n".join(rows))
    index = index_of(tmp_path / "list.jsonl")
    assert texts(index) == {"a.png": "fine"}
    assert {file.name: file.reason.split(";")[0] for file in index.bad} == {
        "gone.png": "list.jsonl:2 names it, and it is not there",
        "list.jsonl:3": "is not JSON (Expecting value)",
        "list.jsonl:4": "names no image",
        "b.png": "list.jsonl:5: multiply: must be a number from 0 to 10000",
        "list.jsonl:6": 'must hold keys and values, such as {"file_name": "cat.jpg", "text": "a cat"}',
        "list.jsonl:7": "names no image",
        "a\ufffd.png": "list.jsonl:8 names it, and it is not there",
    }


@pytest.mark.parametrize(
    ("file", "content", "problem"),
    [
        ("list.json", "{", "list.json:1: is not JSON"),
        ("list.json", '"a"', "list.json: must be a list of images, such as"),
        ("list.json", '{"lr": 1e-6, "data_root": "x"}', "list.json: must be a list of images, such as"),
        ("list.json", "[" * 100_000, "list.json:1: holds JSON that is nested too deep"),
        ("list.csv", 'file_name,text\na.png,"never closed' + "x" * 200_000, "list.csv:"),
    ],
)
def test_a_list_that_cannot_be_read_refuses_the_run(tmp_path, file, content, problem):
    write(tmp_path / file, content)
    with pytest.raises(DataError) as caught:
        index_of(tmp_path / file)
    assert caught.value.problems[0].startswith(f"data_root: {tmp_path / problem}")


def test_a_csv_row_with_too_many_columns(tmp_path):
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png")
    write(tmp_path / "list.csv", "file_name,text\na.png,a cat\nb.png,a dog, sitting\n")
    index = index_of(tmp_path / "list.csv")
    assert [record.name for record in index.records] == ["a.png"]
    assert [str(file) for file in index.bad] == [
        "list.csv:3: has more columns than the first line; put a text that holds commas into quotes"
    ]


@pytest.mark.parametrize(("between", "word"), [(";", "semicolons"), ("\t", "tabs")])
def test_a_csv_with_the_separators_of_other_countries(tmp_path, between, word):
    for name in "abc":
        picture(tmp_path / f"{name}.png")
    rows = ["file_name,text", "a.png,a cat\0 sitting", "b.png,a dog,big"]
    write(tmp_path / "list.csv", "\r\n".join(rows).replace(",", between).replace("\0", ","))
    index = index_of(tmp_path / "list.csv")
    assert texts(index) == {"a.png": "a cat, sitting"}
    assert f"put a text that holds {word} into quotes" in str(index.bad[0])
    write(tmp_path / "metadata.csv", f"file_name{between}text\na.png{between}a cow\n")
    assert texts(index_of(tmp_path))["a.png"] == "a cow"


def test_a_quote_that_is_never_closed_swallows_no_rows(tmp_path):
    for name in "abc":
        picture(tmp_path / f"{name}.png")
    write(tmp_path / "list.csv", 'file_name,text\na.png,x\nb.png,"a cat\nc.png,y\n')
    with pytest.raises(DataError) as caught:
        index_of(tmp_path / "list.csv")
    assert caught.value.problems[0].endswith("list.csv:3: is not CSV (a quote is opened and never closed)")


def test_a_csv_of_excel(tmp_path):
    picture(tmp_path / "ä.png")
    content = ",file_name,text,Größe\r\n0,ä.png,\u201eschön\u201c,5\r\n"
    (tmp_path / "list.csv").write_bytes(b"\xef\xbb\xbf" + content.encode())
    assert texts(index_of(tmp_path / "list.csv")) == {"ä.png": "„schön“"}
    (tmp_path / "list.csv").write_bytes(content.encode("cp1252"))
    index = index_of(tmp_path / "list.csv")
    assert texts(index) == {"ä.png": "„schön“"} and "'Größe'" in index.notices[0].text


def test_metadata_of_a_folder(tmp_path):
    for name in ("train/a.png", "train/sub/b.png", "train/c.png"):
        picture(tmp_path / name)
    rows = [
        {"file_name": "a.png", "text": "from the list"},
        {"file_name": "./sub/b.png", "text": None, "loss_scale": 0.5},
        {"file_name": "gone.png", "text": "x"},
    ]
    write(tmp_path / "train/metadata.jsonl", "\n".join(map(json.dumps, rows)))
    write(tmp_path / "train/c.txt", "beside")
    index = index_of(tmp_path)
    assert texts(index) == {"train/a.png": "from the list", "train/c.png": "beside", "train/sub/b.png": "b"}
    assert index.records[2].loss_scale == 0.5
    assert list(map(str, index.notices)) == ["train/metadata.jsonl:3: its image is not there"]


def test_of_two_rows_for_one_image_the_last_is_used_and_the_others_are_named(tmp_path):
    picture(tmp_path / "train/a.png")
    rows = [
        {"file_name": name, "text": str(number)} for number, name in enumerate(("a.png", "./a.png", "a.png"))
    ]
    write(tmp_path / "train/metadata.jsonl", "\n".join(map(json.dumps, rows)))
    index = index_of(tmp_path)
    assert texts(index) == {"train/a.png": "2"}
    places = "train/metadata.jsonl:1, train/metadata.jsonl:2"
    assert list(map(str, index.notices)) == [f"{places}: a later row names the same image and is used"]


def test_parquet_as_metadata_and_as_a_root(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for name in ("a.png", "sub/b.png", "c.png"):
        picture(tmp_path / "train" / name)
    columns = {
        "file_name": ["a.png", "sub/b.png", None],
        "text": ["a cat", None, "x"],
        "loss_scale": [None, 0.5, math.nan],
    }
    parquet.write_table(pyarrow.table(columns), tmp_path / "train/metadata.parquet")
    index = index_of(tmp_path / "train")
    assert texts(index) == {"a.png": "a cat", "c.png": "c", "sub/b.png": "b"}
    assert [record.loss_scale for record in index.records] == [1.0, 1.0, 0.5] and index.records[
        0
    ].caption.source == "metadata.parquet"
    assert [str(file) for file in index.bad] == [
        "metadata.parquet: row 3: names no image; a row needs a file_name"
    ]
    assert texts(index_of(tmp_path / "train/metadata.parquet")) == {"a.png": "a cat", "sub/b.png": "b"}


def test_parquet_that_cannot_be_read_leaves_its_images_out_and_says_why(tmp_path, monkeypatch):
    picture(tmp_path / "train/a.png")
    picture(tmp_path / "b.png")
    write(tmp_path / "train/metadata.parquet", "not Parquet")
    for reason in (
        "cannot be read (is it Parquet?",
        "Parquet is read with the package pyarrow: pip install pyarrow, or save the list as metadata.jsonl",
    ):
        (bad,) = index_of(tmp_path).bad
        assert str(bad).startswith(f"train/metadata.parquet: {reason}") and bad.reason.endswith(
            "; 1 image is skipped for it"
        )
        monkeypatch.setitem(sys.modules, "pyarrow", None)


def test_a_bad_row_of_metadata_costs_its_image(tmp_path):
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png")
    write(tmp_path / "metadata.jsonl", '{"file_name": "a.png", "flip_p": 3}\n{"text": "nameless"}\n')
    index = index_of(tmp_path)
    assert [record.name for record in index.records] == ["b.png"]
    assert [str(file).split(";")[0] for file in index.bad] == [
        "a.png: metadata.jsonl:1: flip_p: must be a number from 0 to 1",
        "metadata.jsonl:2: names no image",
    ]


@pytest.mark.skipif(os.name != "posix", reason="needs names that other systems change")
def test_names_in_lists_may_be_spelled_as_other_systems_do(tmp_path):
    picture(tmp_path / "sub/é.png")
    write(
        tmp_path / "metadata.jsonl", {"file_name": "sub\\e\u0301.png", "text": "decomposed, with a backslash"}
    )
    assert texts(index_of(tmp_path)) == {"sub/é.png": "decomposed, with a backslash"}
    write(tmp_path / "list.jsonl", {"file_name": "sub\\é.png", "text": "x"})
    assert texts(index_of(tmp_path / "list.jsonl")) == {"sub/é.png": "x"}


# --- kohya's folders
# ------------------------------------------------------------------------------------------------------------


def test_kohyas_folders_are_read_and_said(tmp_path):
    picture(tmp_path / "10_sks dog/a.png")
    picture(tmp_path / "10_sks dog/deep/b.png")
    picture(tmp_path / "2_cats, many/c.png")
    write(tmp_path / "2_cats, many/c.txt", "its own")
    index = index_of(tmp_path)
    found = {record.name: (record.multiply, record.caption.text) for record in index.records}
    assert found == {
        "10_sks dog/a.png": (10.0, "sks dog"),
        "10_sks dog/deep/b.png": (10.0, "sks dog"),
        "2_cats, many/c.png": (2.0, "its own"),
    }
    assert [str(notice).split(",")[0] for notice in index.notices] == [
        "10_sks dog/: read as kohya names its folders: 10 times an epoch",
        "2_cats",
    ]


def test_in_kohyas_folders_the_words_before_the_first_comma_are_a_tag_and_the_first_line_is_the_caption(
    tmp_path,
):
    """sd-scripts keep the first N pieces of a .txt's first line, or of any line as wildcards."""
    picture(tmp_path / "10_sks dog/deep/a.png")
    write(tmp_path / "10_sks dog/deep/a.txt", "one, two, three, four\nfive, six\n")
    index = index_of(tmp_path)
    (record,) = index.records
    assert record.caption.text == "one, two, three, four"
    assert "its first line is the caption, as in kohya's scripts" in "".join(map(str, index.notices))
    draws = np.random.default_rng(0)
    for kept, starts in ((0, {()}), (1, {("one",)}), (2, {("one", "two")})):
        shown = [
            render(record.caption, lambda _: draws, cond_dropout=0, shuffle_tags=True, keep_tags=kept).split(
                ", "
            )
            for _ in range(60)
        ]
        assert {tuple(pieces[:kept]) for pieces in shown} == starts
        assert {pieces[kept] for pieces in shown} == set(["one", "two", "three", "four"][kept:])
    assert {caption.text for caption in only(tmp_path, caption_lines=True).caption.versions} == {
        "one, two, three, four",
        "five, six",
    }
    picture(tmp_path / "more/a.png")
    write(tmp_path / "more/a.txt", "one, two\nthree")
    found = {record.name: record.caption for record in index_of(tmp_path).records}
    assert found["more/a.png"].main == "one" and found["more/a.png"].text == "one, two three"
    assert found["10_sks dog/deep/a.png"].main == "one"


@pytest.mark.parametrize(
    ("names", "beside", "read"),
    [
        (["10_dog"], False, True),
        (["1_dog"], False, True),
        (["5_dog", "20_cat"], False, True),
        (["10_dog"], True, False),
        (["10_dog", "cats"], False, False),
        (["2023_holidays"], False, False),
        (["01_dog"], False, False),
        (["1_dog", "2_cat", "3_horse"], False, False),
        (["10_"], False, False),
        (["10_ "], False, False),
        ([], False, False),
    ],
)
def test_a_number_before_a_name_is_taken_for_repeats_only_where_everything_is_named_so(names, beside, read):
    entries, remarks = read_repeats(names, images_beside=beside)
    assert set(entries) == (set(names) if read else set())
    assert {remark.place for remark in remarks} <= {f"{name}/" for name in names}


def test_folders_that_count_are_said_to_be_none_of_kohyas(tmp_path):
    for name in ("1_dog/a.png", "2_cat/b.png"):
        picture(tmp_path / name)
    index = index_of(tmp_path)
    assert [(record.multiply, record.caption.source) for record in index.records] == [(1.0, "file name")] * 2
    assert "not read as kohya's repeats, since the numbers count the folders" in str(index.notices[0])


def test_the_page_on_pictures_has_every_key_file_and_source():
    page = (Path(__file__).parents[3] / "docs" / "your-pictures.md").read_text(encoding="utf-8")
    files = [name for name in FOLDER_FILES if not name.endswith("yml")]
    assert [
        name
        for name in (*SETTINGS_BY_KEY, *WORDS, "tags", *files, *METADATA, *FILE_KEYS[:2])
        if f"`{name}`" not in page
    ] == []
    sources = page[page.index("\n## Captions\n") : page.index("\n## Settings")]
    places = [
        sources.index(f"`{name}`")
        for name in ("cat.yaml", "cat.yml", "cat.caption", "cat.txt", "cat.json", "metadata.jsonl")
    ]
    assert places == sorted(places)


# --- anything at all
# ------------------------------------------------------------------------------------------------------------

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
keys = st.sampled_from(
    ["caption", "main_prompt", "text", "tags", "rating", "max_caption_length", *ALL]
) | st.text(max_size=6)


@given(st.dictionaries(keys, json_values, max_size=5))
def test_any_values_are_an_entry_or_refused_in_words(values):
    try:
        entry = read_entry(values, file="f", source=".json")
    except FileError as error:
        assert error.reason.startswith("f: ")
    else:
        assert isinstance(entry, Entry)
        assert entry.multiply is None or 0 <= entry.multiply <= 10_000


@given(st.text(st.sampled_from(list("abc:-[]{},&*!|>'\"#? \n\t%@`\x00é")) | st.characters(), max_size=60))
def test_any_text_is_yaml_or_refused_in_words(tmp_path_factory, text):
    path = Path(tmp_path_factory.getbasetemp()) / "any.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        read_yaml(path, ".yaml")
    except FileError as error:
        assert error.reason.startswith("any.yaml")


def test_a_caption_in_utf_16_without_its_mark_is_refused_not_read_as_noise(tmp_path):
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png")
    (tmp_path / "a.txt").write_bytes("a cat".encode("utf-16-le"))
    index = index_of(tmp_path)
    assert [record.name for record in index.records] == ["b.png"]
    assert [str(file) for file in index.bad] == [
        "a.png: a.txt: holds zero bytes, so it is no text in UTF-8; save it as that"
    ]
