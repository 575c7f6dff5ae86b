"""The text encoder stops in the middle of a run: frozen, without optimizer, and resumed to the bit."""

import gc
import json
import weakref

import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPTextModel

import train
from tests.integration.test_resume import curves
from tests.runs import ADAMW, DADAPT, FUSED, run_of, write
from trainer.optim.optimizer_set import OptimizerSet
from trainer.reporting.tags import RATE, D

LAST = "last-tiny-ep03-gs00009"
SETTINGS = {
    "stop_textenc_after_n_epochs": 1.5,
    "log_step": 1,
    "fixed_loss_images": 1,
    "first_samples": False,
    "save_format": "diffusers",
    "save_optimizer": True,
    "save_every_n_epochs": 1,
}
"""Epochs have three steps, so the text encoder trains for five of nine."""

CASES = {
    "D-Adaptation, latents in each step": (DADAPT, {"cache_latents": "no"}),
    "8 bits in backward, averages": (
        FUSED,
        {"cache_latents": "memory", "ema_decay_rate": 0.9, "ema_update_interval": 2},
    ),
    "LoRA": (ADAMW, {"cache_latents": "memory", "lora": {"rank": 2}}),
    "recomputed activations, shuffled tags": (
        ADAMW,
        {"gradient_checkpointing": True, "shuffle_tags": True, "cache_latents": "memory"},
    ),
}


def contents(checkpoint):
    """Return the bytes of every file of tensors, and the training state without times."""
    tensors = {path.relative_to(checkpoint): path.read_bytes() for path in checkpoint.rglob("*.safetensors")}
    state = json.loads((checkpoint / "resume/training.json").read_text())
    state["meter"].pop("epoch_seconds")
    return tensors, state


@pytest.mark.parametrize("case", CASES)
def test_a_run_is_resumed_to_the_bit_before_at_and_after_the_stop(workplace, case):
    optimizer, settings = CASES[case]
    write(workplace, optimizer, **SETTINGS, **settings)
    assert train.main(["--logdir", "whole"]) == 0
    (whole,) = (path for path in (workplace / "whole").iterdir() if path.name != "cache")
    for place, stop in enumerate((3, 5, 7, None)):
        stops = [] if stop is None else ["--stop_after_steps", str(stop)]
        assert train.main([*(["--resume_ckpt", "findlast"] if place else []), *stops]) == 0
    stopped = run_of(workplace)
    assert curves(whole) == curves(stopped)
    assert contents(whole / "ckpts" / LAST) == contents(stopped / "ckpts" / LAST)


def test_from_the_stop_on_nothing_of_the_text_encoder_moves_and_its_optimizer_is_gone(
    workplace, monkeypatch, capsys
):
    write(workplace, DADAPT, **SETTINGS)
    dropped = []
    stop = OptimizerSet.stop

    def watched(self, network, step):
        (member,) = (member for member in self.members if member.network == network)
        dropped.append((network, step, weakref.ref(member.optimizer)))
        del member
        stop(self, network, step)

    monkeypatch.setattr(OptimizerSet, "stop", watched)
    assert train.main([]) == 0
    gc.collect()
    ((network, step, optimizer),) = dropped
    assert (network, step) == ("text encoder", 5) and optimizer() is None
    run = run_of(workplace)
    folders = [run / "ckpts" / name for name in ("tiny-ep01-gs00003", "tiny-ep02-gs00006", LAST)]
    texts = [load_file(folder / "text_encoder/model.safetensors") for folder in folders]
    unets = [load_file(folder / "unet/diffusion_pytorch_model.safetensors") for folder in folders]
    assert any(not torch.equal(texts[0][name], texts[1][name]) for name in texts[0])
    assert all(torch.equal(texts[1][name], texts[2][name]) for name in texts[0])
    assert any(not torch.equal(unets[1][name], unets[2][name]) for name in unets[0])
    state = json.loads((folders[1] / "resume/training.json").read_text())["optimizers"]
    assert state["text encoder"].keys() == {"optimizer", "stopped"}
    tags = {tag: max(steps) for tag, steps in curves(run).items() if tag.endswith("text encoder")}
    assert set(tags.values()) == {5} and f"{RATE}text encoder" in tags
    assert max(curves(run)[f"{RATE}unet"]) == 9
    out = capsys.readouterr().out
    assert "parameters, up to step 5 of 9" in out and "The text encoder is frozen after step 5" in out
    assert "up to step 5 of 9" in (folders[2] / "README.md").read_text()


def test_frozen_captions_are_encoded_once(workplace, monkeypatch):
    calls = []
    forward = CLIPTextModel.forward

    def counting(self, first, *arguments, **keywords):
        if not first.is_meta:
            calls.append((len(first), torch.is_grad_enabled()))
        return forward(self, first, *arguments, **keywords)

    monkeypatch.setattr(CLIPTextModel, "forward", counting)
    quiet = {"fixed_loss_images": 0, "sample_steps": 1000, "cond_dropout": 0}
    write(workplace, ADAMW, **SETTINGS | quiet, cache_latents="memory")
    assert train.main([]) == 0
    trained = [count for count, gradients in calls if gradients]
    assert len(trained) == 5, "five steps"
    assert [count for count, gradients in calls if not gradients][:6] == [1] * 6, "five captions and none"
    samples = len(calls) - 5 - 6
    assert samples <= 2, "nothing in the four steps that are left"


def test_a_stop_can_be_added_on_resume_and_not_taken_back(workplace, capsys):
    write(workplace, DADAPT, **SETTINGS | {"stop_textenc_after_n_epochs": None})
    assert train.main(["--stop_after_steps", "7"]) == 0
    assert train.main(["--resume_ckpt", "findlast", "--stop_textenc_after_n_epochs", "1"]) == 0
    out = capsys.readouterr().out
    assert "Changed: stop_textenc_after_n_epochs: null -> 1.0" in out
    assert "The text encoder is frozen after step 7" in out
    assert max(curves(run_of(workplace))[f"{RATE}text encoder"]) == 7
    assert train.main(["--resume_ckpt", "findlast", "--stop_textenc_after_n_epochs", "null"]) == 2
    assert (
        "stop_textenc_after_n_epochs: the run has frozen the text encoder after step 3 and dropped its "
        "optimizer; set it back to 1, or start a new run with --resume_weights_only."
    ) in capsys.readouterr().err


def test_the_d_of_a_stopped_text_encoder_starts_a_new_run_and_the_exported_rates(workplace):
    write(workplace, FUSED, **SETTINGS)
    assert train.main([]) == 0
    run = run_of(workplace)
    d = curves(run)[f"{D}text encoder"][5]
    assert d > 1.2 * FUSED["base"]["d0"], "it had risen"
    exported = json.loads((run / "optimizer.found.json").read_text())
    assert exported["text_encoder_overrides"]["lr"] == pytest.approx(d, rel=1e-3)
    write(workplace, {"base": {**FUSED["base"], "d0": "resume"}}, **SETTINGS)
    new = ["--resume_ckpt", str(run), "--resume_weights_only", "--logdir", "new", "--stop_after_steps", "1"]
    assert train.main(new) == 0
    sections = json.loads((next((workplace / "new").iterdir()) / "optimizer.json").read_text())
    assert sections["text_encoder_overrides"]["d0"] == pytest.approx(d)
