"""The optimizers: a closed union, one class of options each, which builds the optimizer."""

from trainer.optim.adamw import AdamW8bitOptions, AdamWOptions
from trainer.optim.dadapt import DAdaptAdam8bitOptions, DAdaptAdamOptions, DAdaptAdamReferenceOptions

OptimizerOptions = AdamWOptions | AdamW8bitOptions | DAdaptAdamOptions | DAdaptAdam8bitOptions | DAdaptAdamReferenceOptions

__all__ = [
    "AdamW8bitOptions",
    "AdamWOptions",
    "DAdaptAdam8bitOptions",
    "DAdaptAdamOptions",
    "DAdaptAdamReferenceOptions",
    "OptimizerOptions",
]
