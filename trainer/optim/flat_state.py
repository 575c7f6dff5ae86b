"""Optimizer state of all parameters in a few blocks of memory, in rows of `ROW` elements, as the kernels of D-Adaptation want it.

Only the state is flat. Parameters and gradients stay ordinary tensors: views of one storage would be parted silently by the next
`.to(memory_format=...)`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainer.optim.dadapt_kernels import ROW, Kernel, row_width
from trainer.optim.quantized import BLOCK, decode, encode, to_bf16

_BLOCKS = ROW // BLOCK

_CACHED_ROWS = 15
"""Rows that the eager path works on at a time on the CPU: few enough for the cache, enough to hide each call. Torch spreads calls on
32768 elements or more over its threads, which costs more than it saves on so few, and by orders of magnitude where a core is busy."""

PACK_ROWS = 256
"""Rows of a compiled call that are worth its overhead of some 60 microseconds: half a million elements. Smaller parameters are copied
into one buffer for a call, larger ones are worked on in place."""


class Bank(ABC):
    """The state of all parameters of one precision on one device, and what the rows of a step need beside it.

    Args:
        weights: the parameters' precision.
        state_bits: 32 or 8.
    """

    dtype: torch.dtype
    """What is computed in."""

    def __init__(self, device: torch.device, rows: int, weights: torch.dtype, state_bits: int) -> None:
        self.device, self.rows, self.weights = device, rows, weights
        self._width = row_width(state_bits, weights)
        self.num, self.l1 = (torch.zeros(rows, dtype=torch.float64, device=device) for _ in range(2))
        self.rows_of: dict[int, slice] = {}
        """The rows of each group."""

    def begin(self, step: int) -> None:
        """Clear the sums and draw the step's noise: the fractional part of one number for the block and one for the place in it.

        Any two of its elements are independent and uniform, for the price of two vectors.
        """
        self.num.zero_()
        self.l1.zero_()
        if self._width == BLOCK:  # something is rounded
            generator = None if self.device.type == "meta" else torch.Generator(self.device).manual_seed(step)
            # Multiples of 2^-16: their sums are exact, so every device and every order agrees.
            shapes = ((2, 1, BLOCK), (self.rows * _BLOCKS, 1))
            draws = [torch.randint(1 << 16, shape, generator=generator, device=self.device) for shape in shapes]
            columns, self.blocks = (draw.to(torch.float32) * 2**-16 for draw in draws)
            self.columns = columns + 2**-17  # the middle between 0 and 1

    def noise(self, row: int, rows: int, of_weights: bool = False) -> Tensor:
        """Return the step's noise for these rows, uniform in [0, 1): (rows, ROW)."""
        return (self.blocks[row * _BLOCKS : (row + rows) * _BLOCKS] + self.columns[int(of_weights)]).frac_().view(rows, ROW)

    def narrowed(self, weights: Tensor, row: int) -> Tensor:
        """Return weights (rows, ROW) in the parameters' precision, rounded stochastically to bf16."""
        return weights if self.weights == self.dtype else to_bf16(weights, self.noise(row, len(weights), of_weights=True))

    def call(self, kernel: Kernel, row: int, p: Tensor, g: Tensor, live: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        """Run a compiled kernel on two or more rows, from this one on; return the two sums of each row, in fp64."""
        rows, parts = len(p), ROW // self._width
        here = slice(row * parts, (row + rows) * parts)
        noise = (self.blocks[here], self.columns) if parts > 1 else ()
        live = live.expand(rows, parts).reshape(-1, 1).contiguous()
        sums = kernel(p.view(-1, self._width), g.view(-1, self._width), live, table, *(flat[here] for flat in self._flats()), *noise)
        num, l1 = (sum_.view(rows, parts).sum(1, dtype=torch.float64) for sum_ in sums)
        return num, l1

    @abstractmethod
    def load(self, row: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return m, v and s (rows, ROW) to be changed in place and stored."""

    @abstractmethod
    def store(self, row: int, m: Tensor, v: Tensor, s: Tensor, finite: Tensor | None) -> None:
        """Keep what `load` gave, unless it is not `finite`: 0-d bool, None if that is known."""

    @abstractmethod
    def _flats(self) -> Sequence[Tensor]:
        """Return the state as a compiled kernel takes it, (rows, width or 1)."""

    @abstractmethod
    def started(self, segment: Segment) -> Tensor:
        """Return whether s is not 0 somewhere: 0-d bool."""

    @abstractmethod
    def views(self, segment: Segment, shape: torch.Size) -> dict[str, Tensor]:
        """Return the state of one parameter by name."""


class FloatBank(Bank):
    """m, v and s in fp32 or fp64."""

    def __init__(self, device: torch.device, rows: int, weights: torch.dtype) -> None:
        super().__init__(device, rows, weights, state_bits=32)
        self.dtype = torch.float64 if weights == torch.float64 else torch.float32
        self._state = tuple(torch.zeros(rows, ROW, dtype=self.dtype, device=device) for _ in range(3))

    def load(self, row: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:  # noqa: D102
        m, v, s = (flat[row : row + rows] for flat in self._state)
        return m, v, s

    def store(self, row: int, m: Tensor, v: Tensor, s: Tensor, finite: Tensor | None) -> None:  # noqa: D102
        pass  # changed in place, by nothing if not finite

    def _flats(self) -> Sequence[Tensor]:
        return [flat.view(-1, self._width) for flat in self._state]

    def started(self, segment: Segment) -> Tensor:  # noqa: D102
        return segment.of(self._state[2]).any()

    def views(self, segment: Segment, shape: torch.Size) -> dict[str, Tensor]:  # noqa: D102
        return {name: segment.of(flat).view(shape) for name, flat in zip(("exp_avg", "exp_avg_sq", "s"), self._state, strict=True)}


class ByteBank(Bank):
    """m, v and s in 8 bits."""

    dtype = torch.float32

    def __init__(self, device: torch.device, rows: int, weights: torch.dtype) -> None:
        super().__init__(device, rows, weights, state_bits=8)
        kinds = (torch.int8, torch.uint8, torch.int8)
        self._codes = tuple(torch.zeros(rows * _BLOCKS, BLOCK, dtype=kind, device=device) for kind in kinds)
        self._exponents = tuple(torch.zeros(rows * _BLOCKS, 1, dtype=torch.uint8, device=device) for _ in range(3))

    def load(self, row: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:  # noqa: D102
        here = slice(row * _BLOCKS, (row + rows) * _BLOCKS)
        stored = zip(self._codes, self._exponents, strict=True)
        m, v, s = (decode(codes[here], exponents[here]).view(rows, ROW) for codes, exponents in stored)
        return m, v, s

    def store(self, row: int, m: Tensor, v: Tensor, s: Tensor, finite: Tensor | None) -> None:  # noqa: D102
        here = slice(row * _BLOCKS, (row + len(m)) * _BLOCKS)
        noise = self.noise(row, len(m)).view(-1, BLOCK)
        for values, codes, exponents in zip((m, v, s), self._codes, self._exponents, strict=True):
            for target, value in zip((codes[here], exponents[here]), encode(values.view(-1, BLOCK), noise, codes.is_signed()), strict=True):
                target.copy_(value if finite is None else torch.where(finite.to(self.device), value.to(target.dtype), target))

    def _flats(self) -> Sequence[Tensor]:
        return [*self._codes, *self._exponents]

    def started(self, segment: Segment) -> Tensor:  # noqa: D102
        return segment.of(self._codes[2]).any()

    def views(self, segment: Segment, shape: torch.Size) -> dict[str, Tensor]:  # noqa: D102
        views: dict[str, Tensor] = {}
        for name, codes, exponents in zip(("exp_avg", "exp_avg_sq", "s"), self._codes, self._exponents, strict=True):
            views[name] = segment.of(codes).view(shape)
            views[f"{name}_exponent"] = exponents.view(-1)[segment.row * _BLOCKS :][: -(-segment.numel // BLOCK)]
        return views


@dataclass(frozen=True, eq=False)
class Segment:
    """Where one parameter's state is."""

    index: int
    group: int
    bank: Bank
    row: int
    numel: int

    @property
    def rows(self) -> int:
        """Rows, the last of which may be used in part."""
        return rows_for(self.numel)

    def of(self, flat: Tensor) -> Tensor:
        """Return this parameter's elements of a flat tensor of the bank."""
        return flat.view(-1)[self.row * ROW :][: self.numel]

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


@dataclass(frozen=True, eq=False)
class Pack:
    """Small parameters of one group with neighbouring rows, which one compiled call works on."""

    bank: Bank
    group: int
    segments: tuple[Segment, ...]

    @property
    def row(self) -> int:
        """The first row."""
        return self.segments[0].row

    @property
    def rows(self) -> int:
        """How many rows, at most PACK_ROWS."""
        return self.segments[-1].row + self.segments[-1].rows - self.row


Place = tuple[torch.device, torch.dtype]


class Layout:
    """Which rows of which bank belong to which parameter.

    Within a bank and a group the large parameters come first, so that the small ones are neighbours.
    """

    def __init__(self, groups: Sequence[Mapping[str, Any]], state_bits: int) -> None:
        members: dict[Place, dict[int, list[tuple[int, int]]]] = {}
        parameters = [(number, parameter) for number, group in enumerate(groups) for parameter in group["params"]]
        for index, (number, parameter) in enumerate(parameters):
            place = (parameter.device, parameter.dtype)
            members.setdefault(place, {}).setdefault(number, []).append((index, parameter.numel()))

        self.banks: list[Bank] = []
        self.packs: list[Pack] = []
        segments: dict[int, Segment] = {}
        for (device, dtype), by_group in members.items():
            # One row more than is used: a compiled call takes at least two.
            rows = 1 + sum(rows_for(numel) for entries in by_group.values() for _, numel in entries)
            bank = (ByteBank if state_bits == 8 else FloatBank)(device, rows, dtype)
            self.banks.append(bank)
            row = 0
            for number, entries in by_group.items():
                first, small = row, []
                for index, numel in sorted(entries, key=lambda entry: not is_large(entry[1])):
                    segments[index] = Segment(index, number, bank, row, numel)
                    row += rows_for(numel)
                    if not is_large(numel):
                        small.append(segments[index])
                bank.rows_of[number] = slice(first, row)
                self.packs += _packed(bank, number, small)
        self.segments = tuple(segments[index] for index in range(len(parameters)))
        self.pack_of = {segment.index: pack for pack in self.packs for segment in pack.segments}
        self.device: torch.device = parameters[0][1].device


def rows_for(numel: int) -> int:
    """Return how many rows a parameter takes."""
    return -(-numel // ROW)


def is_large(numel: int) -> bool:
    """Return whether a parameter is worth a compiled call of its own."""
    return numel >= PACK_ROWS * ROW


def _packed(bank: Bank, group: int, segments: Sequence[Segment]) -> list[Pack]:
    packs: list[list[Segment]] = []
    for segment in segments:
        if segment.numel == 0:
            continue
        if not packs or segment.row + segment.rows - packs[-1][0].row > PACK_ROWS:
            packs.append([])
        packs[-1].append(segment)
    return [Pack(bank, group, tuple(pack)) for pack in packs]
