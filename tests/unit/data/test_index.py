import json
import os
from pathlib import Path

import pytest
from PIL import ExifTags, Image, ImageFile

import data
from data.errors import DataError
from data.index import build_index
from data.options import DataOptions

posix = pytest.mark.skipif(
    os.name != "posix", reason="links, pipes and such names are for file systems of POSIX"
)


def picture(path, size=(64, 48)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "red").save(path)
    return path


def index_of(*roots):
    return build_index(DataOptions(data_root=tuple(map(str, roots)) if len(roots) > 1 else str(roots[0])))


def names(index):
    return [record.name for record in index.records]


def test_records_say_what_and_where(tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    (tmp_path / "sub").mkdir()
    Image.new("RGB", (64, 48)).save(tmp_path / "sub/a cat_1.jpg", exif=exif)
    (tmp_path / "sub/a cat_1.txt").write_text("a cat, sitting")
    record = index_of(tmp_path).records[0]
    assert (record.name, record.path) == ("sub/a cat_1.jpg", tmp_path / "sub/a cat_1.jpg")
    assert (record.width, record.height) == (48, 64)
    assert record.caption.text == "a cat, sitting"
    assert (record.multiply, record.loss_scale, record.flip_p, record.cond_dropout) == (1.0, 1.0, None, None)


def test_numbers_of_thousands_of_digits_are_sorted_too(tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    rows = [{"file_name": f"{number}.png", "text": "x"} for number in ("9", "1" * 5000, "08", "2")]
    (tmp_path / "list.jsonl").write_text(
        "\n".join(json.dumps(row) for row in [{"file_name": "a.png"}, *rows])
    )
    index = build_index(DataOptions(data_root=str(tmp_path / "list.jsonl"), resolution=64))
    assert [file.name for file in index.bad] == ["2.png", "08.png", "9.png", "1" * 5000 + ".png"]


def test_natural_order_and_all_extensions(tmp_path):
    files = [
        "2.PNG",
        "10.png",
        "1.png",
        "b/1.jpg",
        "a/1.jpg",
        "x.jpeg",
        "x.webp",
        "x.bmp",
        "x.gif",
        "x.tif",
        "x.tiff",
        "x.avif",
    ]
    for file in files:
        picture(tmp_path / file)
    (tmp_path / "x.jfif").write_bytes((tmp_path / "x.jpeg").read_bytes())
    (tmp_path / "notes.md").write_text("no image")
    (tmp_path / "jpg").write_text("no image either")
    found = names(index_of(tmp_path))
    assert found[:5] == ["1.png", "2.PNG", "10.png", "a/1.jpg", "b/1.jpg"]
    assert set(found) == {*files, "x.jfif"}


def test_dot_files_and_folders_are_skipped(tmp_path):
    for file in ("a.png", ".hidden.png", "._a.png", ".cache/b.png"):
        picture(tmp_path / file)
    assert names(index_of(tmp_path)) == ["a.png"]


@posix
def test_links_are_followed_and_loops_end(tmp_path):
    picture(tmp_path / "elsewhere/real/a.png")
    root = tmp_path / "root"
    picture(root / "b.png")
    (root / "linked").symlink_to(tmp_path / "elsewhere/real")
    (root / "again").symlink_to(tmp_path / "elsewhere/real")
    (root / "loop").symlink_to(root)
    (root / "self").symlink_to("self")
    (root / "c.png").symlink_to(tmp_path / "elsewhere/real/a.png")
    (root / "gone.png").symlink_to("nowhere")
    (root / "round.png").symlink_to("round.png")
    index = index_of(root)
    assert names(index) == ["again/a.png", "b.png", "c.png"]
    assert [file.name for file in index.bad] == ["gone.png", "round.png"]
    assert "broken link" in index.bad[0].reason


@posix
def test_a_pipe_is_not_waited_for(tmp_path):
    picture(tmp_path / "a.png")
    os.mkfifo(tmp_path / "b.png")
    os.mkfifo(tmp_path / "a.txt")
    index = index_of(tmp_path)
    assert names(index) == ["a.png"] and [file.name for file in index.bad] == ["b.png"]
    assert index.records[0].caption.source == "file name"


def test_bad_files_are_listed_with_reasons_and_do_not_stop_the_scan(tmp_path):
    picture(tmp_path / "good.png")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "page.jpg").write_text("<html>")
    picture(tmp_path / "long.png")
    (tmp_path / "long.txt").write_bytes(b"x" * (1 << 21))
    index = index_of(tmp_path)
    assert names(index) == ["good.png"]
    assert {file.name: file.reason.split(" in one")[0] for file in index.bad} == {
        "empty.png": "it is empty (0 bytes)",
        "long.png": "long.txt: is larger than 1024 KiB, which is too much for what it is",
        "page.jpg": "it is not an image",
    }
    assert str(index.bad[0]) == "empty.png: it is empty (0 bytes)"


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    picture(tmp_path / "a.png")
    picture(tmp_path / "locked/b.png")
    scandir = os.scandir

    def guarded(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    index = index_of(tmp_path)
    assert names(index) == ["a.png"]
    assert [str(file) for file in index.bad] == ["locked/: the folder cannot be read (Permission denied)"]


@posix
@pytest.mark.parametrize(
    "name", ["ünï côde 猫.png", "with\nnewline.png", "a" * 250 + ".png", "quote'\".png", "%s {x}.png"]
)
def test_odd_names(tmp_path, name):
    picture(tmp_path / name)
    (tmp_path / name).with_suffix(".txt").write_text("words")
    record = index_of(tmp_path).records[0]
    assert record.path == tmp_path / name and record.caption.text == "words"
    assert record.name.isprintable()


@posix
def test_a_name_that_is_not_unicode(tmp_path):
    raw = os.fsencode(tmp_path) + b"/caf\xe9.png"
    picture(tmp_path / "a.png").rename(os.fsdecode(raw))
    index = index_of(tmp_path)
    assert names(index) == ["caf\ufffd.png"]
    index.fingerprint()
    names(index)[0].encode()


def test_several_roots_have_distinct_names(tmp_path):
    picture(tmp_path / "mine/train/a.png")
    picture(tmp_path / "regularisation/train/a.png")
    index = index_of(tmp_path / "mine/train", tmp_path / "regularisation/train")
    assert names(index) == ["mine/train/a.png", "regularisation/train/a.png"]


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "bmp", "tif", "avif"])
def test_the_header_is_enough(tmp_path, monkeypatch, suffix):
    picture(tmp_path / f"a.{suffix}")
    decoded = []
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: decoded.append(self))
    assert len(index_of(tmp_path).records) == 1 and not decoded


