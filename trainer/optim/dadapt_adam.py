"""Adam with D-Adaptation (Defazio & Mishchenko 2023, arXiv 2301.07733) in one pass over the parameters, without host syncs.

With g the gradient, r the group's layer_scale, bc the bias correction or 1, q = sqrt(beta2) and dlr = d * lr * bc, a step is

    num += r * dlr * <g, s / (sqrt(v) + eps)>           the old s, v and d
    m    = beta1 * m + r * dlr * (1 - beta1) * g
    v    = beta2 * v + (1 - beta2) * g * g
    s    = q * s + dlr * (1 - q) * g
    l1  += r * |s|_1
    p    = p - decay * dlr * p - m / (sqrt(v) + eps)    decay: decoupled; coupled, decay * p is added to g first

and, after all parameters, W = q * W + (1 - q) * num, d_hat = W / ((1 - q) * l1), d = max(d, min(d_hat, d * growth_rate, d_max)).

Nothing in the update uses the new d. So every parameter is visited once, whenever its gradient is there, even inside backward; only
the two sums wait for the end of the step. They are kept for each row of `ROW` elements of a parameter and added in a fixed order, so
they do not depend on the order in which the parameters came.

Three rules of the published optimizer are kept: a parameter without a gradient takes no part in a step; a group at lr 0 (while
another has lr > 0) keeps its state but goes on along its old momentum; and where l1 stays 0 (every lr 0, or no gradient but zeros
ever since the start) the step leaves the parameters, k, W and d alone.
"""

from __future__ import annotations

import math
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from trainer.optim.quantized import BLOCK, decode, encode

ROW = 2048
"""Elements of one row of the flat state. A parameter starts on a new row; the rest of its last row stays zero."""

_BLOCKS = ROW // BLOCK

_CACHED_ROWS = 32
"""Rows that the eager path works on at a time on the CPU: few enough for the cache, enough to hide each call."""

_LEARNED = ("d", "k", "numerator_weighted")
_SHARED = ("betas", "decouple", "use_bias_correction", "d0", "growth_rate", "d_max")


