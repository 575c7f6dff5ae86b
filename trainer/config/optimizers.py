"""The optimizer file: two sections of options, inheritance between them, and the sources of the rates."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from trainer.config.ed2 import NEVER_NAMES, SECTION_WORDS, UNUSED_OPTIMIZER, in_optimizer_file, other_word
from trainer.config.positions import Document
from trainer.config.report import (
    COMMAND_LINE,
    Place,
    Report,
    Written,
    checked,
    read_keys,
    shown,
    unknown_key,
    unknown_value,
    values_of,
)
from trainer.config.schema import (
    DEFAULT_OPTIMIZER,
    FreezingOptions,
    Key,
    OptimizerConfig,
    OptimizerFileOptions,
    keys_of,
    optimizer_classes,
    optimizer_keys,
    plain,
    train_keys,
)
from trainer.optim.by_class import by_class

BASE, OVERRIDES, FREEZING = "base", "text_encoder_overrides", "text_encoder_freezing"
FALLBACK_LR = 1e-6
"""EveryDream2's learning rate, used if no file has one."""

TINY_MULTIPLIER = 1e-4
"""Multipliers of D-Adaptation below this are most likely meant as rates."""

_FREEZE = {
    BASE: "; to leave the UNet as it is, set disable_unet_training in train.json",
    OVERRIDES: "; to leave the text encoder as it is, set disable_textenc_training in train.json",
}
_SCHEDULE = ("lr_scheduler", "lr_warmup_steps", "lr_decay_steps")


@dataclass(frozen=True)
class Rates:
    """The rates and schedule of train.json that were written, by key, and the networks that are trained."""

    written: Mapping[str, Written]
    unet: bool = True
    text_encoder: bool = True


@dataclass(frozen=True)
class _Section:
    """One section: its optimizer (None: unknown), right values, and whether its network is trained."""

    name: str
    optimizer: str | None
    values: Mapping[str, Written]
    trained: bool

    @property
    def adapts(self) -> bool:
        """True if the optimizer finds its own rate, which lr multiplies."""
        return _class(self.optimizer or "").adapts


def read_optimizers(document: Document, rates: Rates, report: Report) -> OptimizerConfig | None:
    """Return the optimizers of an optimizer file, every rate resolved; None after reporting config errors."""
    before = len(report.errors)
    return _Reader(document, rates, report).config(before)


