"""Export of the learned rate: an optimizer file for AdamW in 8 bits, or the reason for its absence."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from trainer.config import check_rates
from trainer.config.resolved import documents, write_document
from trainer.errors import UserError
from trainer.networks import NETWORKS
from trainer.optim import AdamW8bitFusedOptions, AdamW8bitOptions
from trainer.optim.dadapt import AdaptedMomentOptions

if TYPE_CHECKING:
    from trainer.config.schema import TrainConfig
    from trainer.optim.optimizer_set import Learned
    from trainer.training.run import Run

LEARNED = "optimizer.found.json"


def export_learned_rate(run: Run, config: TrainConfig) -> list[str]:
    """Write an optimizer file at the learned rates into the run folder; return the closing lines about it.

    Without an optimizer that adapts there are no lines.
    """
    found = {
        network: learned
        for network, learned in run.learner.optimizers.learned(run.state.step).items()
        if learned.options.adapts
    }
    if not found:
        return []
    path = run.folder / LEARNED
    try:
        path.unlink(missing_ok=True)  # of an earlier stop, at which d may have been another
        if reasons := [
            reason for network, learned in found.items() if (reason := _reason(network, learned, run))
        ]:
            return [f"No {LEARNED}: {'; '.join(reasons)}."]
        half = config.precision.weights_dtype == "bf16" and not config.parts.trains_adapters
        fixed = {network: _as_adamw(learned, half) for network, learned in found.items()}
        rates = " and ".join(f"{options.lr:g} for the {network}" for network, options in fixed.items())
        clauses = {
            network: _cap(learned.options, fixed[network])
            + run.records.watch.settled(network, step=learned.step, d=learned.d)
            for network, learned in found.items()
        }
        settled = _together(clauses)
        doc = (
            f"AdamW in 8 bits at the rates of {run.folder.name} at step {run.state.step}: {rates}. {settled}."
        )
        exported = _with_optimizers(config, fixed)
        write_document(path, {"doc": doc, **documents(exported)["optimizer.json"]})
    except OSError as error:
        return [f"No {LEARNED}: it could not be written ({error.strerror or error})."]
    parameters = run.learner.optimizers.parameters
    trained = {network: sum(p.numel() for p in own) for network, own in parameters.items()}
    return [
        f"Rate:        {LEARNED}: AdamW in 8 bits at {rates}{_needs(exported, trained)}",
        f"             {settled}",
    ]


def _together(clauses: Mapping[str, str]) -> str:
    """Return clauses by network as one sentence; a clause that all share stands once."""
    if len(set(clauses.values())) == 1:
        return f"{' and '.join(clauses)}: {next(iter(clauses.values()))}"
    return "; ".join(f"{network}: {clause}" for network, clause in clauses.items())


def _reason(network: str, learned: Learned, run: Run) -> str | None:
    """Return why the rate of a network cannot be exported, as a clause; None if it can."""
    options = learned.options
    if not isinstance(options, AdaptedMomentOptions):
        other = f"{options.optimizer} of the {network} takes other steps than AdamW"
        return f"{other}, to which its rate means nothing"
    if run.records.watch.stuck(network, learned.d):
        return f"d of the {network} has not left d0 ({options.d0:g}) up to step {learned.step}"
    return None


def _cap(options: Any, exported: AdamW8bitOptions | AdamW8bitFusedOptions) -> str:
    """Return a clause about the rate_max that held a rate, empty if none did."""
    rate_max: float = getattr(options, "rate_max", math.inf)
    return f"rate_max held the rate at {exported.lr:g}; " if (exported.lr or 0) >= _rounded(rate_max) else ""


def _with_optimizers(config: TrainConfig, learned: Mapping[str, Any]) -> TrainConfig:
    own = {NETWORKS[network].attribute: options for network, options in learned.items()}
    return replace(config, optimizers=replace(config.optimizers, **own))


def _as_adamw(learned: Learned, half: bool) -> AdamW8bitOptions | AdamW8bitFusedOptions:
    """Return AdamW in 8 bits with the steps, schedule and decay of an Adam with an estimate.

    It is the one that takes no more memory than the run: with fused backward, or with bf16 weights if `half`,
    this program's own.
    """
    options: Any = learned.options
    fused = getattr(options, "fused_backward", False)
    scale: float = getattr(options, "layer_scale", 1.0)
    same = {
        entry.name: getattr(options, entry.name)
        for entry in fields(AdamW8bitOptions)
        if entry.name != "optimizer"
    }
    # Decay shrinks weights by weight_decay * d*lr a step, which layer_scale leaves alone; AdamW has none that
    # is added to the gradient.
    rate = min(learned.d * (options.lr or 1.0) * scale, getattr(options, "rate_max", math.inf))
    decay = options.weight_decay / scale if options.decouple else 0.0
    same |= {"lr": _rounded(rate), "weight_decay": float(f"{decay:.6g}")}
    return AdamW8bitFusedOptions(**same, fused_backward=fused) if fused or half else AdamW8bitOptions(**same)


def _rounded(rate: float) -> float:
    return float(f"{rate:.4g}")


def _needs(config: TrainConfig, trained: dict[str, int]) -> str:
    """Return the key of train.json that the file needs besides those of its own run, in words."""
    try:
        check_rates(config, trained)
    except UserError:
        return "; train.json then needs allow_high_lr true"
    return ""