class DAdaptAdam(Optimizer):
    """Adam whose rate is d * lr, d being a lower bound of the distance to the solution that only grows.

    A drop-in for `dadaptation.DAdaptAdam`, with the same defaults. Scalars live in fp64 on the parameters' device and are read by
    nobody but the caller: `group["d"]`, `group["k"]` and `group["numerator_weighted"]` are tensors inside and become numbers when
    they are looked up. State is kept in fp32 (fp64 for fp64 parameters, or 8 bits) whatever the parameters' precision; bf16 parameters
    are rounded stochastically, since most steps are smaller than what separates two of their values. Rounding draws from the number
    of the step and the place of the element alone.

    Gradients that are not finite: if `found_inf` (and `grad_scale`) are set on the optimizer before `step()`, as torch's GradScaler
    does for optimizers with `_step_supports_amp_scaling`, they decide; otherwise the step looks for itself. Either way the whole step
    then changes neither parameters nor state nor d. The answer stays on the device. A gradient whose 2-norm overflows counts as not
    finite.

    Args:
        params: parameters, or groups of them. A group may have its own `lr` (0, or the value of the others), `eps`, `weight_decay`
            and `layer_scale`, a fixed factor on its rate; everything else holds for all groups.
        lr: a factor on d. 1.0 is the method's own.
        betas: decays of the running means of the gradient and of its square.
        eps: added to the root of the second moment.
        weight_decay: decay of the weights: each step by weight_decay * d * lr if decoupled, else added to the gradient.
        decouple: decay the weights beside the gradient, as AdamW does.
        use_bias_correction: correct the moments' start at zero, as Adam does.
        d0: where d starts.
        growth_rate: the most that d may grow by in one step, as a factor.
        d_max: d does not grow beyond this.
        state_bits: 32, or 8 for one byte for each of m, v and s (trainer.optim.quantized), 3.01 bytes for a parameter instead of 12.
        fused_backward: update each parameter inside `loss.backward()`, as soon as its gradient is complete, and drop the gradient, so that
            the gradients never exist together. `step()` closes the step: it moves d. Bit-equal to the plain step. One backward a step:
            gradient accumulation, clipping by a norm over all parameters, a loss scaler and gradients averaged over processes all need
            the gradients after backward. Rates are set before backward. A gradient that is not finite then gates its own parameter
            only, and is counted in `not_finite`; the whole step can be gated before backward by `gate`.

    Raises:
        ValueError: an argument is out of range, groups differ in what they must share, or a parameter is neither fp32, fp64 nor bf16.
    """

    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decouple: bool = False,
        use_bias_correction: bool = False,
        d0: float = 1e-6,
        growth_rate: float = math.inf,
        d_max: float = math.inf,
        state_bits: int = 32,
        fused_backward: bool = False,
    ) -> None:
        if not lr > 0:
            raise ValueError(f"lr is {lr}; it must be above 0")
        if state_bits not in (8, 32):
            raise ValueError(f"state_bits is {state_bits}; it must be 8 or 32")
        self.state_bits = state_bits
        self.fused_backward = fused_backward
        self._steps = 0
        self._layout: _Layout | None = None
        self._pass: _Pass | None = None
        self._gate: Tensor | None = None
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "layer_scale": 1.0, "decouple": decouple,
            "use_bias_correction": use_bias_correction, "d0": d0, "growth_rate": growth_rate, "d_max": d_max,
            "d": d0, "k": 0, "numerator_weighted": 0.0,
        }  # fmt: skip
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; only before the first step, since the state is one block of memory."""
        if self._layout is not None:
            raise RuntimeError("a parameter group can only be added before the first step")
        super().add_param_group(param_group)
        group = self.param_groups[-1] = _Group(self.param_groups[-1])
        _check(group, self.param_groups[0], self.state_bits)
        if self.fused_backward:
            hook = _arrival_hook(weakref.ref(self))
            for parameter in group["params"]:
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(hook)

    # ---- what the optimizer has found out: 0-d tensors on the device ----

    @property
    def d(self) -> Tensor:
        """The estimate d: 0-d, fp64, on the parameters' device."""
        return self._ready().scalars["d"]

    @property
    def d_hat(self) -> Tensor:
        """What the last step estimated, which d follows upwards: 0-d, fp64, on the parameters' device."""
        return self._ready().scalars["d_hat"]

    @property
    def l1(self) -> Tensor:
        """|s|_1 of the last step, each group weighted by its layer_scale: 0-d, fp64, on the parameters' device."""
        return self._ready().scalars["l1"]

    @property
    def not_finite(self) -> Tensor:
        """How many gradients were not finite, and left out, since this optimizer was made (fused backward): 0-d, int64."""
        return self._ready().not_finite

    def rate(self) -> Tensor:
        """Return d * lr * bias correction, the rate of the coming step: 0-d, fp64, on the parameters' device."""
        return self._rate(max(group["lr"] for group in self.param_groups))

    # ---- the step ----

    def gate(self, finite: Tensor) -> None:
        """Tell a fused backward, before it runs, whether the loss is finite: 0-d, bool or number. If not, the step changes nothing."""
        self._gate = finite != 0

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update the parameters that have a gradient, their state, and d; return what `closure` returned.

        After a fused backward only d is left to be updated.

        Raises:
            ValueError: groups have different rates, none of them 0.
            RuntimeError: with fused backward, what has happened since backward does not fit it.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        layout = self._ready()
        work = [(segment, parameter) for segment, parameter in self._segments() if parameter.grad is not None]
        found_inf = getattr(self, "found_inf", None)
        grad_scale = getattr(self, "grad_scale", None)
        if self.fused_backward:
            if grad_scale is not None:
                raise RuntimeError("fused backward cannot undo a loss scale after backward: use bf16 or fp32, or the plain step")
            for segment, parameter in work:  # gradients that did not come from a backward pass
                self._arrive(segment, parameter)
        elif work:
            self._pass = self._begin()
            gradients = [(segment, p, p.grad) for segment, p in work if p.grad is not None]
            finite = _all_finite(gradients, layout.device) if found_inf is None else found_inf.to(layout.device) == 0
            inverse_scale = None if grad_scale is None else grad_scale.double().reciprocal()
            self._pass.tables.gate(finite, self._acts(gradients))
            for segment, parameter, gradient in gradients:
                if self._pass.rates[segment.group] == 0:
                    self._pass.resting.append((segment, parameter, finite))
                else:
                    self._take(segment, parameter, gradient, self._pass.tables.of(segment), finite, inverse_scale)
        if self._pass is not None:
            self._close(self._pass, found_inf)
        self._pass = self._gate = None
        return loss

    def _begin(self) -> _Pass:
        layout = self._ready()
        rates = tuple(group["lr"] for group in self.param_groups)
        if len({*rates} - {0.0}) > 1 or min(rates) < 0:
            raise ValueError(f"the groups have the rates {rates}; there is one d, so every lr is 0 or the same: use layer_scale instead")
        for bank in layout.banks:
            bank.begin(self._steps)
        self._steps += 1
        dlr = self._rate(max(rates))
        return _Pass(rates=rates, dlr=dlr, tables=_Tables(self.param_groups, dlr))

    def _arrive(self, segment: _Segment, parameter: Tensor) -> None:
        """Take the gradient of one parameter in whatever order they come, and drop it."""
        gradient, parameter.grad = parameter.grad, None
        if gradient is None:
            return
        if self._pass is None:
            self._pass = self._begin()
            self._prove_now_and_then()
        now = self._pass
        if segment.index in now.seen:
            raise RuntimeError("a parameter got a second gradient before step(): fused backward takes one backward pass a step")
        now.seen.add(segment.index)
        device = self._ready().device
        finite = torch.linalg.vector_norm(gradient).isfinite()
        gate = torch.ones_like(finite) if self._gate is None else self._gate.to(finite.device)
        self._ready().not_finite.add_((gate & ~finite).to(device))
        finite &= gate
        if now.rates[segment.group] == 0:
            now.resting.append((segment, parameter, finite))
            return
        group = self.param_groups[segment.group]
        acts = None
        if segment.index not in self._proven and group["decouple"] and group["weight_decay"] != 0:
            # Whether any parameter moves at all is only known at the end. One that moves by itself decays now, else at the end.
            acts = finite & (gradient.any() | segment.bank.started(segment)) & (group["layer_scale"] != 0)
            now.undecided.append((segment, parameter, finite & ~acts))
        self._take(segment, parameter, gradient, now.tables.of(segment, finite, acts), finite, None)
        rows = slice(segment.row, segment.row + segment.rows)
        segment.bank.l1[rows] *= finite  # the rows of an untouched s are not part of this step

    def _take(
        self, segment: _Segment, parameter: Tensor, gradient: Tensor, table: Tensor, finite: Tensor, inverse_scale: Tensor | None
    ) -> None:
        """Advance one parameter and its state; where not `finite`, `table` and `finite` together leave both as they are."""
        bank = segment.bank
        group = self.param_groups[segment.group]
        c = _Coefficients(*table)
        if group["decouple"] or group["weight_decay"] == 0:
            c = c._replace(coupled=None)
        weights = _flat(parameter)
        for row, p, g in segment.tiles(weights, _flat(gradient)):
            rows = len(p)
            work = p.to(bank.dtype)
            g = g.to(bank.dtype)
            if inverse_scale is not None:
                g = g * inverse_scale.to(bank.device)
            g = torch.nan_to_num(g, 0.0, 0.0, 0.0)  # such a gradient's coefficients change nothing, but 0 * nan is nan
            m, v, s = bank.load(row, rows)
            bank.num[row : row + rows], bank.l1[row : row + rows] = advance(work, g, m, v, s, c)
            bank.store(row, m, v, s, finite)
            segment.put(weights, row, work if work.dtype == p.dtype else bank.narrowed(work, row))
        _write_back(weights, parameter)

    def _close(self, now: _Pass, found_inf: Tensor | None) -> None:
        """Add the sums up in their fixed order; move what waited for them, then W, d and k."""
        layout = self._ready()
        if now.rates != tuple(group["lr"] for group in self.param_groups):
            raise RuntimeError("lr was changed between backward and step(): with fused backward it is set before backward")
        scalars = layout.scalars
        num, l1 = torch.zeros_like(now.dlr), torch.zeros_like(now.dlr)
        for number, group in enumerate(self.param_groups):
            for bank in layout.banks:
                rows = bank.rows_of.get(number)
                if rows is not None and group["lr"] > 0:
                    num += group["layer_scale"] * now.dlr * bank.num[rows].sum().to(layout.device)
                    l1 += group["layer_scale"] * bank.l1[rows].sum().to(layout.device)
        acts = l1 > 0 if now.tables.finite is None else (l1 > 0) & now.tables.finite
        for segment, parameter, waits in now.undecided:
            decay = now.tables.of(segment)[_Coefficients._fields.index("decay")]
            _decay_alone(segment, parameter, torch.where(waits & acts.to(waits.device), decay, 0.0))
        for segment, parameter, finite in now.resting if max(now.rates) > 0 else ():
            _drift(segment, parameter, self.param_groups[segment.group], now.dlr, acts & finite.to(layout.device))

        first = self.param_groups[0]
        root = math.sqrt(first["betas"][1])
        w = root * scalars["numerator_weighted"] + (1 - root) * num
        d_hat = w / ((1 - root) * l1)
        d = torch.maximum(scalars["d"], (scalars["d"] * first["growth_rate"]).clamp(max=first["d_max"]).minimum(d_hat))
        # An overflow of the sums must not reach d, from which nothing comes back: such a step counts as one that learned nothing.
        learns = acts & d_hat.isfinite()
        if found_inf is not None:
            learns &= found_inf.to(layout.device) == 0
        for key, value in (("numerator_weighted", w), ("d_hat", d_hat), ("d", d), ("l1", l1), ("k", scalars["k"] + 1)):
            scalars[key].copy_(torch.where(learns, value, scalars[key]))

    # ---- state ----

    def state_dict(self) -> dict[str, Any]:
        """Return the state of each parameter in its own shape, and under state["adaptation"] d, k, W, d_hat, l1 and the number of steps.

        All of them are the live tensors, not copies. The groups hold hyper-parameters only.
        """
        layout = self._ready()
        saved = super().state_dict()
        for group in saved["param_groups"]:
            for key in _LEARNED:
                del group[key]
        saved["state"]["adaptation"] = {**layout.scalars, "steps": self._steps}
        return saved

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # type: ignore[override]
        """Restore the state bit for bit, in the precision it was saved in. Hyper-parameters stay those of this optimizer.

        Raises:
            ValueError: the state is of other parameters or of another precision.
        """
        layout = self._ready()
        state = dict(state_dict["state"])
        adaptation = state.pop("adaptation")
        segments = list(self._segments())
        if sorted(state) != list(range(len(segments))):
            raise ValueError(f"the state is of {len(state)} parameters, this optimizer has {len(segments)}")
        copies = [(f"adaptation.{key}", layout.scalars[key], adaptation[key]) for key in layout.scalars]
        for number, (_, parameter) in enumerate(segments):
            own = self.state[parameter]
            if set(own) != set(state[number]):
                raise ValueError(f"the state of parameter {number} has {sorted(state[number])}, this optimizer keeps {sorted(own)}")
            copies += [(f"{number}.{key}", own[key], state[number][key]) for key in own]
        for name, target, source in copies:
            if target.shape != source.shape or target.dtype != source.dtype:
                raise ValueError(
                    f"state {name} is {source.dtype} {tuple(source.shape)}, this optimizer keeps {target.dtype} {tuple(target.shape)}"
                )
        for _, target, source in copies:
            target.copy_(source)
        self._steps = adaptation["steps"]
        self._proven.clear()
        self._backwards = 0

    # ---- inside ----

    def _ready(self) -> _Layout:
        """Return the layout; the first call allocates the state, on the device where the parameters are by then."""
        if self._layout is None:
            self._layout = _Layout(self.param_groups, self.state_bits)
            self._proven: set[int] = set()
            self._backwards = 0
            self._segment_of = {parameter: segment for segment, parameter in self._segments()}
            for segment, parameter in self._segments():
                self.state[parameter] = segment.bank.views(segment, parameter.shape)
            for group in self.param_groups:
                group.update({key: self._layout.scalars[key] for key in _LEARNED})
        return self._layout

    def _segments(self) -> Iterator[tuple[_Segment, Tensor]]:
        assert self._layout is not None
        parameters = (parameter for group in self.param_groups for parameter in group["params"])
        return zip(self._layout.segments, parameters, strict=True)

    def _rate(self, lr: float) -> Tensor:
        scalars = self._ready().scalars
        rate = scalars["d"] * lr
        if self.param_groups[0]["use_bias_correction"]:
            beta1, beta2 = self.param_groups[0]["betas"]
            steps = (scalars["k"] + 1).double()
            rate = rate * (1 - beta2**steps).sqrt() / (1 - beta1**steps)
        return rate

    def _acts(self, gradients: Sequence[tuple[_Segment, Tensor, Tensor]]) -> Tensor:
        """Return whether l1 will be above 0 after this step, without which nothing decays or drifts: 0-d bool on the device.

        It is, once a parameter of the step has s != 0 or a gradient != 0. The first is looked up until it is true, in practice in the
        first two steps: the only values that are ever read back.
        """
        layout = self._ready()
        yes = torch.ones((), dtype=torch.bool, device=layout.device)
        if layout.device.type == "meta":
            return yes
        groups = self.param_groups
        counting = [entry for entry in gradients if groups[entry[0].group]["lr"] > 0 and groups[entry[0].group]["layer_scale"] != 0]
        if not counting:
            return ~yes
        if not any(segment.index in self._proven for segment, _, _ in counting):
            self._prove([segment for segment, _, _ in counting])
        if any(segment.index in self._proven for segment, _, _ in counting):
            return yes
        touched: list[Tensor] = []
        for segment, parameter, gradient in counting:
            any_gradient = gradient.any()
            if not groups[segment.group]["decouple"] and groups[segment.group]["weight_decay"] != 0:
                any_gradient = any_gradient | parameter.any()
            touched.append(any_gradient.to(layout.device))
        return torch.stack(touched).any()

    def _prove(self, segments: Sequence[_Segment]) -> None:
        """Read back which of these parameters have s != 0."""
        device = self._ready().device
        if device.type == "meta" or not segments:
            return
        started = torch.stack([segment.bank.started(segment).to(device) for segment in segments]).tolist()
        self._proven.update(segment.index for segment, yes in zip(segments, started, strict=True) if yes)

    def _prove_now_and_then(self) -> None:
        """Before a fused backward, look for s != 0 at every step whose number is a power of two: few parameters stay unproven."""
        self._backwards += 1
        if self._backwards & (self._backwards - 1) == 0:
            self._prove([segment for segment, _ in self._segments() if segment.index not in self._proven])


