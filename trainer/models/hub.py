"""Models by hub id: a complete copy in the cache, or a download of the files that training needs."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from trainer.errors import UserError
from trainer.models.folder import INDEX, WEIGHTS, check_index, choose_weights

_SETTINGS = (INDEX, "scheduler/*.json", "tokenizer/*", "unet/*.json", "vae/*.json", "text_encoder/*.json")

_REVISIONS = {"resume_ckpt": "revision", "vae": "vae_revision", "ema_resume_model": "ema_resume_revision"}
"""By key of a model, the key of its revision."""


class HubUnreachable(UserError):
    """The hub did not answer."""


def cached_model(name: str, revision: str | None = None) -> Path | None:
    """Return the folder of a model's revision, by default its main branch, if the cache holds all of it."""
    folder = _cached(name, INDEX, revision)
    if folder is None or any(_choice(folder / network, network) is None for network in WEIGHTS):
        return None
    return folder


def cached_vae(name: str, revision: str | None = None) -> Path | None:
    """Return the folder of a VAE, or of a model's VAE, if the cache holds it."""
    for config, inside in (("config.json", "."), ("vae/config.json", "vae")):
        found = _cached(name, config, revision)
        if found is not None and _choice(found / inside, "vae") is not None:
            return found / inside
    return None


def fetch_model(name: str, key: str, *, weights: bool, revision: str | None = None) -> Path:
    """Download a model and return its folder; without weights, only its configuration and tokenizer.

    Raises:
        HubUnreachable: the hub did not answer.
        UserError: the hub does not know the id, or it is no Stable Diffusion model.
    """
    files = _listed(name, key, revision)
    if INDEX not in files:
        raise UserError(
            f"{key}: {name} on the hub is no diffusers model: it holds no {INDEX}; name another, or download "
            "its single file."
        )
    settings = _downloaded(name, key, [*_SETTINGS], revision)
    check_index(settings, key, name)
    wanted = [*_SETTINGS]
    for network in WEIGHTS:
        choice = choose_weights(
            [file.removeprefix(f"{network}/") for file in files if file.startswith(f"{network}/")], network
        )
        if choice is None:
            raise UserError(
                f"{key}: {name} on the hub holds no weights of the {network}; name another model."
            )
        wanted += [f"{network}/{file}" for file in choice.files]
    return _downloaded(name, key, wanted, revision) if weights else settings


def fetch_vae(name: str, key: str, revision: str | None = None) -> Path:
    """Return the folder of a VAE, downloaded unless it is cached; of a whole model, only its VAE."""
    cached = cached_vae(name, revision)
    if cached is not None:
        return cached
    files = _listed(name, key, revision)
    inside = "vae/" if "vae/config.json" in files else ""
    choice = choose_weights([file.removeprefix(inside) for file in files if file.startswith(inside)], "vae")
    if choice is None or f"{inside}config.json" not in files:
        raise UserError(
            f"{key}: {name} on the hub holds no VAE in diffusers' layout; name another, or download its "
            "single file."
        )
    wanted = [f"{inside}{file}" for file in ("config.json", *choice.files)]
    return _downloaded(name, key, wanted, revision) / inside


def commit_of(folder: Path) -> str | None:
    """Return the commit of a folder in the hub cache, None for a folder elsewhere."""
    places = (folder, *folder.parents)
    return next((place.name for place in places if place.parent.name == "snapshots"), None)


def _cached(name: str, file: str, revision: str | None = None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, file, revision=revision)
    if not isinstance(found, str):
        return None
    return Path(found).parents[file.count("/")]


def _choice(folder: Path, network: str) -> object | None:
    return (
        choose_weights([path.name for path in folder.iterdir() if path.is_file()], network)
        if folder.is_dir()
        else None
    )


def _listed(name: str, key: str, revision: str | None = None) -> Collection[str]:
    from huggingface_hub import HfApi

    try:
        return {
            sibling.rfilename
            for sibling in HfApi().model_info(name, revision=revision, timeout=20).siblings or ()
        }
    except Exception as error:  # several HTTP libraries' errors come through, by version and kind of failure
        raise _unavailable(name, key, error) from error


def _downloaded(name: str, key: str, wanted: list[str], revision: str | None = None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except Exception as error:  # several HTTP libraries' errors come through, by version and kind of failure
        raise _unavailable(name, key, error) from error


def _unavailable(name: str, key: str, error: Exception) -> UserError:
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    local = f"or give {key} the path of a local diffusers folder or .safetensors file."
    if isinstance(error, GatedRepoError):
        return UserError(
            f"{key}: {name} on the hub asks for consent: accept its terms on its page and run "
            f"`hf auth login`, {local}"
        )
    if isinstance(error, RepositoryNotFoundError):
        return UserError(
            f"{key}: the hub knows no model {name} (or it is private: run `hf auth login`); correct the id, "
            f"{local}"
        )
    if isinstance(error, RevisionNotFoundError):
        return UserError(
            f"{_REVISIONS[key]}: {name} on the hub has no such revision; correct it, or set it to null for "
            "the main branch."
        )
    if isinstance(error, HFValidationError):
        return UserError(
            f"{key}: {name} is neither a folder, a file nor a possible hub id; correct it, {local}"
        )
    reason = "HF_HUB_OFFLINE is set" if isinstance(error, OfflineModeIsEnabled) else _first_line(error)
    return HubUnreachable(
        f"{key}: {name} is not complete in the hub cache ({constants.HF_HUB_CACHE}) and cannot be "
        f"downloaded ({reason}); run `hf download {name}` where there is internet and copy the cache, {local}"
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
