"""Reading a single file in the original layout, without the hub and without any configuration beside it.

What the file leaves out comes from its header where this program wrote it (`sd_dadapt.configs`,
`sd_dadapt.tokenizer`), and otherwise from Stable Diffusion 1.5 as published, or 2.x where the UNet reads text
of 2.x's width. Nothing in the tensors of SD 2.x tells epsilon from v-prediction, so where the file does not
say it either, v-prediction is assumed and a note says so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

from trainer.errors import UserError
from trainer.models import sd2
from trainer.models.load import Models
from trainer.models.networks import SD2, SD15, Configs, build, fill, first_line
from trainer.models.single_file import (
    OPEN_CLIP_PREFIX,
    SD2_WIDTH,
    TEXT_PREFIX,
    UNET_PREFIX,
    VAE_PREFIX,
    from_original,
    layout,
)
from trainer.models.tensor_file import TensorFile
from trainer.models.tokenizer import END, clip_tokenizer, tokenizer_from_text

CONFIGS = "sd_dadapt.configs"
"""Header field: the four configurations as JSON."""

TOKENIZER = "sd_dadapt.tokenizer"
"""Header field: the tokenizer as JSON, where it is not the one of this kind of model."""

PREDICTION_TYPE = "modelspec.prediction_type"
ARCHITECTURE = "modelspec.architecture"
SD2_NOISE, SD2_VELOCITY = "stable-diffusion-v2-512", "stable-diffusion-v2-768-v"
"""What the ModelSpec standard calls SD 2.x by what it predicts."""

_BARE_TEXT_PREFIX = TEXT_PREFIX.removesuffix("text_model.")
"""Where files that were written with newer transformers have the text encoder."""

_VAE_SIGN = "encoder.conv_in.weight"

_READS_TEXT = ".attn2.to_k.weight"
_SDXL_WIDTHS = (1280, 2048)
"""Widths of the text that SDXL and its refiner read."""


def read_file(path: Path, key: str, *, weights: bool) -> Models:
    """Load a whole model from one file.

    Args:
        path: a .safetensors or .ckpt file.
        key: the option that named it, for messages.
        weights: False gives networks on the meta device without reading any weight.

    Raises:
        UserError: the file is damaged or holds something else.
    """
    file = TensorFile(path)
    problem = what_else(file)
    if problem:
        raise UserError(f"{key}: {path} {problem}")
    configs = _configs(file)
    second = configs.unet.get("cross_attention_dim") == SD2_WIDTH
    known = (
        prefix for prefix in (OPEN_CLIP_PREFIX, TEXT_PREFIX) if any(name.startswith(prefix) for name in file)
    )
    text_prefix = next(known, _BARE_TEXT_PREFIX)
    networks: dict[str, Any] = {}
    for network, prefix in (("unet", UNET_PREFIX), ("vae", VAE_PREFIX), ("text_encoder", text_prefix)):
        config = getattr(configs, network)
        empty = build(network, config, _named(file))
        problem = _misfit(file, network, empty, prefix)
        if problem:
            raise UserError(
                f"{key}: {path} is not a Stable Diffusion {2 if second else 1}.x model: of its {network}, {problem}."
            )
        if weights:
            fill(empty, from_original(file, network, empty.config, empty, prefix))
            empty.eval()
        networks[network] = empty
    if TOKENIZER in file.metadata:
        tokenizer = tokenizer_from_text(
            file.metadata[TOKENIZER], f"{file.path}: the header field {TOKENIZER}"
        )
    else:
        tokenizer = clip_tokenizer(padding(configs.text_encoder.get("hidden_size")))
    notes = ()
    if CONFIGS not in file.metadata and not prediction(file)[1]:
        notes = (
            f"{key}: {path} does not say what it predicts; v-prediction is assumed, as of SD 2.x at 768 px, but models of 512 px predict "
            "noise: where you are not certain, name the model's diffusers folder, whose scheduler says it.",
        )
    return Models(
        **networks,
        tokenizer=tokenizer,
        scheduler_config=dict(configs.scheduler),
        source=str(path),
        notes=notes,
    )


def read_vae_file(path: Path, key: str, base: Mapping[str, Any], *, weights: bool) -> AutoencoderKL:
    """Load a VAE from a file: a VAE alone in the original layout or in diffusers' own, or a whole model's.

    Args:
        path: a .safetensors or .ckpt file.
        key: the option that named it, for messages.
        base: the configuration of the VAE that it replaces, tried where the file says nothing and is not of
        SD 1.5's size.
        weights: False gives a network on the meta device without reading any weight.

    Raises:
        UserError: the file is damaged or holds no VAE that fits.
    """
    file = TensorFile(path)
    prefix = next((start for start in (VAE_PREFIX, "", "vae.") if start + _VAE_SIGN in file.shapes), None)
    if prefix is None:
        raise UserError(
            f"{key}: {path} holds no VAE: there is no {_VAE_SIGN} in it; name a VAE's file or folder."
        )
    configs: list[Mapping[str, Any]] = [_configs(file).vae] if CONFIGS in file.metadata else [SD15.vae, base]
    problems = []
    for config in configs:
        empty = build("vae", config, _named(file))
        shapes = {name: tuple(tensor.shape) for name, tensor in empty.state_dict().items()}
        if {
            name.removeprefix(prefix): shape for name, shape in file.shapes.items() if name.startswith(prefix)
        } == shapes:
            state = (
                {name: file[prefix + name].float() for name in shapes} if weights else None
            )  # diffusers' own names
        else:
            problem = _misfit(file, "vae", empty, prefix)
            if problem:
                problems.append(problem)
                continue
            state = from_original(file, "vae", empty.config, empty, prefix) if weights else None
        if state is not None:
            fill(empty, state)
            empty.eval()
        return empty
    raise UserError(f"{key}: {path} is not a VAE of Stable Diffusion 1.x or of this model: {problems[0]}.")


def padding(width: int | None) -> str:
    """Return what the tokenizer of a kind of model pads with, which a file leaves out; the kind is told by the text encoder's width."""
    return sd2.PAD if width == SD2_WIDTH else END


