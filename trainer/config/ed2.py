"""Keys of EveryDream2 and of other trainers that are not keys of this program.

The tables list keys that are accepted without effect, keys that are refused with an alternative, and old
keys. When an option arrives, its line goes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainer.config.report import Place, Report, Written, shown, unknown_value
from trainer.config.schema import Key, optimizer_keys, train_keys

NEVER_NAMES: Mapping[str, str] = {
    "adacoor": "dadapt_adam",
    "coordinate_dowg": "dadapt_adam",
    "dadapt_adagrad": "dadapt_adam",
    "dadapt_adan": "dadapt_adam",
    "scalar_dowg": "dadapt_adam",
}
"""EveryDream2's optimizers that this program omits, and their substitutes."""

UNUSED_OPTIMIZER: Mapping[str, Any] = {"no_prox": False}
"""Keys of optimizers that this program omits, with EveryDream2's defaults."""

RENAMED: Mapping[str, str] = {
    "base_model": "resume_ckpt",
    "ema_decay_device": "ema_device",
    "ema_decay_interval": "ema_update_interval",
    "ema_decay_resume_model": "ema_resume_model",
    "ema_decay_sample_ema_model": "ema_sample_ema_model",
    "ema_decay_sample_raw_training": "ema_sample_nonema_model",
    "ema_decay_target": "ema_strength_target",
    "ema_sample_ema_training": "ema_sample_ema_model",
    "ema_sample_raw_training": "ema_sample_nonema_model",
}
"""Other names of keys of train.json: EveryDream2's earlier ones, and base_model."""

_REFUSED: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "load_settings_every_epoch": (
        (False,),
        'stop the run, change the file and resume with "resume_ckpt": "findlast"',
    ),
    "plugins": (([], {}, ""), "plugins are not supported; remove it or set it to null"),
    "rated_dataset": (
        (False,),
        "rated datasets are not supported; use multiply for images that should count more",
    ),
}

_IDLE: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "rated_dataset_target_dropout_percent": ((50,), "rated_dataset"),
    "rated_dataset_target_dropout_rate": ((50,), "rated_dataset"),
}
"""Keys without effect unless another key is set, which is refused: their usual values, and that other key."""

_OLD: Mapping[str, str] = {
    "disable_xformers": "attention is torch's own; see attn_type",
    "ed1_mode": "",
    "lowvram": "see gradient_checkpointing for less memory",
    "notebook": "",
    "scale_lr": "write the lr that is meant",
    "useadam8bit": "the optimizer file names the optimizer",
    "write_schedule": "train.py --check prints the plan",
}

_SAMPLERS = ("ddpm", "pndm", "ddim")

_OTHER_WORDS: Mapping[str, str] = {
    "base_model_name": "resume_ckpt",
    "caption_dropout_rate": "cond_dropout",
    "caption_tag_dropout_rate": "tag_dropout",
    "checkpoints_total_limit": "keep_last_n",
    "concepts": "data_root",
    "dataset_path": "data_root",
    "enable_wildcard": "wildcards",
    "epochs": "max_epochs",
    "flip_aug": "flip_p",
    "full_bf16": "weights_dtype",
    "gradient_accumulation_steps": "grad_accum",
    "in_json": "data_root",
    "instance_data_dir": "data_root",
    "ip_noise_gamma": "input_perturbation",
    "keep_tokens": "keep_tags",
    "learning_rate": "lr",
    "logging_dir": "logdir",
    "lora_rank": "lora",
    "max_data_loader_n_workers": "num_workers",
    "max_grad_norm": "clip_grad_norm",
    "max_timestep": "timestep_end",
    "max_token_length": "max_tokens",
    "max_train_epochs": "max_epochs",
    "max_train_steps": "stop_after_steps",
    "min_timestep": "timestep_start",
    "model": "resume_ckpt",
    "multires_noise_discount": "pyramid_noise_discount",
    "network_alpha": "lora",
    "network_dim": "lora",
    "network_dropout": "lora",
    "network_module": "lora",
    "network_train_text_encoder_only": "disable_unet_training",
    "network_train_unet_only": "disable_textenc_training",
    "noise_offset": "zero_frequency_noise_ratio",
    "num_train_epochs": "max_epochs",
    "output_dir": "logdir",
    "output_name": "project_name",
    "pretrained_model_name_or_path": "resume_ckpt",
    "random_crop": "crop_jitter",
    "random_flip": "flip_p",
    "reg_data_dir": "data_root",
    "resume": "resume_ckpt",
    "resume_from_checkpoint": "resume_ckpt",
    "sample_every_n_steps": "sample_steps",
    "save_last_n_epochs": "keep_last_n",
    "save_every_n_epoch": "save_every_n_epochs",
    "save_model_as": "save_format",
    "save_precision": "save_full_precision",
    "save_state": "save_optimizer",
    "sdpa": "attn_type",
    "shuffle_caption": "shuffle_tags",
    "snr_gamma": "min_snr_gamma",
    "masked_loss": "unmasked_weight",
    "stop_text_encoder_training": "stop_textenc_after_n_epochs",
    "train_batch_size": "batch_size",
    "train_data_dir": "data_root",
    "training_method": "lora",
    "xformers": "attn_type",
    "zero_terminal_snr": "enable_zero_terminal_snr",
}
"""Keys of train.json by their names in kohya's sd-scripts, diffusers' examples and others."""

