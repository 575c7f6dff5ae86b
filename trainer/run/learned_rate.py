"""Export of the learned rate: an optimizer file for AdamW in 8 bits, or the reason why there is none."""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from trainer.checkpoints.atomic import appearing
from trainer.config import check_rates
from trainer.config.resolved import documents
from trainer.errors import UserError
from trainer.networks import NETWORKS
from trainer.optim import AdamW8bitFusedOptions, AdamW8bitOptions
from trainer.optim.dadapt import AdaptedMomentOptions

if TYPE_CHECKING:
    from trainer.config.schema import TrainConfig
    from trainer.optim import OptimizerOptions
    from trainer.optim.watch import AdaptationWatch
    from trainer.training.run import Run

FOUND = "optimizer.found.json"


def hand_over(run: Run, config: TrainConfig) -> list[str]:
    """Write the optimizer file of the learned rates into the run folder; return sentences about it.

    There are none where no optimizer of the run adapts.
    """
    learning = {member.network: member.options for member in run.learner.optimizers.members}
    watch = run.records.watch
    if not watch.networks:
        return []
    path = run.folder / FOUND
    try:
        path.unlink(missing_ok=True)  # of an earlier stop, at which d may have been another
        if reasons := [
            reason for network in watch.networks if (reason := _reason(network, learning[network], watch))
        ]:
            return [f"No {FOUND}: {'; '.join(reasons)}."]
        half = config.precision.weights_dtype == "bf16" and not config.parts.trains_adapters
        found = {network: _as_adamw(learning[network], watch.d(network), half) for network in watch.networks}
        handed = replace(
            config,
            optimizers=replace(
                config.optimizers,
                **{NETWORKS[network].attribute: options for network, options in found.items()},
            ),
        )
        rates = " and ".join(f"{options.lr:g} for the {network}" for network, options in found.items())
        held = [
            network
            for network in found
            if (found[network].lr or 0) >= _rounded(getattr(learning[network], "rate_max", math.inf))
        ]
        caps = (
            f" That of the {' and the '.join(held)} is rate_max, which held it below what was found."
            if held
            else ""
        )
        found_in = f"{run.folder.name} up to step {run.state.step}"
        doc = f"AdamW in 8 bits at the rates that D-Adaptation found in {found_in}: {rates}.{caps}"
        with appearing(path) as draft:
            text = json.dumps(
                {"doc": doc, **documents(handed)["optimizer.json"]},
                indent=2,
                ensure_ascii=False,
                allow_nan=False,
            )
            draft.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        return [f"No {FOUND}: it could not be written ({error.strerror or error})."]
    needs = _needs(
        handed,
        {
            network: sum(p.numel() for p in parameters)
            for network, parameters in run.learner.optimizers.parameters.items()
        },
    )
    return [f"Found rate:  {path}: AdamW in 8 bits at {rates}{needs}{'.' + caps if caps else ''}"]


def _reason(network: str, options: OptimizerOptions, watch: AdaptationWatch) -> str | None:
    """Return why the rate of a network cannot be exported, as a clause; None where it can."""
    if not isinstance(options, AdaptedMomentOptions):
        other = f"{options.optimizer} of the {network} takes other steps than AdamW"
        return f"{other}, to which its rate means nothing"
    return watch.unsettled(network)


def _as_adamw(options: Any, d: float, half: bool) -> AdamW8bitOptions | AdamW8bitFusedOptions:
    """Return AdamW in 8 bits with the steps, schedule and decay of an Adam with estimate `d`.

    It is the one that takes no more memory than the run: with fused backward, or with bf16 weights if `half`,
    this program's own.
    """
    fused = getattr(options, "fused_backward", False)
    scale: float = getattr(options, "layer_scale", 1.0)
    same = {
        entry.name: getattr(options, entry.name)
        for entry in fields(AdamW8bitOptions)
        if entry.name != "optimizer"
    }
    # Decay shrinks weights by weight_decay * d*lr a step, which layer_scale leaves alone; AdamW has none that
    # is added to the gradient.
    rate = min(d * (options.lr or 1.0) * scale, getattr(options, "rate_max", math.inf))
    decay = options.weight_decay / scale if options.decouple else 0.0
    same |= {"lr": _rounded(rate), "weight_decay": float(f"{decay:.6g}")}
    return AdamW8bitFusedOptions(**same, fused_backward=fused) if fused or half else AdamW8bitOptions(**same)


def _rounded(rate: float) -> float:
    return float(f"{rate:.4g}")


def _needs(config: TrainConfig, trained: dict[str, int]) -> str:
    """Return which key of train.json the file needs, where it does not go with those of its own run."""
    try:
        check_rates(config, trained)
    except UserError:
        return "; train.json then needs allow_high_lr true"
    return ""
