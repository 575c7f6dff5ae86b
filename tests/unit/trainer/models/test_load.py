"""Loading: every form of a model gives the same fp32 weights; everything else is named."""

import errno
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

from scripts.convert_checkpoint import convert
from tests.tiny import tiny_models, tiny_tokenizer, write_tiny_folder
from trainer.checkpoints.export import save_diffusers, save_single_file
from trainer.errors import UserError
from trainer.models import checkpoint_file, family, sd15, tensor_file
from trainer.models.checkpoint_file import CONFIGS, TOKENIZER
from trainer.models.family import SD1, SD2, Configs
from trainer.models.folder import choose_weights
from trainer.models.load import describe, load_models
from trainer.models.networks import EMPTY
from trainer.models.options import ModelOptions
from trainer.models.single_file import NETWORKS, to_original
from trainer.models.tensor_file import TensorFile, write_tensors

UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    return write_tiny_folder(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def folder(written, tmp_path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(written, tmp_path / "model"))


def load(path, vae=None):
    return load_models(ModelOptions(resume_ckpt=str(path), vae=None if vae is None else str(vae)))


def refused(path, vae=None):
    """Return the sentence that both loading and describing answer with, which must be the same one."""
    options = ModelOptions(resume_ckpt=str(path), vae=None if vae is None else str(vae))
    sentences = []
    for read in (load_models, describe):
        with pytest.raises(UserError) as caught:
            read(options)
        assert len(caught.value.problems) == 1
        sentences.append(str(caught.value))
    assert sentences[0] == sentences[1]
    return sentences[0]


def assert_same(models, reference, networks=NETWORKS, through=torch.float32):
    """Compare weights exactly, after a round trip of the reference through the precision on disk."""
    for network in networks:
        own, expected = getattr(models, network).state_dict(), getattr(reference, network).state_dict()
        assert set(own) == set(expected)
        for name, tensor in expected.items():
            assert own[name].dtype == torch.float32 and not own[name].is_meta
            assert torch.equal(own[name], tensor.to(through).float()), name


# Diffusers folders


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_a_folder_loads_in_fp32_whatever_it_holds(dtype, variant, tmp_path):
    folder = write_tiny_folder(tmp_path, dtype=dtype, variant=variant)
    models = load(folder)
    assert_same(models, tiny_models(), through=dtype)
    assert models.tokenizer("a red circle").input_ids == tiny_tokenizer()("a red circle").input_ids
    assert (
        models.scheduler_config["beta_end"] == 0.012
        and models.scheduler_config["prediction_type"] == "epsilon"
    )
    assert models.source == str(folder)


def test_a_checkpoint_folder_of_this_program_is_a_model(folder):
    (folder / "manifest.json").write_text("{}")
    (folder / "resume").mkdir()
    (folder / "resume" / "state.json").write_text("{}")
    assert_same(load(folder), tiny_models())


def test_a_folder_as_it_was_published_years_ago_loads(folder):
    """SD 1.5's own: .bin files, prefixed text encoder, position ids, old VAE names, two tokenizer files."""
    from trainer.models.tokenizer import write_tokenizer

    text = safetensors.torch.load_file(folder / TEXT)
    text = {"text_model." + name.removeprefix("text_model."): tensor for name, tensor in text.items()}
    text["text_model.embeddings.position_ids"] = torch.arange(77).unsqueeze(0)
    torch.save(text, folder / "text_encoder" / "pytorch_model.bin")
    (folder / TEXT).unlink()
    vae = safetensors.torch.load_file(folder / VAE)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for new, before in old.items():
        vae = {
            name.replace(f"attentions.0.{new}.", f"attentions.0.{before}."): tensor
            for name, tensor in vae.items()
        }
    assert "encoder.mid_block.attentions.0.query.weight" in vae
    safetensors.torch.save_file(vae, folder / VAE)
    write_tokenizer(tiny_tokenizer(), folder / "tokenizer")
    (folder / "tokenizer" / "tokenizer.json").unlink()
    models = load(folder)
    assert_same(models, tiny_models())
    assert models.tokenizer("a red circle").input_ids == tiny_tokenizer()("a red circle").input_ids


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (
            ["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"],
            ["diffusion_pytorch_model.safetensors"],
        ),
        (
            ["diffusion_pytorch_model.bin", "diffusion_pytorch_model.fp16.safetensors"],
            ["diffusion_pytorch_model.bin"],
        ),
        (
            ["diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors"],
            ["diffusion_pytorch_model.safetensors"],
        ),
        (
            ["diffusion_pytorch_model.non_ema.safetensors", "diffusion_pytorch_model.fp16.safetensors"],
            ["diffusion_pytorch_model.fp16.safetensors"],
        ),
        (
            [
                "diffusion_pytorch_model-00002-of-00002.safetensors",
                "diffusion_pytorch_model-00001-of-00002.safetensors",
                "config.json",
            ],
            [
                "diffusion_pytorch_model-00001-of-00002.safetensors",
                "diffusion_pytorch_model-00002-of-00002.safetensors",
            ],
        ),
        (["model.safetensors", "config.json"], None),
    ],
)
def test_the_best_weights_of_a_folder_are_taken(names, chosen):
    choice = choose_weights(names, "unet")
    assert (list(choice.files) if choice else None) == chosen


def spoil_json(path, **changes):
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **changes}))


