"""Every message of the configuration, word for word; the cases are in bad_configs and good_configs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.contracts.config_cases import GOOD_TRAIN, Case, read_cases
from trainer.config import load_config
from trainer.errors import UserError

HERE = Path(__file__).parent
BAD = {
    f"{path.stem}: {case.title}": case
    for path in sorted((HERE / "bad_configs").glob("*.txt"))
    for case in read_cases(path)
}
GOOD = {
    f"{path.stem}: {case.title}": case
    for path in sorted((HERE / "good_configs").glob("*.txt"))
    for case in read_cases(path)
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(command_line: list[str] | None = None) -> UserError:
    with pytest.raises(UserError) as error:
        load_config(command_line or [])
    return error.value


@pytest.mark.parametrize("case", BAD.values(), ids=BAD.keys())
def test_bad_configurations_are_refused_in_these_words(case: Case, folder: Path):
    case.write(folder)
    error = refused(case.command_line)
    assert list(error.problems) == case.problems
    assert case.problems
    assert error.exit_code == 2


@pytest.mark.parametrize("case", GOOD.values(), ids=GOOD.keys())
def test_good_configurations_are_accepted_with_these_notes(case: Case, folder: Path):
    case.write(folder)
    assert list(load_config(case.command_line).notes) == case.notes


def test_there_are_enough_cases():
    assert len(BAD) >= 100 and len(GOOD) >= 20


def test_a_byte_order_mark_and_dos_line_ends_are_accepted(folder: Path):
    Case("", {}).write(folder)
    (folder / "train.json").write_bytes(
        b'\xef\xbb\xbf{\r\n  "resume_ckpt": "model",\r\n  "max_epochs": 3\r\n}\r\n'
    )
    assert load_config([]).config.loop.max_epochs == 3


def test_lines_are_counted_across_dos_line_ends(folder: Path):
    Case("", {}).write(folder)
    (folder / "train.json").write_bytes(b'{\r\n  "resume_ckpt": "model",\r\n  "max_epochs": 0\r\n}\r\n')
    assert refused().problems == ("train.json:3: max_epochs: must be at least 1, got 0",)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (GOOD_TRAIN.encode("utf-16"), "train.json: the file is saved as UTF-16; save it as UTF-8"),
        (b'{"resume_ckpt":\n"\xfc"}', "train.json:2: byte 0xfc is not UTF-8; save the file as UTF-8"),
        (
            b"PK\x03\x04\x00\x00",
            "train.json: the file is not text (it holds zero bytes); name a file of text saved as UTF-8",
        ),
        (
            b" " * 5_000_000,
            "--config: train.json cannot be read: it is larger than 4 MiB, which is too much for what it is",
        ),
        (b'{"lora": ' + b"[" * 41 + b"]" * 41 + b"}", "train.json: brackets are nested more than 40 deep"),
        (b'{"lora": ' + b"[" * 100_000, "train.json: brackets are nested more than 40 deep"),
    ],
    ids=["UTF-16", "latin-1", "zip", "large", "deep", "deeper than Python reads"],
)
def test_files_that_are_no_text(folder: Path, content: bytes, problem: str):
    Case("", {}).write(folder)
    (folder / "train.json").write_bytes(content)
    assert refused().problems == (problem,)


@pytest.mark.skipif(os.name == "nt", reason="Windows holds a working directory, and its names are Unicode")
def test_a_working_directory_that_is_gone_or_has_no_name_in_utf_8(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name in (b"gone", b"caf\xe9"):
        place = tmp_path / os.fsdecode(name)
        try:
            place.mkdir()
        except OSError:
            pytest.skip("this file system takes Unicode only")
        monkeypatch.chdir(place)
        if name == b"gone":
            place.rmdir()
            assert refused().problems == (
                "the working directory has been deleted; change to a folder that is there.",
            )
        else:
            assert refused().problems == (
                f"the working directory: {place} is not UTF-8; rename it, or name it by a link.",
            )
    monkeypatch.chdir(tmp_path)
    word = os.fsdecode(b"pictures\xe9")
    assert refused(["--data_root", word]).problems == (
        f"command line: {word} is not UTF-8; rename it, or name it by a link.",
    )


def test_without_a_configuration_the_option_is_named(folder: Path):
    example = Path(__file__).resolve().parents[2] / "train.json"
    advice = f"name yours, or to try the program {example}"
    assert refused().problems == (f"--config: file not found: train.json; {advice}",)


def test_a_file_that_may_not_be_read(folder: Path, monkeypatch: pytest.MonkeyPatch):
    Case("", {}).write(folder)

    def refuse(self: Path, mode: str) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    assert refused().problems == ("--config: train.json cannot be read: Permission denied",)
