"""Files that are none.

A pipe waits for its writer for ever and /dev/zero has no end, wherever a name leads to them.
"""

import os
import signal
import sys
from pathlib import Path

import pytest

from data.captions.text import read_text
from data.contents import content_hash, content_hashes
from data.errors import FileError
from data.record import Record
from data.regular import load_json, read_regular
from trainer.checkpoints.format import model_problem, read_resume
from trainer.config import load_config
from trainer.errors import UserError
from trainer.models.folder import read_json
from trainer.models.tensor_file import TensorFile, read_metadata
from trainer.reporting.jsonl import METRICS, JsonlLogger

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has neither in the file system")


@pytest.fixture(autouse=True)
def patience():
    """Fail instead of waiting for ever."""

    def give_up(*_):
        raise AssertionError("it waits")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(params=["pipe", "device"])
def odd(request, tmp_path):
    """Return what puts a pipe, or a link to /dev/zero, at a path below tmp_path."""

    def put(*parts):
        path = tmp_path.joinpath(*parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        if request.param == "pipe":
            os.mkfifo(path)
        else:
            path.symlink_to("/dev/zero")
        return path

    put.said = f"it is a {request.param}, not a regular file"
    return put


def test_the_functions_that_read_all_others(odd):
    path = odd("x.json")
    for read in (read_regular, load_json, content_hash):
        with pytest.raises(OSError, match=odd.said):
            read(path)
    with pytest.raises(FileError, match=rf"x\.json: cannot be read \({odd.said}\)"):
        read_text(path)


def test_a_file_is_read_up_to_its_limit(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"1" * (1 << 20))
    assert read_regular(path, 1 << 20) == path.read_bytes()
    path.write_bytes(b"1" * (1 << 20) + b"1")
    with pytest.raises(OSError, match="it is larger than 1 MiB, which is too much for what it is"):
        read_regular(path, 1 << 20)


def test_json_that_is_nested_too_deep_is_a_value_error(tmp_path):
    (tmp_path / "x.json").write_text("[" * 200_000)
    with pytest.raises(ValueError, match="nested too deep"):
        load_json(tmp_path / "x.json")


@pytest.mark.parametrize("ending", [".safetensors", ".ckpt"])
def test_tensor_files(odd, ending):
    path = odd("x" + ending)
    with pytest.raises(UserError, match=rf"x{ending}: the file cannot be read \({odd.said}\)"):
        TensorFile(path)
    if ending == ".safetensors":
        with pytest.raises(OSError, match=odd.said):
            read_metadata(path)


def test_parts_of_models(odd):
    with pytest.raises(UserError, match=rf"config\.json is missing or cannot be read \({odd.said}\)"):
        read_json(odd("config.json"), "resume_ckpt")


def test_parts_of_runs(odd, tmp_path):
    problem = model_problem(odd("manifest.json").parent) or ""
    assert odd.said in problem or "leads outside the folder" in problem
    odd("resume", "state.json")
    with pytest.raises(UserError, match=odd.said):
        read_resume(tmp_path)
    odd(METRICS)
    with pytest.raises(UserError, match=odd.said):
        JsonlLogger(tmp_path, warn=print, purge_step=1)


def test_what_is_kept_for_later_runs(odd, tmp_path):
    (tmp_path / "a.png").write_bytes(b"x")
    record = Record(folder=tmp_path, file="a.png", name="a.png", width=1, height=1, caption=None)
    assert content_hashes([record], odd("contents.json"), save=False) == {0: content_hash(tmp_path / "a.png")}


KEYS = (
    *(("x.json", key) for key in ("optimizer_config", "validation_config", "sample_prompts", "data_root")),
    *(("x.safetensors", key) for key in ("resume_ckpt", "vae", "ema_resume_model")),
)


@pytest.mark.parametrize(("name", "key"), KEYS)
def test_files_that_a_configuration_names(odd, name, key, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[3])
    path = odd(name)
    with pytest.raises(UserError) as caught:
        load_config(["--resume_ckpt", "models/mini-sd", f"--{key}", str(path)])
    kind = odd.said.split()[3].strip(",")
    assert any(f"--{key}: {path}" in line and f"is a {kind}" in line for line in caught.value.problems)


def test_the_configuration_itself(odd, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    odd("train.json")
    with pytest.raises(UserError, match=rf"^--config: train\.json cannot be read: {odd.said}$"):
        load_config([])
