"""Loading a Stable Diffusion model: a diffusers folder, a hub id or one file in the original layout."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from trainer.errors import UserError
from trainer.models.checkpoint_file import read_file, read_vae_file
from trainer.models.family import SD1
from trainer.models.folder import read_folder, read_vae_folder
from trainer.models.hub import HubUnreachable, cached_model, cached_vae, commit_of, fetch_model, fetch_vae
from trainer.models.networks import empty_models
from trainer.models.options import ModelOptions
from trainer.models.pipeline import Models
from trainer.models.quiet import quiet_libraries
from trainer.models.tokenizer import clip_tokenizer
from trainer.models.trial import complete, try_model, try_vae


def load_models(options: ModelOptions, key: str = "resume_ckpt") -> Models:
    """Load the networks in fp32 on the CPU; a hub id is downloaded unless it is cached.

    Prints nothing but a download's progress. The safety checker and its image processor are never read.
    `key` names the model in messages.

    Raises:
        UserError: nothing is there, it is damaged, cannot be downloaded or is another kind of model.
    """
    return _load(options, key, weights=True)


def describe(options: ModelOptions, key: str = "resume_ckpt") -> Models:
    """Return the same networks on the meta device, without weights; of a hub id, download configurations.

    Where the hub does not answer either, SD 1.5's configurations describe the model, and `notes` says so.

    Raises:
        UserError: as `load_models`, as far as it shows without reading weights.
    """
    return _load(options, key, weights=False)


def _load(options: ModelOptions, key: str, *, weights: bool) -> Models:
    quiet_libraries()
    models = _base(options.resume_ckpt, options.revision, key, weights=weights)
    _check(models, key)
    if options.vae is not None:
        _replace_vae(models, options.vae, options.vae_revision, weights=weights)
    return models


def _base(name: str, revision: str | None, key: str, *, weights: bool) -> Models:
    path = Path(name).expanduser()
    if path.is_dir():
        return read_folder(path, key, weights=weights)
    if path.is_file():
        _check_kind(path, key)
        return read_file(path, key, weights=weights)
    _check_hub_id(name, key)
    folder = cached_model(name, revision)
    if folder is not None:
        return replace(read_folder(folder, key, weights=weights, source=name), revision=commit_of(folder))
    try:
        folder = fetch_model(name, key, weights=False, revision=revision)
    except HubUnreachable:
        if weights:
            raise
        return _assumed(name, key)
    described = read_folder(folder, key, weights=False, source=name, weights_follow=True)
    if weights:
        _check(described, key)  # before gigabytes are downloaded
        folder = fetch_model(name, key, weights=True, revision=revision)
        return replace(read_folder(folder, key, weights=True, source=name), revision=commit_of(folder))
    return replace(
        described,
        revision=commit_of(folder),
        notes=(f"{key}: {name} is not in the hub cache and is downloaded when training starts.",),
    )


def _replace_vae(models: Models, name: str, revision: str | None, *, weights: bool) -> None:
    key = "vae"
    path = Path(name).expanduser()
    before: Any = models.vae.config
    if path.is_dir():
        models.vae = read_vae_folder(path, key, weights=weights)
    elif path.is_file():
        _check_kind(path, key)
        models.vae = read_vae_file(path, key, before, weights=weights)
    else:
        _check_hub_id(name, key)
        folder = fetch_vae(name, key, revision) if weights else cached_vae(name, revision)
        if folder is None:
            models.notes += (f"vae: {name} is not in the hub cache and is downloaded when training starts.",)
            return
        models.vae = read_vae_folder(folder, key, weights=weights)
        models.vae_revision = commit_of(folder)
    try_vae(models.vae, f"{key}: {name}")
    after: Any = models.vae.config
    for what, old, new in (
        ("latent channels", before["latent_channels"], after["latent_channels"]),
        ("levels", len(before["block_out_channels"]), len(after["block_out_channels"])),
    ):
        if old != new:
            raise UserError(
                f"{key}: {name} has {new} {what} where this model's own VAE has {old}; "
                "name a VAE made for this kind of model."
            )


def _assumed(name: str, key: str) -> Models:
    """Return SD 1.5's shapes for a model that has yet to be downloaded."""
    return replace(
        empty_models(SD1.default, clip_tokenizer(), name),
        notes=(
            f"{key}: {name} is not in the hub cache, and the hub does not answer: the kind of model is "
            "unknown until it is downloaded; sizes here are SD 1.5's.",
        ),
        assumed=True,
    )


def _check(models: Models, key: str) -> None:
    """Complete omitted settings; raise UserError unless the parts fit together, work, and can be trained."""
    unet: Any = models.unet.config
    where = f"{key}: {models.source}"
    taken, made = unet["in_channels"], models.vae.config["latent_channels"]
    if taken != 4 or made != 4:
        raise UserError(
            f"{where}: the UNet takes {taken} channels and the VAE makes {made}; both must be 4 (inpainting "
            "and editing models are not trained); name a text-to-image model."
        )
    extra = [
        part
        for part in ("addition_embed_type", "class_embed_type", "num_class_embeds", "encoder_hid_dim_type")
        if unet.get(part)
    ]
    if extra:
        raise UserError(
            f"{where}: the UNet needs more than text ({extra[0]}), which this program does not give it; name "
            "a Stable Diffusion 1.x or 2.x model."
        )
    width: Any = models.text_encoder.config.hidden_size
    read = unet["cross_attention_dim"]
    if read != width:
        raise UserError(
            f"{where}: the text encoder is {width} wide and the UNet reads {read}; "
            "the parts are of different models."
        )
    entries: Any = models.text_encoder.config.vocab_size
    known = len(models.tokenizer)
    if known > entries:
        raise UserError(
            f"{where}: the tokenizer has {known} entries and the text encoder {entries}; "
            "the parts are of different models."
        )
    complete(models, where)
    try_model(models, where)


def _check_kind(path: Path, key: str) -> None:
    if path.suffix.lower() not in (".safetensors", ".ckpt"):
        raise UserError(
            f"{key}: {path} is a {path.suffix or 'nameless'} file; name a .safetensors or .ckpt file, "
            "a diffusers folder or a hub id."
        )


def _check_hub_id(name: str, key: str) -> None:
    """Raise UserError where a name can only be a path at which nothing is."""
    part = r"[A-Za-z0-9][\w.-]*"
    owner = Path(name.partition("/")[0])
    if (
        re.fullmatch(rf"{part}/{part}", name) is None
        or Path(name).suffix.lower() in (".safetensors", ".ckpt")
        or owner.is_dir()
    ):
        raise UserError(
            f"{key}: there is no folder or file {name}; name a diffusers folder, "
            "a .safetensors file or a hub id (owner/name)."
        )
