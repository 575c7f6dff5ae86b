from pathlib import Path

from data.captions import Caption, parse_caption
from data.index import BadFile, Index, Record
from data.report import report


def record(name, width=512, height=512, caption="a cat", source=".txt", multiply=1.0):
    found = parse_caption(caption, source) if caption else Caption("", (), source)
    return Record(folder=Path(), file=name, name=name, width=width, height=height, caption=found, multiply=multiply)


def words(text):
    return len(text.split())


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
)


def test_findings():
    found = report(INDEX, resolution=512, batch_size=2, count_tokens=words)
    assert (found.images, found.excluded, found.missing, found.empty) == (5, 1, ("c.png",), ("d.png",))
    (long,) = found.long
    assert (long.name, long.tokens, long.cut) == ("e.png", 80, "w75 w76 w77 w78 w79")
    assert [(use.bucket, use.images, use.upscaled) for use in found.buckets] == [((512, 512), 4, 1), ((704, 320), 1, 0)]
    square, wide = found.buckets
    assert square.cropped == 0
    assert abs(wide.cropped - (1 - (1024 * 1024 * 320 / 704) / (1024 * 512))) < 1e-9


def test_lines():
    assert report(INDEX, resolution=512, batch_size=2, count_tokens=words).lines() == [
        "images: 5 in pictures (1 more left out by multiply 0)",
        "files left out: 1",
        "  x.png: it is empty (0 bytes)",
        "images without a caption file, whose name is used: 1",
        "  c.png",
        "images with an empty caption: 1",
        "  d.png",
        "captions over 75 tokens: 1",
        "  e.png: 80 tokens; not seen: 'w75 w76 w77 w78 w79'",
        "bucket        images   cropped   upscaled",
        "  512 x 512        4     0.0%          1",
        "  704 x 320        1     9.1%          0   fewer than a batch",
    ]


def test_without_a_tokenizer_lengths_are_not_reported():
    found = report(INDEX, resolution=512, batch_size=2)
    assert found.long is None and not any("tokens" in line for line in (*found.lines(), *found.notes()))


def test_notes_are_one_sentence_per_concern():
    notes = report(INDEX, resolution=512, batch_size=8, count_tokens=words).notes()
    assert [note.split(":")[0] for note in notes] == [
        "1 file left out that cannot be used",
        "1 image without a caption file, trained on the file name",
        "1 image with an empty caption",
        "1 caption over 75 tokens, of which the end is not seen",
        "batch_size 8 is larger than the number of images, 5",
    ]


def test_clean_data_has_no_notes():
    index = Index(tuple(record(f"{number}.png") for number in range(4)), (), (Path(),))
    found = report(index, resolution=512, batch_size=4, count_tokens=words)
    assert found.notes() == ()
    assert found.lines()[1:5] == [
        "files left out: none",
        "images without a caption file, whose name is used: none",
        "images with an empty caption: none",
        "captions over 75 tokens: none",
    ]


def test_long_lists_are_cut_and_counted():
    index = Index(tuple(record(f"{number}.png", caption="") for number in range(14)), (), (Path(),))
    found = report(index, resolution=512, batch_size=1)
    assert "  ... and 4 more" in found.lines()
    assert found.notes() == ("14 images with an empty caption: 0.png, 1.png, 2.png and 11 more",)


def test_a_picture_a_little_too_large_counts_as_cropped():
    index = Index((record("a.png", 640, 500), record("b.png", 640, 500)), (), (Path(),))
    (use,) = report(index, resolution=512, batch_size=1).buckets
    assert use.bucket == (576, 448)  # 1.2857 against 1.28: the width is kept, 497.8 of the 500 rows are seen
    assert abs(use.cropped - (1 - 640 / 576 * 448 / 500)) < 1e-9
