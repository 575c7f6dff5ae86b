"""D-Adaptation: optimizers that find their own learning rate (Defazio & Mishchenko, arXiv 2301.07733)."""

from trainer.optim.dadapt.options import (
    AdaptationOptions,
    AdaptedMomentOptions,
    DAdaptAdam8bitOptions,
    DAdaptAdamOptions,
    DAdaptAdamReferenceOptions,
    DAdaptLionOptions,
    DAdaptSGDOptions,
    EstimateOptions,
    GrowthOptions,
)

__all__ = [
    "AdaptationOptions",
    "AdaptedMomentOptions",
    "DAdaptAdam8bitOptions",
    "DAdaptAdamOptions",
    "DAdaptAdamReferenceOptions",
    "DAdaptLionOptions",
    "DAdaptSGDOptions",
    "EstimateOptions",
    "GrowthOptions",
]
