from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from data.captions.caption import Caption, parse_caption
from data.captions.file_name import from_file_name
from data.duplicates import find_duplicates
from data.index import Index, build_index
from data.options import DataOptions
from data.record import BadFile, Notice, Record
from data.report import report


def record(name, width=512, height=512, caption="a cat", source=".txt", multiply=1.0, folder=".", **more):
    found = parse_caption(caption, source) if caption else Caption("", (), source)
    size = {"width": width, "height": height}
    return Record(folder=Path(folder), file=name, name=name, **size, caption=found, multiply=multiply, **more)


class Words:
    """Counts words in the place of tokens."""

    limit = 75

    def counts(self, texts):
        return [len(text.split()) for text in texts]


LONG = " ".join(f"w{number}" for number in range(80))

INDEX = Index(
    (
        record("a.png"),
        record("b.png", 1024, 512),
        record("c.png", 256, 256, caption="img", source="file name"),
        record("d.png", caption=""),
        record("e.png", caption=LONG),
        record("f.png", multiply=0, caption=""),
    ),
    (BadFile("x.png", "it is empty (0 bytes)"),),
    (Path("pictures"),),
    (Notice("unknown key 'mutliply'; did you mean 'multiply'?", ("a.yaml:3", "b.yaml:1"), 9),),
)


def report_of(index, *, resolution=512, batch_size=2, tokens=None, **more):
    options = DataOptions(resolution=resolution, batch_size=batch_size)
    return report(index, options, images_per_step=batch_size, tokens=tokens, **more)


def test_findings():
    found = report_of(INDEX, tokens=Words())
    assert (found.images, found.excluded, found.missing, found.empty) == (5, 1, {"c.png": "img"}, ("d.png",))
    (long,) = found.long
    assert (long.name, long.tokens, long.cut) == ("e.png", 80, "w75 w76 w77 w78 w79")
    assert [(use.bucket, use.images, use.upscaled) for use in found.buckets] == [
        ((512, 512), 4, 1),
        ((704, 320), 1, 0),
    ]
    assert [(image.name, image.size, image.bucket) for image in found.enlarged] == [
        ("c.png", (256, 256), (512, 512))
    ]
    square, wide = found.buckets
    assert square.cropped == 0
    assert abs(wide.cropped - (1 - (1024 * 1024 * 320 / 704) / (1024 * 512))) < 1e-9


def test_lines():
    assert report_of(INDEX, tokens=Words()).lines() == [
        "images: 5 in pictures (1 more excluded by multiply 0)",
        "files skipped: 1",
        "  x.png: it is empty (0 bytes)",
        "remarks: 1",
        "  a.yaml:3, b.yaml:1 and 7 more: unknown key 'mutliply'; did you mean 'multiply'?",
        "images without a caption, whose file name is used: 1",
        '  c.png: "img"',
        "names given by a camera or a program among them, describing nothing: 1",
        '  c.png as "img"',
        "images with an empty caption: 1",
        "  d.png",
        "captions over 75 tokens: 1",
        "  e.png: 80 tokens; not seen: 'w75 w76 w77 w78 w79'",
        "images smaller than trained, and so enlarged: 1",
        "  c.png: 256 x 256, trained as 512 x 512",
        "bucket        images   an epoch   cropped   upscaled",
        "  512 x 512        4          4     0.0%          1",
        "  704 x 320        1          1     9.1%          0   fewer than the 2 of a step",
    ]


@pytest.mark.parametrize(
    ("file", "nothing"),
    [
        *((name, True) for name in (
            "IMG_2020", "IMG-20240101-WA0007", "DSC01234", "DSCN0007", "PXL_20240101_123456", "P1010023",
            "0001", "20240101 123456", "Screenshot 2024-01-01 at 12.00.00",
            "WhatsApp Image 2024-01-01 at 12.00.00 (1)", "image (12)", "photo 3", "unnamed",
            "3f2504e0-4f89-11d3-9a0c-0305e82c3301", "d41d8cd98f00b204",
        )),
        *((name, False) for name in (
            "a red cat_0012", "dog (3)", "imgur dog", "pixel art", "photo of a cat", "sks", "facade",
            "at sea", "p",
        )),
    ],
)  # fmt: skip
def test_names_of_cameras_and_programs_are_told_from_captions(file, nothing):
    found = report_of(
        Index((record("x.png", caption=from_file_name(file).text, source="file name"),), (), (Path(),))
    )
    assert any("describing nothing" in note for note in found.notes()) == nothing
    assert any("describing nothing" in line for line in found.lines()) == nothing
    assert found.as_json()["captions"]["from_file_name"] == {"x.png": file.split("_")[0]}


