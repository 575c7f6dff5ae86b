"""The real command line on a tiny model: its files, resumed runs, and messages about faults."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import train
from tests.runs import ADAMW, ADAMW8BIT, DADAPT, FUSED, run_of, same_run, scalars, unbroken, write
from tests.tiny import tiny_models, write_parts_beside, write_tiny_folder
from trainer.checkpoints.export import save_single_file
from trainer.checkpoints.format import resume_problem
from trainer.checkpoints.listing import checkpoints
from trainer.diffusion.schedule import NoiseSchedule
from trainer.models.load import load_models
from trainer.models.options import ModelOptions
from trainer.models.single_file import NETWORKS

ROOT = Path(train.__file__).parent


def test_a_whole_run_from_the_command_line(workplace):
    done = subprocess.run(
        [sys.executable, ROOT / "train.py", "--config", "train.json"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    run = run_of(workplace)

    assert [path.name for path in checkpoints(run)] == ["last-tiny-ep03-gs00009", "tiny-ep02-gs00006"]
    assert resume_problem(run / "ckpts" / "last-tiny-ep03-gs00009") is None
    assert resume_problem(run / "ckpts" / "tiny-ep02-gs00006") is None, "two are kept to resume from"
    assert (run / "ckpts" / "last-tiny-ep03-gs00009.safetensors").is_file()
    assert list((run / "samples").glob("*.png"))
    told = unbroken(done.stdout)
    for text in (
        "9 steps, 15 images",
        f"Run folder: logs/{run.name}, which holds: samples: samples/gs00009.png; "
        "before training: samples/gs0",
        "copy ckpts/last-tiny-ep03-gs00009.safetensors to models/Stable-diffusion of your web UI; the folder",
        "Curves: tensorboard --logdir logs",
    ):
        assert text in told
    ending = done.stdout.partition("Done: ")[2].splitlines()
    assert max(map(len, [*ending, *(run / "run.log").read_text().splitlines()])) <= 110
    assert "decoupled" not in done.stdout + done.stderr, (
        "the optimizer library's own lines stay off the console"
    )
    assert "Traceback" not in done.stderr
    assert "saved" in (run / "run.log").read_text()

    found = scalars(run)
    assert list(found["loss/stabilize-train"]) == [0, 3, 6, 9]
    assert list(found["loss/log_step"]) == [1, 2, 4, 6, 8, 9]
    assert list(found["loss/epoch"]) == [3, 6, 9]
    for network in ("unet", "text encoder"):
        d, rate = found[f"optimizer/d {network}"], found[f"lr/{network}"]
        assert rate == {step: pytest.approx(0.1 * value, rel=1e-5) for step, value in d.items()}
        assert list(d.values()) == sorted(d.values()), "d never falls"
        assert f"optimizer/d_hat {network}" in found
    assert {
        "optimizer/grad norm unet",
        "optimizer/grad norm text encoder",
        "performance/images per second",
        "performance/data wait",
    } <= set(found)

    pipeline = StableDiffusionPipeline.from_pretrained(
        run / "ckpts" / "last-tiny-ep03-gs00009", dtype=torch.float32
    )
    picture = pipeline("a red circle", num_inference_steps=1, height=64, width=64).images[0]
    assert picture.size == (64, 64)


def test_checkpoints_are_written_when_where_and_as_the_configuration_says(workplace, model):
    base = workplace / "base"
    shutil.copytree(model, base)
    write_parts_beside(base)
    shelf = {"save_ckpt_dir": "shelf", "save_full_precision": True, "save_optimizer": True}
    write(
        workplace,
        DADAPT,
        model="base",
        **shelf,
        fixed_loss_images=0,
        save_every_n_epochs=1,
        save_ckpts_from_n_epochs=2,
    )
    assert train.main([]) == 0
    run = run_of(workplace)
    found = checkpoints(run)
    assert [path.name for path in found] == ["last-tiny-ep03-gs00009", "tiny-ep02-gs00006"]
    assert all(resume_problem(path) is None for path in found), "every one can be gone on from"
    assert not list((run / "ckpts").glob("*.safetensors"))
    files = sorted((workplace / "shelf").iterdir())
    assert [path.name for path in files] == [f"{path.name}.safetensors" for path in found]
    for path, file in zip(found, files, strict=True):
        with safe_open(file, framework="pt") as single:
            header = single.metadata()
            weight = single.get_tensor("model.diffusion_model.out.2.weight")
        assert torch.equal(
            weight, load_file(path / "unet" / "diffusion_pytorch_model.safetensors")["conv_out.weight"]
        )
        assert header["modelspec.title"] == path.name and header["modelspec.resolution"] == "64x64"
        specified = ("sai_model_spec", "architecture", "implementation", "date", "prediction_type")
        assert {f"modelspec.{key}" for key in specified} <= set(header)
        settings = {
            name: json.loads(header[f"sd_dadapt.{name}"]) for name in ("train.json", "optimizer.json")
        }
        assert (
            settings["train.json"]["save_ckpts_from_n_epochs"] == 2
            and settings["optimizer.json"]["base"]["d0"] == 1e-6
        )
        checker = path / "safety_checker" / "model.safetensors"
        assert checker.read_bytes() == (base / "safety_checker" / "model.safetensors").read_bytes()
        assert checker.samefile(run / "base" / "safety_checker" / "model.safetensors"), (
            "it takes its room once"
        )

    shutil.rmtree(base)
    minutes = {"ckpt_every_n_minutes": 1e-9, "no_save_ckpt": True, "keep_last_n": 2, "no_prepend_last": True}
    write(workplace, DADAPT, model=str(found[1]), **minutes, fixed_loss_images=0, max_epochs=1)
    assert train.main(["--logdir", "minutes", "--resume_weights_only"]) == 0
    (run,) = (workplace / "minutes").glob("tiny-*")
    assert (run / "run.log").read_text().count(": saved ") == 3, "one after each step"
    assert sorted(path.name for path in (run / "ckpts").iterdir()) == [
        "tiny-ep01-gs00002",
        "tiny-ep01-gs00003",
    ]
    assert (checkpoints(run)[0] / "safety_checker" / "model.safetensors").is_file(), (
        "a model that came from a run has what its base had"
    )


@pytest.mark.parametrize(
    ("unet", "text_encoder"),
    [("lion", "prodigy"), ("dadapt_sgd", "lion8bit"), ("dadapt_lion", "dadapt_adam_reference")],
)
def test_every_other_optimizer_runs_and_continues_to_the_bit(workplace, unet, text_encoder):
    sections = {"base": {"optimizer": unet, "lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 1}}
    write(
        workplace,
        sections | {"text_encoder_overrides": {"optimizer": text_encoder}},
        **{
            "fixed_loss_images": 0,
            "save_every_n_epochs": None,
            "max_epochs": 1,
            "log_step": 1,
            "save_format": "diffusers",
        },
    )
    assert train.main(["--logdir", "whole"]) == 0
    assert train.main(["--stop_after_steps", "2"]) == 0
    assert train.main(["--resume_ckpt", "findlast"]) == 0
    whole, stopped = next((workplace / "whole").iterdir()), run_of(workplace)
    same_run(*(folder / "ckpts" / "last-tiny-ep01-gs00003" for folder in (whole, stopped)))
    found = scalars(stopped)
    assert {tag for tag in found if tag.startswith("optimizer/d_hat")} == {
        f"optimizer/d_hat {network}"
        for network, name in (("unet", unet), ("text encoder", text_encoder))
        if not name.startswith("lion")
    }
    rates = {network: found[f"lr/{network}"] for network in ("unet", "text encoder")}
    assert all(rate[1] == 0 and rate[3] > 0 for rate in rates.values())
    assert found["lr/unet"] == scalars(whole)["lr/unet"]


def test_fused_backward_on_bf16_weights_continues_to_the_bit(workplace):
    write(workplace, FUSED, weights_dtype="bf16", sample_prompts="prompts.json")
    assert train.main(["--logdir", "whole"]) == 0
    assert train.main(["--stop_after_steps", "5"]) == 0
    assert train.main(["--resume_ckpt", "findlast"]) == 0
    whole, stopped = next((workplace / "whole").iterdir()), run_of(workplace)
    same_run(*(folder / "ckpts" / "last-tiny-ep03-gs00009" for folder in (whole, stopped)))
    unet = load_file(checkpoints(stopped)[0] / "unet" / "diffusion_pytorch_model.safetensors")
    vae = load_file(checkpoints(stopped)[0] / "vae" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in unet.values()} == {torch.bfloat16} and {
        tensor.dtype for tensor in vae.values()
    } == {torch.float32}
    found = scalars(stopped)
    assert {
        "optimizer/decay so far unet",
        "optimizer/grad norm unet",
        "optimizer/grad norm text encoder",
    } <= set(found)
    assert max(found["optimizer/gradients not finite unet"].values()) == 0


def test_a_schedule_that_rests_at_zero_is_refused_and_a_long_warm_up_told(workplace, no_estimate, capsys):
    def base(**changes):
        return {"base": {**DADAPT["base"], "lr_scheduler": "linear", **changes}}

    for arguments in ([], ["--check"]):
        write(workplace, base(lr_warmup_steps=0, lr_decay_steps=5))
        assert train.main(arguments) == 2
        error = capsys.readouterr().err
        assert "optimizer.json: base: lr_scheduler linear holds lr at 0 from step 5 on, of 9 in all" in error
        assert not (workplace / "logs").exists()
    write(workplace, base(lr_warmup_steps=3))
    assert train.main(["--check"]) == 0
    assert "the warm-up of 3 steps is more than a tenth of the run's 9" in capsys.readouterr().out
    write(
        workplace,
        {"base": {"optimizer": "adamw", "lr_scheduler": "linear", "lr_warmup_steps": 0, "lr_decay_steps": 5}},
    )
    assert train.main(["--check"]) == 0
    assert "so nothing is learned from there" in capsys.readouterr().out


def test_d_that_stays_at_its_start_is_said(workplace, capsys, monkeypatch):
    monkeypatch.setattr("trainer.optim.watch.PATIENCE", 4)
    write(workplace, {"base": {**DADAPT["base"], "d0": 10.0, "lr": 1e-3}})
    assert train.main([]) == 0
    assert "d of the unet has not left d0 (10)" in capsys.readouterr().out


def test_zero_terminal_snr_is_trained_sampled_and_saved(workplace, capsys):
    """The checkpoint alone says how it was trained, to this program and to diffusers."""
    folder = write_tiny_folder(workplace / "velocity")
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    (folder / "scheduler" / "scheduler_config.json").write_text(
        json.dumps({**scheduler, "prediction_type": "v_prediction"})
    )
    write(
        workplace,
        ADAMW,
        model="velocity",
        enable_zero_terminal_snr=True,
        pyramid_noise_discount=0.3,
        embedding_perturbation=0.5,
        max_epochs=1,
    )
    assert train.main([]) == 0
    assert "could not be drawn" not in capsys.readouterr().err
    [checkpoint] = checkpoints(run_of(workplace))
    saved = json.loads((checkpoint / "scheduler" / "scheduler_config.json").read_text())
    assert (saved["rescale_betas_zero_snr"], saved["timestep_spacing"], saved["prediction_type"]) == (
        True,
        "trailing",
        "v_prediction",
    )
    pipeline = StableDiffusionPipeline.from_pretrained(checkpoint)
    pipeline.scheduler.set_timesteps(3)
    assert pipeline.scheduler.alphas_cumprod[-1] == 0 and pipeline.scheduler.timesteps[0] == 999

    single = next((checkpoint.parent).glob("*.safetensors"))
    for source in (checkpoint, single):
        models = load_models(ModelOptions(resume_ckpt=str(source)))
        assert NoiseSchedule(models.scheduler_config).snr(torch.tensor([999])) == 0, (
            "the switch is not needed again"
        )


def test_a_run_from_a_single_file_of_sd2_ends_in_one(workplace):
    """The file that it writes holds what its folder holds, in SD 2.x's own names, and goes on as velocity."""
    save_single_file(tiny_models(0, "sd2"), workplace / "v2.safetensors", torch.float32)
    write(
        workplace, ADAMW, model="v2.safetensors", max_epochs=1, save_full_precision=True, first_samples=False
    )
    assert train.main([]) == 0
    [checkpoint] = checkpoints(run_of(workplace))
    single = checkpoint.parent / f"{checkpoint.name}.safetensors"
    with safe_open(single, "pt") as file:
        header, names = file.metadata(), set(file.keys())
    assert (header["modelspec.architecture"], header["modelspec.prediction_type"]) == (
        "stable-diffusion-v2-768-v",
        "v",
    )
    assert "cond_stage_model.model.transformer.resblocks.1.attn.in_proj_weight" in names
    base, *made = (
        load_models(ModelOptions(resume_ckpt=str(path))) for path in ("v2.safetensors", checkpoint, single)
    )
    for network in NETWORKS:
        before, folder, file = (getattr(models, network).state_dict() for models in (base, *made))
        assert all(torch.equal(tensor, file[name]) for name, tensor in folder.items())
        assert all(torch.equal(tensor, before[name]) for name, tensor in folder.items()) == (
            network == "vae"
        ), "both others were trained"
    assert {models.scheduler_config["prediction_type"] for models in made} == {"v_prediction"}
    assert [models.tokenizer.pad_token for models in made] == ["!", "!"]


