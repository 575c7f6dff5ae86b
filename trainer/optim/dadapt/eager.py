"""The step by operations of torch: eagerly, or through torch.compile. What the GPU's kernel does is compared with this."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from trainer.optim.dadapt.adam import Coefficients, advance, estimate
from trainer.optim.dadapt.kernels import CompiledKernel
from trainer.optim.dadapt.quantized import BLOCK, noise, to_bf16
from trainer.optim.dadapt.state import TILE, Bank, Segment, tiles_of

PACK_TILES = 256
"""Tiles of a compiled call that are worth its overhead of some 60 microseconds: half a million elements.
Smaller parameters are copied into one buffer for a call, larger ones are worked on in place."""

_CACHED_TILES = 15
"""Tiles that the eager path works on at a time on the CPU: few enough for the cache, enough to hide each
call. Torch spreads calls on 32768 elements or more over its threads, which costs more than it saves on so
few, and by orders of magnitude where a core is busy."""

_BLOCKS = TILE // BLOCK


class Arrival(NamedTuple):
    """A parameter whose gradient is complete."""

    segment: Segment
    parameter: Tensor
    gradient: Tensor
    live: Tensor | None
    """Whether it takes part: 0-d bool; None where it is known to."""
    table: Tensor
    """The values of `Coefficients`."""


class TorchEngine:
    """Advances the parameters of a bank by operations of torch.

    Args:
        kernel: the compiled step; None: the step runs eagerly.
        weights_of: by group, the weight of its sums, layer_scale.
    """

    def __init__(self, bank: Bank, kernel: CompiledKernel | None, weights_of: Sequence[float]) -> None:
        self.bank, self.kernel, self._weights_of = bank, kernel, weights_of
        self._num, self._l1 = (
            torch.zeros(bank.tiles, dtype=torch.float64, device=bank.device) for _ in range(2)
        )
        self._stage: list[Tensor] = []

    @property
    def compiled(self) -> bool:
        """Whether steps run through torch.compile."""
        return self.kernel is not None

    def waits(self, numel: int) -> bool:
        """Return whether a parameter is left to the end of a fused backward, for the sake of few compiled calls."""
        return self.compiled and not is_large(numel)

    def begin(self, step: int, scaled: bool, coupled: bool) -> None:
        """Clear the sums and draw the step's noise.

        Args:
            scaled: gradients carry a loss scale.
            coupled: decay is added to gradients.
        """
        self._num.zero_()
        self._l1.zero_()
        self._scaled, self._coupled = scaled, coupled
        self._noise: tuple[Tensor, Tensor] | None = None
        if self.bank.bits == 8 or self.bank.weights == torch.bfloat16:
            self._noise = noise(step, 0, self.bank.tiles * _BLOCKS, self.bank.device)

    def advance(self, arrivals: Sequence[Arrival]) -> None:
        """Advance parameters and their state: large ones in place, small neighbours in one buffer."""
        for pack in _packed(arrivals):
            segment = pack[0].segment
            if len(pack) > 1:
                self._staged(segment.first, pack)
                continue
            arrival = pack[0]
            weights, gradient = segment.flat(arrival.parameter), segment.flat(arrival.gradient)
            whole = segment.numel // TILE
            if self.compiled and whole < 2:
                whole = 0
            if whole:
                done = whole * TILE
                p, g = (flat[:done].view(whole, TILE) for flat in (weights, gradient.to(weights.dtype)))
                self._rows(
                    segment.first,
                    p,
                    g,
                    None if arrival.live is None else arrival.live.expand(whole, 1),
                    arrival.table,
                )
            if segment.numel > whole * TILE:
                self._staged(segment.first + whole, [arrival], whole * TILE)

    def totals(self) -> Tensor:
        """Return the sums of <g, s / (sqrt(v) + eps)> and |s| of the step, times their groups' weights: (2,), fp64."""
        total = torch.zeros(2, dtype=torch.float64, device=self.bank.device)
        for number, weight in enumerate(self._weights_of):
            own = [segment for segment in self.bank.segments if segment.group == number]
            if own:
                here = slice(own[0].first, own[-1].first + own[-1].tiles)
                total += (
                    weight
                    * max(self.bank.every, 1)
                    * torch.stack([self._num[here].sum(), self._l1[here].sum()])
                )
        return total

    def l1_of(self, segment: Segment) -> Tensor:
        """Return |s|_1 of one parameter in this step: 0-d, fp64."""
        return self._l1[segment.first : segment.first + segment.tiles].sum()

    def decay(self, segment: Segment, parameter: Tensor, decay: Tensor) -> None:
        """Shrink weights by a share of themselves."""
        weights = segment.flat(parameter)
        for start in range(0, segment.numel, _CACHED_TILES * TILE):
            p = weights[start : start + _CACHED_TILES * TILE]
            work = p.to(self.bank.dtype)
            p.copy_(self._narrowed(work - work * decay, segment.first + start // TILE))

    def _staged(self, first: int, pack: Sequence[Arrival], done: int = 0) -> None:
        """Advance parameters with neighbouring state, from tile `first` and their element `done` on, on copies of them."""
        pieces = [
            (a.segment.first + done // TILE - first, a, a.segment.flat(a.parameter)[done:]) for a in pack
        ]
        tiles = max(2, pieces[-1][0] + tiles_of(len(pieces[-1][2])))
        if not self._stage:
            self._stage = [
                torch.zeros(PACK_TILES + 1, TILE, dtype=self.bank.weights, device=self.bank.device)
                for _ in range(2)
            ]
        p, g = (buffer[:tiles].zero_() for buffer in self._stage)
        live = torch.zeros(tiles, 1, dtype=torch.bool, device=self.bank.device)
        for row, arrival, weights in pieces:
            place = slice(row * TILE, row * TILE + len(weights))
            p.view(-1)[place].copy_(weights)
            g.view(-1)[place].copy_(arrival.segment.flat(arrival.gradient)[done:])
            live[row : row + tiles_of(len(weights))] = True if arrival.live is None else arrival.live
        self._rows(first, p, g, live, pack[0].table)
        for row, _, weights in pieces:
            weights.copy_(p.view(-1)[row * TILE : row * TILE + len(weights)])

    def _rows(self, first: int, p: Tensor, g: Tensor, live: Tensor | None, table: Tensor) -> None:
        """Advance weights p (tiles, TILE) in place by gradients g of the same shape, and state from tile `first` on."""
        if self.kernel is None:
            size = _CACHED_TILES if self.bank.device.type == "cpu" else PACK_TILES
            for start in range(0, len(p), size):
                here = slice(start, start + size)
                self._eagerly(
                    first + start,
                    p[here],
                    g[here],
                    None if live is None else live[here],
                    Coefficients(*table.unbind()),
                )
            return
        live = torch.ones(len(p), 1, dtype=torch.bool) if live is None else live
        num, l1 = self.kernel.advance(self.bank, first, p, g, live, table, self._noise)
        here = slice(first, first + len(p))
        # Tiles that are nobody's here may be somebody's elsewhere.
        self._num[here] += num
        self._l1[here] += l1

    def _eagerly(self, first: int, p: Tensor, g: Tensor, live: Tensor | None, c: Coefficients) -> None:
        bank, tiles = self.bank, len(p)
        if live is not None and bank.device.type == "cpu" and bool(live.all()):
            live = None
        work, g = p.to(bank.dtype, copy=True), g.to(bank.dtype)
        if self._scaled:
            g = g * c.unscale
        if live is not None:
            g = torch.where(live, g, 0.0)
        if self._coupled:
            g = g + work * c.coupled
        m, v = (bank.load(name, first, tiles, live) for name in ("exp_avg", "exp_avg_sq"))
        state: dict[str, Tensor] = {}
        if bank.every:
            gs, vs = g, v
            if bank.every > 1:
                drawn = bank.drawn(first, tiles)
                gs, vs = g.gather(1, drawn), v.gather(1, drawn)
            state["s"], products = estimate(gs, bank.load("s", first, tiles, live), vs, c)
            held = 1.0 if live is None else live.squeeze(-1)
            self._num[first : first + tiles] += products.sum(-1) * held
            self._l1[first : first + tiles] += state["s"].abs().sum(-1) * held
        work, state["exp_avg"], state["exp_avg_sq"] = advance(work, g, m, v, c)
        draws = self.noise(first, tiles)[0] if bank.bits == 8 else None
        for name, values in state.items():
            bank.store(name, first, values, draws, live)
        work = self._narrowed(work.view(-1), first).view(p.shape)
        p.copy_(work if live is None else torch.where(live, work, p))

    def noise(self, first: int, tiles: int) -> tuple[Tensor, Tensor]:
        """Return the step's noise in these tiles, for codes and for weights: each (tiles, TILE), uniform in [0, 1)."""
        assert self._noise is not None
        blocks = self._noise[0][first * _BLOCKS : (first + tiles) * _BLOCKS]
        codes, weights = ((blocks + column).frac_().view(tiles, TILE) for column in self._noise[1])
        return codes, weights

    def _narrowed(self, weights: Tensor, first: int) -> Tensor:
        """Return flat weights from tile `first` on in the parameters' precision, rounded stochastically to bf16."""
        if self.bank.weights == self.bank.dtype:
            return weights
        return to_bf16(weights, self.noise(first, tiles_of(len(weights)))[1].view(-1)[: len(weights)])


def _packed(arrivals: Sequence[Arrival]) -> Iterator[list[Arrival]]:
    """Yield large parameters by themselves, and small neighbours with the same coefficients together."""
    pack: list[Arrival] = []
    for arrival in sorted(arrivals, key=lambda arrival: arrival.segment.first):
        segment = arrival.segment
        if segment.numel == 0:
            continue
        if pack and (
            arrival.table is not pack[0].table
            or segment.first + segment.tiles - pack[0].segment.first > PACK_TILES
        ):
            yield pack
            pack = []
        if is_large(segment.numel):
            yield [arrival]
        else:
            pack.append(arrival)
    if pack:
        yield pack


def is_large(numel: int) -> bool:
    """Return whether a parameter is worth a compiled call of its own."""
    return numel >= PACK_TILES * TILE