def prediction(file: TensorFile) -> tuple[str, bool]:
    """Return what a whole model's file predicts, as diffusers' schedulers name it, and False where that is no more than assumed."""
    said, named = file.metadata.get(PREDICTION_TYPE), file.metadata.get(ARCHITECTURE, "")
    if said in ("v", "v_prediction"):
        return "v_prediction", True
    if said == "epsilon" or _reads(file) != SD2_WIDTH:
        return "epsilon", True
    if file.global_step == sd2.BASE_STEP or named.startswith(SD2_NOISE):
        return "epsilon", True
    return "v_prediction", named.startswith(SD2_VELOCITY)


def what_else(file: TensorFile) -> str | None:
    """Return what a file is and what to do, where it is no whole Stable Diffusion 1.x or 2.x model; None where it looks like one."""
    names = file.shapes

    def has(*prefixes: str) -> bool:
        return any(name.startswith(prefixes) for name in names)

    whole = "name a whole Stable Diffusion 1.x or 2.x checkpoint"
    if any(
        ".lora_" in name or "lora_down." in name or name.startswith(("lora_unet_", "lora_te"))
        for name in names
    ):
        return f"is a LoRA, a small change to a model; merge it into its base with the tool that made it, or {whole}."
    if has("conditioner.embedders."):
        return f"is an SDXL model, which this program does not train; {whole}."
    if _reads(file) in _SDXL_WIDTHS:
        return f"is the UNet of an SDXL model, which this program does not train; {whole}."
    if has("control_model.", "controlnet_"):
        return f"is a ControlNet; {whole}."
    if has(
        "model.diffusion_model.joint_blocks.",
        "model.diffusion_model.double_blocks.",
        "double_blocks.",
        "joint_blocks.",
    ):
        return f"is a transformer model (SD 3, Flux or the like), which this program does not train; {whole}."
    if set(names) <= {"emb_params", "*"} or has("string_to_param"):
        return f"is a textual-inversion embedding; {whole}."
    if has("down_blocks.", "text_model.", "encoder.down_blocks."):
        return "holds one network in diffusers' names; name the folder that holds model_index.json above it."
    has_unet, has_vae, has_text = has(UNET_PREFIX), has(VAE_PREFIX), has(_BARE_TEXT_PREFIX, OPEN_CLIP_PREFIX)
    if not has_unet and (has_vae or _VAE_SIGN in names):
        return f"is a VAE without a model; give it as `vae` and {whole} as `resume_ckpt`."
    if not has_unet:
        return f"is not a Stable Diffusion checkpoint: no tensor is named {UNET_PREFIX}...; {whole}."
    absent = [what for what, found in (("the VAE", has_vae), ("the text encoder", has_text)) if not found]
    if absent:
        return f"lacks {' and '.join(absent)}; {whole}."
    channels = names.get(UNET_PREFIX + "input_blocks.0.0.weight", (0, 4))[1]
    if channels != 4:
        return (
            f"is an inpainting or editing model (its UNet takes {channels} channels instead of 4); {whole}."
        )
    if has(UNET_PREFIX + "label_emb."):
        return f"is an unCLIP model or another whose UNet needs more than text, which this program does not give it; {whole}."
    return None