def test_zero_terminal_snr_of_an_epsilon_model_is_refused_before_it_loads(workplace, capsys, monkeypatch):
    monkeypatch.setattr(
        "trainer.models.load.load_models", lambda options: pytest.fail("the weights were loaded")
    )
    for command in ([], ["--check"]):
        assert train.main(["--enable_zero_terminal_snr", *command]) == 2
        assert "predicts epsilon, the noise" in capsys.readouterr().err
    assert not (workplace / "logs").exists()


def test_frozen_layers_keep_their_weights_and_no_gradient(workplace, model):
    write(workplace, DADAPT | {"base": DADAPT["base"] | {"lr": 1.0}}, max_epochs=2)
    assert train.main([]) == 0
    before = load_file(model / "text_encoder" / "model.safetensors")
    after = load_file(checkpoints(run_of(workplace))[0] / "text_encoder" / "model.safetensors")
    prefix = "" if set(before) == set(after) else "text_model."
    changed = {
        name
        for name, tensor in before.items()
        if not torch.equal(tensor, after[name if name in after else prefix + name])
    }
    frozen = {name for name in before if "embeddings" in name or ".layers.0." in name or ".layers.1." in name}
    assert frozen and not frozen & changed
    assert {name for name in before if ".layers.2." in name or "final_layer_norm" in name} <= changed


