"""Runs with EMA weights: exported beside the trained ones, sampled, resumed to the bit, no effect else."""

import pytest
import torch
from diffusers import StableDiffusionPipeline

import train
from tests.runs import ADAMW, DADAPT, run_of, same_run, scalars, unbroken, weights, write
from trainer.checkpoints.listing import checkpoints, single_files
from trainer.models.load import load_models
from trainer.models.options import ModelOptions
from trainer.state_file import read_state


def settings(**changes):
    return {
        "ema_decay_rate": 0.5,
        "ema_update_interval": 2,
        "fixed_loss_images": 0,
        "save_every_n_epochs": None,
        **changes,
    }


def averages(checkpoint):
    return read_state(checkpoint / "resume" / "training")["ema"]


def unet_of(source):
    return list(load_models(ModelOptions(resume_ckpt=str(source))).unet.parameters())


@pytest.mark.parametrize("save_format", ["both", "diffusers"])
def test_averaged_weights_are_exported_and_drawn(workplace, save_format):
    write(
        workplace,
        ADAMW,
        **settings(
            save_format=save_format, save_full_precision=save_format == "both", ema_sample_ema_model=True
        ),
    )
    assert train.main([]) == 0
    run = run_of(workplace)
    [checkpoint] = checkpoints(run)
    name = checkpoint.name
    exported = run / "ckpts" / f"{name}-ema.safetensors" if save_format == "both" else checkpoint / "ema"
    expected = averages(checkpoint)["unet"]["averages"]
    assert averages(checkpoint)["unet"]["updates"] == 4
    for found, average, trained in zip(unet_of(exported), expected, unet_of(checkpoint), strict=True):
        assert torch.equal(found, average) and not torch.equal(found, trained)
    if save_format == "diffusers":
        StableDiffusionPipeline.from_pretrained(exported)
    assert [path.name for path in sorted((run / "samples").glob("*.png"))] == [
        "gs00000-ema.png",
        "gs00009-ema.png",
    ]
    assert "![samples of step 9, of EMA weights](samples.png)" in (checkpoint / "README.md").read_text()


def test_both_kinds_of_samples_are_drawn_where_both_are_asked_for(workplace, capsys):
    write(workplace, ADAMW, **settings(max_epochs=1, ema_sample_ema_model=True, ema_sample_nonema_model=True))
    assert train.main([]) == 0
    assert "samples: samples/gs00003.png; before training: samples/gs00000.png" in unbroken(
        capsys.readouterr().out
    ), "two of one kind"
    names = [path.name for path in sorted((run_of(workplace) / "samples").glob("*.png"))]
    assert names == ["gs00000-ema.png", "gs00000.png", "gs00003-ema.png", "gs00003.png"]


def test_a_stopped_run_goes_on_to_the_bit_and_training_does_not_notice(workplace):
    write(workplace, DADAPT, **settings(ema_sample_ema_model=True, sample_steps=2))
    assert train.main([]) == 0
    whole = run_of(workplace)
    assert train.main(["--stop_after_steps", "5"]) == 0
    assert train.main(["--resume_ckpt", "findlast"]) == 0
    same_run(checkpoints(whole)[0], checkpoints(run_of(workplace))[0])
    write(workplace, DADAPT, **settings(ema_decay_rate=None))
    assert train.main([]) == 0
    plain = run_of(workplace)
    left, right = weights(checkpoints(whole)[0]), weights(checkpoints(plain)[0])
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert scalars(plain)["loss/log_step"] == scalars(whole)["loss/log_step"]


def test_older_averages_go_with_their_checkpoints(workplace):
    write(workplace, ADAMW, **settings(save_every_n_epochs=1, keep_last_n=1))
    assert train.main([]) == 0
    run = run_of(workplace)
    assert [path.name for path in single_files(run / "ckpts", run.name)] == [
        "last-tiny-ep03-gs00009.safetensors"
    ]
    assert [path.name for path in single_files(run / "ckpts", run.name, ema=True)] == [
        "last-tiny-ep03-gs00009-ema.safetensors"
    ]


def test_an_average_begins_from_another_model(workplace, capsys, model):
    write(workplace, ADAMW, **settings(max_epochs=1, save_full_precision=True))
    assert train.main([]) == 0
    earlier = next((run_of(workplace) / "ckpts").glob("*-ema.safetensors"))
    begun = unet_of(earlier)
    write(workplace, ADAMW, **settings(max_epochs=1, ema_update_interval=500, ema_resume_model=str(earlier)))
    assert train.main([]) == 0
    [checkpoint] = checkpoints(run_of(workplace))
    for found, expected in zip(averages(checkpoint)["unet"]["averages"], begun, strict=True):
        assert torch.equal(found, expected)


def test_what_cannot_be_reached_is_refused_before_anything_loads(workplace, capsys):
    write(workplace, ADAMW, **settings(ema_decay_rate=None, ema_strength_target=0.1, ema_update_interval=500))
    for more in ([], ["--check"]):
        assert train.main(more) == 2
        assert (
            "ema_strength_target: ema_update_interval is 500 and the run has 9 optimizer steps"
            in capsys.readouterr().err
        )
    assert not (workplace / "logs").exists()
    write(workplace, ADAMW, **settings())
    assert train.main(["--check"]) == 0
    assert "decay 0.5 every 2 steps (4 updates), kept on cpu" in capsys.readouterr().out