@dataclass
class _Pass:
    """What one step knows between its first gradient and its end."""

    rates: tuple[float, ...]
    dlr: Tensor
    tables: _Tables
    seen: set[int] = field(default_factory=set)
    undecided: list[tuple[_Segment, Tensor, Tensor]] = field(default_factory=list)
    """Parameters that moved nowhere, and whether they decay if others move."""
    resting: list[tuple[_Segment, Tensor, Tensor]] = field(default_factory=list)
    """Parameters whose lr is 0, and whether their gradient is finite."""


class _Tables:
    """The coefficients of each group in one step, on each device and in each precision they are needed in."""

    def __init__(self, groups: Sequence[Mapping[str, Any]], dlr: Tensor) -> None:
        self._groups, self._dlr = groups, dlr
        self._ready: dict[tuple[int, _Bank], Tensor] = {}
        self._neutral: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self.finite: Tensor | None = None
        self._acts: Tensor | None = None

    def gate(self, finite: Tensor, acts: Tensor) -> None:
        """Change nothing in this step unless `finite`, and decay nothing unless `acts`: 0-d bools."""
        self.finite, self._acts = finite, acts

    def of(self, segment: _Segment, finite: Tensor | None = None, acts: Tensor | None = None) -> Tensor:
        """Return the values of `_Coefficients`, gated as the step is, and by what is given here for one parameter."""
        key = segment.group, segment.bank
        if key not in self._ready:
            self._ready[key] = self._gated(self._values(segment.group), self.finite, self._acts).to(segment.bank.device, segment.bank.dtype)
        return self._gated(self._ready[key], finite, acts)

    def _values(self, number: int) -> Tensor:
        group, dlr = self._groups[number], self._dlr
        beta1, beta2 = group["betas"]
        root, decay = math.sqrt(beta2), group["weight_decay"]
        decoupled, coupled = (decay, 0.0) if group["decouple"] else (0.0, decay)
        values = [beta1, (1 - beta1) * group["layer_scale"], beta2, 1 - beta2, root, 1 - root, group["eps"], decoupled, coupled]
        by_rate = torch.stack([torch.ones_like(dlr), dlr])[[0, 1, 0, 0, 0, 1, 0, 1, 0]]
        return torch.tensor(values, dtype=dlr.dtype).to(dlr.device, non_blocking=True) * by_rate

    def _gated(self, values: Tensor, finite: Tensor | None, acts: Tensor | None) -> Tensor:
        if acts is not None:
            factors = torch.ones_like(values)
            factors[_Coefficients._fields.index("decay")] = acts.to(values.device)
            values = values * factors
        if finite is not None:
            kind = values.device, values.dtype
            if kind not in self._neutral:
                self._neutral[kind] = torch.tensor(_NEUTRAL, dtype=values.dtype).to(values.device, non_blocking=True)
            values = torch.where(finite.to(values.device), values, self._neutral[kind])
        return values