def test_check_prints_the_plan_without_loading_weights(workplace, model, capsys, monkeypatch):
    monkeypatch.setattr("trainer.models.tensor_file.TensorFile.__getitem__", None)  # headers only
    assert train.main(["--check", "--resume_ckpt", str(model)]) == 0
    out = capsys.readouterr().out
    for text in (
        "images: 5 in",
        "9 = 3 epochs of 3",
        "layers 3-4 of 4",
        "dadapt_adam, lr 0.1 x the d it finds",
        "fp32 on cpu",
        "logs",
    ):
        assert text in out, text
    for text in (
        r"a checkpoint .* MiB: .* the folder .*; training waits \d",
        r"disk .* MiB for 2 of them, of .* GiB that are free\n",
    ):
        assert re.search(text, re.sub(r"\n {13}", " ", out)), text
    assert not (workplace / "logs").exists(), "a check leaves nothing behind"


def test_unusable_images_are_named_once_and_counted_at_the_end(workplace, capsys):
    good = (workplace / "pictures" / "3.png").read_bytes()
    (workplace / "pictures" / "3.png").write_bytes(good[: len(good) // 2])
    (workplace / "pictures" / "4.png").write_bytes(b"")
    assert train.main([]) == 0
    out = capsys.readouterr().out
    assert out.count("3.png: it is damaged") == 1 and out.count("4.png: it is empty (0 bytes)") == 1
    assert "9 images in" in out and "Skipped 2 unreadable files: 4.png, 3.png." in out


def test_an_image_that_is_damaged_later_is_named_and_counted(workplace, capsys):
    assert train.main(["--stop_after_steps", "3", "--cache_latents", "no", "--fixed_loss_images", "0"]) == 0
    capsys.readouterr()
    Image.new("RGB", (70, 80)).save(workplace / "pictures" / "3.png")  # the scan sees the same size
    content = (workplace / "pictures" / "3.png").read_bytes()
    (workplace / "pictures" / "3.png").write_bytes(content[:60])
    assert train.main(["--resume_ckpt", "findlast", "--cache_latents", "no", "--fixed_loss_images", "0"]) == 0
    out = capsys.readouterr().out
    assert out.count("3.png: it is damaged") == 1 and "Skipped 1 unreadable file: 3.png." in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--resume_ckpt", "no/such/folder"], ["resume_ckpt", "no/such/folder"]),
        (["--resume_ckpt", "pictures"], ["pictures", "model_index.json"]),
        (["--data_root", "empty"], ["empty", "no image"]),
        (["--data_root", "nowhere"], ["data_root", "nowhere", "not found"]),
        (["--resolution", "100"], ["resolution", "multiple of 64"]),
        (["--logdir", "train.json"], ["logdir", "not a folder"]),
        (["--gpuid", "9"] if torch.cuda.is_available() else ["--mixed_precision", "fp16"], ["CUDA"]),
    ],
)
def test_what_cannot_run_is_said_in_a_sentence_and_leaves_nothing(workplace, capsys, arguments, words):
    (workplace / "empty").mkdir()
    assert train.main(arguments) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    for word in words:
        assert word in error, error
    assert not (workplace / "logs").exists()