def rebuild(folder, network, **changes):
    """Give a network another configuration, and weights that fit it."""
    spoil_json(folder / network / "config.json", **changes)
    empty = EMPTY[network](json.loads((folder / network / "config.json").read_text()))
    weights = {name: torch.zeros(tensor.shape) for name, tensor in empty.state_dict().items()}
    safetensors.torch.save_file(weights, folder / (TEXT if network == "text_encoder" else UNET))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (
            lambda f: (f / "model_index.json").unlink(),
            "is not a model: it holds no model_index.json; name a diffusers folder",
        ),
        (lambda f: (f / "model_index.json").write_text("{"), "model_index.json is not valid JSON"),
        (
            lambda f: spoil_json(f / "model_index.json", _class_name="StableDiffusionXLPipeline"),
            "is a StableDiffusionXLPipeline, which this",
        ),
        (
            lambda f: spoil_json(f / "model_index.json", vae=["diffusers", "AutoencoderTiny"]),
            "names AutoencoderTiny as vae",
        ),
        (
            lambda f: spoil_json(f / "model_index.json", text_encoder=[None, None]),
            "names nothing as text_encoder",
        ),
        (lambda f: spoil_json(f / "unet/config.json", _class_name="UNet2DModel"), "holds a UNet2DModel"),
        (lambda f: (f / "unet/config.json").unlink(), "config.json is missing or cannot be read"),
        (lambda f: (f / UNET).unlink(), "holds no weights (diffusion_pytorch_model.safetensors"),
        (lambda f: (f / "tokenizer/tokenizer.json").unlink(), "the tokenizer is missing"),
        (lambda f: (f / "scheduler/scheduler_config.json").unlink(), "scheduler_config.json is missing"),
        (lambda f: rebuild(f, "unet", in_channels=9), "takes 9 channels"),
        (lambda f: rebuild(f, "unet", cross_attention_dim=32), "16 wide and the UNet reads 32"),
        (lambda f: rebuild(f, "text_encoder", vocab_size=100), "has 547 entries and the text encoder 100"),
    ],
)
def test_a_folder_that_is_no_model_is_named_for_what_it_is(folder, spoil, said):
    spoil(folder)
    with pytest.raises(UserError) as caught:
        describe(ModelOptions(resume_ckpt=str(folder)))
    assert said in str(caught.value)
    assert str(folder) in str(caught.value)
    with pytest.raises(UserError):
        load(folder)


def test_folders_near_a_model_point_to_it(folder, tmp_path):
    assert refused(folder / "unet").endswith(
        "is one part of a model; name the folder above it, which holds model_index.json."
    )
    assert refused(tmp_path).endswith(f"name {folder}.")
    files = tmp_path / "files"
    files.mkdir()
    assert "is empty" in refused(files)
    (files / "anime.safetensors").write_bytes(b"")
    assert refused(files).endswith(f"name the file: {files / 'anime.safetensors'}.")


def test_weights_that_are_cut_short_missing_or_misshapen_are_refused(folder):
    content = (folder / UNET).read_bytes()
    (folder / UNET).write_bytes(content[: len(content) // 2])
    with pytest.raises(
        UserError,
        match=r"diffusion_pytorch_model.safetensors: the file is cut short: it holds 115,244 of 230,488",
    ):
        load(folder)
    weights = safetensors.torch.load(content)
    first = weights.pop("conv_in.bias")
    safetensors.torch.save_file(weights, folder / UNET)
    with pytest.raises(UserError, match=r"1 tensors are missing from the weights, conv_in.bias among them"):
        load(folder)
    safetensors.torch.save_file({**weights, "conv_in.bias": first[:3].clone()}, folder / UNET)
    with pytest.raises(UserError, match=r"the weights do not fit config.json"):
        load(folder)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("part", "old"), [(UNET, "diffusion_pytorch_model.bin"), (TEXT, "pytorch_model.bin")]
)
def test_older_weights_that_want_to_run_something_are_refused_and_nothing_runs(
    folder, capsys, part, old, zipped
):
    from tests.unit.trainer.models.test_tensor_file import Evil

    weights = safetensors.torch.load_file(folder / part)
    (folder / part).unlink()
    path = (folder / part).with_name(old)
    torch.save({**weights, "more": Evil()}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        UserError, match=r"asks for (builtins\.)?print, which weights have no use for.*nothing of it was run"
    ):
        load(folder)
    assert "ran" not in capsys.readouterr().out
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"cut short after 1,000 bytes|cannot be read as plain tensors"):
        load(folder)


