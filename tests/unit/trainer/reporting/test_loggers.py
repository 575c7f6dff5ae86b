"""Records of a run.

TensorBoard's event files are read back with TensorBoard's own reader; the console is a fake terminal.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.util import tensor_util

from trainer.errors import UserError
from trainer.reporting.console import Console, Report
from trainer.reporting.jsonl import JsonlLogger
from trainer.reporting.loggers import Loggers, open_loggers
from trainer.reporting.tensorboard import TensorBoardLogger


def read(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def curve(folder: Path, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in read(folder).Scalars(tag)]


def stored(event: Any) -> bytes:
    """Return the bytes of a tensor event: a text, or a serialized layout."""
    return tensor_util.make_ndarray(event.tensor_proto).item()  # type: ignore[return-value]


class Warnings(list[str]):
    def __call__(self, sentence: str) -> None:
        self.append(sentence)


@pytest.fixture
def warnings() -> Warnings:
    return Warnings()


# TensorBoard


def test_numbers_come_back_with_their_tags_and_steps(tmp_path: Path, warnings: Warnings):
    logger = TensorBoardLogger(tmp_path / "run", warn=warnings)
    logger.scalars({"loss/stabilize-train": 0.5}, 0)
    logger.scalars({"loss/log_step": 0.25, "optimizer/d*lr unet": 1e-7}, 1)
    logger.scalars({"loss/log_step": 0.125}, 25)
    # Before close: a run that is killed keeps what it reported.
    assert curve(tmp_path / "run", "loss/log_step") == [(1, 0.25), (25, 0.125)]
    assert curve(tmp_path / "run", "loss/stabilize-train") == [(0, 0.5)]
    assert curve(tmp_path / "run", "optimizer/d*lr unet") == [(1, pytest.approx(1e-7))]
    logger.close()
    assert warnings == []


def test_small_rates_are_shown_as_logarithms_too(tmp_path: Path, warnings: Warnings):
    logger = TensorBoardLogger(tmp_path, warn=warnings)
    logger.scalars({"lr/unet": 1e-5, "optimizer/d unet": 1e-4, "loss/log_step": 0.1}, 1)
    logger.scalars({"lr/unet": 0.0, "optimizer/d unet": 1e-3, "loss/log_step": 0.1}, 2)
    assert curve(tmp_path, "lr/log10 unet") == [(1, pytest.approx(-5))], "a rate of 0 has no logarithm"
    assert curve(tmp_path, "optimizer/log10 d unet") == [(1, pytest.approx(-4)), (2, pytest.approx(-3))]
    assert len(read(tmp_path).Tags()["scalars"]) == 5


@pytest.mark.parametrize(
    ("tag", "words"),
    [
        ("loss/log_step", "Mean loss"),
        ("loss/val", "validation images"),
        ("loss/val minus stabilize-train", "minus"),
        ("lr/text encoder", "hyperparameter/lr"),
        ("lr/log10 unet", "base-10 logarithm"),
        ("optimizer/d unet", "distance"),
        ("optimizer/d_hat unet", "follows"),
        ("performance/vram", "GiB"),
    ],
)
def test_a_number_says_what_it_is(tmp_path: Path, warnings: Warnings, tag: str, words: str):
    TensorBoardLogger(tmp_path, warn=warnings).scalars({tag: 0.5}, 1)
    assert words in read(tmp_path).SummaryMetadata(tag).summary_description


def test_pictures_come_back_bit_for_bit(tmp_path: Path, warnings: Warnings):
    picture = Image.linear_gradient("L").convert("RGB").resize((40, 24))
    TensorBoardLogger(tmp_path, warn=warnings).image("sample_0", picture, 100)
    (event,) = read(tmp_path).Images("sample_0")
    assert (event.step, event.width, event.height) == (100, 40, 24)
    assert Image.open(io.BytesIO(event.encoded_image_string)).tobytes() == picture.tobytes()


def test_configurations_are_tables(tmp_path: Path, warnings: Warnings):
    from html import unescape

    from tensorboard.plugin_util import markdown_to_safe_html

    text = '{"base": {"lr": 0.1, "betas": [0.9, 0.99]}, "doc": "*a* | `b` <i>", "none": {}}'
    TensorBoardLogger(tmp_path, warn=warnings).text("config", text, 0)
    (event,) = read(tmp_path).Tensors("config/text_summary")
    html = markdown_to_safe_html(stored(event).decode())
    cells = [unescape(cell) for cell in re.findall("<td><code>(.*?)</code></td>", html)]
    assert cells == ["base.lr", "0.1", "base.betas", "[0.9, 0.99]", "doc", '"*a* | `b` <i>"', "none", "{}"]


@pytest.mark.parametrize(
    "text",
    ['{\n  "lr": 0.1,  # *not* emphasis\n  "a_b_c": null\n}', "[1, 2]", "a fence\n```\ninside\n````\n", ""],
)
def test_text_is_shown_as_it_is(tmp_path: Path, warnings: Warnings, text: str):
    from html import unescape

    from tensorboard.plugin_util import markdown_to_safe_html

    TensorBoardLogger(tmp_path, warn=warnings).text("config", text, 0)
    (event,) = read(tmp_path).Tensors("config/text_summary")
    markdown = stored(event).decode()
    html = markdown_to_safe_html(markdown)
    (shown,) = re.findall("<pre><code>(.*)</code></pre>", html, re.DOTALL)
    assert unescape(shown).rstrip("\n") == text.rstrip("\n")


def test_the_charts_find_the_tags(tmp_path: Path, warnings: Warnings):
    loggers = open_loggers(
        tmp_path, warn=warnings, networks=["unet", "text encoder"], adaptive=["text encoder"]
    )
    loggers.close()
    (event,) = read(tmp_path).Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout()  # type: ignore[attr-defined]
    layout.ParseFromString(stored(event))
    patterns = {
        category.title: [list(chart.multiline.tag) for chart in category.chart]
        for category in layout.category
    }
    assert list(patterns) == [
        "losses",
        "effective learning rate",
        "D-Adaptation",
        "gradient norm, before clipping",
        "performance",
    ]

    def found(category: str, chart: int, tags: list[str]) -> list[str]:  # as TensorBoard's server matches
        return [
            tag
            for tag in tags
            if any(re.compile(pattern).match(tag) for pattern in patterns[category][chart])
        ]

    tags = [
        "optimizer/d unet",
        "optimizer/d text encoder",
        "optimizer/d_hat text encoder",
        "optimizer/d*lr unet",
        "optimizer/d*lr text encoder",
    ]
    assert found("D-Adaptation", 0, tags) == ["optimizer/d text encoder", "optimizer/d_hat text encoder"]
    rates = ["lr/unet", "lr/log10 unet", "lr/text encoder", "lr/log10 text encoder"]
    for chart, tag in enumerate(rates):
        assert found("effective learning rate", chart, [*rates, "optimizer/grad scale"]) == [tag]
    norms = ["optimizer/grad norm unet", "optimizer/grad norm text encoder"]
    for chart, tag in enumerate(norms):
        assert found("gradient norm, before clipping", chart, norms) == [tag]
    losses = ["loss/log_step", "loss/epoch", "loss/stabilize-train", "loss/val"]
    assert found("losses", 0, losses) + found("losses", 1, losses) == losses


def test_a_run_without_d_adaptation_has_no_charts_of_it(tmp_path: Path, warnings: Warnings):
    open_loggers(tmp_path, warn=warnings, networks=["unet"], adaptive=[]).close()
    (event,) = read(tmp_path).Tensors("custom_scalars__config__")
    assert b"D-Adaptation" not in stored(event)


def test_a_continued_run_hides_what_was_recorded_after_its_checkpoint(tmp_path: Path, warnings: Warnings):
    first = TensorBoardLogger(tmp_path, warn=warnings)
    for step in (10, 20, 30):
        first.scalars({"loss/log_step": float(step)}, step)
    first.close()
    second = TensorBoardLogger(tmp_path, warn=warnings, purge_step=21)
    second.scalars({"loss/log_step": 31.0}, 30)
    assert curve(tmp_path, "loss/log_step") == [(10, 10.0), (20, 20.0), (30, 31.0)]


def test_a_deleted_folder_is_one_warning_and_a_new_file(tmp_path: Path, warnings: Warnings):
    run = tmp_path / "run"
    logger = TensorBoardLogger(run, warn=warnings)
    for step in (1, 2, 3, 4):
        logger.scalars({"loss/log_step": float(step)}, step)
        if step == 2:
            shutil.rmtree(run)
    assert len(warnings) == 1 and "deleted" in warnings[0] and str(run) in warnings[0]
    assert curve(run, "loss/log_step") == [(3, 3.0), (4, 4.0)]
    assert "custom_scalars__config__" in read(run).Tags()["tensors"]


@pytest.mark.skipif(sys.platform == "win32", reason="the limit that plays the full disk exists on Unix only")
def test_a_full_disk_is_one_warning_and_recording_resumes(tmp_path: Path, warnings: Warnings):
    import resource

    logger = TensorBoardLogger(tmp_path, warn=warnings)
    logger.scalars({"loss/log_step": 1.0}, 1)
    (file,) = tmp_path.iterdir()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + 20, before[1]))  # room for half a record
    try:
        logger.scalars({"loss/log_step": 2.0}, 2)
        logger.scalars({"loss/log_step": 3.0}, 3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    logger.scalars({"loss/log_step": 4.0}, 4)
    assert len(warnings) == 1 and "not recorded" in warnings[0]
    assert curve(tmp_path, "loss/log_step") == [(1, 1.0), (4, 4.0)]


def test_a_folder_that_cannot_be_written_is_said_at_once(tmp_path: Path, warnings: Warnings):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"cannot be written .*--logdir"):
        TensorBoardLogger(tmp_path / "file" / "run", warn=warnings)


def test_after_close_nothing_is_recorded(tmp_path: Path, warnings: Warnings):
    logger = TensorBoardLogger(tmp_path, warn=warnings)
    logger.close()
    logger.close()
    logger.scalars({"loss/log_step": 1.0}, 1)
    assert read(tmp_path).Tags()["scalars"] == [] and warnings == []


# Lines of JSON


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_each_report_is_a_line_of_json(tmp_path: Path, warnings: Warnings):
    logger = JsonlLogger(tmp_path / "run", warn=warnings)
    logger.scalars({"loss/val": 0.5}, 0)
    logger.scalars({"loss/log_step": 0.1 + 0.2, "optimizer/d*lr unet": 1e-7}, 1)
    logger.scalars({"loss/log_step": math.nan, "loss/epoch": math.inf}, 2)
    logger.image("a", Image.new("RGB", (8, 8)), 2)
    logger.text("b", "c", 2)
    assert lines(tmp_path / "run") == [  # before close, and every digit of the numbers
        {"step": 0, "loss/val": 0.5},
        {"step": 1, "loss/log_step": 0.1 + 0.2, "optimizer/d*lr unet": 1e-7},
        {"step": 2, "loss/log_step": None, "loss/epoch": None},
    ]
    logger.close()
    logger.scalars({"loss/val": 0.5}, 3)
    assert len(lines(tmp_path / "run")) == 3 and warnings == []


def test_a_continued_run_drops_the_lines_after_its_checkpoint_and_half_a_line(
    tmp_path: Path, warnings: Warnings
):
    first = JsonlLogger(tmp_path, warn=warnings)
    for step in (10, 20, 20, 30):
        first.scalars({"loss/log_step": float(step)}, step)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20')
    second = JsonlLogger(tmp_path, warn=warnings, purge_step=21, last_report=20)
    second.scalars({"loss/log_step": 31.0}, 30)
    assert [(line["step"], line["loss/log_step"]) for line in lines(tmp_path)] == [
        (10, 10.0),
        (20, 20.0),
        (20, 20.0),
        (30, 31.0),
    ]
    assert warnings == [], "a line that was cut off is the mark of a killed process"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda content: content.replace(b'"step": 2', b'"st\xffp": 2'), "1 damaged line is dropped"),
        (lambda content: content.replace(b"{", b"", 2), "2 damaged lines are dropped"),
        (lambda content: content[: len(content) // 2], "the numbers of steps 3 to 5 are missing"),
        (lambda content: b"", "the numbers of steps 1 to 5 are missing"),
        (
            lambda content: b"x\n" + content[:30],
            "1 damaged line is dropped and the numbers of steps 2 to 5 are missing",
        ),
    ],
)
def test_gaps_in_the_numbers_of_a_resumed_run_are_told(tmp_path: Path, warnings: Warnings, damage, said):
    first = JsonlLogger(tmp_path, warn=warnings)
    for step in range(1, 6):
        first.scalars({"a": 1.0}, step)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(damage(path.read_bytes()))
    JsonlLogger(tmp_path, warn=warnings, purge_step=7, last_report=5).scalars({"a": 1.0}, 7)
    assert len(warnings) == 1 and said in warnings[0] and lines(tmp_path)[-1] == {"step": 7, "a": 1.0}


@pytest.mark.skipif(sys.platform == "win32", reason="the limit that plays the full disk exists on Unix only")
def test_a_full_disk_costs_whole_lines_of_json_and_is_said_once(tmp_path: Path, warnings: Warnings):
    import resource

    logger = JsonlLogger(tmp_path / "run", warn=warnings)
    logger.scalars({"loss/log_step": 1.0}, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, ((tmp_path / "run" / "metrics.jsonl").stat().st_size + 20, before[1])
    )
    try:
        logger.scalars({"loss/log_step": 2.0}, 2)
        logger.scalars({"loss/log_step": 3.0}, 3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    logger.scalars({"loss/log_step": 4.0}, 4)
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 4]
    shutil.rmtree(tmp_path / "run")
    logger.scalars({"loss/log_step": 5.0}, 5)
    assert len(warnings) == 1 and "numbers are not recorded" in warnings[0]
    assert lines(tmp_path / "run") == [{"step": 5, "loss/log_step": 5.0}]
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"numbers cannot be written .*logdir"):
        JsonlLogger(tmp_path / "file" / "run", warn=warnings)


# All of them


def test_recording_is_quiet_and_leaves_tensorflow_alone(tmp_path: Path):
    stub = tmp_path / "path" / "tensorflow"
    stub.mkdir(parents=True)
    (stub / "__init__.py").write_text("raise SystemExit('tensorflow was imported')")
    program = (
        "from pathlib import Path\n"
        "from PIL import Image\n"
        "from trainer.reporting.loggers import open_loggers\n"
        "log = open_loggers(Path('run'), warn=print, networks=['unet'], adaptive=['unet'])\n"
        "log.scalars({'a': 1.0}, 1); log.text('b', 'c', 1); log.image('d', "
        "Image.new('RGB', (8, 8)), 1); log.close()\n"
    )
    paths = os.pathsep.join([str(tmp_path / "path"), str(Path(__file__).parents[4])])
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert read(tmp_path / "run").Tags()["scalars"] == ["a"]


def test_options_cost_no_heavy_import():
    slow = ("torch", "tensorboard", "wandb")
    modules = "trainer.reporting.loggers, trainer.reporting.console"
    program = f"import {modules}, sys; print([m for m in {slow} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[4],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"


def test_several_recorders_are_all_told_and_all_closed():
    class Fake:
        def __init__(self, fails: bool = False) -> None:
            self.told: list[object] = []
            self.closed, self.fails = False, fails

        def scalars(self, values, step):
            self.told.append((dict(values), step))

        def image(self, tag, picture, step):
            self.told.append((tag, picture, step))

        def text(self, tag, text, step):
            self.told.append((tag, text, step))

        def close(self):
            self.closed = True
            if self.fails:
                raise OSError("broken")

    first, second = Fake(), Fake(fails=True)
    picture = Image.new("RGB", (1, 1))
    loggers = Loggers([first, second])
    loggers.scalars({"a": 1.0}, 1)
    loggers.image("b", picture, 2)
    loggers.text("c", "d", 3)
    assert first.told == second.told == [({"a": 1.0}, 1), ("b", picture, 2), ("c", "d", 3)]
    with pytest.raises(OSError):
        loggers.close()
    assert first.closed and second.closed


# Console


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def drive(console: Console, steps: int = 3, first: int = 0, total: int = 6, seconds: float = 9.0) -> None:
    console.start(total_steps=total, first_step=first)
    for step in range(first + 1, first + steps + 1):
        console.step(epoch=1 + step // 4, epochs=2, step=step, seconds=seconds)
        if step == first + 1:
            console.event("Samples drawn: samples/gs00001.png")
        console.report(
            Report(
                loss=0.0412345,
                rates={"unet": 2.8e-05, "text encoder": 1.1e-05},
                images_per_second=33.64,
                memory=3 * 2**29,
            )
        )
    console.close()


def test_without_a_terminal_every_report_is_one_plain_line():
    stream = io.StringIO()
    drive(Console(stream=stream))
    text = stream.getvalue()
    assert "\r" not in text and "\x1b" not in text and "|" not in text
    lines = text.splitlines()
    assert len(lines) == 4
    assert lines[0] == "Samples drawn: samples/gs00001.png"
    assert re.fullmatch(
        r"epoch 1/2, step 1/6: loss 0\.04123, lr unet 2\.8e-05 text 1\.1e-05, 33\.6 "
        r"images/s, 1\.50 GiB",
        lines[1],
    )


def test_steps_without_a_report_print_nothing():
    stream = io.StringIO()
    console = Console(stream=stream)
    console.start(total_steps=100)
    for step in range(1, 100):
        console.step(epoch=1, epochs=1, step=step, seconds=1.0)
    console.close()
    assert stream.getvalue() == ""


def test_a_terminal_shows_a_bar_and_events_above_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "140")
    stream = Terminal()
    drive(Console(stream=stream))
    text = stream.getvalue()
    assert "\rSamples drawn: samples/gs00001.png\n" in text
    bar = text.rstrip("\n").split("\r")[-1].strip()
    assert bar.startswith("epoch 1/2 |█") and "| 3/6, " in bar
    for shown in ("loss 0.04123", "unet 2.8e-05", "text 1.1e-05", "33.6 images/s", "1.50 GiB"):
        assert shown in bar
    assert text.count("\n") == 2  # the event's, and the bar's own at the end


NUMBERS = ["36:00 left", "loss 0.04123", "lr unet 2.8e-05 text 1.1e-05", "33.6 images/s", "1.50 GiB"]


@pytest.mark.parametrize(
    ("columns", "shown"), [(20, 0), (40, 1), (60, 2), (80, 3), (95, 4), (110, 5), (200, 5)]
)
def test_a_terminal_of_any_width_has_a_bar_and_the_numbers_that_fit_with_their_labels(
    monkeypatch: pytest.MonkeyPatch, columns: int, shown: int
):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(columns))
    stream = Terminal()
    drive(Console(stream=stream), steps=10, total=250)
    bar = stream.getvalue().rstrip("\n").split("\r")[-1].strip()
    drawn = re.fullmatch(r"epoch 3/2 \|(.{1,20})\| 10/250(.*)", bar)
    assert drawn is not None and len(bar) < max(columns, 30)
    assert drawn[2] == "".join(f", {number}" for number in NUMBERS[:shown])
    if shown < 5 and columns > 30:
        assert len(drawn[1]) >= 4
    assert columns < 40 or "\rSamples drawn: samples/gs00001.png\n" in stream.getvalue()


def test_the_time_left_is_that_of_training_and_shown_from_the_fifth_step_on():
    for first in (0, 40):
        stream = io.StringIO()
        drive(Console(stream=stream), steps=9, first=first, total=first + 12, seconds=60.0)
        lefts = [line.rpartition(", ")[2] for line in stream.getvalue().splitlines() if "left" in line]
        assert lefts == [f"0{12 - step}:00 left" for step in range(5, 10)]


def test_the_first_step_does_not_count_for_the_time_left():
    stream = io.StringIO()
    console = Console(stream=stream)
    console.start(total_steps=10)
    for step in range(1, 6):
        console.step(epoch=1, epochs=1, step=step, seconds=1000.0 if step == 1 else 2.0)
    console.report(Report(loss=1.0))
    assert stream.getvalue() == "epoch 1/1, step 5/10: loss 1, 00:10 left\n"


def test_long_events_are_broken_between_words_except_commands_and_lines_for_programs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    sentence = "label        " + "word " * 39 + "end"
    terminal, pipe = Terminal(), io.StringIO()
    for number, stream in enumerate((terminal, pipe)):
        console = Console(stream=stream)
        console.record_to(tmp_path / f"{number}.log")
        console.event(sentence)
        console.event(sentence, hang=13)
        console.event(sentence, whole=True)
    for stream, width, first in ((terminal, 79, 3), (pipe, 110, 1)):
        lines = stream.getvalue().splitlines()
        assert lines[first].startswith("label        word") and lines[-1] == sentence
        laid_out = lines[first:-1]
        assert max(map(len, laid_out)) <= width
        assert {(line[:13].strip(), line[13:14].isalpha()) for line in laid_out[1:]} == {("", True)}
        assert " ".join(" ".join(laid_out).split()) == " ".join(sentence.split())
    assert pipe.getvalue().splitlines()[0] == sentence
    for number in (0, 1):
        *log, last = (tmp_path / f"{number}.log").read_text().splitlines()
        assert max(map(len, log)) <= 110 and sum(line[:20].strip() != "" for line in log) == 2
        assert last[20:] == sentence


def test_a_continued_run_starts_where_it_was(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    drive(Console(stream=stream), steps=1, first=4)
    assert "| 5/6, " in stream.getvalue().split("\r")[-1]


def test_a_dumb_terminal_gets_lines(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    drive(Console(stream=stream))
    assert "\r" not in stream.getvalue()


def test_lines_are_recorded_with_the_time(tmp_path: Path):
    console = Console(stream=io.StringIO())
    console.event("before the folder exists")
    console.record_to(tmp_path / "run.log")
    drive(console)
    lines = (tmp_path / "run.log").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 4 and all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", line) for line in lines)
    assert lines[0].endswith(" Samples drawn: samples/gs00001.png")
    assert lines[1].endswith("1.50 GiB") and "epoch 1/2, step 1/6" in lines[1]


def test_reports_and_commands_stay_on_one_line_of_the_log(tmp_path: Path):
    console = Console(stream=io.StringIO())
    console.record_to(tmp_path / "run.log")
    command = f"python train.py --resume_ckpt logs/{'long ' * 40}run"
    console.start(total_steps=10_000)
    console.step(epoch=100, epochs=400, step=2350, seconds=1.0)
    rates = {"unet": 4.94e-05, "text encoder": 2.22e-05}
    console.report(Report(loss=0.1037, rates=rates, images_per_second=40.1, memory=3 << 28))
    console.event(command, whole=True)
    console.event("word " * 40)
    report, second, third, *rest = (tmp_path / "run.log").read_text(encoding="utf-8").splitlines()
    assert report.endswith("40.1 images/s, 0.75 GiB") and len(report) > 110
    assert second[20:] == command and third.endswith("word") and len(third) <= 110 and len(rest) == 2


def test_a_log_that_cannot_be_written_is_one_warning(tmp_path: Path):
    stream = io.StringIO()
    console = Console(stream=stream)
    console.record_to(tmp_path / "gone" / "run.log")
    console.event("one")
    console.event("two")
    lines = stream.getvalue().splitlines()
    assert lines[0] == "one" and "not recorded" in lines[1] and lines[2:] == ["two"]


def test_a_console_that_cannot_show_a_character_goes_on():
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="cp1252")
    Console(stream=stream).event("a café 中")
    stream.flush()
    assert raw.getvalue().decode("cp1252").rstrip() == "a café \\u4e2d"


def test_no_name_steers_the_terminal_or_forges_a_line(tmp_path: Path):
    stream = io.StringIO()
    console = Console(stream=stream)
    console.record_to(tmp_path / "run.log")
    console.event("a\x1b[2Jb\n2026-01-01 00:00:00 Done\r\u2028c\u202ed\x9be\udce9")
    escaped = "a\\x1b[2Jb\\n2026-01-01 00:00:00 Done\\r\\u2028c\\u202ed\\x9be\\udce9"
    assert stream.getvalue() == escaped + "\n"
    assert (tmp_path / "run.log").read_text(encoding="utf-8")[20:] == escaped + "\n"


def test_other_processes_show_and_record_nothing(tmp_path: Path):
    stream = Terminal()
    console = Console(stream=stream, enabled=False)
    console.record_to(tmp_path / "run.log")
    drive(console)
    assert stream.getvalue() == "" and not (tmp_path / "run.log").exists()


def test_d_adaptations_own_lines_do_not_reach_the_console(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
):
    """The library logs every step by its log_every, and prints when it decays decoupled."""
    import logging

    import torch

    from trainer.optim.dadapt import DAdaptAdamOptions

    weight = torch.nn.Parameter(torch.ones(4))
    with caplog.at_level(logging.DEBUG):
        optimizer = DAdaptAdamOptions(weight_decay=0.8).build([weight], 0.1)
        for _ in range(3):
            (weight**2).sum().backward()
            optimizer.step()
    output = capsys.readouterr()
    assert (output.out, output.err, caplog.records) == ("", "", [])
