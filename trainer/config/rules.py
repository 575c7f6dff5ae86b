"""The rules between keys of train.json: contradictions are problems, keys without effect are notes."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config.report import COMMAND_LINE, Place, Report, Written
from trainer.config.schema import keys_of
from trainer.models.options import EmaOptions
from trainer.output import clean, shown_path

LONGEST_NAME = 150
"""Bytes. File systems allow 255; a checkpoint adds up to 80: kind, epoch, step and two endings."""

_SAME = (
    ("no_save_ckpt", "save_format"),
    ("disable_amp", "mixed_precision"),
    ("ema_decay_rate", "ema_strength_target"),
)
"""Pairs of keys that set the same thing in two ways."""


class Unknown(Exception):
    """A rule read a key whose value is wrong, which is reported already."""


@dataclass(frozen=True)
class Settings:
    """The value of every key, defaults included, and the written ones with their places.

    Reading a key whose value is wrong raises `Unknown`.
    """

    values: Mapping[str, Any]
    written: Mapping[str, Written]
    default: Place
    """The place of a key that was not written."""
    report: Report

    def __getitem__(self, key: str) -> Any:
        if key not in self.values:
            raise Unknown(key)
        return self.values[key]

    def place(self, *keys: str) -> Place:
        """Return the place of the first of `keys` that was written."""
        return next((self.written[key].place for key in keys if key in self.written), self.default)

    def error(self, sentence: str, *keys: str) -> None:
        """Report a problem at the first of `keys` that was written."""
        self.report.error(self.place(*keys), sentence)

    def note(self, sentence: str, *keys: str) -> None:
        """Report a note at the first of `keys` that was written."""
        self.report.note(self.place(*keys), sentence)


def drop_overridden(written: dict[str, Written]) -> None:
    """Remove a file's key of a pair in `_SAME` if the command line sets the other one."""
    for winner, other in (order for pair in _SAME for order in (pair, pair[::-1])):
        on = winner in written and other in written and written[winner].value not in (None, False)
        if on and written[winner].place.file == COMMAND_LINE != written[other].place.file:
            del written[other]


def apply_rules(settings: Settings) -> None:
    """Report contradictions and keys without effect; a rule about a wrong value is skipped."""
    for rule in _RULES:
        try:
            rule(settings)
        except Unknown:
            continue


def resolved(values: Mapping[str, Any]) -> dict[str, Any]:
    """Apply aliases: a key that duplicates another sets that one."""
    return {
        **values,
        **({"mixed_precision": "no"} if values["disable_amp"] else {}),
        **({"save_format": "diffusers"} if values["no_save_ckpt"] else {}),
        **({"attn_type": "sdp"} if values["attn_type"] == "xformers" else {}),
        "lr_decay_steps": values["lr_decay_steps"] or None,
    }


def _objective(settings: Settings) -> None:
    start, end = settings["timestep_start"], settings["timestep_end"]
    if start >= end:
        settings.error(
            f"no timestep is left to train: timestep_start {start} must be less than timestep_end {end}",
            "timestep_start",
            "timestep_end",
        )
    if settings["enable_zero_terminal_snr"] and end < 1000:
        settings.note(
            f"has little effect: the last timestep is not trained, timestep_end is {end}",
            "enable_zero_terminal_snr",
        )
    if settings["enable_zero_terminal_snr"] and settings["min_snr_gamma"] is not None:
        settings.note(
            "weights a timestep without signal by 0, and those before it by almost 0, which are the ones "
            "that enable_zero_terminal_snr is about; null lets them be learned",
            "min_snr_gamma",
        )


def _clip_skip(settings: Settings) -> None:
    if settings["clip_skip"] == 1:
        settings.note("1 is the last layer, as 0 is; the penultimate one is 2", "clip_skip")


