"""What keys of train.json mean together: contradictions are problems, keys that cannot act are notes."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trainer.config.report import COMMAND_LINE, Place, Report, Written
from trainer.config.schema import OptimizerConfig, TrainConfig, keys_of, optimizer_classes
from trainer.errors import UserError
from trainer.models.ema import EmaOptions
from trainer.optim import OptimizerOptions
from trainer.output import clean

if TYPE_CHECKING:
    from trainer.training.precision import Precision

HIGH_LR = 1e-5
"""The largest AdamW rate that a full fine-tune of Stable Diffusion is known to bear."""

LORA_LR = 1e-4
"""A usual AdamW rate of a LoRA."""

FULL_SIZE = 500_000_000
"""Trained parameters from which a run counts as a full fine-tune."""

LONGEST_NAME = 150
"""Bytes; of the 255 that file systems allow, checkpoints add up to 80: their kind, epoch, step, ending and that of a draft."""

_SAME = (
    ("no_save_ckpt", "save_format"),
    ("disable_amp", "mixed_precision"),
    ("ema_decay_rate", "ema_strength_target"),
)
"""Pairs of keys that set the same thing in two ways."""


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


def drop_overridden(written: dict[str, Written]) -> None:
    """Remove from `written` what a file sets by the one key of a pair in `_SAME` and the command line by the other."""
    for said, other in (order for pair in _SAME for order in (pair, pair[::-1])):
        on = said in written and other in written and written[said].value not in (None, False)
        if on and written[said].place.file == COMMAND_LINE != written[other].place.file:
            del written[other]


def apply_rules(settings: Settings, report: Report) -> None:
    """Report what contradicts or does nothing; a rule about a wrong value is left out."""
    for rule in _RULES:
        try:
            rule(settings, report)
        except Unknown:
            continue


def apply_optimizer_rules(settings: Settings, optimizers: OptimizerConfig, file: str, report: Report) -> None:
    """Report what train.json and the optimizer file contradict each other in.

    Args:
        settings: of train.json.
        optimizers: what the optimizer file asks for.
        file: the optimizer file, as messages call it.
        report: where problems go.
    """
    try:
        sections = {
            **({} if settings["disable_unet_training"] else {"base": optimizers.unet}),
            **(
                {}
                if settings["disable_textenc_training"]
                else {"text_encoder_overrides": optimizers.text_encoder}
            ),
        }
        _fused_backward(settings, sections, file, report)
        _compiled(settings, sections, report)
        _high_rates(settings, sections, report)
        _clipping(settings, sections, report)
        _weights(settings, sections, file, report)
        _lora_rates(settings, sections, optimizers, file, report)
    except Unknown:
        return


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
        UserError: more than 500 million parameters are trained and an optimizer that does not find its own
        rate has an lr above 1e-5.
    """
    total = sum(trained_parameters.values())
    if config.rates.allow_high_lr or total <= FULL_SIZE:
        return
    networks = {
        "unet": ("base", config.optimizers.unet),
        "text encoder": ("text_encoder_overrides", config.optimizers.text_encoder),
    }
    raise_for = [
        f"{config.optimizer_source.name}: {section}.lr: {options.optimizer} at {options.lr:g} ruins a model of this size "
        f"({total / 1e6:.0f} million trained parameters); set lr to {HIGH_LR:g} or less (1e-6 is usual) there or in "
        f"{config.source.name}, or set allow_high_lr to true"
        for network, (section, options) in networks.items()
        if trained_parameters.get(network) and not options.adapts and (options.lr or 0) > HIGH_LR
    ]
    if raise_for:
        raise UserError(raise_for)


def check_fused_backward(config: TrainConfig, precision: Precision | None = None, processes: int = 1) -> None:
    """Refuse fused backward where the device brings fp16's scaler, or others train too.

    Raises:
        UserError: an optimizer has fused_backward, and mixed_precision auto has become fp16, or there are
        several processes.
    """
    fused = [
        options
        for options in (config.optimizers.unet, config.optimizers.text_encoder)
        if getattr(options, "fused_backward", False)
    ]
    if fused and processes > 1:
        raise UserError(
            f"{processes} processes were launched, which contradicts fused_backward: it updates the weights inside the backward pass, "
            f"before gradients are averaged over processes; set fused_backward to false in {config.optimizer_source.name}, or start one "
            "process."
        )
    if fused and precision is not None and precision.scaler is not None:
        raise UserError(
            f"mixed_precision: auto is fp16 on {precision.device}, which has no native bf16, and fp16 contradicts fused_backward: "
            f"whether a scaled gradient has overflowed is known too late; set fused_backward to false in {config.optimizer_source.name}, "
            "or mixed_precision to no."
        )


