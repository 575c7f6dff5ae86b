"""The step by torch operations, eagerly or through torch.compile: the reference of the GPU's kernel."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from trainer.optim.dadapt.adam import Coefficients, advance, estimate
from trainer.optim.dadapt.kernels import CompiledKernel
from trainer.optim.dadapt.quantized import BLOCK, noise, to_bf16
from trainer.optim.dadapt.state import SMALL, TILE, Bank, Segment, tiles_of

PACK_TILES = 256
"""Tiles of a call, half a million elements, that are worth its overhead of some 60 microseconds. Smaller
parameters are copied into one buffer for a call, larger ones are advanced in place."""

_CACHED_TILES = 15
"""Tiles that the eager path works on at a time on the CPU: few enough for the cache, enough to hide each
call. Torch spreads calls on 32768 elements or more over its threads, which costs more than it saves on so
few, and by orders of magnitude where a core is busy."""

_CALL_TILES = 128
"""Tiles that the eager path works on at a time with one thread, where calls cost more than caches save."""

WIDENED_TILES = 1024
"""Tiles of a compiled call with 8-bit state and bf16 weights, at most: its copy of the gradient in fp32 takes
8 MiB then and stays in the cache."""

_BLOCKS = TILE // BLOCK


class Arrival(NamedTuple):
    """A parameter whose gradient is complete."""

    segment: Segment
    parameter: Tensor
    gradient: Tensor
    live: Tensor | None
    """False if the step skips it: 0-d bool; None: it takes part."""
    table: Tensor
    """The values of `Coefficients`."""


class _Places(NamedTuple):
    """Views of the buffers for weights and gradients of small parameters."""

    tiles: int
    weights: list[Tensor]
    gradients: list[Tensor]
    rows: list[slice]
    """The tiles of each parameter."""
    unused: list[Tensor]
    """The elements in between."""
    gaps: bool
    """True if some tiles belong to no parameter."""


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
        self._known: dict[tuple[int, ...], _Places] = {}
        self._scratch: Tensor | None = None

    @property
    def compiled(self) -> bool:
        """Whether steps run through torch.compile."""
        return self.kernel is not None

    def waits(self, numel: int) -> bool:
        """Return True if a fused backward leaves a parameter to `step()`, with its neighbours in memory."""
        return numel < (PACK_TILES * TILE if self.compiled else SMALL)

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

    @torch.no_grad()
    def advance(self, arrivals: Sequence[Arrival]) -> None:
        """Advance parameters and their state: large ones in place, small neighbours in one buffer."""
        for pack in _packed(arrivals):
            arrival, segment = pack[0], pack[0].segment
            whole = segment.numel // TILE
            if len(pack) > 1 or whole < (2 if self.compiled else 1):
                self._staged(segment.first, pack, [(each.parameter, each.gradient) for each in pack])
                continue
            flat_p, flat_g = (segment.flat(each) for each in (arrival.parameter, arrival.gradient))
            done = whole * TILE
            p, g = (each[:done].view(whole, TILE) for each in (flat_p, flat_g.to(flat_p.dtype)))
            live = None if arrival.live is None else arrival.live.expand(whole, 1)
            self._rows(segment.first, p, g, live, arrival.table)
            if segment.numel > done:
                self._staged(segment.first + whole, pack, [(flat_p[done:], flat_g[done:])])

    def totals(self) -> Tensor:
        """Return the sums of <g, s / (sqrt(v) + eps)> and |s|, times their groups' weights: (2,), fp64."""
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

    def _staged(self, first: int, pack: Sequence[Arrival], tensors: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Advance weights by gradients on copies of both; their state begins at tile `first`."""
        weights, gradients = (list(each) for each in zip(*tensors, strict=True))
        places = self._places(first, pack, weights)
        if places.unused:
            torch._foreach_zero_(places.unused)  # type: ignore[attr-defined]
        torch._foreach_copy_(places.weights, weights)  # type: ignore[attr-defined]
        torch._foreach_copy_(places.gradients, gradients)  # type: ignore[attr-defined]
        live = None
        if places.gaps or any(arrival.live is not None for arrival in pack):
            live = torch.zeros(places.tiles, 1, dtype=torch.bool, device=self.bank.device)
            for arrival, rows in zip(pack, places.rows, strict=True):
                live[rows] = True if arrival.live is None else arrival.live
        p, g = (buffer[: places.tiles] for buffer in self._stage)
        self._rows(first, p, g, live, pack[0].table)
        torch._foreach_copy_(weights, places.weights)  # type: ignore[attr-defined]

    def _places(self, first: int, pack: Sequence[Arrival], weights: Sequence[Tensor]) -> _Places:
        """Return the places of weights of these shapes, and of their gradients, in the buffers."""
        key = first, *(arrival.segment.index for arrival in pack)
        if key in self._known:
            return self._known[key]
        if len(self._known) > 2 * len(self.bank.segments):  # gradients are missing now here, now there
            self._known.clear()
        if not self._stage:
            shape, bank = (PACK_TILES + 1, TILE), self.bank
            self._stage = [torch.zeros(shape, dtype=bank.weights, device=bank.device) for _ in range(2)]
        flat = [buffer.view(-1) for buffer in self._stage]
        views: list[list[Tensor]] = [[], []]
        rows: list[slice] = []
        unused: list[slice] = []
        end = 0
        for arrival, own in zip(pack, weights, strict=True):
            row, segment = max(arrival.segment.first - first, 0), arrival.segment
            unused.append(slice(end, row * TILE))
            end = row * TILE + own.numel()
            rows.append(slice(row, tiles_of(end)))
            for number in range(2):
                view = flat[number][row * TILE : end]
                views[number].append(view if own.dim() == 1 else segment.shaped(view, own.shape))
        tiles = max(tiles_of(end), 2 if self.compiled else 1)
        unused.append(slice(end, tiles * TILE))
        gaps = sum(each.stop - each.start for each in rows) < tiles
        empty = [each[part] for each in flat for part in unused if part.stop > part.start]
        self._known[key] = found = _Places(tiles, views[0], views[1], rows, empty, gaps)
        return found

    def _rows(self, first: int, p: Tensor, g: Tensor, live: Tensor | None, table: Tensor) -> None:
        """Advance weights p (tiles, TILE) in place by gradients g, and state from tile `first` on."""
        if self.kernel is None:
            self._eagerly(first, p, g, live, Coefficients(*table.unbind()))
            return
        live = torch.ones(len(p), 1, dtype=torch.bool) if live is None else live
        size = WIDENED_TILES if self.bank.bits == 8 and p.dtype == torch.bfloat16 else len(p)
        ends = [*range(size, len(p) - 1, size), len(p)]  # a call takes two tiles or more
        for start, end in pairwise([0, *ends]):
            part = slice(start, end)
            num, l1 = self.kernel.advance(
                self.bank, first + start, p[part], g[part], live[part], table, self._noise
            )
            here = slice(first + start, first + end)
            # Tiles that are nobody's here may be somebody's elsewhere.
            self._num[here] += num
            self._l1[here] += l1

    def _eagerly(self, first: int, p: Tensor, g: Tensor, live: Tensor | None, c: Coefficients) -> None:
        bank, cpu = self.bank, self.bank.device.type == "cpu"
        size, end = _CACHED_TILES if cpu else PACK_TILES, first + len(p)
        if bank.every:
            c = c._replace(out=None)
        if cpu and live is not None and bool(live.all()):
            live = None
        if live is None and bank.bits != 8 and p.dtype == bank.dtype and bank.every < 2:
            held = [bank.held[name][0][first:end] for name in bank.held]
            sums = [self._num[first:end], self._l1[first:end]]
            if cpu and torch.get_num_threads() == 1:
                size = _CALL_TILES
            for part in zip(*(each.split(size) for each in (p, g, *sums, *held)), strict=True):
                self._in_place(*part, c=c)
            return
        for start in range(0, len(p), size):
            here = slice(start, start + size)
            self._on_copies(first + start, p[here], g[here], None if live is None else live[here], c)

    def _in_place(
        self, p: Tensor, g: Tensor, num: Tensor, l1: Tensor, m: Tensor, v: Tensor, *s: Tensor, c: Coefficients
    ) -> None:
        """Advance tiles that all take part, in the precision they are kept in."""
        if self._scratch is None:
            self._scratch = p.new_empty(PACK_TILES, TILE)
        scratch = self._scratch[: len(p)]
        g = self._seen(g, p, c)
        if s:
            _, products = estimate(g, s[0], v, c, scratch=scratch)
            num += products.sum(-1)
            l1 += torch.abs(s[0], out=scratch).sum(-1)
        advance(p, g, m, v, c, scratch=scratch)

    def _seen(self, g: Tensor, p: Tensor, c: Coefficients) -> Tensor:
        """Return the gradient as the step sees it: unscaled, and with the coupled decay."""
        if self._scaled:
            g = g * c.unscale
        return g + p * c.coupled if self._coupled else g

    def _on_copies(self, first: int, p: Tensor, g: Tensor, live: Tensor | None, c: Coefficients) -> None:
        """Advance `live` tiles (tiles, 1) from `first` on, on copies in the precision of the arithmetic."""
        bank, tiles = self.bank, len(p)
        work, g = p.to(bank.dtype, copy=True), g.to(bank.dtype)
        g = self._seen(g if live is None else torch.where(live, g, 0.0), work, c)
        m, v = (bank.load(name, first, tiles, live) for name in ("exp_avg", "exp_avg_sq"))
        state: dict[str, Tensor] = {}
        if bank.every:
            gs, vs = g, v
            if bank.every > 1:
                drawn = bank.drawn(first, tiles)
                gs, vs = g.gather(1, drawn), v.gather(1, drawn)
            state["s"], products = estimate(gs, bank.load("s", first, tiles, live), vs, c)
            for slots, terms in ((self._num, products), (self._l1, state["s"].abs())):
                sums = terms.sum(-1)
                slots[first : first + tiles] += sums if live is None else sums * live.squeeze(-1)
        work, state["exp_avg"], state["exp_avg_sq"] = advance(work, g, m, v, c)
        draws = self.noise(first, tiles)[0] if bank.bits == 8 else None
        for name, values in state.items():
            bank.store(name, first, values, draws, live)
        work = self._narrowed(work.view(-1), first).view(p.shape)
        p.copy_(work if live is None else torch.where(live, work, p))

    def noise(self, first: int, tiles: int) -> tuple[Tensor, Tensor]:
        """Return the step's noise for codes and for weights, each (tiles, TILE), uniform in [0, 1)."""
        assert self._noise is not None
        blocks = self._noise[0][first * _BLOCKS : (first + tiles) * _BLOCKS]
        codes, weights = ((blocks + column).frac_().view(tiles, TILE) for column in self._noise[1])
        return codes, weights

    def _narrowed(self, weights: Tensor, first: int) -> Tensor:
        """Return flat weights from tile `first` on in the parameters' dtype, to bf16 by noise."""
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
        if segment.numel >= PACK_TILES * TILE:
            yield [arrival]
        else:
            pack.append(arrival)
    if pack:
        yield pack
