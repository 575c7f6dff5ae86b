"""LoRA runs: files load elsewhere and sample the same, resumed to the bit, and the model is unchanged."""

import json
import shutil
from contextlib import nullcontext
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from PIL import Image

import train
from data.dataset import Images
from data.index import build_index
from data.options import DataOptions
from tests.runs import ADAMW, DADAPT, FUSED, run_of, scalars, write
from tests.tiny import tiny_models, write_parts_beside, write_tiny_folder
from trainer.checkpoints.base import read_base
from trainer.checkpoints.listing import checkpoints, single_files
from trainer.diffusion.conditioning import Tokenize
from trainer.diffusion.objective import Networks, make_objective
from trainer.diffusion.options import ObjectiveOptions
from trainer.errors import UserError
from trainer.evaluation.fixed_noise import FixedLoss
from trainer.models.load import load_models
from trainer.models.lora import LORA_FILE, begin, named, read_adapter
from trainer.models.options import FreezingOptions, LoraOptions, ModelOptions, TrainableOptions
from trainer.models.tensor_file import TensorFile
from trainer.models.trainable import apply_freezing
from trainer.state_file import read_state

ALL = {"rank": 3, "alpha": 1.5, "targets": "all"}
DORA = {"lora": ALL | {"dora": True}, "save_format": "diffusers"}
SHORT = {"max_epochs": 2, "fixed_loss_images": 0, "save_every_n_epochs": None, "sample_steps": 100}
QUICK = {"base": {"optimizer": "adamw", "lr": 1e-2}, "text_encoder_freezing": {"freeze_front_n_layers": 2}}


def adapted(models, lora, *, seed=1, values=None, freezing=None, **options):
    parts = apply_freezing(
        models, TrainableOptions(lora=LoraOptions(**lora), **options), FreezingOptions(**(freezing or {}))
    )
    begin(parts, seed, values)
    return parts


