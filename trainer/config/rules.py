"""What keys of train.json mean together: contradictions are problems, keys that cannot act are notes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from trainer.config.report import Place, Report, Written
from trainer.config.schema import TrainConfig
from trainer.errors import UserError

HIGH_LR = 1e-5
"""The largest AdamW rate that a full fine-tune of Stable Diffusion is known to bear."""

FULL_SIZE = 500_000_000
"""Trained parameters from which a run counts as a full fine-tune."""


class Unknown(Exception):
    """A rule asked for a key whose value is wrong, which is reported already."""


@dataclass(frozen=True)
class Settings:
    """The value of every key, defaults included, and which were written where.

    Looking up a key whose value is wrong raises `Unknown`.
    """

    values: Mapping[str, Any]
    written: Mapping[str, Written]
    default: Place
    """The place of what was not written."""

    def __getitem__(self, key: str) -> Any:
        if key not in self.values:
            raise Unknown(key)
        return self.values[key]

    def place(self, *keys: str) -> Place:
        """Return where the first of `keys` that was written stands."""
        return next((self.written[key].place for key in keys if key in self.written), self.default)


def apply_rules(settings: Settings, report: Report) -> None:
    """Report what contradicts or does nothing; a rule about a wrong value is left out."""
    for rule in _RULES:
        try:
            rule(settings, report)
        except Unknown:
            continue


def resolved(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values with every key that only says the same as another one applied to that other one."""
    return {
        **values,
        **({"mixed_precision": "no"} if values["disable_amp"] else {}),
        **({"save_format": "diffusers"} if values["no_save_ckpt"] else {}),
        **({"attn_type": "sdp"} if values["attn_type"] == "xformers" else {}),
        "lr_decay_steps": values["lr_decay_steps"] or None,
    }


def check_rates(config: TrainConfig, trained_parameters: Mapping[str, int]) -> None:
    """Refuse rates that are known to ruin a full-size model, unless `allow_high_lr` is set.

    Args:
        config: the run.
        trained_parameters: how many parameters of each network, "unet" and "text encoder", are trained.

    Raises:
        UserError: more than 500 million parameters are trained and an optimizer that does not find its own rate has an lr above 1e-5.
    """
    total = sum(trained_parameters.values())
    if config.rates.allow_high_lr or total <= FULL_SIZE:
        return
    networks = {"unet": ("base", config.optimizers.unet), "text encoder": ("text_encoder_overrides", config.optimizers.text_encoder)}
    raise_for = [
        f"{config.optimizer_source.name}: {section}.lr: {options.optimizer} at {options.lr:g} ruins a model of this size "
        f"({total / 1e6:.0f} million trained parameters); set lr to {HIGH_LR:g} or less (1e-6 is usual) there or in "
        f"{config.source.name}, or set allow_high_lr to true"
        for network, (section, options) in networks.items()
        if trained_parameters.get(network) and not options.adapts and (options.lr or 0) > HIGH_LR
    ]
    if raise_for:
        raise UserError(raise_for)


def _timesteps(settings: Settings, report: Report) -> None:
    start, end = settings["timestep_start"], settings["timestep_end"]
    if start >= end:
        place = settings.place("timestep_start", "timestep_end")
        report.error(place, f"no timestep is left to train: timestep_start {start} must be less than timestep_end {end}")


def _nothing_trained(settings: Settings, report: Report) -> None:
    if settings["disable_textenc_training"] and settings["disable_unet_training"]:
        place = settings.place("disable_unet_training")
        report.error(place, "nothing is left to train together with disable_textenc_training; set one of the two to false")


def _precision(settings: Settings, report: Report) -> None:
    wanted = settings["mixed_precision"]
    if settings["disable_amp"] and wanted in ("bf16", "fp16"):
        switch = settings.written["disable_amp"].place.key
        off = "disable_amp: true" if switch == "disable_amp" else f"{switch}: false"
        report.error(settings.place("mixed_precision"), f"{wanted} contradicts {off}; remove one of the two")


def _saving(settings: Settings, report: Report) -> None:
    single = settings["save_format"] != "diffusers" and not settings["no_save_ckpt"]
    if settings["no_save_ckpt"] and settings["save_format"] != "diffusers" and "save_format" in settings.written:
        wanted = settings["save_format"]
        report.error(
            settings.place("save_format"), f"{wanted} contradicts no_save_ckpt: true, which is save_format diffusers; remove one of the two"
        )
        return
    for key in ("save_full_precision", "save_ckpt_dir"):
        if settings[key] and not single:
            report.note(settings.place(key), "has no effect: no single file is written (see save_format)")


def _cadence(settings: Settings, report: Report) -> None:
    first, epochs = settings["save_ckpts_from_n_epochs"], settings["max_epochs"]
    every = settings["save_every_n_epochs"]
    if first and every is None:
        report.note(settings.place("save_ckpts_from_n_epochs"), "has no effect without save_every_n_epochs")
    elif first > epochs:
        report.note(settings.place("save_ckpts_from_n_epochs"), f"the only checkpoint is the one at the end: max_epochs is {epochs}")
    elif every is not None and every > epochs:
        report.note(settings.place("save_every_n_epochs"), f"the only checkpoint is the one at the end: max_epochs is {epochs}")


def _attention(settings: Settings, report: Report) -> None:
    if settings["attn_type"] == "xformers":
        report.note(settings.place("attn_type"), "xformers is not used; torch's own attention (sdp) takes its place")


def _names(settings: Settings, report: Report) -> None:
    for key in ("project_name", "run_name"):
        name = settings[key]
        odd = next((character for character in name or "" if character in '/\\:*?"<>|' or character < " "), None)
        if odd is not None:
            report.error(settings.place(key), f"becomes part of file names and must not hold {odd!r}; got '{name}'")


_RULES: tuple[Callable[[Settings, Report], None], ...] = (_timesteps, _nothing_trained, _precision, _saving, _cadence, _attention, _names)
