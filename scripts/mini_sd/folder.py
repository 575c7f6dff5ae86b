"""The diffusers folder: the work folder's EMA weights as a Stable Diffusion 1.5 pipeline in float16."""

# The libraries' decorators and exports hide their types.
# pyright: reportPrivateImportUsage=false, reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from .networks import new_text_encoder, new_unet, sampling_schedule
from .text import load_tokenizer
from .unet import Average
from .vae import load_vae


def export(work: Path, folder: Path) -> int:
    """Write the pipeline folder from the UNet stage's last saved state, and return its step.

    The folder is written under another name, then renamed.

    Raises:
        FileNotFoundError: the UNet's stage has saved nothing yet.
    """
    tokenizer = load_tokenizer(work)
    unet, encoder = new_unet(), new_text_encoder(tokenizer)
    state = torch.load(work / "unet.pt", weights_only=True)
    average = Average([*unet.parameters(), *encoder.parameters()], 0.0)
    average.load_state_dict(state["parts"]["average"])
    average.copy_to_live()
    vae = load_vae(work)
    scaling = torch.load(work / "latents.pt", weights_only=True)["scaling_factor"]
    vae.register_to_config(scaling_factor=round(scaling, 5))
    pipeline = StableDiffusionPipeline(
        vae=vae.to(memory_format=torch.contiguous_format).half(),
        text_encoder=encoder.eval().half(),
        tokenizer=tokenizer,
        unet=unet.eval().half(),
        scheduler=sampling_schedule(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    pipeline.save_pretrained(partial)
    _prefix_text_keys(partial / "text_encoder" / "model.safetensors")
    for name in ("vocab.json", "merges.txt"):
        shutil.copyfile(work / "tokenizer" / name, partial / "tokenizer" / name)
    _add_settings(partial / "scheduler" / "scheduler_config.json", clip_sample=False)
    for config in partial.rglob("*config.json"):
        _forget_paths(config)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return int(state["step"])


def folder_bytes(folder: Path) -> int:
    """Return the size of all files under a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _prefix_text_keys(path: Path) -> None:
    """Give the text encoder's keys the `text_model.` prefix of SD 1.5's files, which older tools expect."""
    tensors = load_file(path)
    prefixed = {
        k if k.startswith("text_model.") else f"text_model.{k}": v.contiguous() for k, v in tensors.items()
    }
    save_file(prefixed, path, metadata={"format": "pt"})


def _add_settings(config: Path, **settings: object) -> None:
    """Add settings that the saved class lacks; without `clip_sample`, DDIM would clip latents to -1..1."""
    values = json.loads(config.read_text(encoding="utf-8")) | settings
    config.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _forget_paths(config: Path) -> None:
    """Drop the paths of this machine that loading a component left in its configuration."""
    values = json.loads(config.read_text(encoding="utf-8"))
    gone = [values.pop(key, None) for key in ("_name_or_path", "is_local", "local_files_only")]
    if any(value is not None for value in gone):
        config.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
