"""scripts/compare_optimizers.py on a tiny model: its runs, the files that it leaves alone, its report."""

import json
import os
import re
import shutil
import signal
import time

import numpy as np
import pytest
from PIL import Image, ImageDraw

from scripts import compare_optimizers
from scripts.compare.drift import tone
from scripts.compare.measures import Compared, Measured
from scripts.compare.plots import COLOURS
from scripts.compare.report import write_report
from scripts.compare.runs import DONE, Finished, Planned, finish, join, labels, plan_runs
from tests.runs import ADAMW, DADAPT, model, scalars, workplace, write  # noqa: F401
from tests.unit.trainer.checkpoints.test_lock import held
from trainer.checkpoints.lock import LOCK
from trainer.reporting.tags import FIXED_LOSS

LOSSES = ("loss/log_step", "loss/stabilize-train", "loss/val")


@pytest.fixture
def place(workplace):  # noqa: F811
    """Two optimizer files, validation and two prompts; two steps an epoch, with one image for validation."""
    write(workplace, DADAPT, max_epochs=2, save_every_n_epochs=1, validation_config="validation.json")
    (workplace / "adamw.json").write_text(json.dumps({"base": {**ADAMW["base"], "lr": 1e-2}}))
    (workplace / "validation.json").write_text('{"auto_split_proportion": 0.3}')
    samples = [{"prompt": "a red circle"}, {"prompt": "a blue square", "seed": 3}]
    (workplace / "prompts.json").write_text(
        json.dumps({"cfgs": [2, 1], "num_inference_steps": 2, "seed": 5, "samples": samples})
    )
    return workplace


def test_two_comparisons_do_not_share_a_folder(place, capsys):
    (place / "out").mkdir()
    with held(place / "out") as process:
        assert (
            compare_optimizers.main(
                ["--config", "train.json", "adamw.json", "optimizer.json", "--out", "out"]
            )
            == 2
        )
        assert f"{place / 'out'} is in use by process {process.pid} on " in capsys.readouterr().err
        assert [path.name for path in (place / "out").iterdir()] == [LOCK]


def test_a_comparison_from_training_to_the_report(place, capsys):
    command = ["--config", "train.json", "adamw.json", "optimizer.json", "--out", "out", "--log_step", "1"]
    assert compare_optimizers.main(command) == 0
    runs = {path.parent.parent.name: path for path in (place / "out/runs").glob("*/seed-7/run-*")}
    assert set(runs) == {"adamw", "optimizer"}
    curves = {name: scalars(run) for name, run in runs.items()}
    # The same images, noise and timesteps: before the first update the losses are the same to the bit, and
    # then they part.
    for tag in LOSSES:
        first = min(curves["adamw"][tag])
        assert curves["adamw"][tag][first] == curves["optimizer"][tag][first]
        assert curves["adamw"][tag].keys() == curves["optimizer"][tag].keys()
        assert (
            curves["adamw"][tag][max(curves["adamw"][tag])]
            != curves["optimizer"][tag][max(curves["optimizer"][tag])]
        )

    report = place / "out/report"
    html, text = (report / "report.html").read_text(), (report / "report.md").read_text()
    assert not re.search(r"(src|href)=\"(?!data:)", html) and "http" not in html and "<script" not in html
    for name in ("loss", "fixed-1", "fixed-2", "rates-1", "rates-2", "d-1", "d-2"):
        assert f"]({name}.svg)" in text and "<svg" in (report / f"{name}.svg").read_text()
    assert html.count("data:image/svg+xml;base64,") == 7
    # Base, both files: two prompts each, at the first guidance scale; both moved most.
    assert html.count("data:image/jpeg;base64,") == 2 * 6
    assert Image.open(report / "grid.png").width > 3 * 256
    assert "](moved.png)" in text and (report / "moved.png").is_file()
    assert (
        text.index(" reached the lowest validation loss, ") < text.index("One seed: ") < text.index("## Loss")
    )
    out = capsys.readouterr().out
    assert "1/2: adamw, seed 7\n" in out
    adamw, dadapt = "adamw at 0.01", "dadapt_adam at d x 0.1"
    cells = table(text, "Loss")
    final = [curves[name]["loss/stabilize-train"] for name in ("adamw", "optimizer")]
    last = [curve[max(curve)] for curve in final]
    assert cells[adamw][:2] == [f"{last[0]:.4f}", "1.000"]
    assert cells[dadapt][:2] == [f"{last[1]:.4f}", f"{last[1] / last[0]:.3f}"]
    assert float(cells[dadapt][2]) == pytest.approx(min(v for s, v in final[1].items() if s), abs=5e-5)
    cost = table(text, "Cost")
    assert (
        7.9 < float(cost[adamw][3]) < 8.6
    )  # two moments in fp32, and a counter for each of very small tensors
    assert 11.9 < float(cost[dadapt][3]) < 14
    checkpoint = next(runs["adamw"].glob("ckpts/last-*/model_index.json")).parent
    single = next(runs["adamw"].glob("ckpts/last-*.safetensors"))
    bytes_of = sum(
        path.stat().st_size
        for path in [*checkpoint.rglob("*"), single]
        if path.is_file() and "resume" not in path.parts
    )
    assert cost[adamw][4] == f"{bytes_of / 2**20:.1f}"
    drift = table(text, "Drift of unrelated prompts")
    assert drift["base"][3] == "0%" and re.fullmatch(r"[+-]\d+%", drift[adamw][3])
    ends = table(text, "Rates")
    assert ends[adamw][2] == "–" and float(ends[dadapt][2]) == pytest.approx(
        list(curves["optimizer"]["optimizer/d unet"].values())[-1], rel=1e-2
    )
    for sentence in (
        "tensorboard --logdir out/runs",
        "the validation loss rises when a model memorizes them",
        "max_epochs 2",
        "--unrelated",
        "python scripts/compare_optimizers.py",
    ):
        assert sentence in html and sentence in text

    # Once more with a further seed: what is finished is kept, the report is of both seeds. One of the runs
    # now comes from elsewhere.
    here = re.search(r"Trained on: (CPU \(.+\), torch [^ ]+)\.\n", text)[1]
    done = place / "out/runs/adamw/seed-7" / DONE
    done.write_text(done.read_text().replace(here, "a GPU"))
    before = {path: path.stat().st_mtime_ns for path in (place / "out/runs").rglob("events*")}
    assert compare_optimizers.main([*command, "--seeds", "7", "8", "--unrelated", "prompts.json"]) == 0
    after = {path: path.stat().st_mtime_ns for path in (place / "out/runs").rglob("events*")}
    assert {path: after[path] for path in before} == before and len(after) == 4
    both = table((report / "report.md").read_text(), "Loss")[dadapt][0]
    mean, low, high = map(float, re.fullmatch(r"(\S+) \((\S+) to (\S+)\)", both).groups())
    assert low < mean < high and f"{last[1]:.4f}" in both
    text = (report / "report.md").read_text()
    assert "(all sample prompts" not in text
    assert f"Trained on: a GPU ({adamw} seed 7); {here} ({adamw} seed 8, {dadapt} seed 7, " in text

    # Another comparison does not go into the same folder.
    assert compare_optimizers.main([*command, "--max_epochs", "3"]) == 2
    assert "max_epochs was 2 and is 3 now; name another folder with --out" in capsys.readouterr().err


