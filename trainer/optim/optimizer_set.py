"""The optimizers of a run, one for each network, stepped together or not at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trainer.errors import UserError
from trainer.optim.schedules import rate_factor

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from trainer.optim import OptimizerOptions


@dataclass(frozen=True)
class Member:
    """One network's optimizer."""

    network: str
    options: OptimizerOptions
    parameters: tuple[nn.Parameter, ...]
    optimizer: Optimizer
    factor: Callable[[int], float]
    """The learning-rate schedule: a factor on the rate by optimizer step."""

    @property
    def fused(self) -> bool:
        """True if it updates its network inside the backward pass."""
        return getattr(self.optimizer, "fused_backward", False)

    @property
    def gated(self) -> bool:
        """True if it skips a step by `found_inf` on the device."""
        return getattr(self.optimizer, "_step_supports_amp_scaling", False)


@dataclass(frozen=True)
class Learned:
    """The options of an optimizer with what it has learned."""

    options: OptimizerOptions
    step: int
    """Optimizer steps of its network."""
    d: float
    """Its estimate; 1 for one that does not find its rate."""


class OptimizerSet:
    """Separate optimizers for separate networks, each with its own rate, schedule and `d`.

    Args:
        options: optimizer options by network.
        parameters: trained parameters by network; a network without any has no optimizer.
        total_steps: the optimizer steps of the run, which schedules are stretched over.
    """

    def __init__(
        self,
        options: Mapping[str, OptimizerOptions],
        parameters: Mapping[str, Sequence[nn.Parameter]],
        *,
        total_steps: int,
    ) -> None:
        self.members: tuple[Member, ...] = tuple(
            _member(network, options[network], trained, total_steps)
            for network, trained in parameters.items()
            if trained
        )
        self.stopped: dict[str, Learned] = {}
        """Of networks that were frozen during the run, whose optimizers are gone."""
        self._decayed: dict[str, Any] = {}
        self._finite: Tensor | None = None
        self._half_made: Tensor | float = 0.0
        self.updating = False
        """True from the start of an update until the step is counted: the weights are ahead of the counter,
        so no checkpoint may be written."""

    @property
    def fused(self) -> bool:
        """True if a network is updated inside the backward pass."""
        return any(member.fused for member in self.members)

    @property
    def optimizers(self) -> list[Optimizer]:
        """The optimizers in the networks' order."""
        return [member.optimizer for member in self.members]

    @property
    def parameters(self) -> dict[str, tuple[nn.Parameter, ...]]:
        """Trained parameters by network."""
        return {member.network: member.parameters for member in self.members}

    def stop(self, network: str, step: int) -> None:
        """Drop the optimizer of a network after `step` optimizer steps, and its state."""
        for member in self.members:
            if member.network == network:
                self._drop(network, _learned(member, step))

    def learned(self, step: int) -> dict[str, Learned]:
        """Return by network what its optimizer has learned in `step` steps, or fewer if it was stopped."""
        return {member.network: _learned(member, step) for member in self.members} | self.stopped

    def _drop(self, network: str, learned: Learned) -> None:
        self.members = tuple(member for member in self.members if member.network != network)
        self.stopped[network] = learned
        self._decayed.pop(network, None)

    def set_rates(self, step: int) -> None:
        """Set the learning rate of every optimizer for optimizer step `step`, counted from 0."""
        for member in self.members:
            for group in member.optimizer.param_groups:
                group["lr"] = _rate(member.options) * member.factor(step)

    def gate(self, loss: Tensor) -> None:
        """Before backward: make optimizers that update inside it change nothing if the loss is not finite."""
        self.updating = self.fused
        self._finite = loss.detach().isfinite()
        for member in self.members:
            if member.fused:
                member.optimizer.gate(self._finite)  # type: ignore[attr-defined]

    def norms_in_backward(self) -> dict[str, Tensor]:
        """Return the 2-norm of the last gradient of each network with fused backward: 0-d tensors."""
        fused = [member for member in self.members if member.fused]
        return {member.network: member.optimizer.grad_norm for member in fused}  # type: ignore[attr-defined]

    def step(self, found_inf: Tensor) -> None:
        """Update the weights; if `found_inf` is 1, change neither weights nor state of any network.

        Optimizers that accept the flag on the device are gated there. bitsandbytes and the dadaptation
        library do not: with one of them in the set the flag is read, one synchronisation a step. Optimizers
        with fused backward are always called, to close their step. They have already updated if the loss was
        finite: the other networks' skipped gradients then count as "not finite" in `measures`.
        """
        skips = not all(member.gated for member in self.members) and bool(found_inf)
        self.updating = True
        if self.fused and self._finite is not None:
            self._half_made = self._half_made + found_inf * self._finite
        for member in self.members:
            if skips and not member.gated:
                continue
            if member.options.adapts and (decay := member.options.decay(member.optimizer)) is not None:
                share = decay * (1 - found_inf.double())
                self._decayed[member.network] = self._decayed.get(member.network, 0.0) + share
            if member.gated:
                member.optimizer.found_inf = found_inf  # type: ignore[attr-defined]
                member.optimizer.grad_scale = None  # type: ignore[attr-defined]
            member.optimizer.step()

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for member in self.members:
            member.optimizer.zero_grad(set_to_none=True)

    def measures(self) -> dict[str, dict[str, Any]]:
        """Return the reported numbers by network: `rate`, the effective learning rate, and those of d.

        Optimizers that find their rate also report `d`, `d_hat` and `decayed`, the share of every weight that
        decay has taken since the start of the run. With fused backward every network reports `not finite`:
        its gradients or steps that were skipped while others were applied.
        """
        found = {member.network: member.options.measure(member.optimizer) for member in self.members}
        for member in self.members if self.fused else ():
            found[member.network].setdefault("not finite", self._half_made)
        for network, total in self._decayed.items():
            found[network]["decayed"] = (
                1 - (-total).exp()
            )  # the product of all 1 - share, where shares are small
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return all state by network; of the groups only entries that the optimizer changes (d, k, ...)."""
        saved: dict[str, Any] = {}
        for member in self.members:
            state = member.optimizer.state_dict()
            groups = [member.options.learned(group) for group in state["param_groups"]]
            saved[member.network] = {
                "optimizer": member.options.optimizer,
                "state": state["state"],
                "groups": groups,
                "decayed": self._decayed.get(member.network),
            }
        for network, last in self.stopped.items():
            saved[network] = {
                "optimizer": last.options.optimizer,
                "stopped": {"step": last.step} | ({"d": last.d} if last.options.adapts else {}),
            }
        return saved

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Restore the state of `state_dict`; hyper-parameters stay those of the configuration.

        Raises:
            UserError: the state is of other networks or other optimizers.
        """
        have = {member.network: member.options.optimizer for member in self.members}
        found = {network: entry["optimizer"] for network, entry in saved.items()}
        if have != found:
            raise UserError(
                f"the checkpoint was trained with {_listed(found)}, this run asks for {_listed(have)}: its "
                "optimizer state does not fit; go back to those optimizers, or start a new run from the "
                "checkpoint's weights with --resume_weights_only."
            )
        for member in self.members:
            if "stopped" in (entry := saved[member.network]):
                last = entry["stopped"]
                self._drop(member.network, Learned(member.options, int(last["step"]), last.get("d", 1.0)))
        for member in self.members:
            entry = saved[member.network]
            current = member.optimizer.state_dict()["param_groups"]
            groups = [{**group, **learned} for group, learned in zip(current, entry["groups"], strict=True)]
            state = {
                key: _laid_out_like(member.parameters[key], values, member.options.shaped_state)
                if isinstance(key, int)
                else values
                for key, values in entry["state"].items()
            }
            kinds: dict[Any, set[type]] = {}
            for name, value in (
                item for key, values in state.items() if isinstance(key, int) for item in values.items()
            ):
                kinds.setdefault(name, set()).add(type(value))
            _check_lengths(member.parameters, state)
            if odd := [name for name, types in kinds.items() if len(types) > 1]:
                raise ValueError(f"{odd[0]} is not of one kind in the state of the {member.network}")
            member.optimizer.load_state_dict({"state": state, "param_groups": groups})
        self._decayed = {
            network: entry["decayed"] for network, entry in saved.items() if entry.get("decayed") is not None
        }


