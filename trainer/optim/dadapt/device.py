"""Launching the GPU's kernel."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trainer.optim.dadapt.quantized import BLOCK
from trainer.optim.dadapt.state import SMALL, TILE, Bank
from trainer.transfer import to_device

if TYPE_CHECKING:
    from trainer.optim.dadapt.eager import Arrival

WARPS = 8
_ALIGNED = 16
"""Alignment of weights and gradients in bytes, for loads of 128 bits."""


class TritonEngine:
    """Advances the parameters of a bank by one kernel launch for all of them, or one for each.

    Args:
        coefficients: (groups, 16), fp32, written before every step.
    """

    compiled = True

    def __init__(self, bank: Bank, coefficients: Tensor) -> None:
        self.bank, self.launches, self._coefficients = bank, 0, coefficients
        device = bank.device
        self._at = {segment: number for number, segment in enumerate(bank.segments)}
        entries = [(segment.numel, segment.first, segment.group, 0) for segment in bank.segments]
        self._table = torch.tensor(entries, dtype=torch.int64).to(device)
        tiles = torch.tensor([segment.tiles for segment in bank.segments])
        self._owner = torch.repeat_interleave(torch.arange(len(tiles), dtype=torch.int32), tiles).to(device)
        self.used = len(self._owner)
        self.slots = torch.zeros(bank.tiles, 4, dtype=torch.float32, device=device)
        none = torch.zeros(1, dtype=torch.uint8, device=device)
        held = [bank.held.get(name, (none, none)) for name in ("exp_avg", "exp_avg_sq", "s")]
        self._state = (
            [data for data, _ in held]
            + [exponents if exponents.numel() else none for _, exponents in held]
            + [self.slots]
        )
        self._shape = {"EVERY": bank.every, "BITS": bank.bits, "TILE": TILE, "BLOCK": BLOCK}
        self._handles: dict[str, Any] = {}

    def waits(self, numel: int) -> bool:
        """Return True if a fused backward leaves a parameter to `step()`."""
        return numel < SMALL

    def begin(self, step: int, scaled: bool, coupled: bool) -> None:
        """Clear the sums."""
        self._step = step
        self.slots.zero_()

    def advance(self, arrivals: Sequence[Arrival]) -> None:
        """Advance parameters and their state."""
        if not arrivals:
            return
        if len(arrivals) == 1:
            segment, p, g = arrivals[0].segment, arrivals[0].parameter, self._in_order(arrivals[0])
            place = (segment.numel, segment.first, segment.group, self._coefficients, self._step)
            self._launch("step_one", segment.tiles, (p, g, *place, *self._state), self._shape)
            torch.autograd.graph.increment_version(p)
            return
        addresses = [[0, 0] for _ in self.bank.segments]
        gradients = [self._in_order(arrival) for arrival in arrivals]  # alive until the launch
        if self.bank.device.type != "meta":
            for arrival, g in zip(arrivals, gradients, strict=True):
                addresses[self._at[arrival.segment]] = [arrival.parameter.data_ptr(), g.data_ptr()]
        sent = to_device(torch.tensor(addresses, dtype=torch.int64), self.bank.device)
        dtype = {
            "DTYPE": _language().bfloat16 if self.bank.weights == torch.bfloat16 else _language().float32
        }
        self._launch(
            "step_all",
            self.used,
            (self._table, sent, self._owner, self._coefficients, self._step, *self._state),
            {**dtype, **self._shape},
        )
        torch.autograd.graph.increment_version([arrival.parameter for arrival in arrivals])

    def totals(self) -> Tensor:
        """Return the sums of num, |s|, squares of the gradient and tiles that are not finite: (4,), fp64."""
        return self.slots.sum(0, dtype=torch.float64)

    def _in_order(self, arrival: Arrival) -> Tensor:
        """Return the gradient, copied if its elements do not lie in memory as those of its parameter."""
        p, g = arrival.parameter, arrival.gradient
        in_order = g.stride() == p.stride() or g.permute(arrival.segment.order).is_contiguous()
        if in_order and g.dtype == p.dtype and (g.device.type == "meta" or g.data_ptr() % _ALIGNED == 0):
            return g
        return torch.empty_like(p).copy_(g)

    def _launch(
        self, name: str, programs: int, arguments: tuple[Any, ...], constants: Mapping[str, Any]
    ) -> None:
        self.launches += 1
        if self.bank.device.type != "meta":
            launch(self._handles, name, programs, arguments, constants)


_use_handles = True


def launch(
    handles: dict[str, Any], name: str, programs: int, arguments: Sequence[Any], constants: Mapping[str, Any]
) -> None:
    """Launch a kernel of triton_kernel.py.

    Args:
        handles: handles of kernels that were launched before with arguments of the same kinds; reusing one
            takes a fraction of the time on the host.
    """
    if name in handles:
        handles[name][(programs, 1, 1)](*arguments, *constants.values())
        return
    from trainer.optim.dadapt import triton_kernel

    kernel: Callable[..., Any] = getattr(triton_kernel, name)[(programs,)]
    compiled = kernel(*arguments, **constants, num_warps=WARPS)
    if _use_handles and hasattr(compiled, "packed_metadata"):  # not in Triton's interpreter
        handles[name] = compiled


def _language() -> Any:
    import triton.language

    return triton.language


_tried: dict[tuple[Any, ...], bool] = {}


@torch.no_grad()
def works(device: torch.device, weights: torch.dtype, bits: int, every: int) -> bool:
    """Return True if the kernel runs there and agrees with the torch step; if not, warn in one line.

    Always true on the meta device, where launches are only counted.
    """
    if device.type == "meta":
        return True
    key = device, weights, bits, every
    if key not in _tried:
        try:
            _compare_twice(*key)
            _tried[key] = True
        except Exception as error:  # no Triton, no compiler for its launcher, an old GPU: anything
            _tried[key] = False
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            warnings.warn(
                f"the optimizer's Triton kernel does not work here ({reason}): it runs without it, slower",
                stacklevel=2,
            )
    return _tried[key]


def _compare_twice(*key: Any) -> None:
    """Compare, and once more without handles, which are no public interface of Triton."""
    global _use_handles
    try:
        _compare(*key)
    except Exception:
        if not _use_handles:
            raise
        _use_handles = False
        _compare(*key)


def _compare(device: torch.device, weights: torch.dtype, bits: int, every: int) -> None:
    """Advance two tensors three times, by the kernel and by torch.

    Raises:
        RuntimeError: the results differ by more than last bits.
    """
    from trainer.optim.dadapt.eager import Arrival, TorchEngine
    from trainer.optim.dadapt.state import Segment

    sizes, first = (3 * TILE + 77, 50), (0, 4)
    table = torch.zeros(1, 16, dtype=torch.float32, device=device)
    values = [0.9, 1e-4, 0.999, 1e-3, 0.9995, 5e-7, 1e-8, 1e-5, 1.0, 0.0, 1.0, 1.0, 1.0]
    table[0, : len(values)] = torch.tensor(values, device=device)
    draws = torch.Generator().manual_seed(0)
    starts, *steps = (
        [torch.randn(size, generator=draws).to(device, weights) for size in sizes] for _ in range(4)
    )
    found: list[list[Tensor]] = []
    for way in (True, False):
        bank = Bank(device, weights, 6, bits, every)
        bank.segments += [
            Segment(number, 0, bank, first[number], size, (0,)) for number, size in enumerate(sizes)
        ]
        engine = TritonEngine(bank, table) if way else TorchEngine(bank, None, [1.0])
        params = [start.clone() for start in starts]
        for step, gradients in enumerate(steps):
            engine.begin(step, False, False)
            arrivals = [
                Arrival(*each, None, table[0, : len(values)])
                for each in zip(bank.segments, params, gradients, strict=True)
            ]
            for together in (
                (arrivals,) if step else ([each] for each in arrivals)
            ):  # one launch for each, and one for all
                engine.advance(together)
        state = [bank.load(name, 0, 5).view(-1) for name in bank.held]
        found.append([*(p.float() for p in params), *state, engine.totals()[: 2 if every else 0]])
    for number, (ours, theirs) in enumerate(zip(*found, strict=True)):
        # A last bit decides now and then to which of two neighbours something is rounded.
        apart = (ours - theirs).abs() > 1e-5 * theirs.abs() + 1e-6 * theirs.abs().sum() / max(
            theirs.numel(), 1
        )
        if theirs.numel() and (apart.float().mean() > 0.01 or not ours.isfinite().all()):
            raise RuntimeError(
                f"result {number} differs from that of torch in {apart.float().mean().item():.1%} of its "
                "elements"
            )
