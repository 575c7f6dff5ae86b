"""A checkpoint's page as the hub takes it, from runs that are stopped and continued."""

import json
import shutil

from huggingface_hub import ModelCard
from PIL import Image

import train
from tests.runs import DADAPT, run_of, scalars, write
from trainer.checkpoints.format import resume_problem
from trainer.checkpoints.listing import checkpoints
from trainer.reporting.model_card import PAGE, Card

SETTINGS = {
    "max_epochs": 2,
    "log_step": 1,
    "fixed_loss_images": 1,
    "save_every_n_epochs": None,
    "save_format": "diffusers",
}


def test_every_checkpoint_of_a_run_has_its_page_also_after_a_stop(workplace, model, tmp_path, drawn_curves):
    base = tmp_path / "somewhere-private" / "the-base"
    shutil.copytree(model, base)
    (base / PAGE).write_text(
        "---\nlicense: creativeml-openrail-m\nbase_model: someone/on-the-hub\n---\n# The base\n"
    )
    write(workplace, DADAPT, **SETTINGS, model=str(base))
    assert train.main(["--stop_after_steps", "3"]) == 0
    first = ModelCard.load(checkpoints(run_of(workplace))[0] / PAGE)
    assert train.main(["--resume_ckpt", "findlast"]) == 0
    run = run_of(workplace)
    checkpoint = checkpoints(run)[0]
    assert "could not be written" not in (run / "run.log").read_text()

    card = ModelCard.load(checkpoint / PAGE)  # the hub's own reader
    for data in (first.data, card.data):
        assert (data.license, data.base_model, data.base_model_relation) == (
            "creativeml-openrail-m",
            "someone/on-the-hub",
            "finetune",
        )
        assert (data.library_name, data.pipeline_tag) == (
            "diffusers",
            "text-to-image",
        ) and "stable-diffusion" in data.tags
    assert "3 of 6 steps, 5 images" in first.text and "6 of 6 steps, 10 images" in card.text
    assert "Fine-tuned from `the-base`, which was made from someone/on-the-hub" in card.text
    losses = scalars(run)["loss/stabilize-train"]
    assert f"{losses[0]:.4f} at step 0, {losses[6]:.4f} at step 6" in card.text, "the curve of both starts"
    assert f"| rate of the unet | {scalars(run)['lr/unet'][6]:.3g} at step 6 |" in card.text
    assert "| unet | dadapt_adam, lr 0.1 x the d it finds" in card.text and '"weight_decay": 0.8' in card.text
    assert "![samples of step 6](samples.png)" in card.text
    assert (checkpoint / "samples.png").read_bytes() == (run / "samples" / "gs00006.png").read_bytes()
    with Image.open(checkpoint / "curves.png") as curves:
        assert curves.size == (900, 600) and len(set(curves.convert("RGB").getdata())) > 50
    assert "somewhere-private" not in card.content and str(tmp_path) not in card.content

    (checkpoint / PAGE).write_text("edited by its owner")
    assert resume_problem(checkpoint) is None, "the page is not part of what must not change"


def test_the_page_of_a_lora_names_its_base_and_a_page_that_fails_costs_nothing_else(workplace, monkeypatch):
    write(workplace, DADAPT, **SETTINGS | {"max_epochs": 1, "fixed_loss_images": 0}, lora={"rank": 2})
    assert train.main(["--stop_after_steps", "1"]) == 0
    checkpoint = checkpoints(run_of(workplace))[0]
    card = ModelCard.load(checkpoint / PAGE)
    assert "lora" in card.data.tags and card.data.license is None and card.data.base_model is None
    assert 'from_pretrained("model")' in card.text and 'load_lora_weights("YOUR_NAME/tiny")' in card.text
    assert "does not know the licence of `model`" in card.text

    def fail(*_):
        raise RuntimeError("no page today")

    monkeypatch.setattr(Card, "write", fail)
    assert train.main(["--resume_ckpt", "findlast"]) == 0
    run = run_of(workplace)
    written = " ".join((run / "run.log").read_text().split())
    place = checkpoints(run)[0].relative_to(workplace)
    assert f"Note: {place} is whole, and its model card could not be written (no page today)." in written
    assert (
        json.loads((checkpoints(run)[0] / "manifest.json").read_text())["step"] == 3
        and resume_problem(checkpoints(run)[0]) is None
    )
