"""`--help`: the keys that most people use, every key, or one key with an example."""

from __future__ import annotations

import dataclasses
import json
import shlex
import textwrap
from collections.abc import Iterator
from dataclasses import replace
from inspect import getdoc
from typing import Any, Literal, get_args, get_origin

from trainer.config.ed2 import RENAMED, other_word
from trainer.config.optimizers import BASE, FREEZING, OVERRIDES
from trainer.config.report import closest
from trainer.config.schema import (
    DEFAULT_OPTIMIZER,
    CommandOptions,
    FileOptions,
    FreezingOptions,
    Key,
    OptimizerFileOptions,
    accepts,
    described,
    keys_of,
    optimizer_classes,
    optimizer_keys,
    plain,
    sections,
    train_keys,
)
from trainer.errors import UserError
from trainer.output import WIDTH

ALL = "all"

FIRST = (
    "config", "check", "vram", "resume_ckpt", "data_root", "project_name", "optimizer_config", "lora",
    "max_epochs", "batch_size", "resolution", "gradient_checkpointing", "sample_prompts", "sample_steps",
    "save_every_n_epochs",
)  # fmt: skip
"""Keys of the short help, in the order in which a new user meets them."""

_EXAMPLES: dict[str, Any] = {
    "config": "mydog.json",
    "check": "json",
    "data_root": "pictures/mydog",
    "resolution": 768,
    "flip_p": 0.5,
    "crop_jitter": 0.2,
    "cond_dropout": 0.1,
    "keep_tags": 1,
    "tag_dropout": 0.1,
    "stop_textenc_after_n_epochs": 10,
    "unmasked_weight": 0.1,
    "zero_frequency_noise_ratio": 0.05,
    "pyramid_noise_discount": 0.03,
    "embedding_perturbation": 0.1,
    "input_perturbation": 0.1,
    "timestep_start": 100,
    "timestep_end": 900,
    "clip_skip": 2,
    "grad_accum": 2,
    "seed": -1,
    "gpuid": 1,
    "ema_update_interval": 10,
    "save_every_n_epochs": 10,
    "save_ckpts_from_n_epochs": 20,
    "keep_resume_n": 3,
    "fixed_loss_images": 32,
    "logdir": "D:/logs",
    "log_step": 10,
    "optimizer_config": "optimizer_dadapt.json",
    "betas": [0.9, 0.99],
    "epsilon": 1e-6,
    "weight_decay": 0.1,
    "growth_rate": 1.02,
    "layer_scale": 0.5,
    "d_max": 1e-4,
    "rate_max": 1e-5,
    "momentum": 0.9,
    "d_coef": 0.5,
    "slice_p": 11,
    "text_encoder_lr_scale": 0.5,
    "freeze_front_n_layers": 6,
    "max_epochs": 40,
    "batch_size": 4,
    "vram": 12,
    "contact_sheets": "sheets",
    "resume_ckpt": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "revision": "main",
    "vae": "stabilityai/sd-vae-ft-mse",
    "vae_revision": "main",
    "ema_resume_revision": "main",
    "ema_resume_model": "logs/mydog-20261127-094413",
    "caption_prefix": "a photo of sks dog, ",
    "cache_dir": "cache",
    "lora": {"rank": 16},
    "sample_prompts": "prompts.txt",
    "sample_steps": "auto",
    "validation_config": "validation.json",
    "save_ckpt_dir": "models",
    "run_name": "second",
    "project_name": "mydog",
    "min_snr_gamma": 5.0,
    "lr": 1e-6,
    "d0": 1e-5,
    "clip_grad_norm": 1.0,
    "ema_decay_rate": 0.99,
    "ema_strength_target": 0.1,
    "max_train_time": 90,
    "ckpt_every_n_minutes": 30,
    "lr_warmup_steps": 100,
    "lr_decay_steps": 1000,
    "stop_after_steps": 500,
}
"""Values that show what a key is for; other keys show a value from their type."""

_HEAD = (
    "usage: python train.py [--config train.json] [--check [json]] [--key value ...]",
    "",
    "Fine-tunes Stable Diffusion as train.json says. Every key of train.json is an option too: the command "
    "line wins over the file, the file over the default. --no-key turns a switch off, null stands for the "
    "default.",
)


def help_text(topic: str = "", width: int = WIDTH) -> str:
    """Return the help: short, of `all` keys, or of one key.

    Raises:
        UserError: there is no such key.
    """
    name = topic.lstrip("-").replace("-", "_")
    lines = _short() if not name else _everything() if name == ALL else _of_key(RENAMED.get(name, name))
    return "\n".join(line for text in lines for line in _filled(text, width) or [""]).lstrip("\n") + "\n"


def _short() -> Iterator[str]:
    yield from _HEAD
    yield "\nThe keys that most people use:"
    known = {**train_keys(), **keys_of(CommandOptions)}
    for name in FIRST:
        yield from _row(
            known[name], "--", words=known[name].doc.split(". ")[0].split("; ")[0].rstrip(".") + "."
        )
    yield "\n--help KEY describes one key with an example; --help all lists every key, as docs/keys.md does."


