"""A saved index is the index of a new scan, or it is not used."""

import os
import pickle
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import pytest
from PIL import Image

from data import saved_index as module
from data.index import build_index
from data.options import DataOptions
from data.record import BadFile
from data.saved_index import remembered_index


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Return the options of a small data set that counts as large and old enough to be saved."""
    monkeypatch.setattr(module, "FEWEST", 1)
    monkeypatch.setattr(module, "_CLOCK_GRAIN", 0)
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    for name in ("a.png", "b.jpg", "sub/c.png", "sub/ünï\ncode.png"):
        Image.new("RGB", (64, 48)).save(root / name)
    (root / "a.txt").write_text("a cat, sitting, on a mat")
    (root / "bad.png").write_bytes(b"")
    return DataOptions(data_root=str(root))


@pytest.fixture
def scans(monkeypatch):
    """Count the scans."""
    counted = []

    def scan(options):
        counted.append(options)
        return build_index(options)

    monkeypatch.setattr(module, "build_index", scan)
    return counted


def test_it_is_equal_and_spares_the_scan(data, scans, tmp_path):
    first = remembered_index(data, tmp_path / "cache")
    again = remembered_index(data, tmp_path / "cache")
    assert len(scans) == 1 and first == again == build_index(data)
    assert again.fingerprint() == first.fingerprint() and [file.name for file in again.bad] == ["bad.png"]
    assert again.records[0].folder is again.records[1].folder, "what is shared stays shared"


@pytest.mark.skipif(sys.platform != "linux", reason="such names are for file systems of Linux")
def test_names_that_are_not_unicode(data, scans, tmp_path):
    (tmp_path / "root" / "b.jpg").rename(os.fsdecode(os.fsencode(tmp_path / "root") + b"/caf\xe9.png"))
    assert remembered_index(data, tmp_path / "cache") == remembered_index(data, tmp_path / "cache")
    assert len(scans) == 1


def touched(path):
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))


CHANGES = {
    "a new image": lambda root: Image.new("RGB", (9, 9)).save(root / "sub" / "d.png"),
    "an image gone": lambda root: (root / "b.jpg").unlink(),
    "a renamed image": lambda root: (root / "b.jpg").rename(root / "c.jpg"),
    "other pixels, same times": lambda root: rewritten(root / "a.png"),
    "a touched image": lambda root: touched(root / "a.png"),
    "a new caption": lambda root: (root / "b.txt").write_text("words"),
    "a longer caption": lambda root: (root / "a.txt").write_text("a cat, sitting, on a mat, at home"),
    "a folder's file": lambda root: (root / "sub" / "multiply.txt").write_text("2"),
    "a mended image": lambda root: Image.new("RGB", (9, 9)).save(root / "bad.png"),
    "permissions": lambda root: (root / "b.jpg").chmod(0o600),
    "a new folder": lambda root: (
        (root / "new").mkdir(),
        Image.new("RGB", (9, 9)).save(root / "new" / "x.png"),
    ),
}


def rewritten(path):
    before = path.stat()
    Image.new("RGB", (64, 49)).save(path)
    with path.open("ab") as file:
        file.write(bytes(max(0, before.st_size - path.stat().st_size)))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("change", CHANGES)
def test_any_change_of_the_files_is_seen(data, scans, tmp_path, change):
    remembered_index(data, tmp_path / "cache")
    time.sleep(0.02)  # the grain of the file system's clock
    CHANGES[change](Path(data.data_root))
    assert remembered_index(data, tmp_path / "cache") == build_index(data)
    assert len(scans) == 2
    remembered_index(data, tmp_path / "cache")
    assert len(scans) == 2, "the new one is saved"


def test_options_count_where_they_enter_the_index(data, scans, tmp_path, monkeypatch):
    remembered_index(data, tmp_path / "cache")
    remembered_index(replace(data, resolution=768, batch_size=9, flip_p=1, num_workers=3), tmp_path / "cache")
    assert len(scans) == 1
    monkeypatch.setattr(
        module, "_UNUSED_OPTIONS", tuple(name for name in module._UNUSED_OPTIONS if name != "batch_size")
    )
    remembered_index(replace(data, batch_size=9), tmp_path / "cache")
    assert len(scans) == 2, "an option that is not known to be idle counts"


def test_idle_options_are_options():
    known = {field.name for field in fields(DataOptions)} | {"max_tokens", "on_bad_image"}
    assert set(module._UNUSED_OPTIONS) <= known
    assert "data_root" not in module._UNUSED_OPTIONS


def test_other_code_makes_another_index(data, scans, tmp_path, monkeypatch):
    remembered_index(data, tmp_path / "cache")
    monkeypatch.setattr(module, "_code", lambda: ("other", "", False))
    remembered_index(data, tmp_path / "cache")
    assert len(scans) == 2


def test_a_damaged_file_is_not_used(data, scans, tmp_path):
    remembered_index(data, tmp_path / "cache")
    (path,) = (tmp_path / "cache").iterdir()
    whole = path.read_bytes()
    for place, damaged in enumerate(
        (whole[:-1], whole[:40], b"", b"\n", b"{}\n", whole[:200] + b"?" + whole[201:])
    ):
        path.write_bytes(damaged)
        assert remembered_index(data, tmp_path / "cache") == build_index(data)
        assert len(scans) == place + 2


class Harm:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize(
    "content", [lambda path: pickle.dumps(Harm(str(path))), lambda path: pickle.dumps({"no": "index"})]
)
def test_a_file_from_elsewhere_runs_nothing(data, scans, tmp_path, content):
    remembered_index(data, tmp_path / "cache")
    (path,) = (tmp_path / "cache").iterdir()
    made = content(tmp_path / "harm")
    head = path.read_bytes().partition(b"\n")[0].decode()
    signature = head.split('"signature": "')[1].split('"')[0]
    path.write_bytes(f'{{"signature": "{signature}", "content": "{module._hash(made)}"}}\n'.encode() + made)
    assert remembered_index(data, tmp_path / "cache") == build_index(data)
    assert len(scans) == 2 and not (tmp_path / "harm").exists()


def test_it_is_not_saved_where_that_is_not_worth_it(data, scans, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "FEWEST", 5)
    remembered_index(data, tmp_path / "cache")
    monkeypatch.setattr(module, "FEWEST", 1)
    monkeypatch.setattr(
        module, "_CLOCK_GRAIN", 10**12
    )  # a file written a moment ago may change and keep its times
    remembered_index(data, tmp_path / "cache")
    assert not (tmp_path / "cache").exists() and len(scans) == 2


def test_what_could_not_be_read_this_time_is_tried_again(data, tmp_path, monkeypatch):
    hiccup = replace(build_index(data), bad=(BadFile("b.jpg", "it cannot be read (Input/output error)"),))
    with monkeypatch.context() as patched:
        patched.setattr(module, "build_index", lambda options: hiccup)
        assert remembered_index(data, tmp_path / "cache") == hiccup
    assert remembered_index(data, tmp_path / "cache") == build_index(data)


def test_a_folder_that_cannot_be_written_costs_nothing_but_time(data, tmp_path):
    (tmp_path / "file").touch()
    assert remembered_index(data, tmp_path / "file" / "cache") == build_index(data)
