"""The optimizer that Adam with D-Adaptation and AdamW share: state in tiles, and the order of a step."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from trainer.optim.dadapt.adam import Coefficients
from trainer.optim.dadapt.choice import EAGER, choose
from trainer.optim.dadapt.device import TritonEngine, works
from trainer.optim.dadapt.eager import Arrival, TorchEngine
from trainer.optim.dadapt.fused import FusedBackward, Pass, arrival_hook
from trainer.optim.dadapt.groups import LEARNED, Group, check_group
from trainer.optim.dadapt.kernels import compiles
from trainer.optim.dadapt.learned import Learned, on_device
from trainer.optim.dadapt.saved import restore
from trainer.optim.dadapt.state import TILE, Bank, Layout, Segment

KERNEL_DEVICES = ("cuda", "meta")
"""Devices of the Triton kernel; on the last its launches are only counted."""

_WORTH_COMPILING = {32: 1 << 24, 8: 1 << 20}
"""By bits of state, the number of parameters from which on compiling is the default."""

_DECAY = Coefficients._fields.index("decay")


class TiledAdam(FusedBackward, Optimizer):
    """An Adam whose state lies in tiles, advanced by one kernel on a GPU, and by torch elsewhere.

    A non-finite gradient skips the whole step: neither parameters nor state change. If `found_inf` (and
    `grad_scale`) are set on the optimizer before `step()`, as torch's GradScaler does for optimizers with
    `_step_supports_amp_scaling`, they decide; otherwise the norm does, so that one that overflows counts as
    not finite. The answer stays on the device.
    """

    _step_supports_amp_scaling = True
    adapts = True
    """True if it finds its rate."""

    def __init__(
        self,
        params: Iterable[Any],
        defaults: dict[str, Any],
        *,
        bits: int,
        every: int,
        fused_backward: bool,
        compile: bool | None,
    ) -> None:
        if not defaults["lr"] > 0:
            raise ValueError(f"lr is {defaults['lr']}; it must be above 0")
        if bits not in (8, 32):
            raise ValueError(f"state_bits is {bits}; it must be 8 or 32")
        if every not in (0, *(1 << power for power in range(TILE.bit_length()))):
            raise ValueError(f"every is {every}; it must be a power of two up to {TILE}")
        self.state_bits, self.every, self.fused_backward, self.compile = bits, every, fused_backward, compile
        self._steps = 0
        self._layout: Layout | None = None
        self._pass: Pass | None = None
        self._gate: Tensor | None = None
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters before the first step; later the state has its place in memory."""
        if self._layout is not None:
            raise RuntimeError("a parameter group can only be added before the first step")
        super().add_param_group(param_group)
        group = self.param_groups[-1] = Group(self.param_groups[-1])
        check_group(group, self.param_groups[0], self.state_bits)
        if self.fused_backward:
            hook = arrival_hook(self)
            for parameter in group["params"]:
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(hook)

    @property
    def compiled(self) -> bool:
        """True if steps run through a compiler."""
        self._ready()
        return any(engine.compiled for engine in self._engines.values())

    @property
    def launches(self) -> int:
        """Launches of own kernels so far."""
        self._ready()
        kernels = [engine for engine in self._engines.values() if isinstance(engine, TritonEngine)]
        return self._learned.launches + sum(engine.launches for engine in kernels)

    # ---- the step ----

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update the parameters that have a gradient, their state, and d; return what `closure` returned.

        After a fused backward only small parameters and d are left to be updated.

        Raises:
            ValueError: groups have different rates.
            RuntimeError: with fused backward, what has happened since backward does not fit it.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        layout = self._ready()
        work = [(segment, p) for segment, p in self._segments() if p.grad is not None]
        found_inf, scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        if self.fused_backward:
            if scale is not None:
                raise RuntimeError(
                    "fused backward cannot undo a loss scale after backward: use bf16 or fp32, "
                    "or the plain step"
                )
            for _, parameter in work:  # gradients that did not come from a backward pass
                self.arrive(parameter)
        elif work:
            if found_inf is None:
                norm = torch.nn.utils.get_total_norm([p.grad for _, p in work if p.grad is not None])
                found_inf = (~norm.isfinite()).float()
            blocked = found_inf.to(layout.device)
            if not self._host or not blocked:
                self._pass = self._begin(blocked, scale)
                self._pass.waiting = [
                    self._arrival(segment, p, p.grad) for segment, p in work if p.grad is not None
                ]
        if self._pass is not None:
            self._close(self._pass, found_inf)
        self._pass = self._gate = None
        return loss

    def _begin(self, blocked: Tensor | None, scale: Tensor | None = None) -> Pass:
        rates = {group["lr"] for group in self.param_groups}
        if len(rates) > 1 or min(rates) < 0:
            raise ValueError(
                f"the groups have the rates {sorted(rates)}; there is one d, so every lr is the same: "
                "use layer_scale instead"
            )
        lr, device = rates.pop(), self._ready().device
        coupled = any(group["weight_decay"] != 0 and not group["decouple"] for group in self.param_groups)
        for engine in self._engines.values():
            engine.begin(self._steps, scale is not None, coupled)
        self._steps += 1
        blocked = self._never if blocked is None else blocked.to(device, torch.float32)
        scale = self._one if scale is None else scale.to(device, torch.float32)
        now = Pass(lr, blocked)
        if self._on_kernel:
            self._learned.begin_in_kernel(lr, blocked, scale)
            return now
        values = self._learned.begin(lr, blocked, scale)[:, : len(Coefficients._fields)]
        resting = values.clone()
        resting[:, _DECAY] = 0
        for bank in self._engines:
            now.tables[bank] = list(values.to(bank.dtype)), list(resting.to(bank.dtype))
        return now

    def _arrival(
        self, segment: Segment, parameter: Tensor, gradient: Tensor, live: Tensor | None = None
    ) -> Arrival:
        """Return an engine's input. On a CPU a parameter that never moved decays at the end, if any moves."""
        now = self._pass
        assert now is not None
        if isinstance(self._engines[segment.bank], TritonEngine):
            return Arrival(segment, parameter, gradient, None, self._learned.coefficients)
        waits = self._host and self.adapts and segment.index not in self._moved
        if waits:
            now.undecided.append((segment, parameter))
        if not self._host and live is None:
            live = now.blocked == 0
        return Arrival(segment, parameter, gradient, live, now.tables[segment.bank][waits][segment.group])

    def _close(self, now: Pass, found_inf: Tensor | None) -> None:
        """Advance what has waited, then add up the sums in their fixed order and move what is learned."""
        if now.lr != self.param_groups[0]["lr"]:
            raise RuntimeError(
                "lr was changed between backward and step(): with fused backward it is set before backward"
            )
        if now.lr == 0:
            return
        for bank, engine in self._engines.items():
            engine.advance([arrival for arrival in now.waiting if arrival.segment.bank is bank])
        blocked = now.blocked if found_inf is None else found_inf.to(now.blocked)
        totals = [engine.totals() for engine in self._engines.values()]
        if self._on_kernel:
            sums = totals[0]
            for more in totals[1:]:
                sums += more
            self._squares = sums[2]
            self._learned.end_in_kernel(now.lr, sums, blocked, self._not_finite)
            return
        num, l1 = (row.sum() for row in torch.stack(totals, 1))
        self._learned.end(num, l1, blocked)
        if now.undecided and bool(l1 > 0):
            for segment, parameter in now.undecided:
                engine = self._engines[segment.bank]
                assert isinstance(engine, TorchEngine)
                if engine.l1_of(segment) > 0:
                    self._moved.add(segment.index)
                engine.decay(segment, parameter, now.tables[segment.bank][0][segment.group][_DECAY])

    # ---- state ----

    def state_dict(self) -> dict[str, Any]:
        """Return the state of each parameter, and in state["adaptation"] d, k, W, d_hat, l1 and the steps.

        They are the live tensors, not copies. The groups hold hyper-parameters only.
        """
        self._ready()
        saved = super().state_dict()
        for group in saved["param_groups"]:
            for key in LEARNED:
                group.pop(key, None)
        saved["state"]["adaptation"] = {
            **self._learned.scalars,
            "steps": self._steps,
            "compiled": self.compiled,
            "tiled": True,
        }
        return saved

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # type: ignore[override]
        """Restore the state bit for bit, in the precision it was saved in; hyper-parameters stay.

        8-bit state with s of every element, of earlier versions, is converted. A warning reports that, and
        steps that can no longer be computed in the saved way, compiled or eagerly.

        Raises:
            ValueError: the state is of other parameters or of another precision.
        """
        layout = self._ready()
        state = dict(state_dict["state"])
        adaptation = state.pop("adaptation")
        own = [(segment, p, self.state[p]) for segment, p in self._segments()]
        restore(own, state, self._learned.scalars, adaptation)
        self._steps = adaptation["steps"]
        saved = adaptation["compiled"]
        if self.compile is None and self.compiled != saved and not self._on_kernel:
            self._choose_engines(layout, compile=saved)
        if self.compiled != saved:
            ways = ("through a compiler", "without a compiler")
            warnings.warn(
                f"the saved run stepped {ways[not saved]}, this one does {ways[saved]}: "
                "it resumes the same but for the last bits",
                stacklevel=2,
            )
        self._look_who_moved()

    # ---- inside ----

    def _ready(self) -> Layout:
        """Return the layout; the first call allocates the state, on the parameters' present device."""
        if self._layout is None:
            layout = self._layout = Layout(self.param_groups, self.state_bits, self.every)
            device = layout.device
            self._segment_of = {parameter: segment for segment, parameter in self._segments()}
            for segment, parameter in self._segments():
                self.state[parameter] = segment.views(parameter.shape)
            self._learned = Learned(self.param_groups, self.rows, self.adapts, device)
            self._not_finite = torch.zeros((), dtype=torch.int64, device=device)
            self._squares = torch.zeros((), dtype=torch.float64, device=device)
            self._never, self._one = torch.zeros((), device=device), torch.ones((), device=device)
            worth_it = sum(segment.numel for segment in layout.segments) >= _WORTH_COMPILING[self.state_bits]
            automatic = self.compile is None
            self._choose_engines(
                layout, compile=worth_it if automatic else bool(self.compile), automatic=automatic
            )
            self._look_who_moved()
        return self._layout

    def _choose_engines(self, layout: Layout, *, compile: bool, automatic: bool = False) -> None:
        """Give each bank its engine; an `automatic` choice compiles only if the eager step is slower."""
        self._host = not on_device(layout.device)
        self._engines: dict[Bank, TorchEngine | TritonEngine] = {}
        weights = [group["layer_scale"] for group in self.param_groups]
        largest = max(layout.banks, key=lambda bank: bank.tiles)
        choices = {
            bank: choose(bank.bits, bank.every, bank.weights)
            for bank in layout.banks
            if compile and compiles(bank)
        }
        if automatic and largest in choices and choices[largest].way == EAGER:
            choices.clear()
        for bank in layout.banks:
            possible = (
                self.compile is not False
                and bank.device.type in KERNEL_DEVICES
                and bank.dtype == torch.float32
            )
            if possible and works(bank.device, bank.weights, bank.bits, bank.every):
                self._engines[bank] = TritonEngine(bank, self._learned.coefficients)
            else:
                kernel = choices[bank].kernel if bank in choices else None
                self._engines[bank] = TorchEngine(bank, kernel, weights)
        self._on_kernel = all(isinstance(engine, TritonEngine) for engine in self._engines.values())

    def _look_who_moved(self) -> None:
        """Find the parameters with s != 0, on a CPU only: elsewhere nothing decays in the first step."""
        self._moved = {
            segment.index
            for segment, p in self._segments()
            if self._host and self.adapts and self.state[p]["s"].any()
        }

    def _segments(self) -> Sequence[tuple[Segment, Tensor]]:
        assert self._layout is not None
        parameters = (parameter for group in self.param_groups for parameter in group["params"])
        return list(zip(self._layout.segments, parameters, strict=True))

    def rows(self, group: Mapping[str, Any]) -> list[Any]:
        """Return coefficients, and what they gain by the corrected rate, by d * lr and by the root."""
        raise NotImplementedError