class _Coefficients(NamedTuple):
    """The scalars of one group in one step, as 0-d tensors; `_NEUTRAL` ones leave everything as it is."""

    keep_m: Tensor
    gain_m: Tensor
    keep_v: Tensor
    gain_v: Tensor
    keep_s: Tensor
    gain_s: Tensor
    eps: Tensor
    decay: Tensor
    coupled: Tensor | None


_NEUTRAL = (1.0, 0.0, 1.0, 0.0, 1.0, 0.0, math.inf, 0.0, 0.0)


def advance(p: Tensor, g: Tensor, m: Tensor, v: Tensor, s: Tensor, c: _Coefficients) -> tuple[Tensor, Tensor]:
    """Update p, m, v, s (rows, width) in place by the gradient g; return for each row <g, s / (sqrt(v) + eps)> of before and |s|_1."""
    if c.coupled is not None:
        g = torch.addcmul(g, p, c.coupled)
    denominator = v.sqrt().add_(c.eps)
    num = torch.div(s, denominator, out=denominator).mul_(g).sum(-1)
    m.mul_(c.keep_m).addcmul_(g, c.gain_m)
    v.mul_(c.keep_v).addcmul_(g * c.gain_v, g)
    s.mul_(c.keep_s).addcmul_(g, c.gain_s)
    l1 = s.abs().sum(-1)
    denominator = v.sqrt().add_(c.eps)
    change = torch.div(m, denominator, out=denominator).addcmul_(p, c.decay)
    p.sub_(change)
    return num, l1