def check_schedules(config: TrainConfig, total_steps: int) -> list[str]:
    """Return notes about courses of the rate that fit the run badly.

    Args:
        config: the run.
        total_steps: its optimizer steps.

    Raises:
        UserError: D-Adaptation would stand at lr 0 for part of the run, where its sums go stale.
    """
    from trainer.optim.schedules import rate_factor, warmup_steps

    notes: list[str] = []
    problems: list[str] = []
    trained = {
        "base": None if config.parts.disable_unet_training else config.optimizers.unet,
        "text_encoder_overrides": None
        if config.parts.disable_textenc_training
        else config.optimizers.text_encoder,
    }
    for section, options in trained.items():
        if options is None or options.lr_scheduler == "constant":
            continue
        where = f"{config.optimizer_source.name}: {section}"
        factor = rate_factor(options, total_steps)
        # A course may touch 0 for one step, where it begins or starts again.
        still = next(
            (step for step in range(total_steps - 1) if factor(step) == 0 and factor(step + 1) == 0), None
        )
        if still is not None:
            told = f"{where}: lr_scheduler {options.lr_scheduler} holds lr at 0 from step {still} on, of {total_steps} in all"
            advice = f"set lr_decay_steps to at least {total_steps}, or null for 1.5 times the run"
            if options.adapts:
                problems.append(f"{told}, where D-Adaptation cannot stand still without harm; {advice}")
            else:
                notes.append(f"{told}, so nothing is learned from there; {advice}")
        warmup = warmup_steps(options, total_steps)
        if options.adapts and warmup > total_steps / 10:
            notes.append(
                f"{where}: the warm-up of {warmup} steps is more than a tenth of the run's {total_steps}; D-Adaptation begins at a tiny "
                "rate and finds its own, so a long warm-up only holds d back; lr_warmup_steps 0 is usual"
            )
    if problems:
        raise UserError(problems)
    return notes


def _timesteps(settings: Settings, report: Report) -> None:
    start, end = settings["timestep_start"], settings["timestep_end"]
    if start >= end:
        place = settings.place("timestep_start", "timestep_end")
        report.error(
            place,
            f"no timestep is left to train: timestep_start {start} must be less than timestep_end {end}",
        )


def _clip_skip(settings: Settings, report: Report) -> None:
    if settings["clip_skip"] == 1:
        report.note(settings.place("clip_skip"), "1 is the last layer, as 0 is; the penultimate one is 2")


def _terminal_snr(settings: Settings, report: Report) -> None:
    if not settings["enable_zero_terminal_snr"]:
        return
    place = settings.place("enable_zero_terminal_snr")
    if settings["timestep_end"] < 1000:
        report.note(
            place,
            f"has little effect: the last timestep is not trained, timestep_end is {settings['timestep_end']}",
        )
    if settings["min_snr_gamma"] is not None:
        report.note(
            settings.place("min_snr_gamma"),
            "weights a timestep without signal by 0, and those before it by almost 0, which are the ones that enable_zero_terminal_snr is "
            "about; null lets them be learned",
        )


def _ema(settings: Settings, report: Report) -> None:
    rate, strength = settings["ema_decay_rate"], settings["ema_strength_target"]
    if rate is not None and strength is not None:
        report.error(
            settings.place("ema_strength_target"),
            f"contradicts ema_decay_rate {rate:g}, which it would replace; set one of the two to null",
        )
    defaults = {name: key.default for name, key in keys_of(EmaOptions).items()}
    if rate is None and strength is None:
        for name, usual in defaults.items():
            if settings[name] != usual:
                report.note(
                    settings.place(name), "has no effect without ema_decay_rate or ema_strength_target"
                )
    elif settings["ema_sample_nonema_model"] and not settings["ema_sample_ema_model"]:
        report.note(
            settings.place("ema_sample_nonema_model"),
            "has no effect without ema_sample_ema_model: samples are of the trained weights anyway",
        )


def _validation(settings: Settings, report: Report) -> None:
    if settings["validation_config"] is None:
        for key in ("keep_best", "stop_on_overfit"):
            if settings[key]:
                report.error(
                    settings.place(key),
                    "needs a validation loss, and validation_config names no file; name one, or set it to false",
                )


def _nothing_trained(settings: Settings, report: Report) -> None:
    if settings["disable_textenc_training"] and settings["disable_unet_training"]:
        place = settings.place("disable_unet_training")
        report.error(
            place,
            "nothing is left to train together with disable_textenc_training; set one of the two to false",
        )


