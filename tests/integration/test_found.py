"""The rate that a run found, handed over as an optimizer file; or the reason why not."""

import json
from dataclasses import replace

import pytest

import train
import trainer.optim.watch
from tests.runs import DADAPT, run_of, scalars, write
from trainer.checkpoints.listing import checkpoints
from trainer.config import load_config
from trainer.config.export import optimizer_schema
from trainer.optim import AdamW8bitOptions
from trainer.run.learned_rate import FOUND

jsonschema = pytest.importorskip("jsonschema")

SHORT = {
    "max_epochs": 2,
    "log_step": 1,
    "fixed_loss_images": 0,
    "save_every_n_epochs": None,
    "save_format": "diffusers",
}


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    """Let d count as settled after two steps of whatever growth: 100 of a tiny model would show nothing more."""
    monkeypatch.setattr(trainer.optim.watch, "PATIENCE", 2)
    monkeypatch.setattr(trainer.optim.watch, "FLAT", 1e9)


def found(run):
    """Return the configuration of a run with the optimizer file that it left, and that file, which fits the schema."""
    content = json.loads((run / FOUND).read_text())
    jsonschema.validate(content, optimizer_schema())
    return load_config(["--optimizer_config", str(run / FOUND)]).config, content


def last(run, tag):
    return list(scalars(run)[tag].values())[-1]


def test_a_settled_run_hands_over_the_rates_that_acted_and_a_run_with_them_starts(workplace, capsys):
    base = {
        **DADAPT["base"],
        "lr": 0.5,
        "layer_scale": 0.5,
        "betas": [0.8, 0.99],
        "weight_decay": 0.3,
        "epsilon": 1e-7,
        "d0": 1e-5,
    }
    overrides = {"layer_scale": 1.0, "lr": 1.0}
    write(
        workplace,
        {
            "base": base,
            "text_encoder_overrides": overrides,
            "text_encoder_freezing": {"freeze_front_n_layers": 2},
        },
        **SHORT,
    )
    assert train.main(["--stop_after_steps", "1"]) == 0
    run = run_of(workplace)
    assert f"No {FOUND}: d of the unet has" in (run / "run.log").read_text() and not (run / FOUND).exists()
    assert train.main(["--resume_ckpt", "findlast"]) == 0
    config, content = found(run)
    unet, text_encoder = config.optimizers.unet, config.optimizers.text_encoder
    assert unet.lr == pytest.approx(last(run, "hyperparameter/lr unet"), rel=1e-3)
    assert text_encoder.lr == pytest.approx(last(run, "hyperparameter/lr text encoder"), rel=1e-3)
    expected = AdamW8bitOptions(
        lr=unet.lr, lr_scheduler="constant", betas=(0.8, 0.99), epsilon=1e-7, weight_decay=0.6
    )
    assert unet == expected, "weight decay acts as before beside a rate that layer_scale has halved"
    assert text_encoder == replace(expected, lr=text_encoder.lr, weight_decay=0.3)
    assert content["text_encoder_freezing"]["freeze_front_n_layers"] == 2
    told = [line for line in (run / "run.log").read_text().splitlines() if str(run / FOUND) in line]
    assert (
        len(told) == 1
        and f"{unet.lr:g} for the unet" in told[-1]
        and told[-1].split("  ")[-1] in capsys.readouterr().out
    )

    assert (
        train.main(["--optimizer_config", str(run / FOUND), "--logdir", "handed", "--stop_after_steps", "1"])
        == 0
    )
    handed = next((workplace / "handed").iterdir())
    assert (
        checkpoints(handed)
        and not (handed / FOUND).exists()
        and f"No {FOUND}" not in (handed / "run.log").read_text()
    )
    assert last(handed, "hyperparameter/lr unet") == pytest.approx(unet.lr, rel=1e-6)


def test_a_section_that_had_a_rate_keeps_it(workplace):
    mixed = {
        "base": {"optimizer": "adamw8bit", "lr": 3e-5, "weight_decay": 0.2},
        "text_encoder_overrides": {**DADAPT["base"], "lr": 1.0},
    }
    write(workplace, mixed, **SHORT, lora={"rank": 2})
    assert train.main([]) == 0
    config, _ = found(run_of(workplace))
    assert config.optimizers.unet == load_config([]).config.optimizers.unet
    assert (
        config.optimizers.text_encoder.optimizer == "adamw8bit" and config.optimizers.text_encoder.lr != 3e-5
    )