def pipeline(models_folder) -> Any:
    pipe = StableDiffusionPipeline.from_pretrained(models_folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(pipe):
    generator = torch.Generator().manual_seed(0)
    image: Any = pipe(
        "a red circle", num_inference_steps=2, generator=generator, height=64, width=64, output_type="pt"
    ).images
    return image


def trained_pipeline(base, checkpoint, lora, **options):
    """Return a pipeline with the networks as they were trained, put together by this program's own reader."""
    models = load_models(ModelOptions(resume_ckpt=str(base)))
    parts = adapted(models, lora, **options)
    begin(parts, 0, read_adapter(checkpoint, parts, LoraOptions(**lora)))
    pipe = pipeline(base)
    pipe.unet, pipe.text_encoder = models.unet.eval(), models.text_encoder.eval()
    return pipe


@pytest.mark.parametrize(
    ("shape", "lora"),
    [pytest.param("sd15", ALL, marks=pytest.mark.slow), ("small", ALL), ("mini", {"rank": 4})],
    ids=["sd15", "all", "attention"],
)
def test_both_files_load_in_diffusers_and_draw_what_was_trained(workplace, tmp_path, shape, lora):
    base = write_tiny_folder(tmp_path / "base", shape=shape)
    write(workplace, QUICK, **SHORT | {"max_epochs": 1}, model=str(base), lora=lora, save_full_precision=True)
    assert train.main([]) == 0
    run = run_of(workplace)
    [checkpoint] = checkpoints(run)
    [single] = single_files(run / "ckpts", run.name)
    assert single.name == "last-tiny-ep01-gs00003-lora.safetensors"
    files = sorted(path.name for path in checkpoint.iterdir())
    assert files == ["README.md", "base.json", "manifest.json", LORA_FILE, "resume", "samples.png"], (
        "no model is written"
    )
    before = picture(pipeline(base))
    expected = picture(trained_pipeline(base, checkpoint, lora, freezing={"freeze_front_n_layers": 2}))
    assert (expected - before).abs().max() > 1e-3, "the LoRA does something"
    for source in ((checkpoint, {}), (single.parent, {"weight_name": single.name})):
        pipe = pipeline(base)
        pipe.load_lora_weights(source[0], **source[1])
        assert (picture(pipe) - expected).abs().max() < 1e-5, source
    header = TensorFile(single).metadata
    assert (header["ss_network_dim"], header["ss_network_alpha"]) == (
        str(lora["rank"]),
        str(float(lora.get("alpha", lora["rank"]))),
    )
    assert (
        header["ss_sd_model_name"] == "base"
        and header["modelspec.architecture"] == "stable-diffusion-v1/lora"
    )
    assert str(tmp_path) not in json.dumps([header, TensorFile(checkpoint / LORA_FILE).metadata])


def test_a_doras_folder_loads_in_diffusers_and_draws_what_was_trained(workplace, tmp_path, capsys):
    base = write_tiny_folder(tmp_path / "base", shape="small")
    write(workplace, QUICK, **SHORT | {"max_epochs": 1} | DORA, model=str(base))
    assert train.main([]) == 0
    run = run_of(workplace)
    [checkpoint] = checkpoints(run)
    assert f"load ckpts/{checkpoint.name} by load_lora_weights of diffusers" in capsys.readouterr().out
    assert not single_files(run / "ckpts", run.name)
    magnitudes = [
        (name, tensor) for name, tensor in TensorFile(checkpoint / LORA_FILE).items() if "magnitude" in name
    ]
    new = named(adapted(load_models(ModelOptions(resume_ckpt=str(base))), DORA["lora"]))
    moved = [not torch.equal(tensor, new[name.replace(".text_model.", ".")]) for name, tensor in magnitudes]
    assert len(moved) > 50 and all(moved)
    expected = picture(
        trained_pipeline(base, checkpoint, DORA["lora"], freezing={"freeze_front_n_layers": 2})
    )
    pipe = pipeline(base)
    assert (expected - picture(pipe)).abs().max() > 1e-3, "the DoRA does something"
    pipe.load_lora_weights(checkpoint)
    assert (picture(pipe) - expected).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("shape", "rank"), [("small", 3), ("sd2", 3), ("small", None)], ids=["lora", "sd2 lora", "model"]
)
def test_every_header_field_of_a_single_file(workplace, tmp_path, shape, rank):
    base = write_tiny_folder(tmp_path / "base", shape=shape)
    lora = {"lora": {"rank": rank, "alpha": 1.5}} if rank else {}
    settings = {"max_epochs": 1, "ema_decay_rate": 0.5, "ema_update_interval": 1, "save_format": "single"}
    write(workplace, QUICK, **SHORT | settings, **lora, model=str(base))
    assert train.main([]) == 0
    run = run_of(workplace)
    prediction, kind, version = (
        ("v", "stable-diffusion-v2-768-v", "sd_v2_v")
        if shape == "sd2"
        else ("epsilon", "stable-diffusion-v1", "sd_v1")
    )
    stem = "last-tiny-ep01-gs00003" + ("-lora" if rank else "")
    for ema in (False, True):
        [single] = single_files(run / "ckpts", run.name, ema=ema)
        name = stem + ("-ema" if ema else "")
        header = TensorFile(single).metadata
        assert single.stem == name
        assert abs(datetime.fromisoformat(header.pop("modelspec.date")) - datetime.now(UTC)) < timedelta(
            minutes=10
        )
        for file, key in (("train.json", "seed"), ("optimizer.json", "base")):
            assert (
                json.loads(header.pop(f"sd_dadapt.{file}"))[key] == json.loads((run / file).read_text())[key]
            )
        own: dict[str, str] = {
            "ss_base_model_version": version,
            "ss_network_module": "networks.lora",
            "ss_network_dim": "3",
            "ss_network_alpha": "1.5",
            "ss_output_name": name,
            "ss_sd_model_name": "base",
            "ss_v2": str(shape == "sd2"),
        }
        if not rank:
            own = {}
            assert set(json.loads(header.pop("sd_dadapt.configs"))) == {
                "unet",
                "vae",
                "text_encoder",
                "scheduler",
            }
            assert "vocab" in header.pop("sd_dadapt.tokenizer")
        assert header == own | {
            "format": "pt",
            "modelspec.sai_model_spec": "1.0.0",
            "modelspec.architecture": kind + ("/lora" if rank else ""),
            "modelspec.implementation": "https://github.com/CompVis/stable-diffusion",
            "modelspec.title": name,
            "modelspec.resolution": "64x64",
            "modelspec.prediction_type": prediction,
            "sd_dadapt.run": run.name,
            "sd_dadapt.step": "3",
            "sd_dadapt.kind": "last",
            **({"sd_dadapt.ema": "true"} if ema else {}),
        }


