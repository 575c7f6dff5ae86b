"""Many options in one run, stopped in each of its phases: the same weights, state, curves and files."""

import json

import pytest
from PIL import Image

import train
from tests.runs import DADAPT, run_of, scalars, uncut, write
from trainer.checkpoints.listing import checkpoints
from trainer.models.lora import LORA_FILE

EVERYTHING = {
    "max_epochs": 3,
    "batch_size": 1,
    "lora": {"rank": 2, "targets": "all", "dropout": 0.2},
    "ema_decay_rate": 0.9,
    "ema_update_interval": 2,
    "ema_sample_ema_model": True,
    "ema_sample_nonema_model": True,
    "stop_textenc_after_n_epochs": 1.5,
    "validation_config": "validation.json",
    "keep_best": True,
    "alpha_mask": True,
    "unmasked_weight": 0.1,
    "shuffle_tags": True,
    "tag_dropout": 0.2,
    "wildcards": True,
    "flip_p": 0.5,
    "crop_jitter": 0.2,
    "cond_dropout": 0.2,
    "grad_accum": 2,
    "loss_type": "mse_huber",
    "min_snr_gamma": 5,
    "pyramid_noise_discount": 0.1,
    "input_perturbation": 0.1,
    "embedding_perturbation": 0.5,
    "clip_grad_norm": 1.0,
    "sample_steps": 2,
    "log_step": 1,
    "save_every_n_epochs": 1,
    "save_optimizer": True,
}


@pytest.mark.parametrize("stops", [[1, 3, 5], [2, 4]], ids=str)
def test_everything_at_once_is_resumed_to_the_bit(workplace, stops):
    """Steps 1 and 2 train both networks, 3 is the text encoder's last, later ones use its cached output."""
    for number in range(4):
        Image.new("L", (35, 40), 255 - 60 * number).save(workplace / f"pictures/{number}.mask.png")
        (workplace / f"pictures/{number}.txt").write_text("a {red|blue, big} circle, one, two, three")
    (workplace / "validation.json").write_text(json.dumps({"every_n_epochs": 0.5}))
    write(workplace, DADAPT, **EVERYTHING)
    whole = uncut(workplace)
    resume = []
    for stop in [*stops, None]:
        assert train.main([*resume, *(["--stop_after_steps", str(stop)] if stop else [])]) == 0
        resume = ["--resume_ckpt", "findlast"]
    run = run_of(workplace)
    left, right = checkpoints(whole)[0], checkpoints(run)[0]
    assert left.name == right.name == "last-tiny-ep03-gs00006"
    for file in (LORA_FILE, "resume/training.safetensors"):
        assert (left / file).read_bytes() == (right / file).read_bytes()
    timeless = [
        {tag: steps for tag, steps in scalars(each).items() if "performance" not in tag}
        for each in (whole, run)
    ]
    assert timeless[0] == timeless[1]
    drawn = [{path.name: path.read_bytes() for path in (each / "samples").iterdir()} for each in (whole, run)]
    assert drawn[0] == drawn[1] and len(drawn[0]) > 6
