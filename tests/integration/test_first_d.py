"""A new run from a checkpoint's weights that keeps its d."""

import json

import pytest

import train
from tests.runs import ADAMW, DADAPT, FUSED, run_of, same_run, scalars, write
from trainer.checkpoints.listing import checkpoints

LIBRARY = {"base": {"optimizer": "dadapt_adam_reference", "lr": 1.0, "d0": 1e-5}}
SHORT = {"max_epochs": 2, "log_step": 1, "first_samples": False, "fixed_loss_images": 0}
SECTIONS = {"unet": "base", "text encoder": "text_encoder_overrides"}


def resuming(optimizer):
    """Return the optimizer file with the d of a checkpoint."""
    return {**optimizer, "base": {**optimizer["base"], "d0": "resume"}}


def trained(workplace, optimizer, **changes):
    """Train a run, and write a new run's configuration that keeps its d; return the first run's folder."""
    write(workplace, optimizer, **{**SHORT, **changes})
    assert train.main([]) == 0
    run = run_of(workplace)
    write(workplace, resuming(optimizer), **{**SHORT, **changes})
    return run


def newest(run):
    return checkpoints(run)[0]


def refused(capsys, *arguments):
    assert train.main(list(arguments)) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("optimizer", [FUSED, LIBRARY], ids=["own", "library"])
def test_d_starts_where_it_was_and_a_resumed_run_is_the_unbroken_one(workplace, optimizer):
    before = trained(workplace, optimizer)
    start = ["--resume_ckpt", str(before), "--resume_weights_only"]
    assert train.main([*start, "--logdir", "whole"]) == 0
    assert train.main([*start, "--logdir", "cut", "--stop_after_steps", "2"]) == 0
    whole, cut = (next((workplace / name).iterdir()) for name in ("whole", "cut"))
    sections = json.loads((whole / "optimizer.json").read_text())
    for network, section in SECTIONS.items():
        first, last = scalars(whole)[f"optimizer/d {network}"], scalars(before)[f"optimizer/d {network}"]
        assert last[6] > 1.2 * optimizer["base"]["d0"], "it had risen"
        assert sections[section]["d0"] == pytest.approx(last[6]) and first[1] >= last[6]
    assert train.main(["--resume_ckpt", str(cut)]) == 0
    same_run(newest(whole), newest(cut))


def test_d_that_stays_where_it_was_learned_is_no_failure(workplace):
    brake = {"base": {**FUSED["base"], "d_max": 1e-5}}
    start = ["--resume_ckpt", str(trained(workplace, brake)), "--resume_weights_only", "--logdir", "new"]
    assert train.main(start) == 0
    run = next((workplace / "new").iterdir())
    assert (run / "optimizer.found.json").exists()
    assert train.main(["--resume_ckpt", str(run), "--max_epochs", "3", "--logdir", "new"]) == 0
    assert (run / "optimizer.found.json").exists(), "a resumed run remembers"


def test_only_trained_networks_need_a_d(workplace, capsys):
    run = trained(workplace, FUSED, disable_textenc_training=True)
    start = ["--resume_ckpt", str(run), "--resume_weights_only", "--logdir", "new"]
    assert train.main([*start, "--stop_after_steps", "1"]) == 0
    assert "x the d it finds, from the checkpoint's " in capsys.readouterr().out
    message = refused(capsys, *start, "--disable_textenc_training", "false")
    assert (
        "optimizer.json: base.d0 and text_encoder_overrides.d0: resume takes the d of a checkpoint" in message
    )
    assert f"no optimizer of {newest(run)} has a d for the text encoder" in message


def test_a_model_and_a_run_of_another_optimizer_have_no_d(workplace, capsys):
    write(workplace, resuming(DADAPT), **SHORT)
    assert "but resume_ckpt is the model" in refused(capsys)
    write(workplace, ADAMW, **SHORT)
    assert train.main([]) == 0
    write(workplace, resuming(DADAPT), **SHORT)
    message = refused(capsys, "--resume_ckpt", "findlast", "--resume_weights_only")
    assert (
        "has a d for the unet and the text encoder; name a checkpoint of a run with D-Adaptation" in message
    )


def test_d_max_below_the_first_d_is_refused(workplace, capsys):
    write(workplace, {"base": {"optimizer": "dadapt_adam", "d0": 1e-3, "d_max": 1e-5}}, **SHORT)
    assert "base.d_max: 1e-05 is below 0.001, where d starts" in refused(capsys)
