"""Files and folders appear whole or not at all, and remains of killed processes are cleared."""

import errno
import os
from pathlib import Path

import pytest

from data import atomic as disk


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def fill(folder, text):
    folder.mkdir()
    (folder / "inner").mkdir()
    (folder / "inner" / "file").write_text(text)


def test_a_file_and_a_folder_appear_whole_and_replace_what_was_there(tmp_path):
    for text in ("one", "two"):
        with disk.appearing(tmp_path / "a" / "file") as draft:
            draft.write_text(text)
        with disk.appearing(tmp_path / "a" / "folder") as draft:
            fill(draft, text)
        assert (
            (tmp_path / "a" / "file").read_text()
            == (tmp_path / "a" / "folder" / "inner" / "file").read_text()
            == text
        )
        assert names(tmp_path / "a") == ["file", "folder"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_leaves_what_was_there(tmp_path, error):
    with disk.appearing(tmp_path / "folder") as draft:
        fill(draft, "good")
    with pytest.raises(type(error)), disk.appearing(tmp_path / "folder") as draft:
        fill(draft, "half")
        raise error
    assert names(tmp_path) == ["folder"] and (tmp_path / "folder" / "inner" / "file").read_text() == "good"


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_whatever_step_of_a_replacement_fails_the_old_folder_stands(tmp_path, monkeypatch, call):
    """Fail at the first, second, ... call, until the replacement succeeds."""
    real = {"fsync": os.fsync, "replace": Path.replace}
    for place in range(20):
        folder = tmp_path / str(place)
        folder.mkdir()
        with disk.appearing(folder / "x") as draft:
            fill(draft, "old")
        left = [place]

        def fail(*arguments, left=left):
            left[0] -= 1
            if left[0] == -1:
                raise OSError(errno.EIO, "Input/output error")
            return real[call](*arguments)

        monkeypatch.setattr(os if call == "fsync" else Path, call, fail)
        try:
            with disk.appearing(folder / "x") as draft:
                fill(draft, "new")
        except OSError:
            succeeded = False
        else:
            succeeded = True
        monkeypatch.undo()
        found = (folder / "x" / "inner" / "file").read_text()
        if succeeded:
            assert place > 1 and found == "new" and names(folder) == ["x"]
            return
        assert found in ("old", "new") and names(folder) == ["x"]
    raise AssertionError("it never succeeded")


def test_a_process_killed_at_any_step_of_a_replacement_leaves_one_of_the_two(tmp_path, monkeypatch):
    """End without cleanup at the first, second, ... rename or deletion, and let `tidy` repair it."""

    class Killed(BaseException):
        pass

    real_replace, real_rmtree = Path.replace, disk.shutil.rmtree
    for place in range(10):
        folder = tmp_path / str(place)
        folder.mkdir()
        with disk.appearing(folder / "x") as draft:
            fill(draft, "old")
        left = [place]

        def count(act, left=left):
            def counted(*arguments):
                left[0] -= 1
                if left[0] < 0:
                    raise Killed
                return act(*arguments)

            return counted

        monkeypatch.setattr(Path, "replace", count(real_replace))
        monkeypatch.setattr(disk.shutil, "rmtree", count(real_rmtree))
        try:
            with disk.appearing(folder / "x") as draft:
                fill(draft, "new")
            killed = False
        except Killed:
            killed = True
        monkeypatch.undo()
        disk.tidy(folder)
        assert names(folder) == ["x"] and (folder / "x" / "inner" / "file").read_text() in ("old", "new")
        if not killed:
            return
    raise AssertionError("it was killed every time")


def test_tidying_deletes_what_killed_processes_left_and_nothing_else(tmp_path):
    for name in (".draft-a", ".dropped-b", ".hidden", "c"):
        fill(tmp_path / name, "x")
    (tmp_path / ".draft-d.safetensors").write_text("half")
    disk.tidy(tmp_path)
    assert names(tmp_path) == [".hidden", "c"]
    disk.tidy(tmp_path / "nothing")


def test_dropping_hides_before_it_deletes(tmp_path, monkeypatch):
    fill(tmp_path / "x", "whole")
    monkeypatch.setattr(
        disk.shutil, "rmtree", lambda path: (_ for _ in ()).throw(PermissionError(13, "in use", str(path)))
    )
    with pytest.raises(PermissionError):
        disk.drop(tmp_path / "x")
    assert names(tmp_path) == [".dropped-x"]


class Windows:
    """What Windows does to a file that another program holds open: refuse, until it lets go."""

    def __init__(self, monkeypatch, refusals):
        self.left = refusals
        self.slept = []
        real = Path.replace

        def replace(source, target):
            if Path(target).is_dir():
                raise PermissionError(13, "Access is denied")  # a folder is never renamed onto another
            if self.left:
                self.left -= 1
                raise PermissionError(
                    13, "The process cannot access the file because it is being used by another process"
                )
            return real(source, target)

        def open_folder(
            path, *arguments, **places
        ):  # rmtree names places, and does on Windows what Windows can do
            assert "dir_fd" in places or not Path(path).is_dir(), "Windows opens no folders"
            return real_open(path, *arguments, **places)

        real_open = os.open
        monkeypatch.setattr(disk, "WINDOWS", True)
        monkeypatch.setattr(Path, "replace", replace)
        monkeypatch.setattr(os, "open", open_folder)
        monkeypatch.setattr(disk.time, "sleep", self.slept.append)


def test_windows_is_given_time_to_let_go(tmp_path, monkeypatch):
    system = Windows(monkeypatch, 3)
    with disk.appearing(tmp_path / "x") as draft:
        fill(draft, "one")
    assert (tmp_path / "x" / "inner" / "file").read_text() == "one" and len(system.slept) == 3
    system.left = 2
    with disk.appearing(tmp_path / "x") as draft:
        fill(draft, "two")
    assert (tmp_path / "x" / "inner" / "file").read_text() == "two" and names(tmp_path) == ["x"]


def test_windows_files_that_stay_open_fail_the_save_and_keep_the_old_one(tmp_path, monkeypatch):
    system = Windows(monkeypatch, 0)
    with disk.appearing(tmp_path / "x") as draft:
        fill(draft, "old")
    system.left = 10**6
    with pytest.raises(PermissionError, match="another process"), disk.appearing(tmp_path / "x") as draft:
        fill(draft, "new")
    assert (tmp_path / "x" / "inner" / "file").read_text() == "old" and names(tmp_path) == ["x"]
    assert sum(system.slept) < 60


def test_windows_files_that_are_written_often_are_given_the_same_time(tmp_path, monkeypatch):
    """The latents and index of a data set, which several runs may be writing and reading."""
    system = Windows(monkeypatch, 2)
    with disk.appearing(tmp_path / "cache" / "x", shared=True) as draft:
        draft.write_text("one")
    assert (tmp_path / "cache" / "x").read_text() == "one" and len(system.slept) == 2
    system.left = 10**6
    with (
        pytest.raises(PermissionError, match="another process"),
        disk.appearing(tmp_path / "cache" / "x", shared=True) as draft,
    ):
        draft.write_text("two")
    assert (tmp_path / "cache" / "x").read_text() == "one" and names(tmp_path / "cache") == ["x"]


def test_elsewhere_a_refusal_is_final(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "WINDOWS", False)
    monkeypatch.setattr(disk.time, "sleep", lambda _: pytest.fail("nothing to wait for"))
    monkeypatch.setattr(
        Path, "replace", lambda *_: (_ for _ in ()).throw(PermissionError(13, "Permission denied"))
    )
    with pytest.raises(PermissionError), disk.appearing(tmp_path / "x") as draft:
        draft.write_text("x")
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("number", "fatal"), [(errno.EINVAL, False), (errno.ENOTSUP, False), (errno.EIO, True)]
)
def test_file_systems_that_cannot_flush_a_folder_are_taken_as_they_are(tmp_path, monkeypatch, number, fatal):
    real = os.fsync

    def fsync(handle):
        if os.path.isdir(f"/proc/self/fd/{handle}"):  # noqa: PTH112
            raise OSError(number, os.strerror(number))
        real(handle)

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("no /proc to tell folders from files")
    monkeypatch.setattr(os, "fsync", fsync)
    if fatal:
        with pytest.raises(OSError, match="Input/output"), disk.appearing(tmp_path / "x") as draft:
            fill(draft, "x")
    else:
        with disk.appearing(tmp_path / "x") as draft:
            fill(draft, "x")
        with disk.appearing(tmp_path / "y", shared=True) as draft:
            draft.write_text("y")
        assert names(tmp_path) == ["x", "y"]


def test_room_and_speed_are_measured_where_the_folder_would_be(tmp_path):
    place = tmp_path / "not" / "yet"
    assert disk.nearest_folder(place) == tmp_path
    assert 0 < disk.free_bytes(place) == disk.free_bytes(tmp_path)
    assert disk.writing_speed(place, 1 << 21) > 1 << 20
    assert names(tmp_path) == []
    assert (disk.in_gib(3 << 30), disk.in_gib(5 << 20)) == ("3.0 GiB", "5.0 MiB")