def _ema(settings: Settings) -> None:
    rate, strength = settings["ema_decay_rate"], settings["ema_strength_target"]
    if rate is not None and strength is not None:
        settings.error(
            f"contradicts ema_decay_rate {rate:g}, which it would replace; set one of the two to null",
            "ema_strength_target",
        )
    if rate is None and strength is None:
        for name, key in keys_of(EmaOptions).items():
            if settings[name] != key.default:
                settings.note("has no effect without ema_decay_rate or ema_strength_target", name)
    elif settings["ema_sample_nonema_model"] and not settings["ema_sample_ema_model"]:
        settings.note(
            "has no effect without ema_sample_ema_model: samples are of the trained weights anyway",
            "ema_sample_nonema_model",
        )


def _validation(settings: Settings) -> None:
    for key in ("keep_best", "stop_on_overfit") if settings["validation_config"] is None else ():
        if settings[key]:
            settings.error(
                "needs a validation loss, and validation_config names no file; name one, or set it to false",
                key,
            )


def _nothing_trained(settings: Settings) -> None:
    if settings["disable_textenc_training"] and settings["disable_unet_training"]:
        settings.error(
            "nothing is left to train together with disable_textenc_training; set one of the two to false",
            "disable_unet_training",
        )


def _stopped_text(settings: Settings) -> None:
    epochs, key = settings["stop_textenc_after_n_epochs"], "stop_textenc_after_n_epochs"
    if epochs is None:
        return
    if settings["disable_textenc_training"]:
        settings.error("contradicts disable_textenc_training: true; set it to null", key)
    if settings["disable_unet_training"]:
        settings.error("leaves nothing to train with disable_unet_training: true; set it to null", key)
    if epochs >= settings["max_epochs"]:
        settings.error(
            f"{epochs:g} must be less than max_epochs, {settings['max_epochs']}; null never freezes the text "
            "encoder",
            key,
        )


def _precision(settings: Settings) -> None:
    wanted = settings["mixed_precision"]
    if settings["disable_amp"] and wanted in ("bf16", "fp16"):
        switch = settings.written["disable_amp"].place.key
        off = "disable_amp: true" if switch == "disable_amp" else f"{switch}: false"
        settings.error(f"{wanted} contradicts {off}; remove one of the two", "mixed_precision")


def _saving(settings: Settings) -> None:
    wanted = settings["save_format"]
    if settings["no_save_ckpt"] and wanted != "diffusers" and "save_format" in settings.written:
        settings.error(
            f"{wanted} contradicts no_save_ckpt: true, which is save_format diffusers; remove one of the two",
            "save_format",
        )
    elif settings["no_save_ckpt"] or wanted == "diffusers":
        for key in ("save_full_precision", "save_ckpt_dir"):
            if settings[key]:
                settings.note("has no effect: no single file is written (see save_format)", key)


def _keeping(settings: Settings) -> None:
    resumable, models = settings["keep_resume_n"], settings["keep_last_n"]
    if "keep_resume_n" not in settings.written:
        return
    if models is not None and resumable > models:
        settings.error(
            f"{resumable} checkpoints to resume from need as many models: keep_last_n {models} must be at "
            "least that",
            "keep_resume_n",
        )
    if settings["save_optimizer"]:
        settings.note("has no effect: save_optimizer keeps the state of every checkpoint", "keep_resume_n")


def _cadence(settings: Settings) -> None:
    first, every = settings["save_ckpts_from_n_epochs"], settings["save_every_n_epochs"]
    epochs = settings["max_epochs"]
    if first and every is None:
        settings.note("has no effect without save_every_n_epochs", "save_ckpts_from_n_epochs")
    elif max(first, every or 0) > epochs:
        key = "save_ckpts_from_n_epochs" if first > epochs else "save_every_n_epochs"
        settings.note(f"the only checkpoint is the one at the end: max_epochs is {epochs}", key)


