"""Reading a single file in the original layout, without the hub and without any configuration beside it.

Configurations and tokenizer come from the file's header if this program wrote it (`sd_dadapt.configs`,
`sd_dadapt.tokenizer`), else from the published models of its family, which follows from the width of the text
that the UNet reads. The tensors of SD 2.x do not distinguish epsilon from v-prediction: without a header,
v-prediction is assumed and noted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

from trainer.errors import UserError, first_line
from trainer.models import family as families
from trainer.models.family import SD1, Configs, Family, TextReader, family_of
from trainer.models.networks import build, fill
from trainer.models.pipeline import Models
from trainer.models.single_file import NETWORKS, UNET_PREFIX, VAE_PREFIX, from_original, layout
from trainer.models.tensor_file import TensorFile
from trainer.models.tokenizer import clip_tokenizer, tokenizer_from_text

CONFIGS = "sd_dadapt.configs"
"""Header field: the four configurations as JSON."""

TOKENIZER = "sd_dadapt.tokenizer"
"""Header field: the tokenizer as JSON, if it is not its family's."""

PREDICTION_TYPE = "modelspec.prediction_type"
ARCHITECTURE = "modelspec.architecture"

_BARE_TEXT = replace(SD1.text, prefix=SD1.text.prefix.removesuffix("text_model."))
"""The text encoder in files of newer transformers."""

_VAE_SIGN = "encoder.conv_in.weight"

_READS_TEXT = ".attn2.to_k.weight"
_SDXL_WIDTHS = (1280, 2048)
"""Widths of the text that SDXL and its refiner read."""


