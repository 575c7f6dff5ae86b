"""The learned rate of a run, exported as an optimizer file."""

import json
import re
from dataclasses import replace

import pytest

import train
from tests.runs import DADAPT, run_of, scalars, unbroken, write
from trainer.checkpoints.listing import checkpoints
from trainer.config import load_config
from trainer.config.export import optimizer_schema
from trainer.config.paths import CONFIGS
from trainer.optim import AdamW8bitOptions
from trainer.run.learned_rate import LEARNED

jsonschema = pytest.importorskip("jsonschema")

SHORT = {
    "max_epochs": 2,
    "log_step": 1,
    "fixed_loss_images": 0,
    "save_every_n_epochs": None,
    "save_format": "diffusers",
}


def found(run):
    """Return a configuration with the optimizer file that its run wrote, and that file, schema checked."""
    content = json.loads((run / LEARNED).read_text())
    jsonschema.validate(content, optimizer_schema())
    return load_config(["--optimizer_config", str(run / LEARNED)]).config, content


def last(run, tag):
    return list(scalars(run)[tag].values())[-1]


def test_a_run_exports_the_rates_that_acted_and_a_run_with_them_starts(workplace, capsys):
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
    log = (run / "run.log").read_text()
    assert f"No {LEARNED}: d of the unet has not left d0" in log and not (run / LEARNED).exists()
    assert train.main(["--resume_ckpt", "findlast"]) == 0
    config, content = found(run)
    unet, text_encoder = config.optimizers.unet, config.optimizers.text_encoder
    assert unet.lr == pytest.approx(last(run, "lr/unet"), rel=1e-3)
    assert text_encoder.lr == pytest.approx(last(run, "lr/text encoder"), rel=1e-3)
    expected = AdamW8bitOptions(
        lr=unet.lr, lr_scheduler="constant", betas=(0.8, 0.99), epsilon=1e-7, weight_decay=0.6
    )
    assert unet == expected, "weight decay acts as before beside a rate that layer_scale has halved"
    assert text_encoder == replace(expected, lr=text_encoder.lr, weight_decay=0.3)
    assert content["text_encoder_freezing"]["freeze_front_n_layers"] == 2
    rates = f"{unet.lr:g} for the unet and {text_encoder.lr:g} for the text encoder"
    settled = "unet and text encoder: too early to tell whether d has settled, after 6 of 100 steps"
    told = f"Rate: {LEARNED}: AdamW in 8 bits at {rates} {settled}"
    assert unbroken(capsys.readouterr().out).endswith(told) and settled in content["doc"]
    last_lines = re.sub(r"^[0-9 :-]{20}", "", (run / "run.log").read_text(), flags=re.MULTILINE)
    assert unbroken(last_lines).endswith(told)

    assert (
        train.main(
            ["--optimizer_config", str(run / LEARNED), "--logdir", "handed", "--stop_after_steps", "1"]
        )
        == 0
    )
    handed = next((workplace / "handed").iterdir())
    assert (
        checkpoints(handed)
        and not (handed / LEARNED).exists()
        and f"No {LEARNED}" not in (handed / "run.log").read_text()
    )
    assert last(handed, "lr/unet") == pytest.approx(unet.lr, rel=1e-6)


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


def test_a_preset_leaves_d0_and_its_cap_holds_the_rate_and_not_d(workplace, capsys):
    preset = json.loads((CONFIGS / "optimizer_dadapt_sd15.json").read_text())
    write(workplace, preset, **{**SHORT, "max_epochs": 8}, first_samples=False)
    assert train.main([]) == 0
    plan = capsys.readouterr().out
    assert (
        plan.count("x the d it finds, at most 1e-05, ")
        == plan.count("x the d it finds, at most 5e-06, ")
        == 1
    )
    run = run_of(workplace)
    config, content = found(run)
    for network, options, cap in (
        ("unet", config.optimizers.unet, 1e-5),
        ("text encoder", config.optimizers.text_encoder, 5e-6),
    ):
        asked, d = (scalars(run)[f"optimizer/{tag} {network}"] for tag in ("d*lr", "d"))
        assert last(run, f"optimizer/d {network}") > 5 * d[1], network
        assert last(run, f"lr/{network}") == pytest.approx(min(asked[max(asked)], cap))
        assert options.lr == pytest.approx(min(asked[max(asked)], cap), rel=1e-3)
    assert content["base"]["optimizer"] == "adamw8bit_fused" and content["base"]["fused_backward"]