def test_kohyas_names(workplace):
    write(workplace, DADAPT, **SHORT, lora={"rank": 2, "targets": "all"}, stop_after_steps=1)
    assert train.main([]) == 0
    run = run_of(workplace)
    shapes = TensorFile(single_files(run / "ckpts", run.name)[0]).shapes
    for layer in (
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0",
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_ff_net_0_proj",
        "lora_unet_mid_block_resnets_1_conv2",
        "lora_unet_up_blocks_0_upsamplers_0_conv",
        "lora_te_text_model_encoder_layers_3_self_attn_q_proj",
        "lora_te_text_model_encoder_layers_2_mlp_fc1",
    ):
        assert (
            shapes[f"{layer}.lora_down.weight"][0] == 2 == shapes[f"{layer}.lora_up.weight"][1]
            and shapes[f"{layer}.alpha"] == ()
        )
    assert not any("layers_1_" in name or "conv_in" in name or "time_embedding" in name for name in shapes)
    assert len(shapes) % 3 == 0


@pytest.mark.parametrize(
    ("optimizer", "settings"),
    [
        (DADAPT, {"ema_decay_rate": 0.5, "ema_update_interval": 1}),
        (
            FUSED,
            {
                "max_epochs": 1,
                "channels_last": True,
                "weights_dtype": "bf16",
                "gradient_checkpointing": True,
                "lora": {"rank": 2, "dropout": 0.3},
            },
        ),
        (
            ADAMW,
            {"grad_accum": 2, "batch_size": 1, "save_format": "single", "disable_textenc_training": True},
        ),
        (DADAPT, DORA | {"channels_last": True, "stop_textenc_after_n_epochs": 1}),
    ],
    ids=["ema", "bf16 base", "single", "dora"],
)
def test_a_stopped_run_goes_on_to_the_bit(workplace, optimizer, settings, model):
    frozen = {path: path.read_bytes() for path in model.rglob("*.safetensors")}
    write(workplace, optimizer, **SHORT | {"lora": ALL} | settings)
    assert train.main(["--logdir", "whole"]) == 0
    assert train.main(["--stop_after_steps", "2"]) == 0
    assert train.main(["--resume_ckpt", "findlast"]) == 0
    whole, stopped = next((workplace / "whole").iterdir()), run_of(workplace)
    left, right = checkpoints(whole)[0], checkpoints(stopped)[0]
    assert left.name == right.name
    assert (left / LORA_FILE).read_bytes() == (right / LORA_FILE).read_bytes()
    assert (left / "resume/training.safetensors").read_bytes() == (
        right / "resume/training.safetensors"
    ).read_bytes()
    assert scalars(whole)["loss/log_step"] == scalars(stopped)["loss/log_step"]
    assert frozen == {path: path.read_bytes() for path in model.rglob("*.safetensors")}
    if "ema_decay_rate" in settings:
        averages = read_state(right / "resume" / "training")["ema"]["unet"]["averages"]
        ema = TensorFile(single_files(stopped / "ckpts", stopped.name, ema=True)[0])
        assert ema.path.name.endswith("-lora-ema.safetensors")
        first = next(tensor for tensor in averages if tensor.any())
        assert any(
            tensor.shape == first.shape and torch.equal(tensor, first.half()) for tensor in ema.values()
        )


def test_dropout_acts_in_training_and_is_drawn_by_the_place_in_the_run(workplace):
    losses = {}
    for name, dropout in (("none", 0.0), ("some", 0.5), ("again", 0.5)):
        settings = SHORT | {"log_step": 1, "fixed_loss_images": 2, "lora": {"rank": 4, "dropout": dropout}}
        write(workplace, {"base": {"optimizer": "adamw", "lr": 1e-2}}, **settings)
        assert train.main(["--logdir", name]) == 0
        torch.rand(1)  # nothing hangs on what the global generator drew before
        losses[name] = scalars(next((workplace / name).iterdir()))["loss/log_step"]
    assert losses["some"] == losses["again"]
    assert losses["some"][1] == losses["none"][1], "new adapters add nothing"
    assert all(losses["some"][step] != losses["none"][step] for step in (3, 4, 5, 6))


def test_measurements_drop_nothing(workplace):
    Image.effect_noise((70, 80), 40).convert("RGB").save(workplace / "pictures/0.png")
    data = DataOptions(data_root="pictures", resolution=64)
    found = []
    for dropout in (0.0, 0.5):
        models = tiny_models()
        parts = adapted(models, {"rank": 4, "dropout": dropout})
        with torch.no_grad():
            for parameter in named(parts).values():
                parameter.fill_(0.02)
        objective = make_objective(ObjectiveOptions(), models, seed=1, train_text_encoder=True)
        images = Images(build_index(data), data, tokenize=Tokenize(models.tokenizer), seed=1)
        networks = Networks(models.unet, models.text_encoder, models.vae)
        loss = FixedLoss(images.plain([0, 1]), objective)
        found += [loss.measure(networks, nullcontext, torch.device("cpu")) for _ in range(2)]
        assert models.unet.training and models.text_encoder.training, "as before"
    assert len(set(found)) == 1