def test_several_resolutions_share_an_epoch():
    index = Index((record("a.png", multiply=3), record("b.png", 1024, 1024)), (), (Path(),))
    found = report_of(index, resolution=(512, 768, 512, 768))
    assert [(use.resolution, use.images, use.an_epoch, use.upscaled) for use in found.buckets] == [
        (512, 2, 2.0, 0),
        (768, 2, 2.0, 1),
    ]
    assert [image.name for image in found.enlarged] == ["a.png"]
    assert found.lines()[0] == "images: 2 in .; 4 are shown in an epoch"
    assert found.lines()[-3:] == [
        "resolution  bucket        images   an epoch   cropped   upscaled",
        "       512    512 x 512        2          2     0.0%          0",
        "       768    768 x 768        2          2     0.0%          1",
    ]


def test_without_a_tokenizer_lengths_are_not_reported():
    found = report_of(INDEX)
    assert found.token_limit is None and not any(
        "tokens" in line for line in (*found.lines(), *found.notes())
    )


def test_each_caption_of_an_image_is_measured():
    both = Caption("short", others=(Caption(LONG), Caption("")))
    found = report_of(
        Index((Record(folder=Path(), file="a", name="a", width=9, height=9, caption=both),), (), (Path(),)),
        tokens=Words(),
    )
    assert (
        [long.name for long in found.long] == ["a, caption 2"]
        and found.empty == ("a",)
        and found.several == 1
    )


def test_letters_that_are_several_tokens_are_counted():
    class Bytes(Words):
        def counts(self, texts):
            return [len(text.encode()) for text in texts]

    index = Index(
        (
            record("a.png", caption="猫" * 30),
            record("b.png", caption="x" * 75),
            record("c.png", caption="x" * 76),
        ),
        (),
        (Path(),),
    )
    assert [long.name for long in report_of(index, tokens=Bytes()).long] == ["a.png", "c.png"]


def test_notes_are_one_sentence_per_concern():
    notes = report_of(INDEX, batch_size=8, tokens=Words()).notes()
    assert [note.split(":")[0] for note in notes] == [
        "a.yaml",
        "1 image without a caption, trained on the file name",
        "1 file name given by a camera or a program, describing nothing",
        "1 image with an empty caption",
        "1 caption over 75 tokens, of which the end is not seen",
        "1 image smaller than trained, and so enlarged",
        "batch_size 8 is larger than the number of images, 5",
    ]


def test_clean_data_has_no_notes():
    index = Index(tuple(record(f"{number}.png") for number in range(4)), (), (Path(),))
    found = report_of(index, batch_size=4, tokens=Words())
    assert found.notes() == ()
    assert found.lines()[1:6] == [
        "files skipped: none",
        "images without a caption, whose file name is used: none",
        "images with an empty caption: none",
        "captions over 75 tokens: none",
        "images smaller than trained, and so enlarged: none",
    ]


def test_braces_that_make_no_wildcard_are_a_remark(tmp_path):
    captions = {
        "nested": "a {red|dark {blue|green}} cat",
        "open": "a cat, {red|blue, big",
        "closed": "a cat }",
        "fine": "a {red|blue, big} cat, {{x}}",
        "none": "a cat",
    }
    for name, caption in captions.items():
        Image.new("RGB", (64, 64)).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(caption)
    options = DataOptions(data_root=str(tmp_path), resolution=64, batch_size=1)
    assert [str(notice) for notice in build_index(options).notices] == [
        "fine.png, nested.png: {a|b} is trained as it is written; with wildcards one of the two is drawn "
        "each time"
    ]
    assert [str(notice) for notice in build_index(replace(options, wildcards=True)).notices] == [
        "closed.png, nested.png, open.png: braces that are no wildcard: nested, or one without the other"
    ]


