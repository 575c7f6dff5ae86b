"""Export of the rates of each optimizer and each mixture of them, without a run."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trainer.config.schema import OptimizerConfig, TrainConfig, optimizer_classes
from trainer.models.options import ModelOptions
from trainer.optim import AdamWOptions, DAdaptAdamOptions
from trainer.optim.optimizer_set import Learned
from trainer.optim.watch import PATIENCE, AdaptationWatch
from trainer.run.learned_rate import LEARNED, export_learned_rate
from trainer.training.options import PrecisionOptions

SECTIONS = {"unet": "base", "text encoder": "text_encoder_overrides"}


def outcome(
    folder: Path, unet: Any, text_encoder: Any, *, d: float = 1e-5, size: int = 10, **changes: Any
) -> tuple[list[str], Any]:
    """Return the message and the sections that a run of 200 steps with this constant d writes."""
    options = {"unet": unet, "text encoder": text_encoder}
    watch = AdaptationWatch(
        {network: chosen for network, chosen in options.items() if chosen.adapts}, SECTIONS
    )
    for network in watch.networks:
        for step in (1, PATIENCE):
            watch.look(network, step=step, d=d / 1.5, d_hat=0.0)
    parameters = (torch.empty(size, device="meta"),)
    optimizers = SimpleNamespace(
        parameters=dict.fromkeys(options, parameters),
        learned=lambda step: {network: Learned(chosen, step, d) for network, chosen in options.items()},
    )
    run: Any = SimpleNamespace(
        folder=folder,
        learner=SimpleNamespace(optimizers=optimizers),
        records=SimpleNamespace(watch=watch),
        state=SimpleNamespace(step=2 * PATIENCE),
    )
    config = TrainConfig(
        model=ModelOptions(resume_ckpt="x"),
        optimizers=OptimizerConfig(unet=unet, text_encoder=text_encoder),
        **changes,
    )
    told = export_learned_rate(run, config)
    return told, json.loads((folder / LEARNED).read_text()) if (folder / LEARNED).exists() else None


def chosen(name: str, **values: Any) -> Any:
    return optimizer_classes()[name](**{"lr": 0.5, "lr_scheduler": "constant", **values})


@pytest.mark.parametrize("name", [name for name, options in optimizer_classes().items() if options.adapts])
def test_every_adam_hands_its_rate_over_and_the_others_say_why_not(tmp_path, name):
    told, written = outcome(tmp_path, chosen(name), chosen(name))
    if name in ("dadapt_lion", "dadapt_sgd"):
        assert written is None and f"{name} of the unet takes other steps than AdamW" in told[0]
    else:
        assert (written["base"]["optimizer"], written["base"]["lr"]) == (
            "adamw8bit",
            5e-6,
        ) and "5e-06 for the unet" in told[0]


def test_sections_with_a_rate_of_their_own_stay_as_they_are(tmp_path):
    _, written = outcome(tmp_path, AdamWOptions(lr=3e-5, lr_scheduler="cosine"), chosen("dadapt_adam"))
    assert (written["base"]["optimizer"], written["base"]["lr"]) == ("adamw", 3e-5)
    assert (written["text_encoder_overrides"]["optimizer"], written["text_encoder_overrides"]["lr"]) == (
        "adamw8bit",
        5e-6,
    )
    assert outcome(tmp_path / "none", AdamWOptions(lr=1.0), AdamWOptions(lr=1.0)) == ([], None)


def test_one_network_that_never_left_d0_is_enough_for_no_file_and_removes_an_older_one(tmp_path):
    assert outcome(tmp_path, chosen("dadapt_adam"), chosen("dadapt_adam"))[1] is not None
    told, written = outcome(tmp_path, chosen("dadapt_adam"), chosen("dadapt_adam", d0=1e-5))
    assert written is None and told == [
        f"No {LEARNED}: d of the text encoder has not left d0 (1e-05) up to step 200."
    ]


def test_a_rate_that_still_rises_or_that_d_max_holds_is_exported_and_said_to_be_so(tmp_path):
    told, written = outcome(tmp_path, chosen("dadapt_adam"), chosen("dadapt_adam", d_max=1e-5))
    assert told[1].strip() == (
        "unet: still rising, d grew by 50.0% over the last 100 steps; "
        "text encoder: held by text_encoder_overrides.d_max (1e-05), so chosen rather than learned"
    )
    assert written["base"]["lr"] == 5e-6 and told[1].strip() in written["doc"]


def test_the_schedule_stays_and_the_rate_is_that_of_its_full_size(tmp_path):
    course = {"lr_scheduler": "cosine", "lr_warmup_steps": 10, "lr_decay_steps": 400}
    _, written = outcome(tmp_path, chosen("dadapt_adam", **course), chosen("dadapt_adam"))
    assert {key: written["base"][key] for key in course} == course and written["base"]["lr"] == 5e-6


def test_decay_that_was_added_to_the_gradient_is_left_out(tmp_path):
    _, written = outcome(
        tmp_path,
        chosen("dadapt_adam", weight_decay=0.3, decouple=False),
        chosen("dadapt_adam", weight_decay=0.3),
    )
    assert (written["base"]["weight_decay"], written["text_encoder_overrides"]["weight_decay"]) == (0.0, 0.3)


def test_what_train_json_has_to_change_for_the_file_is_told(tmp_path):
    options = DAdaptAdamOptions(lr=4.0, lr_scheduler="constant")
    told, _ = outcome(
        tmp_path, options, options, size=300_000_000, precision=PrecisionOptions(weights_dtype="bf16")
    )
    assert told[0].endswith("; train.json then needs allow_high_lr true")
    gentle = replace(options, lr=1.0)
    assert "needs" not in outcome(tmp_path, gentle, gentle, size=300_000_000)[0][0]


def test_a_folder_that_cannot_be_written_to_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    told, _ = outcome(tmp_path / "file", chosen("dadapt_adam"), chosen("dadapt_adam"))
    assert told[0].startswith(f"No {LEARNED}: it could not be written")


def test_a_rate_that_a_cap_held_is_the_one_that_acted_and_is_said_to_be(tmp_path):
    told, written = outcome(
        tmp_path, chosen("dadapt_adam8bit", rate_max=2e-6), chosen("dadapt_adam8bit", rate_max=1e-4)
    )
    assert (written["base"]["lr"], written["text_encoder_overrides"]["lr"]) == (2e-6, 5e-6)
    assert "unet: rate_max held the rate at 2e-06; still rising, " in told[1]
    assert "text encoder: still rising, " in told[1] and told[1].strip() in written["doc"]


def test_the_file_takes_no_more_memory_than_its_run(tmp_path):
    fused, plain = chosen("dadapt_adam8bit", fused_backward=True), chosen("dadapt_adam8bit")
    _, written = outcome(tmp_path, fused, plain)
    base, text = written["base"], written["text_encoder_overrides"]
    assert (base["optimizer"], base["fused_backward"], text["optimizer"]) == (
        "adamw8bit_fused",
        True,
        "adamw8bit",
    )
    _, written = outcome(tmp_path, plain, plain, precision=PrecisionOptions(weights_dtype="bf16"))
    assert (written["base"]["optimizer"], written["base"].get("fused_backward", False)) == (
        "adamw8bit_fused",
        False,
    )
