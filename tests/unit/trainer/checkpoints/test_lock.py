"""The lock of a folder: one process at a time, whatever becomes of it, and no trace left behind."""

import os
import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from data.atomic import WINDOWS
from trainer.checkpoints.lock import LOCK, is_free, locked
from trainer.errors import UserError

HOLDER = """
import os, sys
from pathlib import Path
from trainer.checkpoints.lock import locked
with locked(Path(sys.argv[1])):
    if sys.argv[2:] and os.fork() == 0:
        import time
        time.sleep(60)
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def held(folder, *arguments):
    """Have another process lock a folder until its input ends."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[4])}
    command = [sys.executable, "-c", HOLDER, str(folder), *arguments]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_another_process_is_refused_and_told_who_holds_it(tmp_path):
    with held(tmp_path) as process:
        assert not is_free(tmp_path)
        with (
            pytest.raises(
                UserError, match=rf"{re.escape(str(tmp_path))} is in use by process {process.pid} on "
            ) as caught,
            locked(tmp_path),
        ):
            pass
        assert caught.value.exit_code == 2
        process.communicate("")
        assert list(tmp_path.iterdir()) == []
        with locked(tmp_path):
            assert is_free(tmp_path)


def test_a_process_may_lock_a_folder_twice_and_frees_it_once(tmp_path):
    with locked(tmp_path):
        with locked(tmp_path / ".." / tmp_path.name):
            assert is_free(tmp_path) and (tmp_path / LOCK).is_file()
        assert (tmp_path / LOCK).is_file()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(WINDOWS, reason="there is no fork")
def test_a_kill_frees_it_even_while_a_forked_child_lives_on(tmp_path):
    """As the DataLoader's workers may for seconds."""
    with held(tmp_path, "fork") as process:
        process.kill()
        process.wait()
        assert (tmp_path / LOCK).is_file()
        with locked(tmp_path):
            assert (tmp_path / LOCK).read_text().startswith(f"process {os.getpid()} on ")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_not_free(tmp_path):
    (tmp_path / LOCK).mkdir()
    assert not is_free(tmp_path)
    with pytest.raises(UserError, match="nothing can be written there"), locked(tmp_path):
        pass