def test_a_caption_with_wildcards_is_as_long_as_its_longest_alternatives():
    short = " ".join(["w"] * 70) + " {x|y z} {one two|three}"
    index = Index(
        (record("a.png", caption=short), record("b.png", caption=f"{short} more w{{x|y z}}")), (), ()
    )
    options = DataOptions(resolution=512, batch_size=1, wildcards=True)
    (long,) = report(index, options, images_per_step=1, tokens=Words()).long
    assert (long.name, long.tokens, long.cut) == ("b.png", 77, "wy z")


def test_long_lists_are_cut_and_counted():
    index = Index(tuple(record(f"{number}.png", caption="") for number in range(14)), (), (Path(),))
    found = report_of(index, batch_size=1)
    assert "  ... and 4 more" in found.lines()
    assert found.notes() == ("14 images with an empty caption: 0.png, 1.png, 2.png and 11 more",)


@pytest.mark.parametrize(
    ("multiply", "shown"),
    [
        (12_345.5, "37036"),
        (10_000.0, "30000"),
        (333.0, "999"),
        (0.25, "0.75"),
        (333.5, "1000"),
        (1 / 9, "0.3333"),
    ],
)
def test_counts_are_not_rounded_to_powers_of_ten(multiply, shown):
    index = Index(tuple(record(f"{number}.png", multiply=multiply) for number in range(3)), (), (Path(),))
    lines = report_of(index).lines()
    assert lines[0] == f"images: 3 in .; {shown} are shown in an epoch" and lines[-1].split()[4] == shown


def test_a_large_group_of_duplicates_is_cut(tmp_path):
    records = [record(f"{number}.png", folder=tmp_path) for number in range(50)]
    for copy in records:
        copy.path.write_bytes(b"the same")
    found = report_of(Index(tuple(records), (), (Path(),)), duplicates=True)
    assert "  0.png = 1.png = 2.png and 47 more" in found.lines()
    assert found.as_json()["duplicates"] == [[copy.name for copy in records]]


def test_a_picture_a_little_too_large_counts_as_cropped():
    index = Index((record("a.png", 640, 500), record("b.png", 640, 500)), (), (Path(),))
    (use,) = report_of(index, batch_size=1).buckets
    assert use.bucket == (576, 448)  # 1.2857 against 1.28: the width is kept, 497.8 of the 500 rows are seen
    assert abs(use.cropped - (1 - 640 / 576 * 448 / 500)) < 1e-9


@pytest.fixture
def copies(tmp_path):
    """Files of equal sizes.

    Two copies, one that differs in the middle and one that differs beyond what is compared first.
    """
    long = bytes(200_000)
    contents = {
        "a.png": long,
        "b.png": long[:100_001] + b"x" + long[100_002:],
        "c.png": long,
        "d.png": long[:-1] + b"x",
        "e.png": b"short",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    return [record(name, folder=tmp_path) for name in contents]


def test_duplicates_are_files_with_the_same_bytes(copies):
    assert find_duplicates(copies) == (("a.png", "c.png"),)
    found = report_of(Index(tuple(copies), (), (Path(),)), duplicates=True)
    assert "  a.png = c.png" in found.lines() and found.as_json()["duplicates"] == [["a.png", "c.png"]]


def test_only_files_of_one_size_are_opened(copies, monkeypatch):
    opened = []
    plain = Path.open
    monkeypatch.setattr(Path, "open", lambda self, *args: opened.append(self.name) or plain(self, *args))
    find_duplicates(copies)
    assert sorted(opened) == ["a.png", "a.png", "b.png", "c.png", "c.png", "d.png", "d.png"]


def test_a_file_that_vanishes_is_like_no_other(copies):
    (copies[2].path).unlink()
    assert find_duplicates(copies) == ()