@dataclass(frozen=True)
class _Reader:
    """One optimizer file while it is read."""

    document: Document
    rates: Rates
    report: Report

    def config(self, before: int) -> OptimizerConfig | None:
        """Return the whole file; None if there are more errors than `before`."""
        top, report = self.document.members(self.document.values), self.report
        if BASE not in top and {"resume_ckpt", "data_root", "max_epochs", "optimizer_config"} & top.keys():
            report.error(
                Place(self.document.file),
                f"is a train.json, not an optimizer file, which holds {BASE}, {OVERRIDES} and {FREEZING}; "
                "see optimizer_config",
            )
            return None
        options = self._top(top)
        if BASE not in top:
            sentence = f"{BASE} is missing: the section that names the optimizer; {{}} takes every default"
            report.error(Place(self.document.file), sentence)
        base = self._section(BASE, DEFAULT_OPTIMIZER, self.rates.unet)
        overrides = self._section(OVERRIDES, base.optimizer, self.rates.text_encoder)
        freezing = self._freezing()
        if base.optimizer is None or overrides.optimizer is None or len(report.errors) > before:
            return None
        scale = options.text_encoder_lr_scale
        if scale != 1 and ("lr" in overrides.values or not overrides.trained):
            frozen = "disable_textenc_training freezes the text encoder"
            why = f"{OVERRIDES}.lr is set" if overrides.trained else frozen
            report.note(self.document.place("text_encoder_lr_scale"), f"has no effect: {why}")
        lr = self._base_lr(base, overrides)
        text_lr = self._text_lr(base, overrides, lr, scale)
        self._note_idle_lr([(base, lr), (overrides, text_lr)])
        for section in (base, overrides):
            self._note_tiny_multiplier(section)
        inherited = replace(overrides, values=self._inherit(base, overrides))
        return OptimizerConfig(
            unet=self._build(base, lr),
            text_encoder=self._build(inherited, text_lr),
            freezing=freezing,
            log_grad_norm=options.log_grad_norm,
            apply_grad_scaler_step_tweaks=options.apply_grad_scaler_step_tweaks,
        )

    def _top(self, top: Mapping[str, Written]) -> OptimizerFileOptions:
        sections, known = (BASE, OVERRIDES, FREEZING), keys_of(OptimizerFileOptions)

        def foreign(name: str, written: Written) -> None:
            if name in sections:
                if not isinstance(written.value, dict | None):
                    sentence = f"must be an object in braces, {{ ... }}; got {shown(written.value)}"
                    self.report.error(written.place, sentence)
            elif name in SECTION_WORDS:
                self.report.error(written.place, f"unknown key; did you mean '{SECTION_WORDS[name]}'?")
            elif name in optimizer_keys() or name in UNUSED_OPTIMIZER:
                self.report.error(written.place, f"belongs inside {BASE}")
            elif name in keys_of(FreezingOptions):
                self.report.error(written.place, f"belongs inside {FREEZING}")
            elif name in train_keys():
                self.report.error(written.place, "belongs in train.json")
            elif inside := in_optimizer_file(name, found_there=True):
                self.report.error(written.place, f"belongs inside {inside.replace('.', ', as ')}")
            else:
                self.report.error(written.place, unknown_key(name, [*sections, *known]))

        return OptimizerFileOptions(**values_of(read_keys(top, known, self.report, foreign=foreign)))

    def _section(self, name: str, optimizer: str | None, trained: bool) -> _Section:
        """Check one section's own values; `optimizer` acts if the section names none."""
        members = self.document.members(self.document.values.get(name), name)
        chosen = members.pop("optimizer", None)
        if chosen is not None and chosen.value is not None:
            optimizer = self._name(chosen)
        growth = members.get("growth_rate")
        if growth and isinstance(growth.value, str) and growth.value.lower() in ("inf", "infinity"):
            members["growth_rate"] = replace(growth, value=math.inf)

        def foreign(key: str, written: Written) -> None:
            if key in UNUSED_OPTIMIZER:
                if written.value not in (None, UNUSED_OPTIMIZER[key]):
                    sentence = f"has no effect: {optimizer or 'this optimizer'} does not use it"
                    self.report.note(written.place, sentence)
            else:
                word = other_word(key, optimizer=True)
                close = f"unknown key; did you mean '{word}'?" if word else unknown_key(key, optimizer_keys())
                self.report.error(written.place, close)

        own = keys_of(_class(optimizer)) if optimizer is not None else {}
        read = read_keys(
            members,
            {key: _first(users) for key, users in optimizer_keys().items()} | own,
            self.report,
            foreign=foreign,
            hint=lambda key, value: _FREEZE[name] if key == "lr" and value == 0 else "",
        )
        values: dict[str, Written] = {}
        for key, written in read.items():
            users = optimizer_keys().get(key, {})
            if optimizer is None or key in own:
                values[key] = written
            elif written.value not in [
                user.default for user in users.values()
            ]:  # EveryDream2 writes them all
                sentence = f"has no effect: {optimizer} does not use it, only {_listed(users)}"
                self.report.note(written.place, sentence)
        return _Section(name, optimizer, values, trained)

    def _name(self, written: Written) -> str | None:
        name = written.value.lower() if isinstance(written.value, str) else ""
        if name in optimizer_classes():
            return name
        if "." in name:
            return self._checked_path(written)
        if name in NEVER_NAMES:
            self.report.error(written.place, f"{name} is not supported; use {NEVER_NAMES[name]}")
        else:
            self.report.error(written.place, unknown_value(written.value, list(optimizer_classes())))
        return None

    def _checked_path(self, written: Written) -> str | None:
        """Return a class path that can be used; report why another cannot."""
        try:
            _class(written.value)
        except ValueError as error:
            self.report.error(written.place, f"{error}; or choose one of {', '.join(optimizer_classes())}")
            return None
        return written.value

    def _freezing(self) -> FreezingOptions:
        members = self.document.members(self.document.values.get(FREEZING), FREEZING)
        freezing = FreezingOptions(**values_of(read_keys(members, keys_of(FreezingOptions), self.report)))
        if freezing.unfreeze_last_n_layers is not None and freezing.freeze_front_n_layers is not None:
            place = members["freeze_front_n_layers"].place
            self.report.note(place, "has no effect: unfreeze_last_n_layers is set and wins")
        if freezing != FreezingOptions() and not self.rates.text_encoder:
            sentence = "has no effect: disable_textenc_training freezes the whole text encoder"
            self.report.note(self.document.place(FREEZING), sentence)
        return freezing

    def _inherit(self, base: _Section, overrides: _Section) -> Mapping[str, Written]:
        """Return the text encoder's values: its own, and base's if its optimizer uses them."""
        merged = dict(overrides.values)
        keys, theirs = (keys_of(_class(section.optimizer or "")) for section in (overrides, base))
        for key, written in base.values.items():
            if key in merged or key not in keys:
                continue
            own = keys[key]
            if own.annotation != theirs[key].annotation:
                right, _ = checked(own, plain(written.value), written.place, self.report)
                if not right:
                    continue
            merged[key] = written
        return merged

    def _base_lr(self, base: _Section, own: _Section) -> float:
        if "lr" in base.values:
            if base.trained and not base.adapts:
                self._note_difference(base, "lr")
            return base.values["lr"].value
        if base.adapts:
            return 1.0
        inherited = own.trained and "lr" not in own.values and not own.adapts
        return self._train_lr(BASE, base.trained or inherited)

    def _text_lr(self, base: _Section, own: _Section, base_lr: float, scale: float) -> float:
        if "lr" in own.values:
            if own.trained and not own.adapts:
                self._note_difference(own, "lr")
            return own.values["lr"].value
        if base.adapts == own.adapts:
            return base_lr * scale
        # A rate and a multiplier are unrelated: 0.1 is usual for one and ruin for the other.
        lr = 1.0 if own.adapts else self._train_lr(OVERRIDES, own.trained)
        if "lr" in base.values and own.trained:
            what = {True: "lr multiplies the rate that it finds", False: "lr is the rate"}
            self.report.note(
                self._lr_place(OVERRIDES),
                f"{lr * scale:g} is used; {BASE}.lr {base_lr:g} is not inherited: for {base.optimizer} "
                f"{what[base.adapts]}, for {own.optimizer} {what[own.adapts]}",
            )
        return lr * scale

    def _train_lr(self, section: str, trained: bool) -> float:
        if "lr" in self.rates.written:
            return self.rates.written["lr"].value
        if trained:
            sentence = f"no learning rate here nor in train.json; {FALLBACK_LR:g} is used"
            self.report.note(self._lr_place(section), sentence)
        return FALLBACK_LR

    def _lr_place(self, section: str) -> Place:
        return self.document.place(section).at(f"{section}.lr")

    def _note_idle_lr(self, sections: Iterable[tuple[_Section, float]]) -> None:
        """Note an lr of the command line that no network uses, because D-Adaptation finds the rates of all.

        train.json's lr is a fall-back for any optimizer file, so it causes no note.
        """
        written = self.rates.written.get("lr")
        trained = [(section, lr) for section, lr in sections if section.trained]
        if written is None or written.place.file != COMMAND_LINE or not trained:
            return
        if all(section.adapts for section, _ in trained):
            section, lr = trained[0]
            self.report.note(
                written.place,
                f"is for optimizers that take a rate: {section.optimizer} finds its own, times {lr:g}, "
                f"the {section.name}.lr of {self.document.file}",
            )

    def _note_tiny_multiplier(self, section: _Section) -> None:
        """Note an lr that was meant as a rate: for D-Adaptation it multiplies the learned rate."""
        own = section.values.get("lr")
        if section.trained and own is not None and section.adapts and own.value < TINY_MULTIPLIER:
            self.report.note(
                own.place,
                f"{own.value:g} looks like a learning rate, but for {section.optimizer} lr multiplies the "
                "rate it finds, and d grows in proportion to it; 1.0 is the method's own, 0.1 gentle",
            )

    def _note_difference(self, section: _Section, key: str) -> None:
        """Note a value of a section that wins over another one in train.json or on the command line."""
        own, train = section.values.get(key), self.rates.written.get(key)
        if own is None or train is None or own.value == train.value:
            return
        # Many files hold the default.
        if train.place.file == COMMAND_LINE or train.value not in (train_keys()[key].default, 0):
            used, other = (
                value if isinstance(value, str) else f"{value:g}" for value in (own.value, train.value)
            )
            self.report.note(own.place, f"{used} is used, not the {other} of {train.place.origin}")

    def _build(self, section: _Section, lr: float) -> Any:
        """Return the options object of a section, its schedule taken from train.json if it has none."""
        schedule = {key: section.values.get(key) or self.rates.written.get(key) for key in _SCHEDULE}
        name = schedule["lr_scheduler"].value if schedule["lr_scheduler"] else "constant"
        for key in _SCHEDULE if section.trained else ():
            self._note_difference(section, key)
        for key in ("lr_warmup_steps", "lr_decay_steps"):
            written = schedule[key]
            if name == "constant" and section.trained and written and written.value:
                instead = (
                    "constant_with_warmup" if key == "lr_warmup_steps" else "linear, cosine or polynomial"
                )
                self.report.note(written.place, f"has no effect with lr_scheduler constant; choose {instead}")
        values = values_of(section.values)
        values |= values_of({key: written for key, written in schedule.items() if written is not None})
        values |= {"lr": lr, "lr_scheduler": name, "lr_decay_steps": values.get("lr_decay_steps") or None}
        return _class(section.optimizer or "")(**values)


def _class(name: str) -> Any:
    """Return the options class of an optimizer by name or class path; raise ValueError with a sentence."""
    return optimizer_classes().get(name) or by_class(name)


def _first(users: Mapping[str, Key]) -> Key:
    return next(iter(users.values()))


def _listed(names: Iterable[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last