def _everything() -> Iterator[str]:
    """Yield every key by section, with its type, default and docstring."""
    yield from _HEAD
    model, *rest = sections().values()
    for options in (CommandOptions, model, FileOptions, *rest):
        yield "\n" + (getdoc(options) or "").splitlines()[0]
        yield from _rows(options, "--")
    for key in train_keys().values():
        if dataclasses.is_dataclass(key.kind):
            yield from _inside(key)
    yield "\nKeys of the optimizer file's sections base and text_encoder_overrides:"
    for name, users in optimizer_keys().items():
        yield from _optimizer_row(name, users)
    yield "\nKeys of its text_encoder_freezing:"
    yield from _rows(FreezingOptions, "")
    yield "\nKeys beside its sections:"
    yield from _rows(OptimizerFileOptions, "")


def _of_key(name: str) -> Iterator[str]:
    """Yield one key in each place that takes it, with an example."""
    own, command = train_keys(), keys_of(CommandOptions)
    found = False
    if key := {**own, **command}.get(name):
        found = True
        yield from _row(key, "--")
        if dataclasses.is_dataclass(key.kind):
            yield from _inside(key)
        value = example(key)
        if name in own:
            yield f"\nin train.json:        {json.dumps({name: value})[1:-1]}"
        yield f"\non the command line:  {_on_command_line(name, value)}".lstrip("\n" if name in own else "")
    if users := optimizer_keys().get(name):
        found = True
        yield f"\nIn the optimizer file's {BASE} and text_encoder_overrides:"
        yield from _optimizer_row(name, users)
        value = "dadapt_adam8bit" if name == "optimizer" else example(next(iter(users.values())))
        yield f"\nfor example:          {json.dumps({BASE: {name: value}})[1:-1]}"
    for section, options in ((FREEZING, FreezingOptions), (None, OptimizerFileOptions)):
        if key := keys_of(options).get(name):
            found = True
            yield f"\nIn the optimizer file's {section}:" if section else "\nIn the optimizer file:"
            yield from _row(key, "")
            value = {name: example(key)}
            yield f"\nfor example:          {json.dumps({section: value} if section else value)[1:-1]}"
    keys = keys_of(FreezingOptions) if name == FREEZING else optimizer_keys()
    if name in (BASE, OVERRIDES, FREEZING):
        found = True
        yield f"{name}: a section of the optimizer file. Its keys: {', '.join(keys)}."
    if not found:
        names = [*own, *command, *optimizer_keys(), *keys_of(FreezingOptions), *keys_of(OptimizerFileOptions)]
        close = other_word(name) or closest(name, names)
        hint = f"did you mean --help {close}?" if close else "--help all lists them."
        raise UserError(f"--help {name}: there is no such key; {hint}")


def example(key: Key) -> Any:
    """Return a valid value that is not the default where there is a choice."""
    default = None if key.required else plain(key.default)
    if key.name in _EXAMPLES and key.fits(_EXAMPLES[key.name]):
        return _EXAMPLES[key.name]
    if key.kind is bool:
        return not default
    if get_origin(key.kind) is Literal:
        return next(choice for choice in get_args(key.kind) if choice != default)
    values = (value for value in (default, 4, 0.5, 1, "name") if value is not None)
    return next((value for value in values if key.fits(value)), default)


def _on_command_line(name: str, value: Any) -> str:
    if value is True:
        return f"--{name}"
    if value is False:
        return f"--no-{name}"
    text = value if isinstance(value, str) else json.dumps(value)
    return f"--{name} {shlex.quote(text)}"


def _inside(key: Key) -> Iterator[str]:
    values = {name: plain(inner.default) for name, inner in keys_of(key.kind).items()}
    yield f"\nKeys inside {key.name} (on the command line --{key.name} '{json.dumps(values)}'):"
    yield from _rows(key.kind, "")


def _optimizer_row(name: str, users: dict[str, Key]) -> list[str]:
    key = next(iter(users.values()))
    if name != "optimizer":
        return _row(key, "", words=described(users))
    return _row(replace(key, default=DEFAULT_OPTIMIZER), "", takes="text", words=names_of_optimizers())


def names_of_optimizers() -> str:
    """Return the accepted values of the key optimizer in a sentence."""
    path = "a class path of an installed package, such as pytorch_optimizer.ADOPT"
    return f"One of {', '.join(optimizer_classes())}; or {path}."


def _rows(options: type, dashes: str) -> list[str]:
    return [line for key in keys_of(options).values() for line in _row(key, dashes)]


def _row(key: Key, dashes: str, *, takes: str = "", words: str = "") -> list[str]:
    default = plain(key.default) if not key.required else None
    text = default if isinstance(default, str) else json.dumps(default)
    shown = "required" if key.required else f"default {text}"
    return [f"  {dashes}{key.name}: {takes or accepts(key.annotation)}; {shown}", f"      {words or key.doc}"]


def _filled(text: str, width: int) -> list[str]:
    """Break a text, keeping an empty line before it and its indent."""
    before = [""] if text.startswith("\n") else []
    text = text.lstrip("\n")
    indent = " " * (len(text) - len(text.lstrip()))
    return before + textwrap.wrap(
        text, width, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False
    )
