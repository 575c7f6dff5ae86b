"""What people write about their images acts in training, and the check tells it before."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import train
from data.index import build_index
from data.loader import StepLoader
from data.options import DataOptions
from tests.tiny import tiny_models, write_tiny_folder
from trainer.checkpoints.listing import checkpoints
from trainer.diffusion.conditioning import Tokenize
from trainer.diffusion.objective import Networks, Objective
from trainer.diffusion.options import ObjectiveOptions
from trainer.diffusion.schedule import NoiseSchedule
from trainer.optim import AdamWOptions
from trainer.optim.optimizer_set import OptimizerSet
from trainer.training.step import train_step


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_folder(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def workplace(tmp_path, model, monkeypatch):
    """Return a folder with four captioned images, two of them wide, and a configuration."""
    monkeypatch.chdir(tmp_path)
    for number in range(4):
        noisy(tmp_path / f"pictures/{number}.png", (160, 150) if number < 2 else (260, 64), number)
        (tmp_path / f"pictures/{number}.txt").write_text(f"a red circle, tag {number}")
    write(tmp_path, resume_ckpt=str(model))
    return tmp_path


def noisy(path, size=(64, 64), seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(path)


def write(folder, **changes):
    settings = {
        "data_root": "pictures",
        "resolution": 64,
        "batch_size": 2,
        "max_epochs": 2,
        "lr": 1e-3,
        "optimizer_config": "optimizer.json",
        "project_name": "tiny",
        "log_step": 1,
        "sample_prompts": "prompts.json",
        "fixed_loss_images": 2,
        "num_workers": 0,
        "seed": 7,
        "save_format": "diffusers",
    }
    if (folder / "train.json").exists():
        settings = json.loads((folder / "train.json").read_text())
    (folder / "train.json").write_text(json.dumps(settings | changes))
    (folder / "optimizer.json").write_text(json.dumps({"base": {"optimizer": "adamw", "weight_decay": 0}}))
    prompts = {
        "cfgs": [2],
        "num_inference_steps": 1,
        "samples": [{"prompt": "a red circle"}],
        "generate_pretrain_samples": False,
    }
    (folder / "prompts.json").write_text(json.dumps(prompts))


def last_weights(folder):
    newest = checkpoints(sorted((folder / "logs").iterdir())[-1])[0]
    return {
        f"{part}/{name}": tensor
        for part, file in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model"))
        for name, tensor in load_file(newest / part / f"{file}.safetensors").items()
    }


def gradient(folder):
    """Return loss and gradient of one step of all images in a folder, read as a run reads them."""
    models = tiny_models(0)
    options = DataOptions(data_root=str(folder), resolution=64, batch_size=4, num_workers=0, cond_dropout=0)
    loader = StepLoader(
        build_index(options), options, tokenize=Tokenize(models.tokenizer), seed=1, images_per_step=4
    )
    objective = Objective(
        ObjectiveOptions(),
        NoiseSchedule(models.scheduler_config),
        seed=1,
        latent_channels=4,
        latent_factor=8,
        scaling_factor=models.vae.config.scaling_factor,
        context_width=16,
        train_text_encoder=True,
    )
    parameters = {
        "unet": list(models.unet.parameters()),
        "text encoder": list(models.text_encoder.parameters()),
    }
    optimizers = OptimizerSet(dict.fromkeys(parameters, AdamWOptions(lr=1e-3)), parameters, total_steps=1)
    found = []
    optimizers.step = lambda found_inf: found.extend(  # type: ignore[method-assign]
        p.grad.reshape(-1).clone() for p in parameters["unet"]
    )
    (batches,) = loader.steps(0)
    networks = Networks(models.unet, models.text_encoder, models.vae)
    loss = train_step(
        [objective.draw(batch) for batch in batches], networks, objective, optimizers, step=0, images=2
    ).loss
    return float(loss), torch.cat(found)


def test_loss_scale_weighs_an_image_s_loss_and_gradient(tmp_path):
    for name in "ab":
        noisy(tmp_path / f"{name}.png", seed=ord(name))
        (tmp_path / f"{name}.txt").write_text(f"a circle {name}")
    results = {}
    for scale in (1.0, 0.0, 0.25):
        (tmp_path / "a.yaml").write_text(f"loss_scale: {scale}\n")
        results[scale] = gradient(tmp_path)
    for place in range(2):
        whole, without, quarter = (results[scale][place] for scale in (1.0, 0.0, 0.25))
        torch.testing.assert_close(quarter, without + 0.25 * (whole - without), rtol=1e-4, atol=1e-6)
    assert results[0.0][0] < 0.9 * results[1.0][0]


def test_images_of_loss_scale_0_teach_nothing(workplace, model):
    (workplace / "pictures/global.yaml").write_text("loss_scale: 0\n")
    assert train.main([]) == 0
    after = last_weights(workplace)
    before = load_file(model / "unet/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(after[f"unet/{name}"], tensor) for name, tensor in before.items())
    (workplace / "pictures/0.yaml").write_text("loss_scale: 0.5\n")
    assert train.main([]) == 0
    assert any(
        not torch.equal(last_weights(workplace)[f"unet/{name}"], tensor) for name, tensor in before.items()
    )


def test_settings_of_an_image_reach_its_batches(tmp_path):
    for name in "ab":
        noisy(tmp_path / f"{name}.png", seed=ord(name))
        (tmp_path / f"{name}.txt").write_text("main, t1, t2, t3, t4")
    (tmp_path / "a.yaml").write_text("cond_dropout: 1\nflip_p: 1\nmultiply: 3\n")
    (tmp_path / "b.yaml").write_text("shuffle_tags: true\nkeep_tags: 2\nloss_scale: 0.5\nbatch_id: alone\n")
    options = DataOptions(data_root=str(tmp_path), resolution=64, num_workers=0, cond_dropout=0)
    loader = StepLoader(
        build_index(options), options, tokenize=Tokenize(tiny_models().tokenizer), seed=1, images_per_step=2
    )
    plain = {batch.names[0]: batch.pixels_BCHW for batch in loader.images.plain([0, 1])}
    shown = {"a.png": [], "b.png": []}
    for epoch in range(12):
        for step in loader.steps(epoch):
            for batch in step:
                assert len(set(batch.names)) == 1, "b has a batch of its own"
                assert batch.loss_scale_B.tolist() == [1.0 if batch.names[0] == "a.png" else 0.5] * len(batch)
                shown[batch.names[0]] += batch.captions
                expected = (
                    plain[batch.names[0]][0].flip(-1)
                    if batch.names[0] == "a.png"
                    else plain[batch.names[0]][0]
                )
                assert torch.equal(batch.pixels_BCHW[0], expected)
    assert shown["a.png"] == [""] * 36
    assert len(shown["b.png"]) == 12 and set(shown["b.png"]) == {
        "main, t1, t2, t3, t4",
        "main, t1, t2, t4, t3",
    }


def test_words_beyond_the_first_window_are_seen_with_max_tokens_only(workplace):
    def trained(*arguments, words):
        for number in range(4):
            (workplace / f"pictures/{number}.txt").write_text("a " * 80 + words)
        assert train.main(["--max_epochs", "1", "--cond_dropout", "0", *arguments]) == 0
        return last_weights(workplace)["unet/conv_in.weight"]

    assert torch.equal(trained(words="red circle"), trained(words="blue square"))
    long = trained("--max_tokens", "150", words="red circle")
    assert not torch.equal(long, trained("--max_tokens", "150", words="blue square"))
    log = (sorted((workplace / "logs").iterdir())[-1] / "run.log").read_text()
    assert "captions over 150" not in log and "could not be drawn" not in log


def test_several_resolutions_train_and_continue_to_the_bit(workplace):
    write(workplace, resolution=[64, 128], max_epochs=3, max_tokens=150, flip_p=0.5)
    (workplace / "pictures/3.yaml").write_text("multiply: 1.5\n")
    assert train.main([]) == 0
    whole = last_weights(workplace)
    assert train.main(["--logdir", "logs", "--run_name", "z", "--stop_after_steps", "4"]) == 0
    assert train.main(["--resume_ckpt", str(sorted((workplace / "logs").iterdir())[-1])]) == 0
    stopped = last_weights(workplace)
    assert whole.keys() == stopped.keys() and all(
        torch.equal(tensor, stopped[name]) for name, tensor in whole.items()
    )
    assert (
        train.main(["--resume_ckpt", str(sorted((workplace / "logs").iterdir())[-1]), "--resolution", "64"])
        == 2
    )


def test_kept_latents_of_several_resolutions_are_those_of_every_step(workplace):
    write(workplace, resolution=[64, 128], flip_p=0.5, batch_size=1)
    found = []
    for cache in ("no", "memory"):
        assert train.main(["--cache_latents", cache, "--run_name", f"z{len(found)}"]) == 0
        found.append(last_weights(workplace))
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())


def test_epochs_in_which_no_image_is_due_are_passed_over(workplace):
    for number in range(1, 4):
        (workplace / f"pictures/{number}.png").unlink()
    (workplace / "pictures/multiply.txt").write_text("0.25")
    assert train.main(["--max_epochs", "8"]) == 0
    assert checkpoints(sorted((workplace / "logs").iterdir())[-1])[0].name.endswith("gs00002")


def test_a_run_in_which_no_image_is_ever_due_is_refused(workplace, capsys):
    (workplace / "pictures/multiply.txt").write_text("0.0001")
    for arguments in ([], ["--check"]):
        assert train.main(arguments) == 2
        assert (
            "data_root: in 2 epochs no image is due: raise its multiply, or max_epochs"
            in capsys.readouterr().err
        )
    assert not (workplace / "logs").exists()


def test_bad_files_refuse_the_run_where_they_are_errors(workplace, no_estimate, capsys):
    (workplace / "pictures/2.png").write_bytes(b"")
    (workplace / "pictures/3.yaml").write_text("multiply: x\n")
    assert train.main(["--check"]) == 0
    assert train.main(["--on_bad_image", "error"]) == 2
    error = capsys.readouterr().err
    assert (
        "data_root: 2 files cannot be used" in error
        and "2.png: it is empty (0 bytes)" in error
        and "3.yaml:1: multiply" in error
    )
    assert not (workplace / "logs").exists()
    assert train.main(["--on_bad_image", "error", "--check"]) == 1
    out = capsys.readouterr().out
    assert "files skipped: 2" in out and out.rstrip().endswith(
        "on_bad_image is error: a run would be refused for 2 of the files."
    )
    assert train.main([]) == 0


def test_the_check_is_a_report_for_programs(workplace, capfd, request):
    (workplace / "pictures/0.txt").write_text("a " * 100)
    (workplace / "pictures/1.txt").unlink()
    (workplace / "pictures/again.png").write_bytes((workplace / "pictures/2.png").read_bytes())
    command = ["--check", "json", "--contact_sheets", "sheets", "--on_bad_image", "error"]
    assert train.main(command) == 0
    found = json.loads(capfd.readouterr().out)
    data = found["data"]
    assert (found["usable"], data["images"], data["bad"]) == (True, 5, [])
    assert data["captions"]["missing"] == ["1.png", "again.png"]
    assert [(long["image"], long["tokens"]) for long in data["captions"]["long"]] == [("0.png", 100)]
    assert data["duplicates"] == [["2.png", "again.png"]]
    assert [(use["width"], use["height"], use["images"]) for use in data["buckets"]] == [(64, 64, 5)]
    assert (found["steps"], found["steps_of_first_epoch"], found["plan"]["seed"]) == (6, 3, "7") and found[
        "contact_sheets"
    ] == ["sheets/64x64.png"]
    assert found["memory"]["peak"] > 0
    assert not (workplace / "logs").exists(), "a check leaves nothing behind"

    request.getfixturevalue("no_estimate")
    whole = (workplace / "pictures/3.png").read_bytes()
    (workplace / "pictures/3.png").write_bytes(whole[: len(whole) // 2])
    assert train.main(command) == 1
    found = json.loads(capfd.readouterr().out)
    assert (found["usable"], found["data"]["images"]) == (False, 4)
    assert [file["file"] for file in found["data"]["bad"]] == ["3.png"]
    assert found["plan"]["latents"].startswith("encoded once, before training: 4 images, ")
    assert any(
        note.startswith("1 damaged image will be skipped but counted in the steps") for note in found["notes"]
    )


def test_a_check_keeps_the_index_of_a_large_data_set(workplace, no_estimate, monkeypatch):
    for constant in ("FEWEST", "_CLOCK_GRAIN"):
        monkeypatch.setattr(f"data.saved_index.{constant}", 0)
    assert train.main(["--check"]) == 0
    (kept,) = (workplace / "logs" / "cache").iterdir()
    assert kept.name.startswith("index-")
    monkeypatch.setattr("data.saved_index.build_index", lambda options: pytest.fail("scanned again"))
    assert train.main(["--check"]) == 0
    assert train.main(["--check", "--cache_dir", str(kept.parent)]) == 0


def test_masks_are_counted_and_shown_on_contact_sheets(workplace, no_estimate, capsys):
    for path in (workplace / "pictures").glob("[1-4].png"):
        path.unlink()
    Image.new("RGB", (64, 64), (0, 0, 255)).save(workplace / "pictures/0.png")
    Image.new("RGB", (64, 64), (0, 255, 0)).save(workplace / "pictures/1.png")
    mask = Image.new("L", (64, 64), 255)
    mask.paste(0, (32, 0, 64, 64))
    mask.save(workplace / "pictures/0.mask.png")
    assert train.main(["--check", "--contact_sheets", "sheets", "--unmasked_weight", "0.1"]) == 0
    assert "masks        of 1 of 2 images; in the loss black counts 0.1, white 1" in capsys.readouterr().out
    sheet = Image.open(workplace / "sheets/64x64.png").convert("RGB")
    colours = {colour for count, colour in sheet.getcolors(1 << 20) if count > 1000}
    assert {(0, 0, 255), (0, 255, 0), (166, 0, 193)} <= colours, "blue trained and not, green without a mask"


def test_contact_sheets_show_each_image_as_it_is_cropped(workplace, no_estimate, capsys):
    red, blue = (255, 0, 0), (0, 0, 255)
    picture = Image.new("RGB", (300, 100), blue)
    picture.paste(red, (100, 0, 200, 100))
    for path in (workplace / "pictures").glob("*.png"):
        path.unlink()
    picture.save(workplace / "pictures/0.png")
    assert train.main(["--check", "--contact_sheets", "sheets/new", "--resolution", "[64, 128]"]) == 0
    assert "contact sheets: 2 in sheets/new" in capsys.readouterr().out
    assert sorted(path.name for path in (workplace / "sheets/new").iterdir()) == [
        "128-192x64.png",
        "64-64x64.png",
    ]

    def colours(name):
        sheet = Image.open(workplace / "sheets/new" / name).convert("RGB")
        return {colour for count, colour in sheet.getcolors(1 << 20) if count > 1000}

    assert red in colours("64-64x64.png") and blue not in colours("64-64x64.png"), (
        "the square in the middle is red"
    )
    assert {red, blue} <= colours("128-192x64.png")
    (workplace / "taken").write_text("a file")
    assert train.main(["--check", "--contact_sheets", "pictures/sheets"]) == 2
    assert "lies inside" in capsys.readouterr().err and not (workplace / "pictures/sheets").exists()
    (workplace / "linked").symlink_to("pictures")
    for option in ("--contact_sheets", "--logdir"):
        assert train.main(["--check", "--data_root", "linked", option, "pictures/new"]) == 2
        assert "lies inside" in capsys.readouterr().err, option
    assert train.main(["--check", "--contact_sheets", "taken"]) == 2
    assert "--contact_sheets: taken cannot be written to" in capsys.readouterr().err