def test_what_does_not_fit_a_lora_is_refused(workplace, capsys, tmp_path):
    write(workplace, DADAPT, **SHORT, lora={"rank": 2})
    assert train.main(["--stop_after_steps", "1"]) == 0
    [checkpoint] = checkpoints(run_of(workplace))
    for more, sentence in (
        (
            ["--lora", '{"rank": 3}'],
            "what learns of the unet was a LoRA of rank 2 and alpha 2 on 32 attention layers, "
            "and is a LoRA of rank 3",
        ),
        (["--lora", "null"], "and is everything now"),
        (
            ["--lora", '{"rank": 3}', "--resume_weights_only"],
            "holds a LoRA of other layers or of another rank",
        ),
        (
            ["--lora", '{"rank": 2, "alpha": 1}', "--resume_weights_only"],
            "holds a LoRA of alpha 2.0, and lora.alpha is 1 now",
        ),
        (
            ["--lora", '{"rank": 2, "dora": true}', "--no_save_ckpt"],
            "was a LoRA of rank 2 and alpha 2 on 32 attention layers, and is a DoRA of rank 2",
        ),
        (["--lora", "null", "--resume_weights_only"], "holds a LoRA, and lora is null"),
    ):
        for action in ([], ["--check"]):
            assert train.main(["--resume_ckpt", str(checkpoint), *more, *action]) == 2
            assert sentence in capsys.readouterr().err, (more, action)
    assert train.main(["--resume_ckpt", str(checkpoint), "--resume_weights_only"]) == 0

    base = json.loads((checkpoint / "base.json").read_text())
    other = write_tiny_folder(tmp_path / "other", seed=5)
    (checkpoint / "base.json").write_text(json.dumps({**base, "model": str(other)}))
    assert train.main(["--resume_ckpt", str(checkpoint), "--resume_weights_only"]) == 2
    assert f"was trained on other weights than {other} holds now" in capsys.readouterr().err


def test_the_base_is_published_by_name_and_found_by_its_path(workplace, model, no_estimate, capsys, tmp_path):
    write(workplace, DADAPT, **SHORT, lora={"rank": 2})
    assert train.main(["--stop_after_steps", "1"]) == 0
    run = run_of(workplace)
    [checkpoint] = checkpoints(run)
    published = json.loads((checkpoint / "base.json").read_text())
    assert published["model"] == model.name and set(published) == {"model", "fingerprint", "revision"}

    def starts(*words):
        return train.main(["--check", "--resume_ckpt", *map(str, words)])

    def base_of(folder):
        base = read_base(folder)
        return base and base.model

    def found():
        return base_of(checkpoint), base_of(checkpoint / "ema")

    moved = shutil.copytree(checkpoint, tmp_path / "moved")
    assert base_of(moved) == str(model) and starts(moved) == 0
    shutil.copytree(checkpoint, checkpoint / "ema", ignore=shutil.ignore_patterns("resume"))
    assert found() == (str(model),) * 2
    shutil.rmtree(checkpoint / "resume")  # as of older checkpoints of a run
    assert found() == (str(model),) * 2 and starts(checkpoint, "--resume_weights_only") == 0
    record = json.loads((run / "base.json").read_text())
    (run / "base.json").write_text(json.dumps({**record, "fingerprint": "of another model"}))
    with pytest.raises(UserError, match="its base, model, is not found"):
        read_base(checkpoint)

    lone = shutil.copytree(checkpoint, tmp_path / "lone")  # as from the hub
    weights_only = ["--resume_ckpt", str(lone), "--resume_weights_only", "--stop_after_steps", "1"]
    assert train.main(weights_only) == 0
    assert json.loads((run_of(workplace) / "base.json").read_text())["model"] == str(model)
    other = write_tiny_folder(tmp_path / "other", seed=5)
    write(workplace, DADAPT, **SHORT, lora={"rank": 2}, model=str(other))
    capsys.readouterr()
    assert train.main(weights_only) == 2
    assert f"other weights than {other} holds now; put {model.name} back" in capsys.readouterr().err
    write(workplace, DADAPT, **SHORT, lora={"rank": 2}, model=str(lone))
    assert train.main(["--resume_weights_only"]) == 2
    said = capsys.readouterr().err
    assert f"{lone} is a LoRA, and its base, {model.name}, is not found on this machine" in said
    (lone / "base.json").write_text(json.dumps({**published, "model": str(model)}))  # of earlier versions
    assert base_of(lone) == str(model)


