"""Runs with and without cached latents: the same numbers, less work."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import CLIPTextModel

import train
from data.index import build_index
from data.latents import MomentShape
from data.options import DataOptions
from tests.tiny import tiny_models, write_tiny_folder
from trainer.diffusion.conditioning import Tokenize
from trainer.errors import UserError
from trainer.models.placement import place
from trainer.training import latent_cache as cache_module
from trainer.training.latent_cache import (
    LatentPlan,
    encode_captions,
    encode_images,
    identity,
    plan_latents,
)
from trainer.training.options import CacheOptions
from trainer.training.precision import Precision
from trainer.transfer import visiting

CPU = Precision(torch.device("cpu"), None, None, torch.float32)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_folder(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def workplace(tmp_path, model, monkeypatch):
    """Return a folder with 5 captioned images and no cache: 2 epochs, one image a pass, two a step."""
    monkeypatch.chdir(tmp_path)
    images = tmp_path / "pictures"
    images.mkdir()
    for number in range(5):
        picture = Image.effect_noise((70, 80) if number else (90, 60), 40).convert("RGB")
        picture.paste((50 * number, 100, 200), (0, 0, 30, 30))
        picture.save(images / f"{number}.png")
        (images / f"{number}.txt").write_text(f"a red circle, tag {number}")
    settings = {
        "resume_ckpt": str(model),
        "data_root": "pictures",
        "resolution": 64,
        "batch_size": 1,
        "grad_accum": 2,
        "max_epochs": 2,
        "flip_p": 0.5,
        "cond_dropout": 0.2,
        "lr": 1e-3,
        "optimizer_config": "optimizer.json",
        "project_name": "tiny",
        "log_step": 1,
        "sample_steps": 100,
        "sample_prompts": "prompts.json",
        "fixed_loss_images": 3,
        "num_workers": 0,
        "seed": 7,
        "cache_latents": "no",
        "save_format": "diffusers",
    }
    (tmp_path / "train.json").write_text(json.dumps(settings))
    (tmp_path / "optimizer.json").write_text(json.dumps({"base": {"optimizer": "adamw"}}))
    (tmp_path / "prompts.json").write_text(
        json.dumps({"cfgs": [1], "num_inference_steps": 1, "samples": [{"prompt": "a red circle"}]})
    )
    return tmp_path


@pytest.fixture
def calls(monkeypatch):
    """Return the numbers of images and captions that the networks were given, by network."""
    counted = {"vae": 0, "text encoder": 0}

    def counting(name, original):
        def call(self, first, *arguments, **keywords):
            counted[name] += (
                0 if first.is_meta else len(first)
            )  # on the meta device a model is only tried out
            return original(self, first, *arguments, **keywords)

        return call

    monkeypatch.setattr(AutoencoderKL, "encode", counting("vae", AutoencoderKL.encode))
    monkeypatch.setattr(CLIPTextModel, "forward", counting("text encoder", CLIPTextModel.forward))
    return counted


def run_of(logs):
    return next(path for path in sorted(logs.iterdir()) if path.name != "cache")


def outcome(logs):
    """Return the trained weights and the recorded losses of a run."""
    run = run_of(logs)
    (last,) = (run / "ckpts").glob("last-*")
    files = ("unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors")
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    losses = [
        [event.value for event in events.Scalars(tag)] for tag in ("loss/log_step", "loss/stabilize-train")
    ]
    return {
        f"{file}:{key}": tensor for file in files for key, tensor in load_file(last / file).items()
    }, losses


def assert_same(left, right):
    assert left[1] == right[1]
    for name, tensor in left[0].items():
        assert torch.equal(tensor, right[0][name]), name


def test_kept_latents_change_no_bit_where_images_are_encoded_one_at_a_time(workplace, calls, capsys):
    assert train.main(["--logdir", "plain"]) == 0
    assert calls["vae"] == 10 + 3, "each image of each step, and those of the fixed-noise loss once"
    plain = outcome(workplace / "plain")

    calls["vae"] = 0
    assert train.main(["--logdir", "memory", "--cache_latents", "memory"]) == 0
    assert calls["vae"] == 10, "each image as it is and mirrored"
    assert_same(plain, outcome(workplace / "memory"))
    assert "Encoding 10 images once: 0.0 MiB of latents, kept in memory." in capsys.readouterr().out
    assert not (workplace / "memory" / "cache").exists()

    calls["vae"] = 0
    assert train.main(["--logdir", "disk", "--cache_latents", "disk"]) == 0
    assert calls["vae"] == 10
    assert_same(plain, outcome(workplace / "disk"))
    assert len(list((workplace / "disk" / "cache" / "latents").glob("*/*.safetensors"))) == 1

    calls["vae"] = 0
    assert (
        train.main(
            [
                "--logdir",
                "later",
                "--cache_latents",
                "disk",
                "--cache_dir",
                "disk/cache",
                "--num_workers",
                "1",
            ]
        )
        == 0
    )
    assert calls["vae"] == 0, "the earlier run's are there"
    assert_same(plain, outcome(workplace / "later"))
    assert "Latents of 10 of 10 images are in" in capsys.readouterr().out


def test_masks_change_the_training_and_kept_latents_change_no_bit_of_it(workplace):
    assert train.main(["--logdir", "none"]) == 0
    plain = outcome(workplace / "none")
    for number in range(5):
        size = (70, 80) if number else (90, 60)
        Image.new("L", size, 255).save(workplace / f"pictures/{number}.mask.png")
    assert train.main(["--logdir", "white"]) == 0
    assert_same(plain, outcome(workplace / "white"))
    half = Image.new("L", (70, 80))
    half.paste(255, (0, 0, 20, 80))
    half.save(workplace / "pictures/2.mask.png")
    assert train.main(["--logdir", "ignored", "--unmasked_weight", "1"]) == 0
    assert_same(plain, outcome(workplace / "ignored"))
    runs = {}
    for mode in ("no", "memory", "disk"):
        assert train.main(["--logdir", mode, "--cache_latents", mode, "--crop_jitter", "0"]) == 0
        runs[mode] = outcome(workplace / mode)
    for mode in ("memory", "disk"):
        assert_same(runs["no"], runs[mode])
    losses, fixed = runs["no"][1]
    assert losses[0] != plain[1][0] or losses[1:] != plain[1][0][1:]
    assert fixed != plain[1][1], "masks weight the fixed-noise loss too"


def test_a_frozen_text_encoder_is_run_once_for_each_caption(workplace, calls):
    frozen = ["--disable_textenc_training", "true"]
    assert train.main(["--logdir", "plain", *frozen]) == 0
    calls["text encoder"] = 0
    assert train.main(["--logdir", "kept", "--cache_latents", "auto", *frozen]) == 0
    samples = 2 * 2  # before and after training, the prompt and the empty one
    assert 5 + 1 <= calls["text encoder"] <= 5 + 1 + samples
    (plain, (losses, fixed)), (kept, (kept_losses, kept_fixed)) = (
        outcome(workplace / name) for name in ("plain", "kept")
    )
    assert_same((plain, losses), (kept, kept_losses))
    assert kept_fixed == pytest.approx(fixed, rel=1e-5), "which encodes four captions at a time"
    calls["text encoder"] = 0
    (workplace / "pictures" / "0.txt").write_text("a red circle, one, two, three")
    assert (
        train.main(["--logdir", "shuffled", "--cache_latents", "auto", "--shuffle_tags", "true", *frozen])
        == 0
    )
    assert calls["text encoder"] > 30, "shuffled captions are encoded as they come"


def test_a_run_with_kept_latents_continues_to_the_bit(workplace):
    pairs = {"memory": ("memory", "memory"), "both": ("disk", "memory")}
    assert train.main(["--logdir", "whole", "--cache_latents", "memory", "--batch_size", "2"]) == 0
    whole = outcome(workplace / "whole")
    for name, (first, then) in pairs.items():
        assert (
            train.main(
                ["--logdir", name, "--batch_size", "2", "--cache_latents", first, "--stop_after_steps", "3"]
            )
            == 0
        )
        for partial in (run_of(workplace / name) / "ckpts").glob("tiny*"):
            assert "gs00003" in partial.name
        assert (
            train.main(
                ["--resume_ckpt", "findlast", "--logdir", name, "--batch_size", "2", "--cache_latents", then]
            )
            == 0
        )
        assert_same(whole, outcome(workplace / name))


def test_batches_with_and_without_kept_latents_agree(workplace):
    """Encoded in batches, images may differ in the last bits."""
    for name in ("no", "memory"):
        assert (
            train.main(["--logdir", name, "--cache_latents", name, "--batch_size", "2", "--grad_accum", "1"])
            == 0
        )
    (_, plain), (_, kept) = (outcome(workplace / name) for name in ("no", "memory"))
    for one, other in zip(plain, kept, strict=True):
        torch.testing.assert_close(torch.tensor(one), torch.tensor(other), rtol=1e-5, atol=1e-5)


def test_a_changed_image_is_encoded_anew_and_so_is_everything_for_another_vae(
    workplace, calls, tmp_path_factory
):
    disk = ["--cache_latents", "disk", "--flip_p", "0", "--stop_after_steps", "1"]
    assert train.main(disk) == 0 and calls["vae"] == 5
    Image.new("RGB", (70, 80), "red").save(workplace / "pictures" / "3.png")
    assert train.main(disk) == 0 and calls["vae"] == 6
    other = write_tiny_folder(tmp_path_factory.mktemp("other") / "model", seed=1)
    assert train.main([*disk, "--vae", str(other)]) == 0 and calls["vae"] == 11


def test_an_unreadable_image_is_named_and_left_out(workplace, capsys):
    content = (workplace / "pictures" / "3.png").read_bytes()
    (workplace / "pictures" / "3.png").write_bytes(content[: len(content) // 2])
    for mode in ("memory", "disk"):
        assert train.main(["--cache_latents", mode]) == 0
        out = capsys.readouterr().out
        assert out.count("3.png: it is damaged") == 1 and "8 images" in out, out


def test_damage_inside_an_image_refuses_the_run_where_that_is_asked(workplace, capsys):
    content = (workplace / "pictures" / "3.png").read_bytes()
    (workplace / "pictures" / "3.png").write_bytes(content[: len(content) // 2])
    assert train.main(["--cache_latents", "memory", "--on_bad_image", "error"]) == 2
    error = capsys.readouterr().err
    assert "a file cannot be used" in error and error.count("3.png: it is damaged") == 1
    assert not (workplace / "logs").exists()


def test_full_disks_and_odd_places_are_told_before_anything_is_written(workplace, capsys, monkeypatch):
    (workplace / "file").touch()
    assert train.main(["--cache_latents", "disk", "--cache_dir", "file/cache"]) == 2
    assert "cannot be written to" in capsys.readouterr().err
    usage = shutil.disk_usage(workplace)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    assert train.main(["--cache_latents", "disk"]) == 2
    error = capsys.readouterr().err
    assert "needs 0.0 MiB in logs/cache and 0.0 MiB are free" in error
    assert not (workplace / "logs" / "cache" / "latents").exists()
    assert not list(workplace.glob("logs/tiny*"))


def test_the_plan_is_told(workplace, no_estimate, capsys):
    assert train.main(["--check", "--cache_latents", "disk"]) == 0
    assert "encoded once, before training: 10 images, 0.0 MiB, kept on the disk" in capsys.readouterr().out
    assert train.main(["--check", "--crop_jitter", "0.5", "--cache_latents", "auto"]) == 0
    assert "encoded in every step (with crop_jitter no two crops are equal)" in capsys.readouterr().out


def plan_of(folder, monkeypatch, free=1 << 40, epochs=10, mode="auto", **changes):
    monkeypatch.setattr(cache_module, "_free_memory", lambda: free)
    data = DataOptions(data_root=str(folder), resolution=64, **changes)
    return plan_latents(
        CacheOptions(cache_latents=mode), data, build_index(data), tiny_models().vae.config, epochs=epochs
    )


def test_auto_keeps_latents_where_that_is_worth_it(workplace, monkeypatch):
    pictures = workplace / "pictures"
    plan = plan_of(pictures, monkeypatch)
    assert plan.mode == "memory" and plan.size == 5 * 4 * 8 * 64
    assert plan_of(pictures, monkeypatch, free=4 * plan.size).mode == "memory"
    tight = plan_of(pictures, monkeypatch, free=4 * plan.size - 1)
    assert tight.mode == "no" and "more than a quarter" in tight.why
    assert plan_of(pictures, monkeypatch, crop_jitter=0.1).mode == "no"
    assert plan_of(pictures, monkeypatch, epochs=1, flip_p=0.5).mode == "no"
    assert plan_of(pictures, monkeypatch, epochs=1).mode == "memory"
    assert plan_of(pictures, monkeypatch, free=0, mode="disk").mode == "disk"
    assert plan_of(pictures, monkeypatch, mode="no").mode == "no"
    with pytest.raises(UserError, match="use disk, auto or no"):
        plan_of(pictures, monkeypatch, free=plan.size - 1, mode="memory")


def test_values_that_are_not_finite_are_not_kept(workplace, monkeypatch):
    models = tiny_models()
    place(models, CPU.device, channels_last=False, weights=torch.float32)
    models.vae.quant_conv.bias.data.fill_(float("nan"))
    data = DataOptions(data_root=str(workplace / "pictures"), resolution=64, num_workers=0)
    plan = plan_of(workplace / "pictures", monkeypatch)
    with pytest.raises(UserError, match=r"not finite for 0.png in fp32"):
        encode_images(plan, build_index(data), data, models.vae, CPU, folder=workplace / "x", report=print)


def test_the_identity_of_a_vae():
    vae = tiny_models().vae
    own = identity(vae, CPU)
    assert own == identity(tiny_models().vae, CPU) != identity(tiny_models(seed=1).vae, CPU)
    assert identity(vae, replace(CPU, dtype=torch.bfloat16)) != own
    vae.quant_conv.bias.data[0] += 1e-6
    assert identity(vae, CPU) != own


def test_progress_is_told_in_long_runs(workplace, monkeypatch):
    monkeypatch.setattr(cache_module, "EVERY", -1)
    models = tiny_models()
    data = DataOptions(data_root=str(workplace / "pictures"), resolution=64, num_workers=0)
    told = []
    encode_images(
        plan_of(workplace / "pictures", monkeypatch),
        build_index(data),
        data,
        models.vae,
        CPU,
        folder=workplace,
        report=told.append,
    )
    assert (
        told[0].startswith("Encoding 5 images once")
        and told[1] == "Encoded 1 of 5 images; about 0 minutes left."
    )
    assert (
        encode_images(
            LatentPlan("no", (), MomentShape(4, 8)),
            build_index(data),
            data,
            None,
            CPU,
            folder=workplace,
            report=print,
        )
        is None
    )


def test_captions_that_would_take_too_much_memory_are_not_kept(monkeypatch):
    models = tiny_models()
    tokenize = Tokenize(models.tokenizer)
    monkeypatch.setattr(cache_module, "_free_memory", lambda: 4 * 2 * 4 * 77 * 16)
    assert encode_captions(["a", "b", "c"], tokenize, models.text_encoder, CPU, clip_skip=0) is None
    contexts = encode_captions(["a", "b"], tokenize, models.text_encoder, CPU, clip_skip=1)
    assert contexts is not None and contexts.lookup(tokenize(["b", "a"])).shape == (2, 77, 16)
    with pytest.raises(KeyError):
        contexts.lookup(tokenize(["never seen"]))


def test_waiting_networks_visit_the_device():
    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.places = []

        def to(self, device):
            self.places.append(str(device))
            return self

    network = Network()
    with pytest.raises(ZeroDivisionError), visiting([network], torch.device("cuda:0")):
        assert network.places == ["cuda:0"]
        1 / 0  # noqa: B018
    assert network.places == ["cuda:0", "cpu"]
