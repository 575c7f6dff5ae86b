"""The optimizers: a closed union, one class of options each, which builds the optimizer."""

from trainer.optim.adamw import AdamW8bitFusedOptions, AdamW8bitOptions, AdamWOptions
from trainer.optim.dadapt import (
    DAdaptAdam8bitOptions,
    DAdaptAdamOptions,
    DAdaptAdamReferenceOptions,
    DAdaptLionOptions,
    DAdaptSGDOptions,
)
from trainer.optim.lion import Lion8bitOptions, LionOptions
from trainer.optim.prodigy import ProdigyOptions

OptimizerOptions = (
    AdamWOptions
    | AdamW8bitOptions
    | AdamW8bitFusedOptions
    | LionOptions
    | Lion8bitOptions
    | DAdaptAdamOptions
    | DAdaptAdam8bitOptions
    | DAdaptAdamReferenceOptions
    | DAdaptLionOptions
    | DAdaptSGDOptions
    | ProdigyOptions
)

__all__ = [
    "AdamW8bitFusedOptions",
    "AdamW8bitOptions",
    "AdamWOptions",
    "DAdaptAdam8bitOptions",
    "DAdaptAdamOptions",
    "DAdaptAdamReferenceOptions",
    "DAdaptLionOptions",
    "DAdaptSGDOptions",
    "Lion8bitOptions",
    "LionOptions",
    "OptimizerOptions",
    "ProdigyOptions",
]
