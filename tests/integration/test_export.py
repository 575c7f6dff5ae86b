"""Exports: diffusers' own pipeline loads them and draws, to the bit, what the trained networks draw."""

import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors import safe_open

from tests.tiny import (
    PNDMScheduler,
    StableDiffusionPipeline,
    tiny_models,
    write_parts_beside,
    write_tiny_folder,
)
from trainer.checkpoints.export import architecture, save_diffusers, save_single_file
from trainer.models.load import load_models
from trainer.models.options import ModelOptions
from trainer.models.single_file import NETWORKS
from trainer.run.folder import keep_beside

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = ["a red circle on a blue background", ""]


CASES = {
    "small": lambda: tiny_models(1, "small"),
    "mini": lambda: tiny_models(1, "mini"),
    "sd15": lambda: tiny_models(1, "sd15"),
    "sd2": lambda: tiny_models(1, "sd2"),
    "embedded": lambda: load_models(ModelOptions(resume_ckpt=str(ROOT / "models" / "mini-sd"))),
}


def draw(pipeline) -> np.ndarray:
    """Return pictures (2, 64, 64, 3) of a fixed seed, with guidance so that both prompts matter."""
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline(
        PROMPTS,
        num_inference_steps=2,
        guidance_scale=3.0,
        height=64,
        width=64,
        generator=generator,
        output_type="np",
    ).images


def draw_here(models) -> np.ndarray:
    parts: dict[str, Any] = {name: getattr(models, name).eval() for name in NETWORKS}
    parts |= {"tokenizer": models.tokenizer, "safety_checker": None, "feature_extractor": None}
    parts["scheduler"] = PNDMScheduler.from_config(models.scheduler_config)
    return draw(StableDiffusionPipeline(**parts, requires_safety_checker=False))


def from_pretrained(folder):
    arguments: dict[str, Any] = {"dtype": torch.float32, "local_files_only": True}
    return StableDiffusionPipeline.from_pretrained(str(folder), **arguments)


def from_single_file(path, folder):
    arguments: dict[str, Any] = {"config": str(folder), "local_files_only": True, "dtype": torch.float32}
    return StableDiffusionPipeline.from_single_file(str(path), **arguments)


@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_both_exports_draw_the_same_pixels(case, dtype, tmp_path):
    models = CASES[case]()
    save_diffusers(models, tmp_path / "folder", dtype)
    save_single_file(models, tmp_path / "x.safetensors", dtype)
    for network in NETWORKS:  # the precision on disk is all that may change
        torch.nn.Module.to(getattr(models, network), dtype).float()
    expected = draw_here(models)
    assert expected.std() > 0.01
    assert np.array_equal(draw(from_pretrained(tmp_path / "folder")), expected)
    pipeline = from_single_file(tmp_path / "x.safetensors", tmp_path / "folder")
    if case != "embedded":
        # Matrices narrower than a cache line lie at odd addresses of the mapped file, where some processors
        # round differently.
        for network in NETWORKS:
            for parameter in getattr(pipeline, network).parameters():
                parameter.data = parameter.data.clone()
    assert np.array_equal(draw(pipeline), expected)


def test_training_goes_on_from_an_export_exactly(tmp_path):
    models = tiny_models(2)
    for parameter in models.unet.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    save_diffusers(models, tmp_path / "folder", torch.float32)
    save_single_file(models, tmp_path / "x.safetensors", torch.float32)
    for path in (tmp_path / "folder", tmp_path / "x.safetensors"):
        again = load_models(ModelOptions(resume_ckpt=str(path)))
        for network in NETWORKS:
            expected = getattr(models, network).state_dict()
            assert all(
                torch.equal(tensor, expected[name])
                for name, tensor in getattr(again, network).state_dict().items()
            )
        assert (
            again.scheduler_config["beta_schedule"] == "scaled_linear"
            and again.scheduler_config["skip_prk_steps"] is True
        )


def test_an_export_of_an_export_is_the_same_file(tmp_path):
    save_single_file(
        tiny_models(), tmp_path / "a.safetensors", metadata={"modelspec.date": "2026", "modelspec.title": "t"}
    )
    again = load_models(ModelOptions(resume_ckpt=str(tmp_path / "a.safetensors")))
    save_single_file(
        again, tmp_path / "b.safetensors", metadata={"modelspec.date": "2026", "modelspec.title": "t"}
    )
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_the_networks_are_left_as_they_were(tmp_path):
    models = tiny_models()
    models.unet.train()
    before = {name: (tensor.data_ptr(), tensor.dtype) for name, tensor in models.unet.state_dict().items()}
    save_diffusers(models, tmp_path / "folder", torch.float16)
    save_single_file(models, tmp_path / "x.safetensors")
    assert {
        name: (tensor.data_ptr(), tensor.dtype) for name, tensor in models.unet.state_dict().items()
    } == before
    assert models.unet.training