def _learned(member: Member, step: int) -> Learned:
    d = float(member.options.measure(member.optimizer)["d"]) if member.options.adapts else 1.0
    return Learned(member.options, step, d)


def _member(
    network: str, options: OptimizerOptions, trained: Sequence[nn.Parameter], total_steps: int
) -> Member:
    """Return a network's optimizer; parameters marked by `no_weight_decay` are a second group of it."""
    kept = [parameter for parameter in trained if getattr(parameter, "no_weight_decay", False)]
    if kept and options.groups_decay:
        decayed = [parameter for parameter in trained if not getattr(parameter, "no_weight_decay", False)]
        groups: Any = [{"params": decayed}, {"params": kept, "weight_decay": 0.0}]
        trained = [*decayed, *kept]
    else:
        groups = trained
    optimizer = options.build(groups, _rate(options))
    return Member(network, options, tuple(trained), optimizer, rate_factor(options, total_steps))


def _rate(options: OptimizerOptions) -> float:
    if options.lr is None:
        raise ValueError("the learning rate is resolved when the configuration is loaded")
    return options.lr


def _laid_out_like(parameter: nn.Parameter, value: Any, shaped: bool) -> Any:
    """Return saved state with the strides of its parameter wherever it has its shape.

    Files hold tensors in logical order. Fused and 8-bit kernels walk parameter and state as plain memory,
    side by side, so state beside channels-last weights must be channels last too; and sums are equal to the
    bit only in the same order.
    """
    import torch

    if isinstance(value, dict):
        return {key: _laid_out_like(parameter, item, shaped) for key, item in value.items()}
    if shaped and isinstance(value, torch.Tensor) and value.dim() > 1 and value.shape != parameter.shape:
        raise ValueError(f"state of {tuple(value.shape)} beside weights of {tuple(parameter.shape)}")
    if (
        isinstance(value, torch.Tensor)
        and value.shape == parameter.shape
        and value.stride() != parameter.stride()
    ):
        return torch.empty_strided(
            parameter.shape, parameter.stride(), dtype=value.dtype, device=value.device
        ).copy_(value)
    return value


def _check_lengths(parameters: Sequence[nn.Parameter], state: Mapping[Any, Any]) -> None:
    """Raise ValueError if flat state differs in size from its weights, though other such state fits."""
    entries = [
        (key, name, value)
        for key, each in state.items()
        if isinstance(key, int)
        for name, value in each.items()
    ]
    sizes = [(key, name, value) for key, name, value in entries if hasattr(value, "shape")]
    shaped = {name for _, name, value in sizes if value.dim() > 1}
    for key, name, value in sizes:
        if name in shaped and value.dim() == 1 and value.numel() != parameters[key].numel():
            raise ValueError(
                f"{name} of {tuple(value.shape)} beside weights of {tuple(parameters[key].shape)}"
            )


def _listed(optimizers: Mapping[str, str]) -> str:
    return " and ".join(f"{name} for the {network}" for network, name in optimizers.items()) or "no optimizer"
