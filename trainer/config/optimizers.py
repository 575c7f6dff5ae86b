"""The optimizer file: two sections of optimizer options, inheritance between them, and where every learning rate comes from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from trainer.config.ed2 import NEVER_NAMES, SECTION_WORDS, UNUSED_OPTIMIZER, other_word
from trainer.config.positions import Document
from trainer.config.report import (
    COMMAND_LINE,
    Place,
    Report,
    Written,
    checked,
    did_you_mean,
    shown,
    unknown_value,
)
from trainer.config.schema import (
    DEFAULT_OPTIMIZER,
    FreezingOptions,
    OptimizerConfig,
    OptimizerFileOptions,
    keys_of,
    optimizer_classes,
    optimizer_keys,
    plain,
    train_keys,
)

BASE, OVERRIDES, FREEZING = "base", "text_encoder_overrides", "text_encoder_freezing"
FALLBACK_LR = 1e-6
"""The rate where no file has one: EveryDream2's."""

TINY_MULTIPLIER = 1e-4
"""Multipliers of D-Adaptation below this are most likely meant as rates."""

_FREEZE = {
    BASE: "; to leave the UNet as it is, set disable_unet_training in train.json",
    OVERRIDES: "; to leave the text encoder as it is, set disable_textenc_training in train.json",
}
_SCHEDULE = ("lr_scheduler", "lr_warmup_steps", "lr_decay_steps")


@dataclass(frozen=True)
class Rates:
    """What train.json says about rates: its own values by key, those that were written, and which networks learn."""

    written: Mapping[str, Written]
    lr_scheduler: str = "constant"
    unet: bool = True
    text_encoder: bool = True


@dataclass(frozen=True)
class _Section:
    """One section of the file: the optimizer that acts, None if it is not known, and the values that are right."""

    name: str
    optimizer: str | None
    values: dict[str, Written]


def is_documentation(name: str) -> bool:
    """Whether a key is for readers only."""
    return name in ("$schema", "doc") or name.startswith("_")


def read_optimizers(document: Document, file: str, rates: Rates, report: Report) -> OptimizerConfig | None:
    """Return the optimizers that an optimizer file asks for, every rate resolved; None after reporting what is wrong."""
    before = len(report.errors)
    top = {name: value for name, value in document.values.items() if not is_documentation(name)}
    if _other_file(top, file, report):
        return None
    options = _top(top, document, file, report)
    if BASE not in top and not document.issues:
        report.error(
            Place(file), f"{BASE} is missing: the section that names the optimizer; {{}} takes every default"
        )
    base = _section(BASE, None, document, file, report)
    overrides = _section(OVERRIDES, base, document, file, report)
    freezing = _freezing(document, file, rates, report)
    if (
        base.optimizer is None
        or overrides.optimizer is None
        or len(report.errors) > before
        or document.issues
    ):
        return None
    scale = options.text_encoder_lr_scale
    merged = _Section(OVERRIDES, overrides.optimizer, _inherit(base, overrides, report))
    if scale != 1 and ("lr" in overrides.values or not rates.text_encoder):
        why = (
            f"{OVERRIDES}.lr is set"
            if rates.text_encoder
            else "disable_textenc_training freezes the text encoder"
        )
        report.note(
            Place(file, document.lines[("text_encoder_lr_scale",)], "text_encoder_lr_scale"),
            f"has no effect: {why}",
        )
    lr = _base_lr(base, overrides, rates, Place(file, document.lines.get((BASE,)), f"{BASE}.lr"), report)
    text_lr = _text_lr(
        base,
        overrides,
        lr,
        scale,
        rates,
        Place(file, document.lines.get((OVERRIDES,)), f"{OVERRIDES}.lr"),
        report,
    )
    learn = {BASE: (base, lr)} if rates.unet else {}
    learn |= {OVERRIDES: (overrides, text_lr)} if rates.text_encoder else {}
    _idle_lr(learn, rates, file, report)
    _tiny_multiplier(base, rates.unet, report)
    _tiny_multiplier(overrides, rates.text_encoder, report)
    return OptimizerConfig(
        unet=_build(base, lr, rates, rates.unet, report),
        text_encoder=_build(merged, text_lr, rates, rates.text_encoder, report),
        freezing=freezing,
        log_grad_norm=options.log_grad_norm,
        apply_grad_scaler_step_tweaks=options.apply_grad_scaler_step_tweaks,
    )


def _other_file(top: Mapping[str, Any], file: str, report: Report) -> bool:
    """Whether this is a train.json, which is reported once instead of key by key."""
    if BASE in top or not {"resume_ckpt", "data_root", "max_epochs", "optimizer_config"} & top.keys():
        return False
    report.error(
        Place(file),
        f"is a train.json, not an optimizer file, which holds {BASE}, {OVERRIDES} and {FREEZING}; see optimizer_config",
    )
    return True


