"""Any optimizer of any package by its class path, such as `pytorch_optimizer.ADOPT`, for experiments.

Its keys are the keyword arguments of its constructor; steps and state are its own.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable
from dataclasses import dataclass, field, make_dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

from trainer.optim.schedules import ScheduleOptions

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer


@dataclass(frozen=True, kw_only=True)
class ByClassOptions(ScheduleOptions):
    """The options of an optimizer that is named by its class path; `by_class` adds its keyword arguments."""

    optimizer: str = ""

    shaped_state: ClassVar[bool] = False

    arguments: ClassVar[tuple[str, ...]] = ()
    """The constructor's keyword arguments that are keys."""

    def build(self, params: Iterable[nn.Parameter], lr: float) -> Optimizer:
        """Return the optimizer over `params`."""
        return _load(self.optimizer)(params, lr=lr, **{name: getattr(self, name) for name in self.arguments})

    def learned(self, group: dict[str, Any]) -> dict[str, Any]:
        """Return the entries of a group that are no arguments, such as a step count or an estimate d."""
        given = {"params", "lr", "initial_lr", *self.arguments}
        return {key: value for key, value in group.items() if key not in given}

    def rate(self, optimizer: Optimizer) -> Any:
        """Return the rate of the coming step: lr, or d * lr where the optimizer has an estimate d."""
        group = optimizer.param_groups[0]
        return group["d"] * group["lr"] if self.adapts else group["lr"]

    def decay(self, optimizer: Optimizer) -> None:
        """Return None: what another package's weight decay takes is not known."""

    def measure(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return `rate`, and `d` where the optimizer has one."""
        own = {"d": optimizer.param_groups[0]["d"]} if self.adapts else {}
        return {"rate": self.rate(optimizer), **own}


@cache
def by_class(path: str) -> type[ByClassOptions]:
    """Return the options class of a torch optimizer by its class path.

    An optimizer with an argument `d0` is taken for one that finds its own rate, `d` of its groups times lr.

    Raises:
        ValueError: with a sentence, if it is none that this program can step.
    """
    parameters = list(inspect.signature(_load(path)).parameters.values())[1:]
    named = [each for each in parameters if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)]
    if "lr" not in (each.name for each in named):
        raise ValueError(f"{path} takes no lr, which schedules and reports need")
    keys = [(each.name, _kind(each), each.default) for each in named if each.name != "lr"]
    own = {name: (kind, field(default=default)) for name, kind, default in keys if kind is not None}
    if needed := [name for name, _, default in keys if default is inspect.Parameter.empty]:
        raise ValueError(f"{path} cannot be made without {', '.join(needed)}, which have no default")
    return make_dataclass(
        "ByClass",
        [("optimizer", str, field(default=path)), *((name, *rest) for name, rest in own.items())],
        bases=(ByClassOptions,),
        frozen=True,
        kw_only=True,
        namespace={"arguments": tuple(own), "adapts": "d0" in own},
    )


def try_out(options: ByClassOptions, *, channels_last: bool) -> None:
    """Step the optimizer once on two small weights, one of them a convolution's.

    Raises:
        ValueError: with a sentence, if it refuses its arguments or cannot step.
    """
    import torch

    layout = torch.channels_last if channels_last else torch.contiguous_format
    values = torch.ones(4, 4), torch.ones(4, 2, 3, 3).to(memory_format=layout)
    for value, hint in zip(values, ("", "; channels_last false may help" * channels_last), strict=True):
        weight = torch.nn.Parameter(value)
        weight.grad = torch.full_like(weight, 1e-3)
        try:
            optimizer = options.build([weight], options.lr or 1.0)
            optimizer.step()
            options.measure(optimizer)
        except Exception as error:  # another package may raise anything
            said = next(iter(str(error).strip().splitlines()), repr(error))
            raise ValueError(f"{options.optimizer} fails on a small weight ({said}{hint})") from error


@cache
def _load(path: str) -> Any:
    from torch.optim import Optimizer

    module, _, name = path.rpartition(".")
    try:
        found = importlib.import_module(module)
    except Exception as error:  # a module may raise anything
        raise ValueError(
            f"{module} does not load ({error}); install the package, or check the name"
        ) from error
    kind = getattr(found, name, None)
    if not isinstance(kind, type) or not issubclass(kind, Optimizer):
        raise ValueError(f"{path} is not a torch.optim.Optimizer")
    if any(each.default is each.empty for each in list(inspect.signature(kind.step).parameters.values())[1:]):
        raise ValueError(f"{path} steps several times a batch, which this program does not")
    if hasattr(kind, "eval") and hasattr(kind, "train"):
        raise ValueError(
            f"{path} needs other weights for samples and checkpoints than for training (schedule-free)"
        )
    return kind


def _kind(argument: inspect.Parameter) -> Any:
    """Return the type of a key by its default; None for an argument that JSON cannot hold."""
    default = argument.default
    if default is None:
        return bool | int | float | str | None
    if isinstance(default, int) and "float" in str(argument.annotation):
        return float
    if isinstance(default, bool | int | float | str):
        return type(default)
    if (
        isinstance(default, tuple | list)
        and default
        and all(isinstance(each, int | float) for each in default)
    ):
        return tuple[float, ...]
    return None