def test_missing_bitsandbytes_is_said_in_a_sentence(workplace, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    monkeypatch.delitem(sys.modules, "trainer.optim.strided", raising=False)
    write(workplace, ADAMW8BIT)
    assert train.main([]) == 2
    error = capsys.readouterr().err
    assert "pip install bitsandbytes" in error and not (workplace / "logs").exists()


def test_a_batch_larger_than_the_data_is_a_note(workplace, capsys):
    write(workplace, DADAPT, batch_size=16, max_epochs=1)
    assert train.main([]) == 0
    assert "batch_size 16 is larger than the number of images, 5" in capsys.readouterr().out


def test_every_image_counts_the_same_also_in_a_short_step(workplace, monkeypatch):
    from trainer.diffusion.objective import Objective

    real, weights = Objective.losses, []

    def losses(self, networks, inputs, autocast):
        loss_B = real(self, networks, inputs, autocast)
        if loss_B.requires_grad:
            loss_B.register_hook(lambda gradient: weights.append(gradient.tolist()))
        return loss_B

    monkeypatch.setattr(Objective, "losses", losses)
    write(workplace, DADAPT, batch_size=4, max_epochs=1, fixed_loss_images=0, first_samples=False, flip_p=0.0)
    assert train.main([]) == 0
    assert sorted(map(len, weights)) == [1, 4]
    assert {weight for step in weights for weight in step} == {0.25}


def test_auto_draws_samples_ten_times_whatever_the_length(workplace, no_estimate, capsys):
    write(workplace, DADAPT, sample_steps="auto")
    assert train.main(["--check", "--max_epochs", "13"]) == 0
    assert "every 4 steps, 11 times in all: prompts.json" in capsys.readouterr().out
    assert train.main(["--stop_after_steps", "3", "--max_epochs", "7", "--batch_size", "3"]) == 0
    assert sorted(path.name for path in (run_of(workplace) / "samples").iterdir()) == [
        "gs00000.png",
        "gs00001.png",
        "gs00002.png",
        "gs00003.png",
    ]