def _reads(file: TensorFile) -> int | None:
    """Return the width of the text that the UNet in a file reads, as the shape of its first cross-attention says."""
    if CONFIGS in file.metadata:  # it says itself what it is
        return None
    return next(
        (
            shape[1]
            for name, shape in file.shapes.items()
            if name.startswith(UNET_PREFIX) and name.endswith(_READS_TEXT)
        ),
        None,
    )


def _configs(file: TensorFile) -> Configs:
    if CONFIGS in file.metadata:
        try:
            configs = Configs(**json.loads(file.metadata[CONFIGS]))
            if not all(isinstance(config, dict) for config in vars(configs).values()):
                raise ValueError("a configuration is not an object")
            return configs
        except (ValueError, TypeError, RecursionError) as error:
            raise UserError(
                f"{_named(file)} is damaged ({first_line(error)}); export the file again."
            ) from error
    kind, _ = prediction(file)
    if _reads(file) != SD2_WIDTH:
        return Configs(
            unet=SD15.unet,
            text_encoder=SD15.text_encoder,
            vae=SD15.vae,
            scheduler={**SD15.scheduler, "prediction_type": kind},
        )
    if kind == "v_prediction":
        return SD2
    unet, vae = {**SD2.unet, **sd2.BASE["unet"]}, {**SD2.vae, **sd2.BASE["vae"]}
    return Configs(unet=unet, text_encoder=SD2.text_encoder, vae=vae, scheduler=sd2.BASE["scheduler"])


def _named(file: TensorFile) -> str:
    return f"{file.path}: the header field {CONFIGS}"


def _misfit(file: TensorFile, network: str, empty: Any, prefix: str) -> str | None:
    """Return what keeps a network from being read from a file, None where every tensor is there in its shape."""
    try:
        places = layout(network, empty.config, empty.state_dict(), prefix=prefix)
    except (ValueError, LookupError) as error:
        return first_line(error)
    shapes = {
        place.name: (place.shape, place.shape if place.third is not None else tuple(tensor.shape))
        for place, tensor in zip(places.values(), empty.state_dict().values(), strict=True)
    }
    missing = [name for name in shapes if name not in file.shapes]
    if missing:
        return f"{len(missing)} of {len(shapes)} tensors are missing, {missing[0]} among them"
    wrong = [name for name, accepted in shapes.items() if file.shapes[name] not in accepted]
    if wrong:
        first, (expected, _) = file.shapes[wrong[0]], shapes[wrong[0]]
        return f"{len(wrong)} of {len(shapes)} tensors have other shapes: {wrong[0]} is {first} instead of {expected}"
    return None