@pytest.mark.parametrize("lora", [None, {"rank": 2}], ids=["model", "lora"])
def test_no_published_file_names_a_folder_of_this_machine(workplace, tmp_path, lora, drawn_curves):
    base = write_tiny_folder(tmp_path / "base")
    write_parts_beside(base)
    settings = {"ema_decay_rate": 0.5, "ema_update_interval": 1, "save_ckpt_dir": str(tmp_path / "singles")}
    write(workplace, QUICK, **SHORT | settings, lora=lora, model=str(base), vae=str(base / "vae"))
    for more in ([], ["--save_format", "diffusers"]):
        assert train.main(["--stop_after_steps", "1", *more]) == 0
    published = [path for path in (tmp_path / "singles").iterdir() if path.is_file()]
    for checkpoint in (checkpoints(run_of(workplace, number))[0] for number in (0, 1)):
        published += [
            path
            for path in checkpoint.rglob("*")
            if path.is_file() and "resume" not in path.relative_to(checkpoint).parts
        ]
    assert {"README.md", "manifest.json", "samples.png"} < {path.name for path in published}
    assert len([path for path in published if path.suffix == ".safetensors"]) == (5 if lora else 14)
    for path in published:
        assert str(tmp_path).encode() not in path.read_bytes(), path


@pytest.mark.parametrize("dora", [False, True])
def test_a_new_lora_changes_no_bit_and_depends_on_the_seed_and_the_layer_alone(dora):
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([3, 500]), torch.randn(2, 77, 16)
    plain, models = tiny_models(), tiny_models()
    state = torch.random.get_rng_state()
    attention = named(adapted(models, {"rank": 2, "dora": dora}))
    assert torch.equal(torch.random.get_rng_state(), state), "nothing is drawn from the global generator"
    with torch.no_grad():
        assert torch.equal(models.unet(*inputs).sample, plain.unet(*inputs).sample)
    everything = named(adapted(tiny_models(), {"rank": 2, "targets": "all", "dora": dora}))
    other = named(adapted(tiny_models(), {"rank": 2, "dora": dora}, seed=2))
    assert attention.keys() < everything.keys() and attention.keys() == other.keys()
    for name, matrix in attention.items():
        assert torch.equal(matrix, everything[name])
        if ".lora_A." in name:
            assert not torch.equal(matrix, other[name])
        else:
            assert matrix.any() == ("magnitude" in name)
    drawn = [matrix * matrix[0].numel() ** 0.5 for name, matrix in everything.items() if ".lora_A." in name]
    spread = torch.cat([matrix.flatten() for matrix in drawn])
    assert spread.abs().max() <= 1 and spread.std().item() == pytest.approx(3**-0.5, rel=0.02), (
        "uniform in +-1/sqrt(fan in)"
    )


@pytest.mark.parametrize(("unet", "dora"), [(True, False), (False, False), (True, True)])
def test_gradient_checkpointing_gives_the_same_gradients(unet, dora):
    tokens, latents, times = torch.randint(0, 100, (2, 77)), torch.randn(2, 4, 8, 8), torch.tensor([3, 500])
    found = []
    for checkpointing in (False, True):
        models = tiny_models()
        parts = adapted(
            models,
            {"rank": 2, "targets": "all", "dora": dora},
            gradient_checkpointing=checkpointing,
            disable_unet_training=not unet,
        )
        assert ("unet" in parts.parameters) == unet
        with torch.no_grad():
            for name, matrix in named(parts).items():
                if ".lora_B." in name:  # not constant: a group norm's gradient sums to 0 over its channels
                    matrix += torch.linspace(0.05, 0.15, matrix.numel()).view_as(matrix)
        context = models.text_encoder(tokens).last_hidden_state
        models.unet(latents, times, context).sample.square().mean().backward()
        found.append({name: matrix.grad for name, matrix in named(parts).items()})
        assert all(grad is not None and grad.any() for grad in found[-1].values())
    assert all(torch.allclose(grad, found[1][name], rtol=1e-4, atol=1e-7) for name, grad in found[0].items())
