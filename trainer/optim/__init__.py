"""The optimizers: a closed union, one class of options each, which builds the optimizer."""

from trainer.optim.adamw import AdamW8bitOptions, AdamWOptions
from trainer.optim.dadapt import DAdaptAdamOptions

OptimizerOptions = AdamWOptions | AdamW8bitOptions | DAdaptAdamOptions

__all__ = ["AdamW8bitOptions", "AdamWOptions", "DAdaptAdamOptions", "OptimizerOptions"]