def test_no_key_and_no_file_of_a_folder_makes_a_library_fetch_code_or_other_weights(
    folder, tmp_path, monkeypatch
):
    """Transformers would load kernels, quantizers, an adapter's base or another file by these."""
    monkeypatch.setattr("transformers.modeling_utils.PreTrainedModel.from_pretrained", None)
    monkeypatch.setattr("diffusers.models.modeling_utils.ModelMixin.from_pretrained", None)
    kernel = {"_attn_implementation": "kernels-community/x", "attn_implementation": "kernels-community/x"}
    other = {
        "transformers_weights": "../../x.safetensors",
        "auto_map": {"AutoModel": "x.Y"},
        "fusion_config": {"x": "y"},
    }
    for network in ("unet", "vae", "text_encoder"):
        spoil_json(folder / network / "config.json", **kernel, **other, _name_or_path="/elsewhere")
    (folder / "text_encoder" / "adapter_config.json").write_text(
        '{"base_model_name_or_path": "someone/elses", "peft_type": "LORA"}'
    )
    index = {"metadata": {}, "weight_map": {"x": "../../elsewhere.safetensors"}}
    (folder / "text_encoder" / "model.safetensors.index.json").write_text(json.dumps(index))
    models = load(folder)
    assert_same(models, tiny_models())
    assert models.text_encoder.config._attn_implementation in ("sdpa", "eager")
    save_single_file(models, tmp_path / "x.safetensors", torch.float32)
    file = TensorFile(tmp_path / "x.safetensors")
    configs = json.loads(file.metadata[CONFIGS])
    assert not {*kernel, *other} & {key for config in configs.values() for key in config}
    configs["text_encoder"] |= kernel
    write_tensors(
        tmp_path / "y.safetensors", file, torch.float32, {**file.metadata, CONFIGS: json.dumps(configs)}
    )
    assert_same(load(tmp_path / "y.safetensors"), tiny_models())


def test_quantized_weights_are_named_for_what_they_are(folder):
    """bitsandbytes keeps the shape and the name of a matrix in 8 bits."""
    weights = safetensors.torch.load_file(folder / UNET)
    weights["conv_in.weight"] = weights["conv_in.weight"].to(torch.int8)
    safetensors.torch.save_file(weights, folder / UNET)
    assert (
        "unet: the weights are quantized (conv_in.weight is torch.int8); name the model in fp16 or fp32."
        in refused(folder)
    )


def test_shards_load_as_one(folder):
    weights = safetensors.torch.load_file(folder / UNET)
    (folder / UNET).unlink()
    for number in (0, 1):
        part = dict(list(weights.items())[number::2])
        safetensors.torch.save_file(
            part, folder / "unet" / f"diffusion_pytorch_model-{number + 1:05}-of-00002.safetensors"
        )
    assert_same(load(folder), tiny_models())