def _decay_alone(segment: _Segment, parameter: Tensor, decay: Tensor) -> None:
    bank, weights = segment.bank, _flat(parameter)
    for row, p in segment.tiles(weights):
        work = p.to(bank.dtype)
        work = work - work * decay
        segment.put(weights, row, work if work.dtype == p.dtype else bank.narrowed(work, row))
    _write_back(weights, parameter)


def _drift(segment: _Segment, parameter: Tensor, group: Mapping[str, Any], dlr: Tensor, acts: Tensor) -> None:
    """Move a parameter whose lr is 0 along its old momentum, as the published optimizer does."""
    bank, weights = segment.bank, _flat(parameter)
    decay = torch.where(acts, (group["weight_decay"] if group["decouple"] else 0.0) * dlr, 0.0).to(bank.device, bank.dtype)
    eps = torch.where(acts, group["eps"], math.inf).to(bank.device, bank.dtype)
    for row, p in segment.tiles(weights):
        m, v, _ = bank.load(row, len(p))
        work = p.to(bank.dtype)
        work = work - (m / (v.sqrt() + eps) + work * decay)
        segment.put(weights, row, work if work.dtype == p.dtype else bank.narrowed(work, row))
    _write_back(weights, parameter)


def _all_finite(gradients: Sequence[tuple[_Segment, Tensor, Tensor]], device: torch.device) -> Tensor:
    return torch.stack([torch.linalg.vector_norm(gradient).isfinite().to(device) for _, _, gradient in gradients]).all()


