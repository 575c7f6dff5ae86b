"""Output arrives as plain lines, whatever names hold and wherever the standard streams lead."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import train
from tests.runs import DADAPT, run_of, write
from trainer.checkpoints.format import resume_problem
from trainer.checkpoints.listing import checkpoints
from trainer.output import clean

ROOT = Path(__file__).resolve().parents[2]
HOSTILE = "a\x1b]0;owned\x07b"


def program(place, *arguments, **settings):
    command = [sys.executable, str(ROOT / "train.py"), *arguments]
    return subprocess.run(command, cwd=place, timeout=300, **settings)


def test_a_check_is_printed_to_a_terminal_that_knows_no_umlauts(workplace):
    (workplace / "pictures" / "0.png").rename(workplace / "pictures" / "Löwe.png")
    (workplace / "pictures" / "broken-é.png").write_bytes(b"nothing")
    environment = {**os.environ, "PYTHONIOENCODING": "ascii:strict"}
    done = program(workplace, "--check", capture_output=True, env=environment)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"broken-\\xe9.png" in done.stdout
    assert done.stdout.startswith(b"images: "), "no library has a word before the check"


@pytest.mark.skipif(os.name == "nt", reason="Windows gives every process its streams")
def test_nothing_is_written_into_files_that_take_the_numbers_of_closed_streams(tmp_path):
    code = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
from trainer.output import open_streams, say
open_streams()
with open("file", "w") as file:
    say("lost", stream=sys.stdout)
    print("lost too", file=sys.stderr)
    os.write(2, b"lost as well")
"""
    closed = {"preexec_fn": lambda: [os.close(number) for number in range(3)]}
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, **closed).returncode == 0
    assert (tmp_path / "file").read_bytes() == b""


@pytest.mark.skipif(os.name == "nt", reason="Windows gives every process its streams")
def test_a_run_without_streams_trains(workplace):
    write(workplace, DADAPT, first_samples=False, fixed_loss_images=0)
    ended = program(
        workplace, "--stop_after_steps", "1", preexec_fn=lambda: [os.close(number) for number in range(3)]
    )
    assert ended.returncode == 0 and resume_problem(checkpoints(run_of(workplace))[0]) is None


@pytest.mark.skipif(os.name == "nt", reason="names there hold no control characters")
def test_no_name_key_or_tag_reaches_the_terminal_raw(workplace, capsys, no_estimate):
    pictures = workplace / "pictures"
    (pictures / f"{HOSTILE}.png").write_bytes(b"nothing")
    (pictures / "0.yaml").write_text('main_prompt: !<!\\x1b[2J> x\n"k\\e[2J": y\n')
    (pictures / "1.yaml").write_text('"k\\e[2J": y\n')
    (pictures / f"{HOSTILE}").mkdir()
    assert train.main(["--check"]) == 0
    text = capsys.readouterr().out
    assert {letter for letter in text if not letter.isprintable()} == {"\n"} and "\\x1b[2J" in text
    assert train.main(["--check", "json"]) == 0
    answer = capsys.readouterr().out
    assert answer.isascii() and json.loads(answer)["data"]
    settings = json.loads((workplace / "train.json").read_text())
    (workplace / "train.json").write_text(
        json.dumps({**settings, HOSTILE: 1, "data_root": HOSTILE, "wandb": HOSTILE})
    )
    assert train.main(["--sample_prompts", HOSTILE, f"--{HOSTILE}"]) == 2
    refused = capsys.readouterr().err
    assert "\x1b" not in refused and "\x07" not in refused and refused.count("\\x1b]0;owned\\x07") >= 4


def test_joiners_of_emoji_and_scripts_stay():
    assert clean("👩\u200d🚀 نمی\u200cخواهم 你　好") == "👩\u200d🚀 نمی\u200cخواهم 你　好"