def test_the_same_data_gives_the_same_index_and_fingerprint(tmp_path):
    for folder in ("one", "two"):
        for number in (3, 1, 2) if folder == "one" else (2, 3, 1):
            picture(tmp_path / folder / f"{number}.png")
    one, two = index_of(tmp_path / "one"), index_of(tmp_path / "two")
    assert names(one) == names(two) and one.fingerprint() == two.fingerprint()


def test_the_fingerprint_changes_with_the_data(tmp_path):
    picture(tmp_path / "a.png")
    seen = {index_of(tmp_path).fingerprint()}
    for change in (
        lambda: picture(tmp_path / "b.png"),
        lambda: (tmp_path / "b.png").rename(tmp_path / "c.png"),
        lambda: (tmp_path / "a.txt").write_text("words"),
        lambda: (tmp_path / "a.txt").write_text("word, s"),
        lambda: picture(tmp_path / "a.png", (65, 48)),
    ):
        change()
        seen.add(index_of(tmp_path).fingerprint())
    assert len(seen) == 6


def problems(*roots):
    with pytest.raises(DataError) as caught:
        index_of(*roots)
    return caught.value.problems


def test_a_missing_root(tmp_path):
    (tmp_path / "input").mkdir()
    assert problems(tmp_path / "inptu") == (
        f"data_root: folder not found: {tmp_path / 'inptu'}; did you mean 'input'?",
    )
    assert "create it and put captioned images there" in problems(tmp_path / "elsewhere/deeper")[0]


def test_all_missing_roots_are_named_at_once(tmp_path):
    assert len(problems(tmp_path / "first", tmp_path / "second")) == 2


def test_a_root_that_is_a_file(tmp_path):
    assert "nor a list of them (.json, .jsonl, .csv, .parquet)" in problems(picture(tmp_path / "a.png"))[0]


def test_a_root_without_images(tmp_path):
    (tmp_path / "a.txt").write_text("caption")
    (problem,) = problems(tmp_path)
    assert (
        problem.startswith(f"data_root: no images in {tmp_path} or its sub-folders")
        and "jpg, jpeg, png" in problem
    )


def test_a_root_with_nothing_but_bad_files(tmp_path):
    for number in range(12):
        (tmp_path / f"{number}.png").write_bytes(b"")
    first, *listed = problems(tmp_path)
    assert first == f"data_root: {tmp_path}: none of its images can be used"
    assert listed[0] == "0.png: it is empty (0 bytes)" and listed[-1] == "... and 2 more"


def test_overlapping_roots(tmp_path):
    picture(tmp_path / "all/some/a.png")
    assert "would be found twice" in problems(tmp_path / "all", tmp_path / "all/some")[0]
    assert len(problems(tmp_path / "all", tmp_path / "all")) == 1


def test_the_package_of_the_same_name_is_not_a_folder_of_images():
    assert "this program's own package" in problems(Path(data.__path__[0]))[0]


def test_an_empty_list_of_roots():
    with pytest.raises(DataError, match="the list is empty"):
        build_index(DataOptions(data_root=()))
