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
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from trainer.optim.dadapt_kernels import NEUTRAL, ROW, Coefficients, Kernel, advance, compiled_kernel
from trainer.optim.flat_state import PACK_ROWS, Bank, Layout, Pack, Segment, is_large
from trainer.transfer import to_device

_WORTH_COMPILING = {32: 1 << 24, 8: 1 << 20}
"""By bits of state, the parameters from which on compiling is tried without being asked for."""

_LEARNED = ("d", "k", "numerator_weighted")
_SHARED = ("betas", "decouple", "use_bias_correction", "d0", "growth_rate", "d_max")


class DAdaptAdam(Optimizer):
    """Adam whose rate is d * lr, d being a lower bound of the distance to the solution that only grows.

    A drop-in for `dadaptation.DAdaptAdam`, with the same defaults. Scalars live in fp64 on the parameters' device and are read by
    nobody but the caller: `group["d"]`, `group["k"]` and `group["numerator_weighted"]` are tensors inside and become numbers when
    they are looked up. State is kept in fp32 (fp64 for fp64 parameters, or 8 bits) whatever the parameters' precision. bf16 parameters
    are rounded stochastically, since most steps are smaller than what separates two of their values; weights decay before, in fp32.
    Rounding draws from the number of the step and the place of the element alone. (Against keeping the lower 16 bits in the state, which
    trains as fp32 does: two bytes less for a parameter, steps 5 to 20% shorter, and 0.3% more loss on a regression of steps far below
    that spacing, where rounding to nearest gives 370% more. On the embedded model both end at the loss of fp32.)

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
        compile: run through torch.compile, True or False; None does so if there are sixteen million parameters or more, with 8 bits a
            million, below which the 12 s it takes before the first step (measured on the CPU; torch keeps the result on disk) are not won
            back soon: for four million a step takes 57 ms and compiled 24, with 8 bits 231 and 27. Where it does not work, or for fp64,
            the step runs eagerly, which gives the same results but for the last bits. Which way it was is saved with the state, and
            with None a loaded state decides.
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
        compile: bool | None = None,
    ) -> None:
        if not lr > 0:
            raise ValueError(f"lr is {lr}; it must be above 0")
        if state_bits not in (8, 32):
            raise ValueError(f"state_bits is {state_bits}; it must be 8 or 32")
        self.state_bits = state_bits
        self.fused_backward = fused_backward
        self.compile = compile
        self._steps = 0
        self._layout: Layout | None = None
        self._scalars: dict[str, Tensor] = {}
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
        return self._scalar("d")

    @property
    def d_hat(self) -> Tensor:
        """What the last step estimated, which d follows upwards: 0-d, fp64, on the parameters' device."""
        return self._scalar("d_hat")

    @property
    def l1(self) -> Tensor:
        """|s|_1 of the last step, each group weighted by its layer_scale: 0-d, fp64, on the parameters' device."""
        return self._scalar("l1")

    @property
    def not_finite(self) -> Tensor:
        """How many gradients were not finite, and left out, since this optimizer was made (fused backward): 0-d, int64."""
        self._ready()
        return self._not_finite

    @property
    def grad_norm(self) -> Tensor:
        """The 2-norm of the last gradient, over all parameters (fused backward, which keeps no gradient to measure): 0-d, fp32."""
        self._ready()
        return self._squares.sqrt().float()

    @property
    def compiled(self) -> bool:
        """Whether steps run through torch.compile."""
        self._ready()
        return any(kernel is not None for kernel in self._kernels.values())

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
            self._pass.scaled = grad_scale is not None
            self._pass.tables.gate(finite, self._acts(gradients), grad_scale)
            for segment, parameter, gradient in gradients:
                if self._pass.rates[segment.group] == 0:
                    self._pass.resting.append((segment, parameter, finite))
                else:
                    self._take(_Arrival(segment, parameter, gradient, finite), self._pass.tables.of(segment))
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

    def _arrive(self, segment: Segment, parameter: Tensor) -> None:
        """Take the gradient of one parameter in whatever order they come, and drop it."""
        gradient, parameter.grad = parameter.grad, None
        if gradient is None:
            return
        if self._pass is None:
            self._pass = self._begin()
            self._squares.zero_()
            self._prove_now_and_then()
        now = self._pass
        if segment.index in now.seen:
            raise RuntimeError("a parameter got a second gradient before step(): fused backward takes one backward pass a step")
        now.seen.add(segment.index)
        device = self._ready().device
        norm = torch.linalg.vector_norm(gradient)
        finite = norm.isfinite()
        gate = torch.ones_like(finite) if self._gate is None else self._gate.to(finite.device)
        self._not_finite.add_((gate & ~finite).to(device))
        self._squares.add_(norm.double().square().to(device))
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
        # Where it is not finite, an eager step is held still by its coefficients, a compiled one row by row.
        eager = self._kernels[segment.bank] is None
        table = now.tables.of(segment, finite if eager else None, acts)
        self._take(_Arrival(segment, parameter, gradient, finite), table, alone=acts is not None)

    def _take(self, arrival: _Arrival, table: Tensor, alone: bool = False) -> None:
        """Advance one parameter and its state, or keep it until the pack it belongs to is complete, unless it has its own table."""
        now, segment = self._pass, arrival.segment
        assert now is not None
        kernel = self._kernels[segment.bank]
        if kernel is None:
            self._advance_eagerly(arrival, table)
        elif is_large(segment.numel):
            self._advance_large(kernel, arrival, table)
        else:
            pack = self._ready().pack_of[segment.index]
            if alone:
                now.away[pack] = now.away.get(pack, 0) + 1
                self._advance_together(kernel, Pack(pack.bank, pack.group, (segment,)), [arrival], table)
                table = now.tables.of(segment)
            else:
                now.waiting.setdefault(pack, []).append(arrival)
            if pack in now.waiting and len(now.waiting[pack]) + now.away.get(pack, 0) == len(pack.segments):
                self._advance_together(kernel, pack, now.waiting.pop(pack), table)

    def _advance_eagerly(self, arrival: _Arrival, table: Tensor) -> None:
        segment, bank = arrival.segment, arrival.segment.bank
        known = _on_host(bank.device)
        if known and not arrival.finite:
            return
        assert self._pass is not None
        group, c = self.param_groups[segment.group], Coefficients(*table)
        weights = _flat(arrival.parameter)
        for row, p, g in segment.tiles(weights, _flat(arrival.gradient)):
            here = slice(row, row + len(p))
            work, g = p.to(bank.dtype), g.to(bank.dtype)
            if self._pass.scaled:
                g = g * c.unscale
            if group["weight_decay"] != 0 and not group["decouple"]:
                g = g + work * c.coupled
            if not known:
                g = torch.nan_to_num(g, 0.0, 0.0, 0.0)  # neutral coefficients do the rest, but 0 * nan is nan
            m, v, s = bank.load(row, len(p))
            work, m, v, s, products = advance(work, g, m, v, s, c)
            bank.num[here], bank.l1[here] = products.sum(-1), s.abs().sum(-1)
            bank.store(row, m, v, s, None if known else arrival.finite)
            segment.put(weights, row, bank.narrowed(work, row))
        _write_back(weights, arrival.parameter)
        if not known:  # the rows of an s that was left as it was are not part of this step
            bank.l1[segment.row : segment.row + segment.rows] *= arrival.finite.to(bank.device)

    def _advance_large(self, kernel: Kernel, arrival: _Arrival, table: Tensor) -> None:
        """Run the kernel on a large parameter: in place if its elements are in order, else piece by piece on a copy."""
        segment, bank = arrival.segment, arrival.segment.bank
        weights, gradient = _flat(arrival.parameter), _flat(arrival.gradient)
        whole = segment.numel // ROW
        done = 0
        if weights.data_ptr() == arrival.parameter.data_ptr():
            done = whole * ROW
            p, g = (flat[:done].view(whole, ROW) for flat in (weights, gradient.to(bank.weights)))
            live = arrival.finite.to(bank.device).expand(whole, 1)
            here = slice(segment.row, segment.row + whole)
            bank.num[here], bank.l1[here] = bank.call(kernel, segment.row, p, g, live, table)
        for start in range(done, segment.numel, PACK_ROWS * ROW):
            piece = slice(start, min(start + PACK_ROWS * ROW, segment.numel))
            self._staged(kernel, bank, segment.row + start // ROW, [(0, weights[piece], gradient[piece], arrival.finite)], table)
        _write_back(weights, arrival.parameter)

    def _advance_together(self, kernel: Kernel, pack: Pack, arrivals: Sequence[_Arrival], table: Tensor) -> None:
        """Run the kernel once on copies of small parameters; those of the pack that have not arrived keep still."""
        pieces: list[tuple[int, Tensor, Tensor, Tensor]] = []
        for arrival in arrivals:
            first = arrival.segment.row - pack.row
            pieces.append((first, _flat(arrival.parameter), _flat(arrival.gradient), arrival.finite))
        self._staged(kernel, pack.bank, pack.row, pieces, table)
        for arrival, (_, weights, _, _) in zip(arrivals, pieces, strict=True):
            _write_back(weights, arrival.parameter)

    def _staged(self, kernel: Kernel, bank: Bank, row: int, pieces: Sequence[tuple[int, Tensor, Tensor, Tensor]], table: Tensor) -> None:
        """Run the kernel on flat pieces (first row, weights, gradient, whether finite), copied to one buffer and back."""
        rows = max(first + -(-weights.numel() // ROW) for first, weights, _, _ in pieces)
        p, g, live = (buffer[: max(rows, 2)].zero_() for buffer in self._stages[bank])
        for first, weights, gradient, finite in pieces:
            place = slice(first * ROW, first * ROW + weights.numel())
            p.view(-1)[place].copy_(weights)
            g.view(-1)[place].copy_(gradient)
            live[first : first - (-weights.numel() // ROW)] = finite.to(bank.device)
        num, l1 = bank.call(kernel, row, p, g, live, table)
        # Rows that are nobody's here may be somebody's elsewhere.
        bank.num[row : row + rows] += num[:rows]
        bank.l1[row : row + rows] += l1[:rows]
        for first, weights, _, _ in pieces:
            weights.copy_(p.view(-1)[first * ROW : first * ROW + weights.numel()])

    def _close(self, now: _Pass, found_inf: Tensor | None) -> None:
        """Add the sums up in their fixed order; move what waited for them, then W, d and k."""
        layout = self._ready()
        for pack, arrivals in now.waiting.items():
            kernel = self._kernels[pack.bank]
            assert kernel is not None
            self._advance_together(kernel, pack, arrivals, now.tables.of(pack.segments[0]))
        if now.rates != tuple(group["lr"] for group in self.param_groups):
            raise RuntimeError("lr was changed between backward and step(): with fused backward it is set before backward")
        scalars = self._scalars
        num, l1 = torch.zeros_like(now.dlr), torch.zeros_like(now.dlr)
        for number, group in enumerate(self.param_groups):
            for bank in layout.banks:
                rows = bank.rows_of.get(number)
                if rows is not None and group["lr"] > 0:
                    num += group["layer_scale"] * now.dlr * bank.num[rows].sum().to(layout.device)
                    l1 += group["layer_scale"] * bank.l1[rows].sum().to(layout.device)
        acts = l1 > 0 if now.tables.finite is None else (l1 > 0) & now.tables.finite
        for segment, parameter, waits in now.undecided:
            decay = now.tables.of(segment)[Coefficients._fields.index("decay")]
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
        self._ready()
        saved = super().state_dict()
        for group in saved["param_groups"]:
            for key in _LEARNED:
                del group[key]
        saved["state"]["adaptation"] = {**self._scalars, "steps": self._steps, "compiled": self.compiled}
        return saved

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # type: ignore[override]
        """Restore the state bit for bit, in the precision it was saved in. Hyper-parameters stay those of this optimizer.

        A warning says so if steps cannot go on the way they were computed, compiled or not.

        Raises:
            ValueError: the state is of other parameters or of another precision.
        """
        layout = self._ready()
        state = dict(state_dict["state"])
        adaptation = state.pop("adaptation")
        segments = list(self._segments())
        if sorted(state) != list(range(len(segments))):
            raise ValueError(f"the state is of {len(state)} parameters, this optimizer has {len(segments)}")
        copies = [(f"adaptation.{key}", own, adaptation[key]) for key, own in self._scalars.items()]
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
        saved = adaptation["compiled"]
        if self.compile is None and self.compiled != saved:
            self._choose_kernels(layout, compile=saved)
        if self.compiled != saved:
            ways = ("through torch.compile", "without torch.compile")
            warnings.warn(
                f"the saved run stepped {ways[not saved]}, this one does {ways[saved]}: it goes on the same but for the last bits",
                stacklevel=2,
            )
        self._proven.clear()
        self._backwards = 0

    # ---- inside ----

    def _ready(self) -> Layout:
        """Return the layout; the first call allocates the state, on the device where the parameters are by then."""
        if self._layout is None:
            layout = self._layout = Layout(self.param_groups, self.state_bits)
            self._proven: set[int] = set()
            self._backwards = 0
            self._segment_of = {parameter: segment for segment, parameter in self._segments()}
            for segment, parameter in self._segments():
                self.state[parameter] = segment.bank.views(segment, parameter.shape)
            first = dict(self.param_groups[0])
            kinds = {"d": torch.float64, "k": torch.int64, "numerator_weighted": torch.float64, "d_hat": torch.float64, "l1": torch.float64}
            self._scalars.update({key: torch.full((), first.get(key, 0), dtype=kind, device=layout.device) for key, kind in kinds.items()})
            self._not_finite = torch.zeros((), dtype=torch.int64, device=layout.device)
            self._squares = torch.zeros((), dtype=torch.float64, device=layout.device)
            for group in self.param_groups:
                group.update({key: self._scalars[key] for key in _LEARNED})
            worth_it = sum(segment.numel for segment in layout.segments) >= _WORTH_COMPILING[self.state_bits]
            self._choose_kernels(layout, compile=worth_it if self.compile is None else self.compile)
        return self._layout

    def _choose_kernels(self, layout: Layout, *, compile: bool) -> None:
        self._kernels: dict[Bank, Kernel | None] = {}
        self._stages: dict[Bank, tuple[Tensor, Tensor, Tensor]] = {}
        for bank in layout.banks:
            possible = compile and bank.dtype == torch.float32
            self._kernels[bank] = compiled_kernel(bank.device, self.state_bits, bank.weights) if possible else None
            if self._kernels[bank] is not None:
                weights, gradients = (torch.zeros(PACK_ROWS + 1, ROW, dtype=bank.weights, device=bank.device) for _ in range(2))
                self._stages[bank] = weights, gradients, torch.zeros(PACK_ROWS + 1, 1, dtype=torch.bool, device=bank.device)

    def _scalar(self, name: str) -> Tensor:
        self._ready()
        return self._scalars[name]

    def _segments(self) -> Iterator[tuple[Segment, Tensor]]:
        assert self._layout is not None
        parameters = (parameter for group in self.param_groups for parameter in group["params"])
        return zip(self._layout.segments, parameters, strict=True)

    def _rate(self, lr: float) -> Tensor:
        self._ready()
        scalars = self._scalars
        rate = scalars["d"] * lr
        if self.param_groups[0]["use_bias_correction"]:
            beta1, beta2 = self.param_groups[0]["betas"]
            steps = (scalars["k"] + 1).double()
            rate = rate * (1 - beta2**steps).sqrt() / (1 - beta1**steps)
        return rate

    def _acts(self, gradients: Sequence[tuple[Segment, Tensor, Tensor]]) -> Tensor:
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

    def _prove(self, segments: Sequence[Segment]) -> None:
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
    scaled: bool = False
    """Whether the gradients carry a loss scale."""
    seen: set[int] = field(default_factory=set)
    undecided: list[tuple[Segment, Tensor, Tensor]] = field(default_factory=list)
    """Parameters that moved nowhere, and whether they decay if others move."""
    resting: list[tuple[Segment, Tensor, Tensor]] = field(default_factory=list)
    """Parameters whose lr is 0, and whether their gradient is finite."""
    waiting: dict[Pack, list[_Arrival]] = field(default_factory=dict)
    """Small parameters that wait for the others of their pack."""
    away: dict[Pack, int] = field(default_factory=dict)
    """How many of a pack's parameters were advanced by themselves."""


@dataclass(frozen=True)
class _Arrival:
    """A parameter whose gradient is complete, and whether that is finite."""

    segment: Segment
    parameter: Tensor
    gradient: Tensor
    finite: Tensor


class _Tables:
    """The coefficients of each group in one step, on each device and in each precision they are needed in."""

    def __init__(self, groups: Sequence[Mapping[str, Any]], dlr: Tensor) -> None:
        self._groups, self._dlr = groups, dlr
        self._ready: dict[tuple[int, Bank], Tensor] = {}
        self._neutral: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self.finite: Tensor | None = None
        self._acts: Tensor | None = None
        self._scale = torch.ones_like(dlr)

    def gate(self, finite: Tensor, acts: Tensor, scale: Tensor | None) -> None:
        """Change nothing in this step unless `finite`, and decay nothing unless `acts`: 0-d bools. Gradients carry the loss scale."""
        self.finite, self._acts = finite, acts
        if scale is not None:
            self._scale = scale.to(self._dlr)

    def of(self, segment: Segment, finite: Tensor | None = None, acts: Tensor | None = None) -> Tensor:
        """Return the values of `Coefficients`, gated as the step is, and by what is given here for one parameter."""
        key = segment.group, segment.bank
        if key not in self._ready:
            self._ready[key] = self._gated(self._values(segment.group), self.finite, self._acts).to(segment.bank.device, segment.bank.dtype)
        return self._gated(self._ready[key], finite, acts)

    def _values(self, number: int) -> Tensor:
        group, dlr = self._groups[number], self._dlr
        beta1, beta2 = group["betas"]
        root = math.sqrt(beta2)
        decay, coupled = (group["weight_decay"] if group["decouple"] == decoupled else 0.0 for decoupled in (True, False))
        values = [beta1, (1 - beta1) * group["layer_scale"], beta2, 1 - beta2, root, 1 - root, group["eps"], decay, 1.0, coupled]
        one, inverse = torch.ones_like(dlr), self._scale.reciprocal()
        factors = torch.stack([one, dlr, one, one, one, dlr, one, dlr, inverse, one])  # a list as index would be copied, waiting
        return to_device(torch.tensor(values, dtype=dlr.dtype), dlr.device) * factors

    def _gated(self, values: Tensor, finite: Tensor | None, acts: Tensor | None) -> Tensor:
        if acts is not None:
            factors = torch.ones_like(values)
            factors[Coefficients._fields.index("decay")] = acts.to(values.device)
            values = values * factors
        if finite is not None:
            kind = values.device, values.dtype
            if kind not in self._neutral:
                self._neutral[kind] = to_device(torch.tensor(NEUTRAL, dtype=values.dtype), values.device)
            values = torch.where(finite.to(values.device), values, self._neutral[kind])
        return values


def _decay_alone(segment: Segment, parameter: Tensor, decay: Tensor) -> None:
    bank, weights = segment.bank, _flat(parameter)
    for row, p in segment.tiles(weights):
        work = p.to(bank.dtype)
        work = work - work * decay
        segment.put(weights, row, bank.narrowed(work, row))
    _write_back(weights, parameter)


def _drift(segment: Segment, parameter: Tensor, group: Mapping[str, Any], dlr: Tensor, acts: Tensor) -> None:
    """Move a parameter whose lr is 0 along its old momentum, as the published optimizer does."""
    bank, weights = segment.bank, _flat(parameter)
    decay = torch.where(acts, (group["weight_decay"] if group["decouple"] else 0.0) * dlr, 0.0).to(bank.device, bank.dtype)
    eps = torch.where(acts, group["eps"], math.inf).to(bank.device, bank.dtype)
    for row, p in segment.tiles(weights):
        m, v, _ = bank.load(row, len(p))
        work = p.to(bank.dtype)
        work = work - (m / (v.sqrt() + eps) + work * decay)
        segment.put(weights, row, bank.narrowed(work, row))
    _write_back(weights, parameter)


def _all_finite(gradients: Sequence[tuple[Segment, Tensor, Tensor]], device: torch.device) -> Tensor:
    return torch.stack([torch.linalg.vector_norm(gradient).isfinite().to(device) for _, _, gradient in gradients]).all()


def _arrival_hook(reference: weakref.ref[DAdaptAdam]) -> Callable[[Tensor], None]:
    @torch.no_grad()
    def arrive(parameter: Tensor) -> None:
        optimizer = reference()
        if optimizer is not None:
            optimizer._ready()
            optimizer._arrive(optimizer._segment_of[parameter], parameter)

    return arrive


def _on_host(device: torch.device) -> bool:
    """Return whether a number there can be looked at without waiting for a device."""
    return device.type == "cpu"


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