def _top(top: Mapping[str, Any], document: Document, file: str, report: Report) -> OptimizerFileOptions:
    known = keys_of(OptimizerFileOptions)
    found: dict[str, Any] = {}
    for name, value in top.items():
        place = Place(file, document.lines[(name,)], name)
        if name in known:
            if value is not None:
                right, read = checked(known[name], value, place, report)
                found |= {name: read} if right else {}
        elif name in (BASE, OVERRIDES, FREEZING):
            if value is not None and not isinstance(value, dict):
                report.error(place, f"must be an object in braces, {{ ... }}; got {shown(value)}")
        elif name in SECTION_WORDS:
            report.error(place, f"unknown key; did you mean '{SECTION_WORDS[name]}'?")
        elif name in optimizer_keys() or name in UNUSED_OPTIMIZER:
            report.error(place, f"belongs inside {BASE}")
        elif name in keys_of(FreezingOptions):
            report.error(place, f"belongs inside {FREEZING}")
        elif name in train_keys():
            report.error(place, "belongs in train.json")
        else:
            report.error(
                place,
                "unknown key"
                + (
                    did_you_mean(name, [BASE, OVERRIDES, FREEZING, *known])
                    or _accepted([BASE, OVERRIDES, FREEZING, *known])
                ),
            )
    return OptimizerFileOptions(**found)


def _section(name: str, base: _Section | None, document: Document, file: str, report: Report) -> _Section:
    """Check one section's own values; `base` is the section it inherits from."""
    raw = document.values.get(name)
    members = (
        {key: value for key, value in raw.items() if not is_documentation(key)}
        if isinstance(raw, dict)
        else {}
    )
    places = {key: Place(file, document.lines[(name, key)], f"{name}.{key}") for key in members}
    unread = {key for key in members if (name, key) in document.unread}
    optimizer = base.optimizer if base else DEFAULT_OPTIMIZER
    if "optimizer" in unread:
        optimizer = None
    elif members.get("optimizer") is not None:
        optimizer = _name(members["optimizer"], places["optimizer"], report)
    values: dict[str, Written] = {}
    for key, value in members.items():
        users = optimizer_keys().get(key, {})
        if key == "optimizer" or key in unread:
            continue
        if key in UNUSED_OPTIMIZER and not users:
            if value not in (None, UNUSED_OPTIMIZER[key]):
                report.note(places[key], f"has no effect: {optimizer or 'this optimizer'} does not use it")
        elif not users:
            word = other_word(key, optimizer=True)
            close = (
                f"; did you mean '{word}'?"
                if word
                else did_you_mean(key, optimizer_keys()) or _accepted(list(optimizer_keys()))
            )
            report.error(places[key], f"unknown key{close}")
        elif value is not None:
            if key == "growth_rate" and isinstance(value, str) and value.lower() in ("inf", "infinity"):
                value = math.inf
            hint = _FREEZE[name] if key == "lr" and value == 0 else ""
            right, read = checked(
                users.get(optimizer or "") or next(iter(users.values())), value, places[key], report, hint
            )
            if right and optimizer and optimizer not in users:
                if read not in [
                    user.default for user in users.values()
                ]:  # which asks for nothing, and fills EveryDream2's files
                    report.note(
                        places[key], f"has no effect: {optimizer} does not use it, only {_listed(users)}"
                    )
            elif right:
                values[key] = Written(read, places[key])
    return _Section(name, optimizer, values)


def _name(value: Any, place: Place, report: Report) -> str | None:
    names = optimizer_classes()
    name = value.lower() if isinstance(value, str) else ""
    if name in names:
        return name
    if name in NEVER_NAMES:
        report.error(place, f"{name} is not supported; use {NEVER_NAMES[name]}")
    else:
        report.error(place, unknown_value(value, list(names)))
    return None


def _freezing(document: Document, file: str, rates: Rates, report: Report) -> FreezingOptions:
    known, found = keys_of(FreezingOptions), {}
    raw = document.values.get(FREEZING)
    for name, value in raw.items() if isinstance(raw, dict) else ():
        place = Place(file, document.lines[(FREEZING, name)], f"{FREEZING}.{name}")
        if is_documentation(name) or (FREEZING, name) in document.unread:
            continue
        if name not in known:
            report.error(place, "unknown key" + (did_you_mean(name, known) or _accepted(list(known))))
        elif value is not None:
            right, read = checked(known[name], value, place, report)
            found |= {name: read} if right else {}
    freezing = FreezingOptions(**found)
    if freezing.unfreeze_last_n_layers is not None and freezing.freeze_front_n_layers is not None:
        place = Place(
            file, document.lines[(FREEZING, "freeze_front_n_layers")], f"{FREEZING}.freeze_front_n_layers"
        )
        report.note(place, "has no effect: unfreeze_last_n_layers is set and wins")
    if freezing != FreezingOptions() and not rates.text_encoder:
        report.note(
            Place(file, document.lines[(FREEZING,)], FREEZING),
            "has no effect: disable_textenc_training freezes the whole text encoder",
        )
    return freezing


def _inherit(base: _Section, overrides: _Section, report: Report) -> dict[str, Written]:
    """Return the text encoder's values: its own, and base's where its optimizer uses them."""
    merged = dict(overrides.values)
    for key, written in base.values.items():
        users = optimizer_keys()[key]
        if key in merged or overrides.optimizer not in users:
            continue
        if users[overrides.optimizer].annotation != users[base.optimizer or ""].annotation:
            right, _ = checked(users[overrides.optimizer], plain(written.value), written.place, report)
            if not right:
                continue
        merged[key] = written
    return merged