def _precision(settings: Settings, report: Report) -> None:
    wanted = settings["mixed_precision"]
    if settings["disable_amp"] and wanted in ("bf16", "fp16"):
        switch = settings.written["disable_amp"].place.key
        off = "disable_amp: true" if switch == "disable_amp" else f"{switch}: false"
        report.error(settings.place("mixed_precision"), f"{wanted} contradicts {off}; remove one of the two")


def _saving(settings: Settings, report: Report) -> None:
    single = settings["save_format"] != "diffusers" and not settings["no_save_ckpt"]
    if (
        settings["no_save_ckpt"]
        and settings["save_format"] != "diffusers"
        and "save_format" in settings.written
    ):
        wanted = settings["save_format"]
        report.error(
            settings.place("save_format"),
            f"{wanted} contradicts no_save_ckpt: true, which is save_format diffusers; remove one of the two",
        )
        return
    for key in ("save_full_precision", "save_ckpt_dir"):
        if settings[key] and not single:
            report.note(settings.place(key), "has no effect: no single file is written (see save_format)")


def _keeping(settings: Settings, report: Report) -> None:
    resumable, models = settings["keep_resume_n"], settings["keep_last_n"]
    if models is not None and resumable > models and "keep_resume_n" in settings.written:
        place = settings.place("keep_resume_n", "keep_last_n")
        report.error(
            place,
            f"{resumable} checkpoints to resume from need as many models: keep_last_n {models} must be at least that",
        )
    if settings["save_optimizer"] and "keep_resume_n" in settings.written:
        report.note(
            settings.place("keep_resume_n"),
            "has no effect: save_optimizer keeps the state of every checkpoint",
        )


def _cadence(settings: Settings, report: Report) -> None:
    first, epochs = settings["save_ckpts_from_n_epochs"], settings["max_epochs"]
    every = settings["save_every_n_epochs"]
    if first and every is None:
        report.note(settings.place("save_ckpts_from_n_epochs"), "has no effect without save_every_n_epochs")
    elif first > epochs:
        report.note(
            settings.place("save_ckpts_from_n_epochs"),
            f"the only checkpoint is the one at the end: max_epochs is {epochs}",
        )
    elif every is not None and every > epochs:
        report.note(
            settings.place("save_every_n_epochs"),
            f"the only checkpoint is the one at the end: max_epochs is {epochs}",
        )


def _fused_backward(
    settings: Settings, sections: Mapping[str, OptimizerOptions], file: str, report: Report
) -> None:
    fused = " and ".join(
        name for name, options in sections.items() if getattr(options, "fused_backward", False)
    )
    if not fused:
        return
    off = f"set fused_backward to false in {file} ({fused})"
    if settings["grad_accum"] > 1:
        report.error(
            settings.place("grad_accum"),
            f"{settings['grad_accum']} contradicts fused_backward, which updates the weights inside every backward pass, before "
            f"the batches are averaged; raise batch_size instead and set grad_accum to 1, or {off}",
        )
    if settings["clip_grad_norm"] is not None:
        report.error(
            settings.place("clip_grad_norm"),
            "contradicts fused_backward, which updates the first weights before the norm of the whole gradient is known; D-Adaptation "
            f"seldom needs clipping: set it to null, or {off}",
        )
    if settings["mixed_precision"] == "fp16":
        report.error(
            settings.place("mixed_precision"),
            "fp16 contradicts fused_backward, which updates weights before it is known whether the scaled gradient has overflowed; "
            f"use bf16 or no, or {off}",
        )


def _compiled(settings: Settings, sections: Mapping[str, OptimizerOptions], report: Report) -> None:
    if settings["compile"] and any(
        getattr(options, "fused_backward", False) for options in sections.values()
    ):
        report.note(
            settings.place("compile"),
            "a compiled backward pass hands over all gradients of a network at once, so fused_backward spares no memory with it",
        )


def _high_rates(settings: Settings, sections: Mapping[str, OptimizerOptions], report: Report) -> None:
    if settings["allow_high_lr"] and all(options.adapts for options in sections.values()):
        report.note(
            settings.place("allow_high_lr"),
            "has no effect: it allows rates chosen by hand, and D-Adaptation finds them",
        )


def _clipping(settings: Settings, sections: Mapping[str, OptimizerOptions], report: Report) -> None:
    finding = [
        options.optimizer
        for options in sections.values()
        if options.adapts and not getattr(options, "fused_backward", False)
    ]
    if settings["clip_grad_norm"] is not None and finding:
        report.note(
            settings.place("clip_grad_norm"),
            f"also changes d, which {finding[0]} estimates from the clipped gradients; null is usual",
        )