def read_file(path: Path, key: str, *, weights: bool) -> Models:
    """Load a whole model from one file; without `weights`, on the meta device."""
    file = TensorFile(path)
    problem = what_else(file)
    if problem:
        raise UserError(f"{key}: {path} {problem}")
    configs = _configs(file)
    family = family_of(configs.unet.get("cross_attention_dim"))
    reader = _reader(file)
    networks: dict[str, Any] = {}
    for network in NETWORKS:
        config = getattr(configs, network)
        empty = build(network, config, _named(file))
        problem = _misfit(file, network, empty, reader=reader)
        if problem:
            raise UserError(f"{key}: {path} is not a {family.name} model: of its {network}, {problem}.")
        if weights:
            fill(empty, from_original(file, network, empty, reader=reader))
            empty.eval()
        networks[network] = empty
    if TOKENIZER in file.metadata:
        tokenizer = tokenizer_from_text(
            file.metadata[TOKENIZER], f"{file.path}: the header field {TOKENIZER}"
        )
    else:
        tokenizer = clip_tokenizer(family.text.pad)
    notes = ()
    if CONFIGS not in file.metadata and not prediction(file)[1]:
        notes = (
            f"{key}: {path} does not say what it predicts; v-prediction is assumed, as of SD 2.x at 768 px, "
            "but models of 512 px predict noise: where you are not certain, name the model's diffusers "
            "folder, whose scheduler says it.",
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

    `base`, the configuration of the VAE that it replaces, is tried if the file has no configuration and is
    not of SD 1.5's size. Without `weights` the network is on the meta device.

    Raises:
        UserError: the file is damaged or holds no VAE that fits.
    """
    file = TensorFile(path)
    prefix = next((start for start in (VAE_PREFIX, "", "vae.") if start + _VAE_SIGN in file.shapes), None)
    if prefix is None:
        raise UserError(
            f"{key}: {path} holds no VAE: there is no {_VAE_SIGN} in it; name a VAE's file or folder."
        )
    configs: list[Mapping[str, Any]] = (
        [_configs(file).vae] if CONFIGS in file.metadata else [families.FAMILIES[0].default.vae, base]
    )
    problems = []
    for config in configs:
        empty = build("vae", config, _named(file))
        shapes = {name: tuple(tensor.shape) for name, tensor in empty.state_dict().items()}
        own = {
            name.removeprefix(prefix): shape for name, shape in file.shapes.items() if name.startswith(prefix)
        }
        if own == shapes:  # diffusers' own names
            state = {name: file[prefix + name].float() for name in shapes} if weights else None
        else:
            problem = _misfit(file, "vae", empty, prefix=prefix)
            if problem:
                problems.append(problem)
                continue
            state = from_original(file, "vae", empty, prefix) if weights else None
        if state is not None:
            fill(empty, state)
            empty.eval()
        return empty
    raise UserError(f"{key}: {path} is not a VAE of Stable Diffusion 1.x or of this model: {problems[0]}.")


def family_of_file(file: TensorFile) -> Family:
    """Return the family of a whole model's file, by the text that its UNet reads."""
    return family_of(_reads(file))


def prediction(file: TensorFile) -> tuple[str, bool]:
    """Return the prediction type of a whole model's file, and False if it is assumed."""
    header, family = file.metadata.get(PREDICTION_TYPE), family_of_file(file)
    if header in ("v", "v_prediction"):
        return "v_prediction", True
    if header == "epsilon" or file.global_step in family.epsilon_steps:
        return "epsilon", True
    named = file.metadata.get(ARCHITECTURE, "")
    known = next((kind for kind, name in family.architectures.items() if named.startswith(name)), None)
    return known or family.prediction, known is not None or not family.ambiguous


def what_else(file: TensorFile) -> str | None:
    """Return what a file is and what to do; None if it looks like a whole SD 1.x or 2.x model."""
    names = file.shapes

    def has(*prefixes: str) -> bool:
        return any(name.startswith(prefixes) for name in names)

    whole = "name a whole Stable Diffusion 1.x or 2.x checkpoint"
    if any(
        ".lora_" in name or "lora_down." in name or name.startswith(("lora_unet_", "lora_te"))
        for name in names
    ):
        return (
            "is a LoRA, a small change to a model; merge it into its base with the tool that made it, "
            f"or {whole}."
        )
    if has("conditioner.embedders."):
        return f"is an SDXL model, which this program does not train; {whole}."
    if _reads(file) in _SDXL_WIDTHS:
        return f"is the UNet of an SDXL model, which this program does not train; {whole}."
    if has("control_model.", "controlnet_"):
        return f"is a ControlNet; {whole}."
    transformer = ("joint_blocks.", "double_blocks.")
    if has(*transformer, *(f"model.diffusion_model.{start}" for start in transformer)):
        return f"is a transformer model (SD 3, Flux or the like), which this program does not train; {whole}."
    if set(names) <= {"emb_params", "*"} or has("string_to_param"):
        return f"is a textual-inversion embedding; {whole}."
    if has("down_blocks.", "text_model.", "encoder.down_blocks."):
        return "holds one network in diffusers' names; name the folder that holds model_index.json above it."
    has_unet, has_vae, has_text = has(UNET_PREFIX), has(VAE_PREFIX), _reader(file)
    if not has_unet and (has_vae or _VAE_SIGN in names):
        return f"is a VAE without a model; give it as `vae` and {whole} as `resume_ckpt`."
    if not has_unet:
        return f"is not a Stable Diffusion checkpoint: no tensor is named {UNET_PREFIX}...; {whole}."
    absent = [part for part, found in (("the VAE", has_vae), ("the text encoder", has_text)) if not found]
    if absent:
        return f"lacks {' and '.join(absent)}; {whole}."
    channels = names.get(UNET_PREFIX + "input_blocks.0.0.weight", (0, 4))[1]
    if channels != 4:
        takes = f"its UNet takes {channels} channels instead of 4"
        return f"is an inpainting or editing model ({takes}); {whole}."
    if has(UNET_PREFIX + "label_emb."):
        needs = "whose UNet needs more than text, which this program does not give it"
        return f"is an unCLIP model or another {needs}; {whole}."
    return None


def _reads(file: TensorFile) -> int | None:
    """Return the width of the text that a file's UNet reads, by the shape of its first cross-attention."""
    if CONFIGS in file.metadata:  # the header is certain
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
    return family_of_file(file).configs[prediction(file)[0]]


def _reader(file: TensorFile) -> TextReader | None:
    """Return the names of a file's text encoder; None without one."""
    readers = (*(family.text for family in reversed(families.FAMILIES)), _BARE_TEXT)
    return next((each for each in readers if any(name.startswith(each.prefix) for name in file)), None)


def _named(file: TensorFile) -> str:
    return f"{file.path}: the header field {CONFIGS}"


def _misfit(
    file: TensorFile, network: str, empty: Any, prefix: str | None = None, reader: TextReader | None = None
) -> str | None:
    """Return why a network cannot be read from a file; None if every tensor is there in its shape."""
    try:
        places = layout(network, empty.config, empty.state_dict(), prefix=prefix, reader=reader)
    except (ValueError, LookupError) as error:
        return first_line(error)
    shapes = {
        place.name: (place.shape, place.shape if place.third is not None else tuple(tensor.shape))
        for place, tensor in zip(places.values(), empty.state_dict().values(), strict=True)
    }
    if missing := [name for name in shapes if name not in file.shapes]:
        return f"{len(missing)} of {len(shapes)} tensors are missing, {missing[0]} among them"
    if wrong := [name for name, accepted in shapes.items() if file.shapes[name] not in accepted]:
        found, (expected, _) = file.shapes[wrong[0]], shapes[wrong[0]]
        shape = f"{wrong[0]} is {found} instead of {expected}"
        return f"{len(wrong)} of {len(shapes)} tensors have other shapes: {shape}"
    return None
