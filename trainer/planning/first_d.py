"""The start of d: d0 of the optimizer file, or the d of the checkpoint that a new run starts from."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from trainer.checkpoints.format import RESUME, resume_problem
from trainer.config import TrainConfig
from trainer.errors import UserError, said
from trainer.networks import NETWORKS, by_network
from trainer.optim.dadapt import EstimateOptions
from trainer.state_file import read_entry

if TYPE_CHECKING:
    from trainer.planning.resume import Start

_PLACES = (("state", "adaptation", "d"), ("groups", 0, "d"), ("stopped", "d"))
"""Places of d in the state of an optimizer: of this program's own, and of the libraries'."""


def with_first_d(
    config: TrainConfig, start: Start, trained: Collection[str]
) -> tuple[TrainConfig, frozenset[str]]:
    """Return the configuration with a number for every d0, and the networks that start at a checkpoint's d.

    A resumed run keeps the numbers that it started with.

    Args:
        config: the checked configuration.
        start: the model or checkpoint that the run starts from.
        trained: networks with trained parameters; the d0 of others becomes the default.

    Raises:
        UserError: d0 is resume, and there is no checkpoint with a d for the network; or d_max is below d0.
    """
    every: dict[str, Any] = by_network(config.optimizers)
    asking = {network: found for network, found in every.items() if getattr(found, "d0", None) == "resume"}
    learned = frozenset(asking.keys() & trained)
    numbers: Mapping[str, float] = dict.fromkeys(asking, EstimateOptions.d0)  # type: ignore[arg-type]
    if learned and start.about is not None:
        numbers = {**numbers, **{network: _recorded(start.about, network) for network in learned}}
    elif learned:
        numbers = {**numbers, **_of_checkpoint(config, start.weights_of, learned)}
    resolved = {
        NETWORKS[network].attribute: replace(asking[network], d0=numbers[network]) for network in asking
    }
    config = replace(config, optimizers=replace(config.optimizers, **resolved))
    _check_limits(config, trained)
    return config, learned


def _check_limits(config: TrainConfig, trained: Collection[str]) -> None:
    problems = [
        f"{config.optimizer_source.name}: {NETWORKS[network].section}.d_max: {found.d_max:g} is below "
        f"{found.d0:g}, where d starts; raise d_max, or cap the rate by rate_max instead, which lets d rise."
        for network, found in by_network(config.optimizers).items()
        if network in trained and hasattr(found, "d_max") and found.d_max < found.d0
    ]
    if problems:
        raise UserError(problems)


def _recorded(about: Mapping[str, Any], network: str) -> float:
    """Return the number of d0 in a checkpoint's record of its run."""
    recorded = about["config"].get(f"{NETWORKS[network].section}.d0")
    found = isinstance(recorded, float) and recorded > 0
    return recorded if found else EstimateOptions.d0  # type: ignore[return-value]


def _of_checkpoint(config: TrainConfig, folder: Path | None, networks: Collection[str]) -> dict[str, float]:
    """Return the d of each network in a checkpoint's optimizer state."""
    sections = " and ".join(f"{NETWORKS[network].section}.d0" for network in NETWORKS if network in networks)
    place = f"{config.optimizer_source.name}: {sections}: resume takes the d of a checkpoint"
    fix = "set d0 to a number (1e-6 is the default)"
    if folder is None:
        raise UserError(
            f"{place}, but resume_ckpt is the model {config.model.resume_ckpt}; name a run folder or a "
            f"checkpoint folder and add --resume_weights_only, or {fix}."
        )
    if (problem := resume_problem(folder)) is not None:
        raise UserError(f"{place}; {problem}; name another checkpoint, or {fix}.")
    found = {network: _read_d(folder, network) for network in networks}
    if missing := [network for network in NETWORKS if found.get(network, 1.0) is None]:
        raise UserError(
            f"{place}, but no optimizer of {folder} has a d for the {' and the '.join(missing)}; name a "
            f"checkpoint of a run with D-Adaptation there, or {fix}."
        )
    return {network: d for network, d in found.items() if d is not None}


def _read_d(folder: Path, network: str) -> float | None:
    """Return the d in the state of a network's optimizer, None if it has none."""
    path = folder / RESUME / "training.json"
    for place in _PLACES:
        try:
            d = float(read_entry(path.with_suffix(""), "optimizers", network, *place))
        except (KeyError, IndexError):
            continue
        except (OSError, SafetensorError, TypeError, ValueError) as error:
            raise UserError(f"{path}: d cannot be read ({said(error)}); name another checkpoint.") from error
        if d > 0:
            return d
    return None