def _base_lr(base: _Section, own: _Section, rates: Rates, place: Place, report: Report) -> float:
    if "lr" in base.values:
        if rates.unet and not _adapts(base):
            _differs(base, "lr", rates, report)
        return base.values["lr"].value
    if _adapts(base):
        return 1.0
    inherited = rates.text_encoder and "lr" not in own.values and not _adapts(own)
    return _train_lr(rates, place, rates.unet or inherited, report)


def _text_lr(
    base: _Section, own: _Section, base_lr: float, scale: float, rates: Rates, place: Place, report: Report
) -> float:
    if "lr" in own.values:
        if rates.text_encoder and not _adapts(own):
            _differs(own, "lr", rates, report)
        return own.values["lr"].value
    if _adapts(base) == _adapts(own):
        return base_lr * scale
    # A rate and a multiplier of a found rate have nothing in common: 0.1 is usual for one and ruin for the
    # other.
    lr = 1.0 if _adapts(own) else _train_lr(rates, place, rates.text_encoder, report)
    if "lr" in base.values and rates.text_encoder:
        what = {True: "lr multiplies the rate that it finds", False: "lr is the rate"}
        report.note(
            place,
            f"{lr * scale:g} is used; {BASE}.lr {base_lr:g} is not inherited: for {base.optimizer} {what[_adapts(base)]}, "
            f"for {own.optimizer} {what[_adapts(own)]}",
        )
    return lr * scale


def _train_lr(rates: Rates, place: Place, learns: bool, report: Report) -> float:
    if "lr" in rates.written:
        return rates.written["lr"].value
    if learns:
        report.note(place, f"no learning rate here nor in train.json; {FALLBACK_LR:g} is used")
    return FALLBACK_LR


def _idle_lr(learns: Mapping[str, tuple[_Section, float]], rates: Rates, file: str, report: Report) -> None:
    """Note an lr of the command line that no network takes, since D-Adaptation finds the rates of all.

    train.json's is a fall-back for whichever optimizer file is swapped in, and silent where that file needs
    none.
    """
    written = rates.written.get("lr")
    if written is None or written.place.file != COMMAND_LINE:
        return
    if not learns or not all(_adapts(section) for section, _ in learns.values()):
        return
    name, (section, lr) = next(iter(learns.items()))
    report.note(
        written.place,
        f"is for optimizers that take a rate: {section.optimizer} finds its own, times {lr:g}, the {name}.lr of {file}",
    )


def _tiny_multiplier(section: _Section, learns: bool, report: Report) -> None:
    """Note an lr that was meant as a rate: for D-Adaptation it multiplies the rate that is found."""
    own = section.values.get("lr")
    if learns and own is not None and _adapts(section) and own.value < TINY_MULTIPLIER:
        report.note(
            own.place,
            f"{own.value:g} looks like a learning rate, but for {section.optimizer} lr multiplies the rate it finds, and d grows in "
            "proportion to it; 1.0 is the method's own, 0.1 gentle",
        )


def _differs(section: _Section, key: str, rates: Rates, report: Report) -> None:
    """Note a value of a section that wins over another one in train.json or on the command line."""
    own, train = section.values.get(key), rates.written.get(key)
    if own is None or train is None or own.value == train.value:
        return
    if train.place.file == COMMAND_LINE or train.value not in (
        train_keys()[key].default,
        0,
    ):  # files often hold the default
        own_value, other = (
            value if isinstance(value, str) else f"{value:g}" for value in (own.value, train.value)
        )
        report.note(own.place, f"{own_value} is used, not the {other} of {train.place.origin}")


def _build(section: _Section, lr: float, rates: Rates, learns: bool, report: Report) -> Any:
    """Return the options object of a section, its schedule taken from train.json where it has none."""
    assert section.optimizer is not None
    schedule = {key: section.values.get(key) or rates.written.get(key) for key in _SCHEDULE}
    name = schedule["lr_scheduler"].value if schedule["lr_scheduler"] else rates.lr_scheduler
    for key in _SCHEDULE if learns else ():
        _differs(section, key, rates, report)
    for key in ("lr_warmup_steps", "lr_decay_steps"):
        written = schedule[key]
        if name == "constant" and learns and written and written.value:
            instead = "constant_with_warmup" if key == "lr_warmup_steps" else "linear, cosine or polynomial"
            report.note(written.place, f"has no effect with lr_scheduler constant; choose {instead}")
    values = {key: written.value for key, written in section.values.items()}
    values |= {key: written.value for key, written in schedule.items() if written is not None}
    values |= {"lr": lr, "lr_scheduler": name, "lr_decay_steps": values.get("lr_decay_steps") or None}
    return optimizer_classes()[section.optimizer](**values)


def _adapts(section: _Section) -> bool:
    return optimizer_classes()[section.optimizer or ""].adapts


def _listed(names: Iterable[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last


def _accepted(names: list[str]) -> str:
    return "; accepted are " + ", ".join(names)