def test_a_comparison_that_was_broken_off_goes_on(place):
    """A run with a checkpoint and no end continues; its curves are those of an unbroken run."""
    planned = plan_runs(
        place / "train.json",
        [place / "optimizer.json", place / "adamw.json"],
        place / "out",
        None,
        ["--log_step", "1", "--keep_resume_n", "2"],
    )
    [whole] = finish(planned[:1], lambda _: None)
    whole_curves = scalars(whole.folder)
    for path in whole.folder.glob("ckpts/last-*"):  # as if it had been killed after the first epoch
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    first = next(whole.folder.glob("ckpts/run-ep01*/"))
    assert (whole.peak or 0) > 2**26 and len(whole.machines) == 1
    (planned[0].logdir / DONE).unlink()
    assert (first / "resume").exists()
    [again] = finish(planned[:1], lambda _: None)
    assert len(again.machines) == 2 and again.peak is None and again.folder == whole.folder
    assert scalars(again.folder)["loss/log_step"] == whole_curves["loss/log_step"]


@pytest.mark.parametrize(("number", "told"), [(signal.SIGTERM, 1), (signal.SIGINT, 0)])
def test_a_comparison_that_is_ended_waits_for_the_checkpoint_of_its_run(number, told):
    """Ctrl-C in a terminal reaches the run by itself, and a second signal would not let it save."""
    # A shell starts a background job with SIGINT ignored; Python then installs no handler.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    before = signal.getsignal(signal.SIGTERM)
    calls = []

    class Child:
        exitcode = None

        def join(self, timeout=None):
            calls.append("join")
            if calls.count("join") == 1:
                os.kill(os.getpid(), number)
                time.sleep(5)

        def terminate(self):
            calls.append("terminate")

    with pytest.raises(KeyboardInterrupt):
        join(Child())
    assert calls == ["join", *["terminate"] * told, "join"]
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.slow
def test_a_run_that_fails_is_told_and_the_others_go_on(place):
    (place / "wild.json").write_text(json.dumps({"base": {"optimizer": "adamw", "lr": 1e30}}))
    command = [
        "--config",
        "train.json",
        "adamw.json",
        "wild.json",
        "--out",
        "out",
        "--max_epochs",
        "60",
        "--log_step",
        "50",
    ]
    assert (
        compare_optimizers.main([*command, "--save_every_n_epochs", "null", "--fixed_loss_images", "0"]) == 0
    )
    text = (place / "out/report/report.md").read_text()
    assert "**Failed: adamw at 1e+30: seed 7: no step has had finite gradients" in text
    assert table(text, "Loss")["adamw at 1e+30"][0] == "–" and table(text, "Cost")["adamw at 0.01"][0] != "–"