def _tags(settings: Settings) -> None:
    if settings["keep_tags"] and not settings["shuffle_tags"] and not settings["tag_dropout"]:
        settings.note(
            "has no effect without shuffle_tags or tag_dropout, but where a folder or an image shuffles",
            "keep_tags",
        )


def _lora(settings: Settings) -> None:
    if settings["lora"] is None:
        return
    if settings["ema_resume_model"] is not None:
        settings.error(
            "contradicts lora: a model holds no LoRA adapters for the EMA to start from; set it to null",
            "ema_resume_model",
        )
    if settings["lora"].dora and settings["save_format"] != "diffusers" and not settings["no_save_ckpt"]:
        settings.error(
            "dora has no single file, since web UIs and diffusers misread it; set save_format to diffusers",
            "lora",
        )
    if settings["lora"].dora and settings["compile"]:
        settings.note("a DoRA breaks the compiled passes at each of its layers", "compile")
    if settings["enable_zero_terminal_snr"]:
        settings.note(
            "a LoRA file cannot hold a noise schedule: set rescale_betas_zero_snr and timestep_spacing "
            "trailing wherever you draw with it",
            "enable_zero_terminal_snr",
        )


def _revisions(settings: Settings) -> None:
    for key, model in (("vae_revision", "vae"), ("ema_resume_revision", "ema_resume_model")):
        named = settings[model]
        if settings[key] is not None and (named is None or Path(named).is_absolute()):
            settings.error(
                f"{model} is not on the hub, and only models there have revisions; set it to null", key
            )


def _attention(settings: Settings) -> None:
    if settings["attn_type"] == "xformers":
        settings.note("xformers is not used; torch's own attention (sdp) takes its place", "attn_type")


def _cache(settings: Settings) -> None:
    wanted = settings["cache_latents"]
    if wanted in ("disk", "memory") and settings["crop_jitter"] > 0:
        settings.error(
            f"{wanted} contradicts crop_jitter {settings['crop_jitter']:g}, with which no two crops are "
            "equal; set one of the two to its default",
            "cache_latents",
        )


def _folders(settings: Settings) -> None:
    roots, logdir = settings["data_root"], Path(settings["logdir"]).resolve()
    for root in map(Path, [roots] if isinstance(roots, str) else roots):
        real = root.resolve()
        inside = logdir.relative_to(real).parts if root.is_dir() and logdir.is_relative_to(real) else None
        if inside is not None and not any(part.startswith(".") for part in inside):  # hidden ones are skipped
            settings.error(
                f"the folder {settings['logdir']} lies inside the images' {shown_path(root)}, so that the "
                "next run would train the samples of this one; name a folder outside",
                "logdir",
                "data_root",
            )


def _wandb(settings: Settings) -> None:
    if settings["wandb"] and importlib.util.find_spec("wandb") is None:
        settings.error(
            "true needs the package wandb, which is not installed: pip install wandb, or set it to false",
            "wandb",
        )


def _names(settings: Settings) -> None:
    for key in ("project_name", "run_name"):
        name = settings[key] or ""
        odd = next((letter for letter in name if letter in '/\\:*?"<>|' or clean(letter) != letter), None)
        if odd is not None:
            settings.error(f"becomes part of file names and must not hold {odd!r}; got '{name}'", key)
    size = sum(len((settings[key] or "").encode()) for key in ("project_name", "run_name"))
    if size > LONGEST_NAME:
        settings.error(
            f"project_name and run_name become file names and may have {LONGEST_NAME} bytes together, and "
            f"have {size}; shorten them",
            "run_name",
            "project_name",
        )


_RULES: tuple[Callable[[Settings], None], ...] = (
    _objective,
    _clip_skip,
    _ema,
    _validation,
    _nothing_trained,
    _stopped_text,
    _precision,
    _saving,
    _keeping,
    _cadence,
    _attention,
    _tags,
    _lora,
    _revisions,
    _cache,
    _folders,
    _wandb,
    _names,
)
