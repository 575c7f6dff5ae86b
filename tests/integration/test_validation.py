"""Runs with validation images: what is measured, shown and saved, also by a stopped run."""

import json

import pytest
from PIL import Image

import train
from tests.runs import ADAMW, run_of, same_run, scalars, write
from trainer.checkpoints.listing import checkpoints, single_files
from trainer.evaluation.loss_watch import LossWatch

UPDATE = LossWatch.update
GAP = "loss/val minus stabilize-train"


@pytest.fixture
def held_out(workplace):
    """Add three images, and hold them out as loss/val; one more folder is measured beside it."""
    for folder, count in (("held", 3), ("more", 1)):
        (workplace / folder).mkdir()
        for number in range(count):
            Image.new("RGB", (64, 64), (40 * number, 60, 250)).save(workplace / folder / f"{number}.png")
            (workplace / folder / f"{number}.txt").write_text("a blue square")
    settings = {
        "val_split_mode": "manual",
        "manual_data_root": "held",
        "extra_manual_datasets": {"more": "more"},
        "batch_size": 8,
    }
    (workplace / "validation.json").write_text(json.dumps(settings))
    return workplace


def settings(**changes):
    return {
        "validation_config": "validation.json",
        "sample_steps": 1000,
        "log_step": 1,
        "save_format": "diffusers",
        **changes,
    }


def test_held_out_losses_are_measured_from_step_0_and_the_same_after_a_stop(held_out):
    write(held_out, ADAMW, **settings(min_snr_gamma=5.0))
    assert train.main([]) == 0
    whole = run_of(held_out)
    found = scalars(whole)
    for tag in (
        "loss/val",
        "loss/val mse",
        "loss/val more",
        "loss/stabilize-train",
        "loss/stabilize-train mse",
        GAP,
    ):
        assert list(found[tag]) == [0, 3, 6, 9], tag
    for step, gap in found[GAP].items():
        assert gap == pytest.approx(found["loss/val"][step] - found["loss/stabilize-train"][step], abs=1e-6)
    assert found["loss/val"][0] != found["loss/val"][9]

    assert train.main(["--stop_after_steps", "4"]) == 0
    assert train.main(["--resume_ckpt", "findlast"]) == 0
    same_run(checkpoints(whole)[0], checkpoints(run_of(held_out))[0])
    assert scalars(run_of(held_out))["loss/val"] == found["loss/val"]


def test_a_plain_loss_is_drawn_once(held_out):
    write(held_out, ADAMW, **settings(max_epochs=1))
    assert train.main([]) == 0
    assert "loss/val mse" not in scalars(run_of(held_out))


def test_an_automatic_split_trains_fewer_images_and_a_continued_run_keeps_it(workplace, capsys):
    (workplace / "validation.json").write_text(
        json.dumps({"auto_split_proportion": 0.4, "every_n_epochs": 0.5})
    )
    write(workplace, ADAMW, **settings(max_epochs=2))
    assert train.main(["--check"]) == 0
    checked = capsys.readouterr().out
    assert "\nvalidation   " in checked and not (workplace / "logs").exists()
    assert train.main(["--stop_after_steps", "1"]) == 0
    (workplace / "validation.json").write_text(json.dumps({"auto_split_proportion": 0.05}))
    assert train.main(["--resume_ckpt", "findlast"]) == 2
    assert "the images or captions have changed" in capsys.readouterr().err


def rising(monkeypatch, values):
    """Have the validation loss take these values in turn, and that of training images fall."""
    given = iter(values)
    monkeypatch.setattr(
        LossWatch, "update", lambda self, *, step, fixed, validation, rates: UPDATE(
            self, step=step, fixed=1 - step / 100, validation=next(given), rates=rates
        )
    )  # fmt: skip


def test_the_best_is_kept_and_no_scheduled_save_is_deleted(held_out, monkeypatch):
    rising(monkeypatch, [1.0, 0.9, 0.8, 0.85])
    write(held_out, ADAMW, **settings(keep_best=True, save_every_n_epochs=1, save_format="both"))
    assert train.main([]) == 0
    run = run_of(held_out)
    assert [path.name for path in checkpoints(run)] == [
        "last-tiny-ep03-gs00009",
        "tiny-ep02-gs00006",
        "best-tiny-ep02-gs00006",
        "tiny-ep01-gs00003",
    ]
    assert [path.stem for path in single_files(run / "ckpts", run.name, best=True)] == [
        "best-tiny-ep02-gs00006"
    ]
    assert len(single_files(run / "ckpts", run.name)) == 3


def test_keep_last_n_counts_scheduled_saves_alone(held_out, monkeypatch):
    rising(monkeypatch, [1.0, 0.9, 0.95, 0.95])
    write(held_out, ADAMW, **settings(keep_best=True, save_every_n_epochs=1, keep_last_n=1))
    assert train.main([]) == 0
    assert [path.name for path in checkpoints(run_of(held_out))] == [
        "last-tiny-ep03-gs00009",
        "best-tiny-ep01-gs00003",
    ]


def test_overfitting_is_said_and_ends_the_run_only_where_that_is_asked(held_out, monkeypatch, capsys):
    values = [1.0, 0.5, 0.6, 0.7, 0.8, 0.9]
    write(held_out, ADAMW, **settings(max_epochs=5))
    rising(monkeypatch, values)
    assert train.main([]) == 0
    out = capsys.readouterr().out
    assert "step 12: the validation loss has been above its 0.5000 of step 3" in out and "15 steps" in out
    rising(monkeypatch, values)
    assert train.main(["--stop_on_overfit"]) == 0
    out = capsys.readouterr().out
    assert "step 12: the run ends here, as stop_on_overfit asks." in out
    assert [path.name for path in checkpoints(run_of(held_out))] == ["tiny-ep04-gs00012", "tiny-ep02-gs00006"]
    rising(monkeypatch, [1.0])
    assert train.main(["--stop_on_overfit", "--resume_ckpt", "findlast"]) == 0, (
        "who goes on has looked at the pictures"
    )
    assert checkpoints(run_of(held_out))[0].name == "last-tiny-ep05-gs00015"


@pytest.mark.parametrize(
    ("file", "arguments", "words"),
    [
        ({"val_split_mode": "none"}, ["--keep_best"], "keep_best: there is no loss/val"),
        ({}, ["--stop_on_overfit", "--fixed_loss_images", "0"], "stop_on_overfit: fixed_loss_images is 0"),
    ],
)
def test_what_cannot_be_judged_is_refused(workplace, capsys, file, arguments, words):
    (workplace / "validation.json").write_text(json.dumps(file))
    write(workplace, ADAMW, **settings())
    for more in ([], ["--check"]):
        assert train.main([*arguments, *more]) == 2
        assert words in capsys.readouterr().err