def test_the_header_describes_the_model(tmp_path):
    models = tiny_models()
    models.scheduler_config["prediction_type"] = "v_prediction"
    save_single_file(
        models, tmp_path / "smile.safetensors", metadata={"modelspec.resolution": "512x768", "steps": "100"}
    )
    with safe_open(tmp_path / "smile.safetensors", framework="pt") as file:
        header = file.metadata()
        keys = [name for name in file.keys() if "position_ids" not in name]  # noqa: SIM118
        kinds = {str(file.get_slice(name).get_dtype()) for name in keys}
        assert file.get_tensor(
            "cond_stage_model.transformer.text_model.embeddings.position_ids"
        ).tolist() == [list(range(77))]
    assert kinds == {"F16"}
    assert header["modelspec.sai_model_spec"] == "1.0.0"
    assert header["modelspec.architecture"] == "stable-diffusion-v1"
    assert header["modelspec.title"] == "smile"
    assert header["modelspec.prediction_type"] == "v"
    assert (header["modelspec.resolution"], header["steps"]) == ("512x768", "100")


@pytest.mark.parametrize(
    ("width", "prediction", "name"),
    [
        (768, "epsilon", "stable-diffusion-v1"),
        (1024, "epsilon", "stable-diffusion-v2-512"),
        (1024, "v_prediction", "stable-diffusion-v2-768-v"),
    ],
)
def test_the_header_names_the_generation_of_the_model(width, prediction, name):
    models = tiny_models()
    models.text_encoder.config.hidden_size = width
    models.scheduler_config["prediction_type"] = prediction
    assert architecture(models) == name


def test_further_parts_that_cannot_be_copied_are_told_and_left_out(tmp_path, monkeypatch):
    folder = write_tiny_folder(tmp_path / "base")
    write_parts_beside(folder)
    models = load_models(ModelOptions(resume_ckpt=str(folder)))

    def fail(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("trainer.checkpoints.export.copyfile", fail)
        (note,) = keep_beside(models, tmp_path / "run")
    assert note.startswith(
        "the base's safety_checker and feature_extractor could not be copied (No space left on device)"
    )
    save_diffusers(models, tmp_path / "out")
    assert from_pretrained(tmp_path / "out").safety_checker is None
    assert not list((tmp_path / "run").iterdir()), "nothing half copied is left"


def test_the_folder_suits_older_readers(tmp_path):
    save_diffusers(tiny_models(), tmp_path, torch.float16)
    names = safetensors.torch.load_file(tmp_path / "text_encoder" / "model.safetensors")
    assert all(name.startswith("text_model.") for name in names)
    assert {path.name for path in (tmp_path / "tokenizer").iterdir()} == {
        "merges.txt",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
    }
    assert json.loads((tmp_path / "text_encoder" / "config.json").read_text())["torch_dtype"] == "float16"
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["safety_checker"] == [None, None] and index["requires_safety_checker"] is False


def test_further_parts_of_the_base_are_neither_needed_nor_lost(tmp_path):
    folder = write_tiny_folder(tmp_path / "base")
    checker = write_parts_beside(folder)
    models = load_models(ModelOptions(resume_ckpt=str(folder)))
    save_diffusers(models, tmp_path / "out")
    again = load_models(ModelOptions(resume_ckpt=str(tmp_path / "out")))
    save_diffusers(again, tmp_path / "linked", link=True)
    for out in (tmp_path / "out", tmp_path / "linked"):
        pipeline: Any = from_pretrained(out)
        kept = pipeline.safety_checker.state_dict()
        assert all(torch.equal(tensor, kept[name]) for name, tensor in checker.state_dict().items())
        assert pipeline.feature_extractor.size["shortest_edge"] == 32
        assert not list(out.rglob("*.bin")), "weights are kept in one form"
        assert not (out / "watermark").exists(), "diffusers does not know it"
        index = json.loads((out / "model_index.json").read_text())
        assert "watermark" not in index and index["requires_safety_checker"] is True
    for part in ("safety_checker", "feature_extractor"):
        shutil.rmtree(folder / part)
    save_diffusers(load_models(ModelOptions(resume_ckpt=str(folder))), tmp_path / "without")
    assert from_pretrained(tmp_path / "without").safety_checker is None


def test_no_file_tells_where_it_was_made(tmp_path):
    folder = write_tiny_folder(tmp_path / "somewhere-private")
    models = load_models(ModelOptions(resume_ckpt=str(folder)))
    save_diffusers(models, tmp_path / "out", torch.float16)
    save_single_file(models, tmp_path / "out" / "x.safetensors")
    assert not [
        path
        for path in (tmp_path / "out").rglob("*")
        if path.is_file() and b"somewhere-private" in path.read_bytes()
    ]


def test_loading_is_silent_and_exports_give_libraries_nothing_to_say(tmp_path):
    """In a process of its own, since notices are given once a process."""
    code = f"""
import sys
from pathlib import Path
import torch
from trainer.models.load import load_models
from trainer.models.options import ModelOptions
folder = {str(write_tiny_folder(tmp_path / "in", dtype=torch.float16))!r}
models = load_models(ModelOptions(resume_ckpt=folder))
from trainer.checkpoints.export import save_diffusers
save_diffusers(models, Path({str(tmp_path / "out")!r}), torch.float32)
from diffusers import StableDiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging
diffusers_logging.set_verbosity_warning()
transformers_logging.set_verbosity_warning()
StableDiffusionPipeline.from_pretrained({str(tmp_path / "out")!r}, dtype=torch.float32)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
