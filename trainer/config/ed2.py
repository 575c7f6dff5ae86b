"""Keys of EveryDream2 and of other trainers that are not keys of this program.

Everything that is not one of this program's own options stands in the tables below: what is accepted where it changes nothing, what is
refused and with which alternative, what is merely old. A table's line goes when the option arrives.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainer.config.report import Report, Written, shown, unknown_value

NEVER_NAMES: Mapping[str, str] = {
    "adacoor": "dadapt_adam",
    "coordinate_dowg": "dadapt_adam",
    "dadapt_adagrad": "dadapt_adam",
    "dadapt_adan": "dadapt_adam",
    "scalar_dowg": "dadapt_adam",
}
"""Optimizers that EveryDream2 names and this program leaves out, and what to use instead."""

UNUSED_OPTIMIZER: Mapping[str, Any] = {"no_prox": False}
"""Keys of optimizer sections that only optimizers use which this program leaves out, with EveryDream2's defaults."""

_REFUSED: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "load_settings_every_epoch": ((False,), 'stop the run, change the file and go on with "resume_ckpt": "findlast"'),
    "plugins": (([], {}, ""), "plugins are not supported; remove it or set it to null"),
    "rated_dataset": ((False,), "rated datasets are not supported; use multiply for images that should count more"),
    "write_schedule": ((False,), "train.py --check prints the plan instead; set it to false"),
}

_IDLE: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "rated_dataset_target_dropout_percent": ((50,), "rated_dataset"),
}
"""Keys that do nothing unless another is set, which is refused: their usual values, and that other key."""

_OLD: Mapping[str, str] = {
    "disable_xformers": "attention is torch's own; see attn_type",
    "ed1_mode": "",
    "lowvram": "see gradient_checkpointing for less memory",
    "notebook": "",
    "scale_lr": "write the lr that is meant",
    "useadam8bit": "the optimizer file names the optimizer",
}

_SAMPLERS = ("ddpm", "pndm", "ddim")

_OTHER_WORDS: Mapping[str, str] = {
    "base_model": "resume_ckpt",
    "caption_dropout_rate": "cond_dropout",
    "dataset_path": "data_root",
    "enable_wildcard": "caption_lines",
    "epochs": "max_epochs",
    "flip_aug": "flip_p",
    "gradient_accumulation_steps": "grad_accum",
    "keep_tokens": "keep_tags",
    "learning_rate": "lr",
    "lora_rank": "lora",
    "max_grad_norm": "clip_grad_norm",
    "max_token_length": "max_tokens",
    "max_train_epochs": "max_epochs",
    "model": "resume_ckpt",
    "network_alpha": "lora",
    "network_dim": "lora",
    "noise_offset": "zero_frequency_noise_ratio",
    "num_train_epochs": "max_epochs",
    "optimizer": "optimizer_config",
    "output_dir": "logdir",
    "pretrained_model_name_or_path": "resume_ckpt",
    "save_every_n_epoch": "save_every_n_epochs",
    "shuffle_caption": "shuffle_tags",
    "snr_gamma": "min_snr_gamma",
    "train_batch_size": "batch_size",
    "train_data_dir": "data_root",
}
"""What other trainers call keys of train.json."""

_OTHER_OPTIMIZER_WORDS: Mapping[str, str] = {
    "beta1": "betas",
    "beta2": "betas",
    "eps": "epsilon",
    "learning_rate": "lr",
    "name": "optimizer",
    "optimizer_type": "optimizer",
    "scheduler": "lr_scheduler",
    "type": "optimizer",
    "warmup_steps": "lr_warmup_steps",
}


def foreign_schema() -> dict[str, dict[str, Any]]:
    """Return JSON Schemas of the foreign keys that train.json may hold, for editors."""
    found: dict[str, dict[str, Any]] = {
        "amp": {"type": ["boolean", "null"], "description": "EveryDream2's switch of mixed precision; false is mixed_precision: no."},
        "train_sampler": {"enum": [*_SAMPLERS, None], "description": "Accepted; training always uses ddpm's noise."},
    }
    for name, (inert, instead) in _REFUSED.items():
        found[name] = {"enum": [*inert, None], "description": f"Not supported: {instead}."}
    for name, (_, master) in _IDLE.items():
        found[name] = {"description": f"Without effect unless {master} is set."}
    for name, instead in _OLD.items():
        found[name] = {"description": "; ".join(filter(None, ("Old key without effect", instead))) + ".", "deprecated": True}
    return found


def translate(name: str, written: Written, report: Report) -> dict[str, Written] | None:
    """Return what a foreign key of train.json means in this program's keys, {} where it means nothing, None where it is unknown."""
    value, place = written.value, written.place
    if name == "amp":
        if value is False:
            return {"disable_amp": Written(True, place)}
        if value not in (True, None):
            report.error(place, f"must be true or false; got {shown(value)}")
        return {}
    if name == "train_sampler":
        if value not in (*_SAMPLERS, None):
            report.error(place, unknown_value(value, _SAMPLERS))
        elif value not in ("ddpm", None):
            report.note(place, f"{shown(value)} has no effect; training uses ddpm")
        return {}
    if name in _REFUSED:
        inert, instead = _REFUSED[name]
        if value is not None and not _among(value, inert):
            report.error(place, f"{shown(value)} is not supported; {instead}" if "not supported" not in instead else instead)
        return {}
    if name in _IDLE:
        usual, master = _IDLE[name]
        if value is not None and not _among(value, usual):
            report.note(place, f"has no effect without {master}")
        return {}
    if name in _OLD:
        if value not in (False, None):
            report.note(place, "; ".join(filter(None, ("an old EveryDream2 key without effect", _OLD[name]))))
        return {}
    return None


def other_word(name: str, *, optimizer: bool = False) -> str | None:
    """Return the key that another trainer calls `name`."""
    return (_OTHER_OPTIMIZER_WORDS if optimizer else _OTHER_WORDS).get(name.lower())


def _among(value: Any, choices: tuple[Any, ...]) -> bool:
    return any(value == choice and isinstance(value, bool) == isinstance(choice, bool) for choice in choices)