_OTHER_OPTIMIZER_WORDS: Mapping[str, str] = {
    "adam_beta1": "betas",
    "adam_beta2": "betas",
    "adam_epsilon": "epsilon",
    "adam_weight_decay": "weight_decay",
    "beta1": "betas",
    "beta2": "betas",
    "eps": "epsilon",
    "fused_backward_pass": "fused_backward",
    "learning_rate": "lr",
    "learning_rate_te": "lr",
    "name": "optimizer",
    "optimizer_type": "optimizer",
    "scheduler": "lr_scheduler",
    "text_encoder_lr": "lr",
    "type": "optimizer",
    "unet_lr": "lr",
    "use_8bit_adam": "optimizer",
    "warmup_steps": "lr_warmup_steps",
}
"""Keys of the optimizer file's sections by their names elsewhere."""

_OF_TEXT_ENCODER = ("learning_rate_te", "text_encoder_lr")

SECTION_WORDS: Mapping[str, str] = {
    "te": "text_encoder_overrides",
    "text_encoder": "text_encoder_overrides",
    "unet": "base",
}
"""The optimizer file's sections by their names elsewhere."""


def foreign_schema() -> dict[str, dict[str, Any]]:
    """Return JSON Schemas of the foreign keys that train.json may hold, for editors."""
    found: dict[str, dict[str, Any]] = {
        "amp": {
            "type": ["boolean", "null"],
            "description": "EveryDream2's switch of mixed precision; false is mixed_precision: no.",
        },
        "train_sampler": {
            "enum": [*_SAMPLERS, None],
            "description": "Accepted; training always uses ddpm's noise.",
        },
    }
    for name, (inert, instead) in _REFUSED.items():
        found[name] = {"enum": [*inert, None], "description": f"Not supported: {instead}."}
    for name, (_, master) in _IDLE.items():
        found[name] = {"description": f"Without effect unless {master} is set."}
    for name, instead in _OLD.items():
        found[name] = {
            "description": "; ".join(filter(None, ("EveryDream2's key, without effect", instead))) + ".",
            "deprecated": True,
        }
    for name, now in RENAMED.items():
        found[name] = {**train_keys()[now].json_schema(), "description": f"Another name of {now}."}
    return found


def foreign_options() -> dict[str, Key]:
    """Return EveryDream2's options of the command line that `translate` understands, as keys."""
    kinds: dict[str, Any] = dict.fromkeys(("amp", *_REFUSED, *_OLD), bool) | dict.fromkeys(_IDLE, int)
    kinds |= {"plugins": str, "train_sampler": str}
    return {name: Key(name, kind, None, object) for name, kind in kinds.items()}


def translate(name: str, written: Written, report: Report) -> dict[str, Written] | None:
    """Return a foreign key of train.json as this program's keys; {} for none, None if it is unknown."""
    if name not in foreign_options():
        return None
    if name == "amp" and written.value is False:
        return {"disable_amp": Written(True, written.place)}
    if written.value is not None:
        _report(name, written.value, written.place, report)
    return {}


def _report(name: str, value: Any, place: Place, report: Report) -> None:
    """Report a foreign key whose value would have an effect elsewhere."""
    if name == "amp":
        if value is not True:
            report.error(place, f"must be true or false; got {shown(value)}")
    elif name == "train_sampler":
        if value not in _SAMPLERS:
            report.error(place, unknown_value(value, _SAMPLERS))
        elif value != "ddpm":
            report.note(place, f"{shown(value)} has no effect; training uses ddpm")
    elif name in _REFUSED:
        inert, instead = _REFUSED[name]
        if not _among(value, inert):
            refused = "" if "not supported" in instead else f"{shown(value)} is not supported; "
            report.error(place, refused + instead)
    elif name in _IDLE:
        usual, master = _IDLE[name]
        if not _among(value, usual):
            report.note(place, f"has no effect without {master}")
    elif value is not False:
        report.note(place, "; ".join(filter(None, ("an EveryDream2 key without effect", _OLD[name]))))


def other_word(name: str, *, optimizer: bool = False) -> str | None:
    """Return the key that another trainer calls `name`, if there is one."""
    return (_OTHER_OPTIMIZER_WORDS if optimizer else _OTHER_WORDS).get(name.lower())


def in_optimizer_file(name: str, *, found_there: bool = False) -> str | None:
    """Return the place in a section of the optimizer file of a key elsewhere; None if it has none there.

    `found_there`: the key is in that file, outside its sections, so it means none of train.json.
    """
    key = other_word(name, optimizer=True) or name
    if (other_word(name) is not None and not found_there) or key not in optimizer_keys():
        return None
    return f"{'text_encoder_overrides' if name.lower() in _OF_TEXT_ENCODER else 'base'}.{key}"


def _among(value: Any, choices: tuple[Any, ...]) -> bool:
    return any(value == choice and isinstance(value, bool) == isinstance(choice, bool) for choice in choices)