def test_a_report_of_a_run_that_failed(tmp_path):
    """As it is after the test above, without the training."""
    output = tmp_path / "output.txt"
    output.write_text("step 1\nit failed because <of this>.\n\n")
    planned = [Planned(name, tmp_path / name, 1, tmp_path, (), {}) for name in ("good", "wild")]
    good = Measured(
        Finished(planned[0], tmp_path, 0, 2**30, ("a GPU",)),
        {FIXED_LOSS: {0: 0.2, 5: 0.1}},
        None,
        1.0,
        2.0,
        1.0,
        2.0,
        3.0,
    )
    wild = Measured(
        Finished(planned[1], tmp_path, 1, None, (None, "a CPU")),
        {FIXED_LOSS: {0: 0.2, 5: float("nan")}},
        None,
        None,
        None,
        None,
        None,
        None,
    )
    files = [Compared("good", (good,)), Compared("wild", (wild,))]
    page = write_report(files, None, tmp_path, settings="x", command="y")
    text, html = (page.parent / "report.md").read_text(), page.read_text()
    assert (
        "**Failed: wild: seed 1: it failed because <of this>.**" in text
        and "it failed because &lt;of this&gt;." in html
    )
    machines = "a GPU (good seed 1); a machine that is not recorded, then a CPU (wild seed 1)"
    assert f"Trained on: {machines}. Their times and memory do not compare." in text
    assert table(text, "Loss") == {"good": ["0.1000", "1.000", "0.1000", "1.000"], "wild": ["–"] * 4}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["train.json", "adamw.json"], "name train.json and then two or more optimizer files"),
        (["train.json", "adamw.json", "./adamw.json"], "is named twice"),
        (
            ["train.json", "adamw.json", "optimizer.json", "--logdir", "x"],
            "--logdir: the comparison sets this itself",
        ),
        (
            ["train.json", "adamw.json", "optimizer.json", "--seed", "-1"],
            "--seed: the comparison sets this itself",
        ),
        (
            ["train.json", "adamw.json", "optimizer.json", "--stop_after_steps", "1"],
            "shorten them by max_epochs",
        ),
        (["train.json", "adamw.json", "optimizer.json", "--max_epoch", "1"], "did you mean"),
        (["train.json", "adamw.json", "missing.json"], "missing.json"),
        (["train.json", "adamw.json", "optimizer.json", "--prompts", "none.json"], "none.json"),
        (
            ["train.json", "adamw.json", "optimizer.json", "--sample_prompts", "null"],
            "--prompts: train.json names no sample_prompts",
        ),
    ],
)
def test_what_cannot_be_compared_is_said_before_anything_is_trained(place, capsys, arguments, sentence):
    assert compare_optimizers.main(["--config", *arguments, "--out", "out"]) == 2
    assert sentence in capsys.readouterr().err
    assert not (place / "out").exists()


def test_files_of_one_name_are_told_apart(tmp_path):
    paths = [tmp_path / "a/adam.json", tmp_path / "b/adam.json", tmp_path / "lion.json"]
    assert labels(paths) == ["a adam", "b adam", "lion"]


def test_tone_of_known_pictures():
    grey, red = Image.new("RGB", (8, 8), (128, 128, 128)), Image.new("RGB", (8, 8), (255, 0, 0))
    halves = Image.new("RGB", (8, 8), "black")
    ImageDraw.Draw(halves).rectangle((0, 0, 3, 7), fill="white")
    assert tone([grey]) == (0, 0) and tone([red]) == (1, 0)
    assert tone([halves]) == (0, 0.5) and tone([red, halves]) == (0.5, 0.25)


def test_every_colour_can_be_read_on_white():
    for ink in COLOURS:
        channels = np.array([int(ink[place : place + 2], 16) for place in (1, 3, 5)]) / 255
        linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
        assert 1.05 / (linear @ (0.2126, 0.7152, 0.0722) + 0.05) >= 3, ink


def table(text, title):
    """Return a table of the Markdown report: cells by the label of the line."""
    lines = text.partition(f"## {title}\n")[2].partition("\n## ")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return {row[0]: row[1:] for row in rows[2:]}
