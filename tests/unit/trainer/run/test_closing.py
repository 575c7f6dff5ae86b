"""The command that resumes a run, on lines that a shell takes as one."""

import os
import subprocess
from types import SimpleNamespace
from typing import Any

import pytest

from trainer.output import WIDTH
from trainer.run.closing import how_to_resume


@pytest.mark.skipif(os.name == "nt", reason="a long command stays on one line there")
@pytest.mark.parametrize("many", [False, True])
def test_a_long_command_is_broken_so_that_a_shell_takes_it_as_one(tmp_path, many):
    run: Any = SimpleNamespace(
        folder=tmp_path / "it's a run",
        state=SimpleNamespace(step=3, pending=[]),
        cadence=SimpleNamespace(total_steps=9),
        out_of_time=False,
        epochs=3,
        processes=SimpleNamespace(launcher=["echo"]),
    )
    config: Any = SimpleNamespace(loop=SimpleNamespace(stop_after_steps=None))
    assert how_to_resume(run, config, []) == [], "there is no checkpoint"
    checkpoint = run.folder / "ckpts" / "x-ep01-gs00003"
    (checkpoint / "resume").mkdir(parents=True)
    (checkpoint / "manifest.json").write_text('{"step": 3, "project": "x"}')
    arguments = ["--lora", '{"rank": 2, "targets": "all --x"}', *(["--project_name", "y" * 40] * 3 * many)]
    lines = how_to_resume(run, config, arguments)
    assert lines[0].startswith("Resume with:") and max(map(len, lines)) <= WIDTH + len(str(tmp_path))
    script = "\n".join(lines).removeprefix("Resume with:").strip()
    assert ("\\\n" in script) >= many
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True)
    words = [*arguments, "--resume_ckpt", str(run.folder)]
    assert done.stdout.split("train.py ", 1)[1].strip() == " ".join(words)