def test_text_encoder_weights_that_are_missing_are_refused(folder):
    weights = safetensors.torch.load_file(folder / TEXT)
    name = next(name for name in weights if "layers.2.mlp.fc1.weight" in name)
    del weights[name]
    safetensors.torch.save_file(weights, folder / TEXT, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 tensors are missing from the weights, .*layers.2.mlp.fc1.weight"):
        load(folder)


# Single files


@pytest.fixture
def sd15_is_tiny(monkeypatch):
    """Let the built-in configurations be the tiny model's: a file without a header stands for SD 1.5's."""
    models = tiny_models()
    configs = Configs(
        unet=dict(models.unet.config),
        text_encoder=models.text_encoder.config.to_diff_dict(),
        vae=dict(models.vae.config),
        scheduler={**models.scheduler_config, "set_alpha_to_one": False},
    )
    kinds = {
        kind: replace(configs, scheduler={**configs.scheduler, "prediction_type": kind})
        for kind in SD1.configs
    }
    monkeypatch.setattr(family, "FAMILIES", (replace(SD1, configs=kinds), SD2))
    # the tiny text encoder has no room for CLIP's 49408 entries
    monkeypatch.setattr(checkpoint_file, "clip_tokenizer", lambda _: tiny_tokenizer())


@pytest.fixture(scope="module")
def second():
    return tiny_models(4, "sd2")


@pytest.fixture
def sd2_is_tiny(monkeypatch, second):
    """The same for SD 2.x; published 768 px configurations are recognised by their sample size."""
    configs = Configs(
        unet={**second.unet.config, "sample_size": 96},
        text_encoder=second.text_encoder.config.to_diff_dict(),
        vae={**second.vae.config, "sample_size": 768},
        scheduler=second.scheduler_config,
    )
    noise = replace(
        configs,
        unet={**configs.unet, "sample_size": 64},
        vae={**configs.vae, "sample_size": 512},
        scheduler=sd15.SCHEDULER,
    )
    tiny = replace(SD2, configs={"v_prediction": configs, "epsilon": noise})
    monkeypatch.setattr(family, "FAMILIES", (SD1, tiny))

    def tokenizer(pad):
        made = tiny_tokenizer()
        made.pad_token = pad
        return made

    monkeypatch.setattr(checkpoint_file, "clip_tokenizer", tokenizer)


@pytest.mark.parametrize("shape", ["small", "mini", "sd15", "sd2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_file_of_this_program_loads_alone(shape, dtype, tmp_path):
    reference = tiny_models(3, shape)
    save_single_file(reference, tmp_path / "x.safetensors", dtype)
    models = load(tmp_path / "x.safetensors")
    assert_same(models, reference, through=dtype)
    assert models.tokenizer("a red circle").input_ids == reference.tokenizer("a red circle").input_ids
    assert models.scheduler_config["_class_name"] == "PNDMScheduler"
    for network in NETWORKS:
        assert not getattr(models, network).training
    tokens = torch.randint(0, 500, (1, 77))
    with torch.no_grad():
        assert torch.equal(
            models.text_encoder(tokens).last_hidden_state,
            torch.nn.Module.to(reference.text_encoder.eval(), dtype).float()(tokens).last_hidden_state,
        )


@pytest.mark.parametrize(
    "form", ["safetensors", "ckpt", "with averages", "bare text prefix", "linear vae attention"]
)
def test_files_of_other_programs_load(form, sd15_is_tiny, tmp_path):
    reference = tiny_models(4)
    tensors = {name: tensor.contiguous() for name, tensor in to_original(reference).items()}
    path = tmp_path / ("x.ckpt" if form == "ckpt" else "x.safetensors")
    if form == "with averages":
        tensors |= {
            "model_ema.decay": torch.ones(1),
            "alphas_cumprod": torch.ones(1000),
            "cond_stage_model.logit_scale": torch.ones(1),
        }
    if form == "bare text prefix":
        tensors = {
            name.replace("transformer.text_model.", "transformer."): tensor
            for name, tensor in tensors.items()
        }
    if form == "linear vae attention":
        tensors = {
            name: t.reshape(t.shape[:2]) if ".attn_1." in name and t.ndim == 4 else t
            for name, t in tensors.items()
        }
    if form == "ckpt":
        torch.save({"state_dict": tensors, "global_step": 1}, path)
    else:
        safetensors.torch.save_file(tensors, path)
    models = load(path)
    assert_same(models, reference)
    assert models.scheduler_config["prediction_type"] == "epsilon"


def as_published(models):
    """Return a file's tensors with SD 2.x's unused ones: OpenCLIP's last layer, projection and scale."""
    tensors = {name: tensor.contiguous() for name, tensor in to_original(models).items()}
    layer = "cond_stage_model.model.transformer.resblocks."
    last = {
        name.replace(f"{layer}1.", f"{layer}2."): torch.ones_like(t)
        for name, t in tensors.items()
        if name.startswith(f"{layer}1.")
    }
    unused = {
        "cond_stage_model.model.text_projection": torch.ones(1024, 8),
        "cond_stage_model.model.logit_scale": torch.ones(()),
    }
    return {**tensors, **last, **unused, "alphas_cumprod": torch.ones(1000)}


@pytest.mark.parametrize(
    ("kind", "said", "predicts"),
    [
        ("safetensors", {}, None),
        ("safetensors", {"modelspec.prediction_type": "v"}, "v_prediction"),
        ("safetensors", {"modelspec.prediction_type": "epsilon"}, "epsilon"),
        ("safetensors", {"modelspec.architecture": "stable-diffusion-v2-768-v"}, "v_prediction"),
        ("safetensors", {"modelspec.architecture": "stable-diffusion-v2-512"}, "epsilon"),
        ("ckpt", {}, None),
        ("ckpt", {"global_step": 110_000}, None),
        ("ckpt", {"global_step": 875_000}, "epsilon"),
    ],
)
def test_an_sd2_file_of_other_programs_loads_and_what_it_predicts_is_read_or_told_as_assumed(
    kind, said, predicts, sd2_is_tiny, second, tmp_path, capsys
):
    path = tmp_path / f"x.{kind}"
    if kind == "ckpt":
        torch.save({"state_dict": as_published(second), **said}, path)
    else:
        safetensors.torch.save_file(as_published(second), path, said)
    models = load(path)
    assert_same(models, second)
    assert models.scheduler_config["prediction_type"] == (predicts or "v_prediction")
    assert models.unet.config["sample_size"] == (64 if predicts == "epsilon" else 96)
    assert models.tokenizer.pad_token_id == 0
    assert models.notes == describe(ModelOptions(resume_ckpt=str(path))).notes
    if predicts:
        assert not models.notes
    else:
        (note,) = models.notes
        assert note.startswith(f"resume_ckpt: {path} does not say what it predicts; v-prediction is assumed")
        convert(str(path), tmp_path / "folder")  # whose scheduler will say it as if it were certain
        assert capsys.readouterr().err == f"Note: source: {note.removeprefix('resume_ckpt: ')}\n"
    save_single_file(models, tmp_path / "again.safetensors", torch.float32)
    again = load(tmp_path / "again.safetensors")
    assert_same(again, second)
    assert again.scheduler_config["prediction_type"] == (predicts or "v_prediction") and not again.notes
    assert again.tokenizer.pad_token_id == 0


def test_an_sd2_folder_becomes_a_file_in_sd2s_own_layout(tmp_path):
    models = load(write_tiny_folder(tmp_path / "model", 4, "sd2"))
    save_single_file(models, tmp_path / "x.safetensors")
    file = TensorFile(tmp_path / "x.safetensors")
    expected = to_original(models)
    assert set(file) == set(expected) and not any(
        "position_ids" in name or ".transformer.text_model." in name for name in file
    )
    assert all(torch.equal(file[name], tensor.half()) for name, tensor in expected.items())
    assert file.metadata["modelspec.architecture"] == "stable-diffusion-v2-768-v"
    assert file.metadata["modelspec.prediction_type"] == "v"


def test_an_sd2_file_with_a_third_of_a_projection_is_refused(sd2_is_tiny, second, tmp_path):
    name = "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight"
    safetensors.torch.save_file(
        {**as_published(second), name: torch.ones(1024, 1024)}, tmp_path / "x.safetensors"
    )
    assert refused(tmp_path / "x.safetensors").endswith(
        "is not a Stable Diffusion 2.x model: of its text_encoder, 1 of 28 tensors have other shapes: "
        f"{name} is (1024, 1024) instead of (3072, 1024)."
    )


def test_an_sd2_file_with_sd1s_text_encoder_names_loads(second, tmp_path):
    """As this program once wrote them, with the configurations in the header."""
    save_single_file(second, tmp_path / "new.safetensors", torch.float32)
    new = TensorFile(tmp_path / "new.safetensors")
    tensors = {name: new[name] for name in new if not name.startswith("cond_stage_model.")}
    start = "cond_stage_model.transformer.text_model."
    tensors |= {
        start + name.removeprefix("text_model."): tensor
        for name, tensor in second.text_encoder.state_dict().items()
    }
    write_tensors(tmp_path / "old.safetensors", tensors, torch.float32, new.metadata)
    assert_same(load(tmp_path / "old.safetensors"), second)


def test_a_header_that_says_v_prediction_is_believed(sd15_is_tiny, tmp_path):
    write_tensors(
        tmp_path / "x.safetensors",
        to_original(tiny_models()),
        torch.float16,
        {"modelspec.prediction_type": "v"},
    )
    assert load(tmp_path / "x.safetensors").scheduler_config["prediction_type"] == "v_prediction"


@pytest.mark.parametrize(("configs", "parameters", "pad"), [(SD1, 859_520_964, 49407), (SD2, 865_910_724, 0)])
def test_a_real_size_file_is_recognised_by_its_header(configs, parameters, pad, tmp_path, monkeypatch):
    """A sparse file with the published names and shapes: describing reads the header and nothing else."""
    from tests.unit.trainer.models.test_single_file import full_size

    path = tmp_path / "published.safetensors"
    header, end = {}, 0
    for name, tensor in to_original(full_size(configs)).items():
        header[name] = {
            "dtype": "F16",
            "shape": list(tensor.shape),
            "data_offsets": [end, end + 2 * tensor.numel()],
        }
        end += 2 * tensor.numel()
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    monkeypatch.setattr(tensor_file.TensorFile, "__getitem__", None)
    models = describe(ModelOptions(resume_ckpt=str(path)))
    assert sum(p.numel() for p in models.unet.parameters()) == parameters
    assert models.tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert models.tokenizer.pad_token_id == pad
    assert models.scheduler_config["prediction_type"] == configs.prediction


def renamed(start, end):
    return lambda tensors: {name.replace(start, end): tensor for name, tensor in tensors.items()}


def only(*starts):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if name.startswith(starts)}


def reading(width):
    """Let the UNet read text of another width, whatever else is in the file."""
    return lambda tensors: {
        name: torch.ones(tensor.shape[0], width)
        if name.endswith((".attn2.to_k.weight", ".attn2.to_v.weight"))
        else tensor
        for name, tensor in tensors.items()
    }


@pytest.mark.parametrize("ending", ["safetensors", "ckpt"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: {"lora_unet_down_blocks_0.lora_down.weight": torch.ones(1)}, "is a LoRA"),
        (lambda t: {"unet.down_blocks.0.attn1.to_q.lora_A.weight": torch.ones(1)}, "is a LoRA"),
        (renamed("cond_stage_model.", "conditioner.embedders.0."), "is an SDXL model"),
        (
            renamed("cond_stage_model.transformer.", "cond_stage_model.model."),
            "is not a Stable Diffusion 1.x model: of its text_encoder, 52",
        ),
        (reading(1024), "is not a Stable Diffusion 2.x model: of its unet, "),
        (
            lambda t: {**t, "model.diffusion_model.label_emb.0.0.weight": torch.ones(1)},
            "is an unCLIP model or another whose UNet needs more",
        ),
        (reading(2048), "is the UNet of an SDXL model"),
        (renamed("model.diffusion_model.", "control_model."), "is a ControlNet"),
        (lambda t: {"model.diffusion_model.double_blocks.0.weight": torch.ones(1)}, "is a transformer model"),
        (lambda t: {"emb_params": torch.ones(1, 16)}, "is a textual-inversion embedding"),
        (lambda t: tiny_models().unet.state_dict(), "holds one network in diffusers' names"),
        (only("first_stage_model."), "is a VAE without a model; give it as `vae`"),
        (only("model.diffusion_model."), "lacks the VAE and the text encoder"),
        (only("model.", "first_stage_model."), "lacks the text encoder"),
        (lambda t: {"weight": torch.ones(1)}, "is not a Stable Diffusion checkpoint"),
        (
            lambda t: {**t, "model.diffusion_model.input_blocks.0.0.weight": torch.ones(8, 9, 3, 3)},
            "is an inpainting or editing model (its UNet takes 9 channels instead of 4)",
        ),
        (
            lambda t: {name: tensor for name, tensor in t.items() if "middle_block.1.proj_in" not in name},
            "of its unet, 2 of 208 tensors are missing, model.diffusion_model.middle_block.1.proj_in.weight "
            "among them",
        ),
        (
            lambda t: {**t, "first_stage_model.quant_conv.bias": torch.ones(3)},
            "of its vae, 1 of 180 tensors have other shapes: first_stage_model.quant_conv.bias is (3,) "
            "instead of (8,)",
        ),
    ],
)
def test_files_that_hold_something_else_are_named_for_what_they_are(
    change, said, ending, sd15_is_tiny, tmp_path
):
    path = tmp_path / f"x.{ending}"
    tensors = {
        name: tensor.contiguous().clone() for name, tensor in change(to_original(tiny_models())).items()
    }
    if ending == "ckpt":
        torch.save({"state_dict": tensors}, path)
    else:
        safetensors.torch.save_file(tensors, path)
    sentence = refused(path)
    assert said in sentence
    assert sentence.startswith(f"resume_ckpt: {path} ")


def test_a_ckpt_that_is_cut_short_or_hostile_is_refused_where_it_is_named(tmp_path, capsys):
    from tests.unit.trainer.models.test_tensor_file import Evil

    torch.save({"state_dict": to_original(tiny_models())}, tmp_path / "x.ckpt")
    content = (tmp_path / "x.ckpt").read_bytes()
    (tmp_path / "x.ckpt").write_bytes(content[: len(content) // 2])
    assert "x.ckpt: the file is cut short after" in refused(tmp_path / "x.ckpt")
    torch.save({"state_dict": to_original(tiny_models()), "callback": Evil()}, tmp_path / "evil.ckpt")
    assert (
        "asks for builtins.print" in refused(tmp_path / "evil.ckpt") and "ran" not in capsys.readouterr().out
    )


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    save_single_file(tiny_models(), path, metadata={CONFIGS: "{"})
    assert "sd_dadapt.configs is damaged" in refused(path)
    path.write_bytes(path.read_bytes()[:-1])
    assert "the file is cut short" in refused(path)
    (tmp_path / "x.pt").write_bytes(b"")
    assert "is a .pt file; name a .safetensors or .ckpt file" in refused(tmp_path / "x.pt")


def test_a_file_that_the_disk_does_not_give_is_refused_with_the_reason(folder, tmp_path, monkeypatch):
    save_single_file(tiny_models(), tmp_path / "x.safetensors")
    torch.save({"state_dict": to_original(tiny_models())}, tmp_path / "x.ckpt")
    real = Path.open

    def fail(path, *arguments, **keywords):
        if path.suffix in (".safetensors", ".ckpt"):
            raise OSError(errno.EIO, "Input/output error", str(path))
        return real(path, *arguments, **keywords)

    monkeypatch.setattr(Path, "open", fail)
    for source, file in (
        ("x.safetensors", "x.safetensors"),
        ("x.ckpt", "x.ckpt"),
        ("model", "model/unet/diffusion_pytorch_model.safetensors"),
    ):
        with pytest.raises(UserError, match=rf"{file}: the file cannot be read \(Input/output error\)"):
            load(tmp_path / source)


def test_the_tokenizer_is_in_the_file_only_where_it_is_not_clips(tmp_path):
    second = tiny_models(0, "sd2")
    from trainer.models.tokenizer import clip_tokenizer

    models = tiny_models()
    save_single_file(models, tmp_path / "own.safetensors")
    assert TOKENIZER in TensorFile(tmp_path / "own.safetensors").metadata
    for pad, kept in (("<|endoftext|>", False), ("!", True)):  # SD 2.x's, in a model of SD 1.x
        models.tokenizer = clip_tokenizer(pad)
        save_single_file(models, tmp_path / "clip.safetensors")
        assert (TOKENIZER in TensorFile(tmp_path / "clip.safetensors").metadata) == kept
    second.tokenizer = clip_tokenizer("!")
    save_single_file(second, tmp_path / "second.safetensors")
    assert TOKENIZER not in TensorFile(tmp_path / "second.safetensors").metadata


# A VAE of its own


@pytest.mark.parametrize(
    "form",
    [
        "folder",
        "model folder",
        "original file",
        "prefixed file",
        "diffusers file",
        "whole checkpoint",
        "other program's file",
    ],
)
def test_the_vae_is_replaced_from_every_form(form, written, tmp_path, sd15_is_tiny):
    other = tiny_models(5)
    other.vae.register_to_config(scaling_factor=0.5)
    path = tmp_path / "vae.safetensors"
    tensors = {
        name: tensor.contiguous()
        for name, tensor in to_original(other).items()
        if name.startswith("first_stage_model.")
    }
    bare = {name.removeprefix("first_stage_model."): tensor for name, tensor in tensors.items()}
    if form in ("folder", "model folder"):
        path = write_tiny_folder(tmp_path / "other", 5) / ("vae" if form == "folder" else "")
    elif form == "whole checkpoint":
        save_single_file(other, path, torch.float32)
    elif form == "diffusers file":
        safetensors.torch.save_file(other.vae.state_dict(), path)
    elif form == "other program's file":
        safetensors.torch.save_file({**bare, "loss.logvar": torch.ones(1)}, path)
    else:
        safetensors.torch.save_file(bare if form == "original file" else tensors, path)
    models = load(written, vae=path)
    assert_same(models, other, networks=("vae",))
    assert_same(models, tiny_models(), networks=("unet", "text_encoder"))
    assert models.vae.config["scaling_factor"] == (0.5 if form == "whole checkpoint" else 0.18215)


def test_a_vae_of_the_bases_own_size_loads_where_it_is_not_sd15s(written, tmp_path):
    safetensors.torch.save_file(tiny_models(6).vae.state_dict(), tmp_path / "vae.safetensors")
    assert_same(load(written, vae=tmp_path / "vae.safetensors"), tiny_models(6), networks=("vae",))


def test_what_is_no_fitting_vae_is_named_for_what_it_is(written, folder, tmp_path):
    spoil_json(folder / "vae/config.json", _class_name="AutoencoderTiny")
    assert "holds a AutoencoderTiny" in refused(written, vae=folder / "vae")
    (folder / "vae/config.json").unlink()
    assert "is not a VAE's folder" in refused(written, vae=folder / "vae")
    safetensors.torch.save_file({"weight": torch.ones(1)}, tmp_path / "x.safetensors")
    assert "holds no VAE: there is no encoder.conv_in.weight in it" in refused(
        written, vae=tmp_path / "x.safetensors"
    )
    safetensors.torch.save_file(tiny_models(0, "sd15").vae.state_dict(), tmp_path / "y.safetensors")
    assert "is not a VAE of Stable Diffusion 1.x or of this model" in refused(
        written, vae=tmp_path / "y.safetensors"
    )
    assert refused(written, vae="nothing.safetensors").startswith(
        "vae: there is no folder or file nothing.safetensors"
    )


# Nonsense in configurations


NONSENSE = [
    ("unet", {"norm_num_groups": 0}),
    ("unet", {"norm_num_groups": "2"}),
    ("unet", {"norm_eps": float("nan")}),
    ("unet", {"norm_eps": float("inf")}),
    ("unet", {"layers_per_block": 10**7}),
    ("unet", {"layers_per_block": -1}),
    ("unet", {"layers_per_block": None}),
    ("unet", {"transformer_layers_per_block": 10**7}),
    ("unet", {"block_out_channels": [8] * 100_000}),
    ("unet", {"block_out_channels": 8}),
    ("unet", {"block_out_channels": []}),
    ("unet", {"down_block_types": ["Nothing", "Nothing"]}),
    ("unet", {"attention_head_dim": 0}),
    ("unet", {"act_fn": "nothing"}),
    ("unet", {"act_fn": ["silu"]}),
    ("unet", {"cross_attention_dim": [16, 16]}),
    ("unet", {"in_channels": "4"}),
    ("unet", {"out_channels": 8}),
    ("unet", {"dropout": 7}),
    ("unet", {"sample_size": "large"}),
    ("unet", {"sample_size": 0}),
    ("unet", {"sample_size": []}),
    ("unet", {"center_input_sample": 1, "time_embedding_type": "nothing"}),
    ("unet", {"encoder_hid_dim_type": "text_proj"}),
    ("vae", {"norm_num_groups": 0}),
    ("vae", {"layers_per_block": 10**7}),
    ("vae", {"latent_channels": 0}),
    ("vae", {"block_out_channels": {"a": 1}}),
    ("vae", {"scaling_factor": 0}),
    ("vae", {"scaling_factor": "0.18"}),
    ("vae", {"scaling_factor": None}),
    ("vae", {"in_channels": 4}),
    ("vae", {"sample_size": "x"}),
    ("text_encoder", {"num_hidden_layers": 10**7}),
    ("text_encoder", {"num_hidden_layers": "4"}),
    ("text_encoder", {"num_attention_heads": 3}),
    ("text_encoder", {"hidden_act": "nothing"}),
    ("text_encoder", {"attention_dropout": 7.0}),
    ("text_encoder", {"max_position_embeddings": 76}),
    ("text_encoder", {"vocab_size": 10**12}),
    ("scheduler", {"_class_name": "../../x"}),
    ("scheduler", {"_class_name": ["PNDMScheduler"]}),
    ("scheduler", {"_class_name": "FlaxPNDMScheduler"}),
    ("scheduler", {"num_train_timesteps": 10**9}),
    ("scheduler", {"num_train_timesteps": "1000"}),
    ("scheduler", {"num_train_timesteps": 0}),
    ("scheduler", {"beta_start": "x"}),
    ("scheduler", {"beta_start": 2.0, "beta_end": 3.0}),
    ("scheduler", {"beta_end": float("nan")}),
    ("scheduler", {"beta_schedule": "nothing"}),
    ("scheduler", {"trained_betas": [0.1, 0.2]}),
    ("scheduler", {"prediction_type": "sample"}),
    ("scheduler", {"prediction_type": ["epsilon"]}),
    ("tokenizer", {"model_max_length": "77"}),
    ("tokenizer", {"model_max_length": 2}),
    ("tokenizer", {"model_max_length": 100}),
    ("tokenizer", {"pad_token": 5}),
    ("tokenizer", {"bos_token": {"x": 1}}),
]


@pytest.mark.parametrize(("part", "changes"), NONSENSE)
def test_nonsense_in_a_configuration_is_refused_in_one_sentence(part, changes, folder):
    names = {"scheduler": "scheduler_config", "tokenizer": "tokenizer_config"}
    spoil_json(folder / part / f"{names.get(part, 'config')}.json", **changes)
    with pytest.raises(UserError) as caught:
        describe(ModelOptions(resume_ckpt=str(folder)))
    (sentence,) = caught.value.problems
    assert "\n" not in sentence and sentence.endswith(".") and str(folder) in sentence


@pytest.mark.parametrize(("part", "changes"), NONSENSE[::8])
def test_nonsense_in_a_header_is_refused_likewise(part, changes, tmp_path):
    save_single_file(tiny_models(), tmp_path / "x.safetensors", torch.float32)
    file = TensorFile(tmp_path / "x.safetensors")
    field, inner = (TOKENIZER, "tokenizer_config.json") if part == "tokenizer" else (CONFIGS, part)
    said = json.loads(file.metadata[field])
    metadata = {**file.metadata, field: json.dumps({**said, inner: {**said[inner], **changes}})}
    write_tensors(tmp_path / "spoilt.safetensors", dict(file), torch.float32, metadata)
    sentence = refused(tmp_path / "spoilt.safetensors")
    assert "\n" not in sentence and sentence.endswith(".") and "spoilt.safetensors" in sentence


@pytest.mark.parametrize("field", [CONFIGS, TOKENIZER])
@pytest.mark.parametrize(
    "text",
    ["[]", "5", '{"unet": 5}', "[" * 100_000, '{"unet": {}, "vae": {}, "text_encoder": {}, "scheduler": []}'],
)
def test_nonsense_in_a_header_is_refused_in_one_sentence(field, text, tmp_path):
    save_single_file(tiny_models(), tmp_path / "x.safetensors", metadata={field: text})
    assert f"header field {field}" in refused(tmp_path / "x.safetensors")


@pytest.mark.parametrize("content", ["[]", "5", "null", "[" * 100_000, "\ufffe", '{"_class_name": 5}'])
@pytest.mark.parametrize(
    "file",
    ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json", "tokenizer/tokenizer.json"],
)
def test_files_of_a_folder_that_hold_something_else_are_refused(content, file, folder):
    (folder / file).write_text(content)
    sentence = refused(folder)
    assert "\n" not in sentence and str(folder) in sentence


def test_no_key_of_a_configuration_chooses_code_or_files(folder, written):
    """Attention kernels, quantization and further files are what a loader would fetch, and run, for a key."""
    strange = {
        "_attn_implementation": "someone/kernel",
        "attn_implementation": "someone/kernel",
        "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True},
        "auto_map": {"AutoModel": "someone/model--code.Model"},
        "vocab_file": "/etc/passwd",
        "_name_or_path": "someone/model",
    }
    for file in (
        "unet/config.json",
        "vae/config.json",
        "text_encoder/config.json",
        "tokenizer/tokenizer_config.json",
    ):
        spoil_json(folder / file, **strange)
    models = load(folder)
    assert_same(models, tiny_models())
    for network in NETWORKS:
        assert not strange.keys() & dict(vars(getattr(models, network).config)).keys() - {
            "_attn_implementation",
            "_name_or_path",
        }
        assert "someone" not in str(getattr(models, network).config)


@pytest.mark.parametrize("size", [None, [8, 8]])
def test_what_a_base_leaves_out_is_completed_before_training(size, folder, tmp_path):
    spoil_json(folder / "unet/config.json", sample_size=size)
    spoil_json(folder / "scheduler/scheduler_config.json", _class_name=None)
    models = load(folder)
    save_diffusers(models, tmp_path / "out")
    save_single_file(models, tmp_path / "out.safetensors")
    for path in (tmp_path / "out", tmp_path / "out.safetensors"):
        again = load(path)
        assert again.scheduler_config["_class_name"] == "PNDMScheduler" and not again.notes
    assert [note for note in models.notes if "no scheduler class; PNDMScheduler is assumed" in note]
    assert bool([note for note in models.notes if "no sample_size; 64 is assumed" in note]) == (size is None)


# Without weights


def test_describing_reads_no_weights_and_gives_the_same_shapes(written, monkeypatch):
    monkeypatch.setattr(tensor_file.TensorFile, "__getitem__", None)
    monkeypatch.setattr(safetensors.torch, "load_file", None)
    models, reference = describe(ModelOptions(resume_ckpt=str(written))), tiny_models()
    for network in NETWORKS:
        own, expected = getattr(models, network).state_dict(), getattr(reference, network).state_dict()
        assert {name: tensor.shape for name, tensor in own.items()} == {
            name: tensor.shape for name, tensor in expected.items()
        }
        assert all(tensor.is_meta for tensor in own.values())
    assert models.tokenizer("red").input_ids == reference.tokenizer("red").input_ids


# Hub ids, without a hub: tests/integration/test_hub.py talks to one


def test_a_hub_id_that_cannot_be_had_says_what_was_tried_and_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError) as caught:
        load("someone/some-model")
    assert str(caught.value) == (
        f"resume_ckpt: someone/some-model is not complete in the hub cache ({tmp_path}) and cannot be "
        "downloaded (HF_HUB_OFFLINE is set); run `hf download someone/some-model` where there is internet "
        "and copy the cache, or give resume_ckpt the path of a local diffusers folder or .safetensors file."
    )


def test_a_hub_id_that_is_not_cached_is_described_as_sd15_with_a_note(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    models = describe(ModelOptions(resume_ckpt="someone/some-model", vae="someone/some-vae"))
    assert sum(p.numel() for p in models.unet.parameters()) == 859_520_964
    assert models.source == "someone/some-model"
    assert (
        len(models.notes) == 2
        and "the kind of model is unknown" in models.notes[0]
        and "some-vae" in models.notes[1]
    )


@pytest.mark.parametrize(
    "name", ["nothing.safetensors", "tests/nothing", "a/b/c", "x", r"C:\models\sd", "", "a b/c"]
)
def test_names_that_can_only_be_paths_are_not_looked_up(name, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[4])
    if name == "":
        assert "holds no model_index.json" in refused(name)  # the working directory
    else:
        assert refused(name).startswith(f"resume_ckpt: there is no folder or file {name};")