def _arrival_hook(reference: weakref.ref[DAdaptAdam]) -> Callable[[Tensor], None]:
    @torch.no_grad()
    def arrive(parameter: Tensor) -> None:
        optimizer = reference()
        if optimizer is not None:
            optimizer._ready()
            optimizer._arrive(optimizer._segment_of[parameter], parameter)

    return arrive


def _flat(tensor: Tensor) -> Tensor:
    """Return the tensor's elements in the order of its indices: a view if it is contiguous, else a copy."""
    return tensor.detach().reshape(-1)


def _write_back(weights: Tensor, parameter: Tensor) -> None:
    if weights.data_ptr() != parameter.data_ptr():
        parameter.copy_(weights.view(parameter.shape))


class _Group(dict[str, Any]):
    """A parameter group whose learned numbers are tensors on the device that read as plain numbers."""

    def __getitem__(self, key: str) -> Any:
        value = super().__getitem__(key)
        return value.item() if key in _LEARNED and isinstance(value, Tensor) else value

    def __setitem__(self, key: str, value: Any) -> None:
        own = super().get(key)
        if key in _LEARNED and isinstance(own, Tensor):
            own.fill_(value)
        else:
            super().__setitem__(key, value)


class _Bank(ABC):
    """The flat state of all parameters of one precision on one device, and what the rows of a step need beside it.

    Args:
        noisy: whether anything is rounded stochastically.
    """

    dtype: torch.dtype
    """What is computed in."""

    def __init__(self, device: torch.device, rows: int, noisy: bool) -> None:
        self.device, self.rows, self.noisy = device, rows, noisy
        self.num, self.l1 = (torch.zeros(rows, dtype=torch.float64, device=device) for _ in range(2))
        self.rows_of: dict[int, slice] = {}
        """The rows of each group."""

    def begin(self, step: int) -> None:
        """Clear the sums and draw the step's noise: the fractional part of one number for the block and one for the place in it.

        Any two of its elements are independent and uniform, for the price of two vectors.
        """
        self.num.zero_()
        self.l1.zero_()
        if self.noisy:
            generator = None if self.device.type == "meta" else torch.Generator(self.device).manual_seed(step)
            # Multiples of 2^-16: their sums are exact, so every device and every order agrees.
            shapes = ((2, 1, BLOCK), (self.rows * _BLOCKS, 1))
            draws = [torch.randint(1 << 16, shape, generator=generator, device=self.device) for shape in shapes]
            self._columns, self._blocks = (draw.to(torch.float32) * 2**-16 for draw in draws)

    def noise(self, row: int, rows: int, of_weights: bool = False) -> Tensor:
        """Return the step's noise for these rows, uniform in [0, 1): (rows, ROW)."""
        return (self._blocks[row * _BLOCKS : (row + rows) * _BLOCKS] + self._columns[int(of_weights)]).frac().view(rows, ROW)

    def narrowed(self, weights: Tensor, row: int) -> Tensor:
        """Return fp32 weights (rows, ROW) rounded stochastically to bf16."""
        kept = -(1 << 16)  # the upper 16 bits of fp32 are bf16
        steps = (self.noise(row, len(weights), of_weights=True) * (1 << 16)).to(torch.int32)
        return ((weights.view(torch.int32) + steps) & kept).view(torch.float32).to(torch.bfloat16)

    @abstractmethod
    def load(self, row: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return m, v and s (rows, ROW) to be changed in place and stored."""

    @abstractmethod
    def store(self, row: int, m: Tensor, v: Tensor, s: Tensor, finite: Tensor) -> None:
        """Keep what `load` gave; where not `finite` it has not been changed."""

    @abstractmethod
    def started(self, segment: _Segment) -> Tensor:
        """Return whether s is not 0 somewhere: 0-d bool."""

    @abstractmethod
    def views(self, segment: _Segment, shape: torch.Size) -> dict[str, Tensor]:
        """Return the state of one parameter by name."""


class _FloatBank(_Bank):
    def __init__(self, device: torch.device, rows: int, noisy: bool, dtype: torch.dtype) -> None:
        super().__init__(device, rows, noisy)
        self.dtype = dtype
        self._m, self._v, self._s = (torch.zeros(rows, ROW, dtype=dtype, device=device) for _ in range(3))

    def load(self, row: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        here = slice(row, row + rows)
        return self._m[here], self._v[here], self._s[here]

    def store(self, row: int, m: Tensor, v: Tensor, s: Tensor, finite: Tensor) -> None:
        pass

    def started(self, segment: _Segment) -> Tensor:
        return self._s[segment.row : segment.row + segment.rows].any()

    def views(self, segment: _Segment, shape: torch.Size) -> dict[str, Tensor]:
        flats = {"exp_avg": self._m, "exp_avg_sq": self._v, "s": self._s}
        return {name: _of(segment, flat, segment.numel).view(shape) for name, flat in flats.items()}


class _ByteBank(_Bank):
    dtype = torch.float32

    def __init__(self, device: torch.device, rows: int) -> None:
        super().__init__(device, rows, noisy=True)
        kinds = (torch.int8, torch.uint8, torch.int8)
        self._codes = tuple(torch.zeros(rows * _BLOCKS, BLOCK, dtype=kind, device=device) for kind in kinds)
        self._exponents = tuple(torch.zeros(rows * _BLOCKS, 1, dtype=torch.uint8, device=device) for _ in range(3))

    def load(self, row: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        here = slice(row * _BLOCKS, (row + rows) * _BLOCKS)
        stored = zip(self._codes, self._exponents, strict=True)
        m, v, s = (decode(codes[here], exponents[here]).view(rows, ROW) for codes, exponents in stored)
        return m, v, s

    def store(self, row: int, m: Tensor, v: Tensor, s: Tensor, finite: Tensor) -> None:
        here = slice(row * _BLOCKS, (row + len(m)) * _BLOCKS)
        finite, noise = finite.to(self.device), self.noise(row, len(m)).view(-1, BLOCK)
        for values, codes, exponents in zip((m, v, s), self._codes, self._exponents, strict=True):
            new_codes, new_exponents = encode(values.view(-1, BLOCK), noise, signed=codes.dtype == torch.int8)
            codes[here] = torch.where(finite, new_codes.to(codes.dtype), codes[here])
            exponents[here] = torch.where(finite, new_exponents.to(torch.uint8), exponents[here])

    def started(self, segment: _Segment) -> Tensor:
        return _of(segment, self._codes[2], segment.numel).any()

    def views(self, segment: _Segment, shape: torch.Size) -> dict[str, Tensor]:
        views: dict[str, Tensor] = {}
        for name, codes, exponents in zip(("exp_avg", "exp_avg_sq", "s"), self._codes, self._exponents, strict=True):
            views[name] = _of(segment, codes, segment.numel).view(shape)
            first = segment.row * _BLOCKS
            views[f"{name}_exponent"] = exponents[first : first - (-segment.numel // BLOCK)].view(-1)
        return views


def _of(segment: _Segment, flat: Tensor, numel: int) -> Tensor:
    return flat.view(-1)[segment.row * ROW :][:numel]


@dataclass(frozen=True, eq=False)
class _Segment:
    """Where one parameter's state is."""

    index: int
    group: int
    bank: _Bank
    row: int
    numel: int

    @property
    def rows(self) -> int:
        return -(-self.numel // ROW)

    def tiles(self, *flats: Tensor) -> Iterator[Any]:
        """Yield the first row, and for each of the parameter's flat tensors the elements (rows, ROW): views, or a last row filled up."""
        whole, rest = divmod(self.numel, ROW)
        if whole:
            most = _CACHED_ROWS if self.bank.device.type == "cpu" else whole
            parts = [flat[: whole * ROW].view(whole, ROW).split(most) for flat in flats]
            yield from zip(range(self.row, self.row + whole, most), *parts, strict=True)
        if rest:
            yield self.row + whole, *(torch.nn.functional.pad(flat[whole * ROW :], (0, ROW - rest)).view(1, ROW) for flat in flats)

    def put(self, flat: Tensor, row: int, values: Tensor) -> None:
        """Write values (rows, ROW), beginning at this row, to the parameter's flat tensor, unless they are its own elements."""
        start = (row - self.row) * ROW
        target = flat[start : start + values.numel()]
        if target.data_ptr() != values.data_ptr():
            target.copy_(values.view(-1)[: target.numel()])


class _Layout:
    """The flat state of all parameters, and the scalars."""

    def __init__(self, groups: Sequence[Mapping[str, Any]], state_bits: int) -> None:
        kinds: dict[tuple[torch.device, torch.dtype], int] = {}
        noisy: set[tuple[torch.device, torch.dtype]] = set()
        places: list[tuple[int, tuple[torch.device, torch.dtype], int, int]] = []
        spans: dict[tuple[tuple[torch.device, torch.dtype], int], slice] = {}
        for number, group in enumerate(groups):
            for parameter in group["params"]:
                kind = (parameter.device, torch.float64 if parameter.dtype == torch.float64 else torch.float32)
                if parameter.dtype == torch.bfloat16:
                    noisy.add(kind)
                row = kinds.get(kind, 0)
                places.append((number, kind, row, parameter.numel()))
                kinds[kind] = row + -(-parameter.numel() // ROW)
                first = spans[kind, number].start if (kind, number) in spans else row
                spans[kind, number] = slice(first, kinds[kind])
        banks: dict[tuple[torch.device, torch.dtype], _Bank] = {
            (device, dtype): _ByteBank(device, rows) if state_bits == 8 else _FloatBank(device, rows, (device, dtype) in noisy, dtype)
            for (device, dtype), rows in kinds.items()
        }
        for (kind, number), span in spans.items():
            banks[kind].rows_of[number] = span
        self.banks: tuple[_Bank, ...] = tuple(banks.values())
        self.segments = tuple(_Segment(index, number, banks[kind], row, numel) for index, (number, kind, row, numel) in enumerate(places))
        self.not_finite = torch.zeros((), dtype=torch.int64, device=groups[0]["params"][0].device)
        self.device: torch.device = groups[0]["params"][0].device
        first_group = groups[0]
        self.scalars: dict[str, Tensor] = {
            "d": torch.full((), first_group["d"], dtype=torch.float64, device=self.device),
            "k": torch.full((), first_group["k"], dtype=torch.int64, device=self.device),
            "numerator_weighted": torch.full((), first_group["numerator_weighted"], dtype=torch.float64, device=self.device),
            "d_hat": torch.zeros((), dtype=torch.float64, device=self.device),
            "l1": torch.zeros((), dtype=torch.float64, device=self.device),
        }


def _check(group: Mapping[str, Any], first: Mapping[str, Any], state_bits: int) -> None:
    beta1, beta2 = group["betas"]
    if not 0 <= beta1 < 1 or not 0 <= beta2 < 1:
        raise ValueError(f"betas are {group['betas']}; both must be at least 0 and below 1")
    for key in ("eps", "d0"):
        if not 0 < group[key] < math.inf:
            raise ValueError(f"{key} is {group[key]}; it must be above 0")
    for key in ("lr", "weight_decay", "layer_scale"):
        if not 0 <= group[key] < math.inf:
            raise ValueError(f"{key} is {group[key]}; it must be 0 or above")
    if not group["growth_rate"] >= 1:
        raise ValueError(f"growth_rate is {group['growth_rate']}; d never falls, so it must be 1 or above")
    if not group["d_max"] >= group["d0"]:
        raise ValueError(f"d_max is {group['d_max']}, below d0, {group['d0']}, where d starts")
    for key in _SHARED:
        if group[key] != first[key]:
            raise ValueError(f"{key} is {group[key]} in one group and {first[key]} in another; all groups share it")
    for parameter in group["params"]:
        if parameter.dtype not in (torch.float32, torch.float64, torch.bfloat16):
            raise ValueError(f"a parameter is {parameter.dtype}; DAdaptAdam trains fp32, fp64 and bf16 parameters")
        if parameter.dtype == torch.float64 and state_bits == 8:
            raise ValueError("a parameter is torch.float64, whose state cannot be kept in 8 bits; use state_bits=32")