def _weights(settings: Settings, sections: Mapping[str, OptimizerOptions], file: str, report: Report) -> None:
    if settings["weights_dtype"] == "fp32":
        return
    if settings["mixed_precision"] in ("fp16", "no") or settings["disable_amp"]:
        asked = "no" if settings["disable_amp"] else settings["mixed_precision"]
        report.error(
            settings.place("weights_dtype"),
            f"bf16 contradicts mixed_precision: {asked}; use mixed_precision auto or bf16 with it",
        )
    for name, options in sections.items():
        if not options.rounds_bf16 and settings["lora"] is None:  # whose matrices stay in fp32
            able = " or ".join(name for name, options in optimizer_classes().items() if options.rounds_bf16)
            report.error(
                settings.place("weights_dtype"),
                f"bf16 needs an optimizer that rounds stochastically, since most steps are smaller than the spacing of bf16 numbers and "
                f"would be lost with {options.optimizer} ({file}: {name}); use {able} there, or weights_dtype fp32",
            )


def _lora_rates(
    settings: Settings,
    sections: Mapping[str, OptimizerOptions],
    optimizers: OptimizerConfig,
    file: str,
    report: Report,
) -> None:
    if settings["lora"] is None:
        return
    for name, options in sections.items():
        if not options.adapts and (options.lr or 0) <= HIGH_LR:
            report.note(
                Place(file, None, f"{name}.lr"),
                f"{options.lr:g} is a rate for training whole networks; a LoRA learns little at it, {LORA_LR:g} is usual",
            )
    if optimizers.freezing.freeze_embeddings is False and "text_encoder_overrides" in sections:
        report.note(
            Place(file, None, "text_encoder_freezing.freeze_embeddings"),
            "has no effect: lora trains no embeddings",
        )


def _tags(settings: Settings, report: Report) -> None:
    if settings["keep_tags"] and not settings["shuffle_tags"]:
        report.note(
            settings.place("keep_tags"),
            "has no effect without shuffle_tags, but where a folder or an image sets that",
        )


def _lora(settings: Settings, report: Report) -> None:
    if settings["lora"] is None:
        return
    if settings["ema_resume_model"] is not None:
        report.error(
            settings.place("ema_resume_model"),
            "contradicts lora: a model holds no LoRA that an average could begin from; set it to null",
        )
    if settings["enable_zero_terminal_snr"]:
        report.note(
            settings.place("enable_zero_terminal_snr"),
            "a LoRA file cannot hold a noise schedule: set rescale_betas_zero_snr and timestep_spacing trailing wherever you draw with it",
        )


def _attention(settings: Settings, report: Report) -> None:
    if settings["attn_type"] == "xformers":
        report.note(
            settings.place("attn_type"), "xformers is not used; torch's own attention (sdp) takes its place"
        )


def _cache(settings: Settings, report: Report) -> None:
    wanted = settings["cache_latents"]
    if wanted in ("disk", "memory") and settings["crop_jitter"] > 0:
        report.error(
            settings.place("cache_latents"),
            f"{wanted} contradicts crop_jitter {settings['crop_jitter']:g}, with which no two crops are equal; set one of the two to its "
            "default",
        )


def _wandb(settings: Settings, report: Report) -> None:
    if settings["wandb"] and importlib.util.find_spec("wandb") is None:
        report.error(
            settings.place("wandb"),
            "true needs the package wandb, which is not installed: pip install wandb, or set it to false",
        )


def _names(settings: Settings, report: Report) -> None:
    for key in ("project_name", "run_name"):
        name = settings[key]
        odd = next(
            (letter for letter in name or "" if letter in '/\\:*?"<>|' or clean(letter) != letter), None
        )
        if odd is not None:
            report.error(
                settings.place(key), f"becomes part of file names and must not hold {odd!r}; got '{name}'"
            )
    size = sum(len((settings[key] or "").encode()) for key in ("project_name", "run_name"))
    if size > LONGEST_NAME:
        report.error(
            settings.place("run_name", "project_name"),
            f"project_name and run_name become file names and may have {LONGEST_NAME} bytes together, and have {size}; shorten them",
        )


_RULES: tuple[Callable[[Settings, Report], None], ...] = (
    _timesteps,
    _clip_skip,
    _terminal_snr,
    _ema,
    _validation,
    _nothing_trained,
    _precision,
    _saving,
    _keeping,
    _cadence,
    _attention,
    _tags,
    _lora,
    _cache,
    _wandb,
    _names,
)
