"""Optimizer state of all parameters in a few blocks of memory, in tiles of `TILE` elements.

Tiles follow the order of the elements in memory, not that of their indices, so weights that are channels last
need no copy. Only the state is flat: views of one storage as parameters would be parted silently by the next
`.to(memory_format=...)`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainer.optim.dadapt.quantized import BLOCK, decode, encode, mixed

TILE = 2048
"""Elements of one tile; the state of each parameter begins a new one."""

SMALL = 1 << 14
"""Size below which parameters keep s of every element and, with fused backward, are updated in `step()`."""


class Bank:
    """The state of parameters of one precision on one device.

    Args:
        weights: the parameters' dtype.
        bits: 8 or 32 for each kept number (64 for fp64 weights).
        every: keep s of every element (1), of one drawn in each `every` (a power of two), or not at all (0).
    """

    def __init__(self, device: torch.device, weights: torch.dtype, tiles: int, bits: int, every: int) -> None:
        self.device, self.weights, self.tiles, self.bits, self.every = device, weights, tiles, bits, every
        self.dtype = torch.float64 if weights == torch.float64 else torch.float32
        """The precision of the arithmetic."""
        self.segments: list[Segment] = []
        self.few = TILE // every if every else 0
        self.held: dict[str, tuple[Tensor, Tensor]] = {}
        """By name, numbers (tiles, width) and exponents (tiles, blocks of a tile), empty above 8 bits."""
        names = {"exp_avg": (True, TILE), "exp_avg_sq": (False, TILE)}
        names |= {"s": (True, self.few)} if every else {}
        for name, (signed, width) in names.items():
            kind = self.dtype if bits != 8 else torch.int8 if signed else torch.uint8
            exponents = torch.zeros(
                tiles, -(-width // BLOCK) if bits == 8 else 0, dtype=torch.uint8, device=device
            )
            self.held[name] = torch.zeros(tiles, width, dtype=kind, device=device), exponents

    def load(self, name: str, first: int, tiles: int, live: Tensor | None = None) -> Tensor:
        """Return numbers (tiles, width), to be changed in place and stored."""
        data, exponents = (each[first : first + tiles] for each in self.held[name])
        if self.bits != 8:
            return data if live is None else data.clone()
        return decode(data.view(-1, min(data.shape[1], BLOCK)), exponents.reshape(-1, 1)).view(data.shape)

    def store(self, name: str, first: int, values: Tensor, noise: Tensor | None, live: Tensor | None) -> None:
        """Store values (tiles, width), rounded by noise (tiles, TILE), in `live` tiles (tiles, 1) or all."""
        data, exponents = (each[first : first + len(values)] for each in self.held[name])
        new: list[tuple[Tensor, Tensor]] = [(data, values)]
        if noise is not None:
            width = min(data.shape[1], BLOCK)
            draws = noise[:, : data.shape[1]].reshape(-1, width)
            codes, powers = encode(values.view(-1, width), draws, data.is_signed())
            new = [(data, codes.view(data.shape)), (exponents, powers.view(exponents.shape))]
        for target, value in new:
            if target.data_ptr() != value.data_ptr():  # else it was changed in place
                target.copy_(value if live is None else torch.where(live, value.to(target.dtype), target))

    def drawn(self, first: int, tiles: int) -> Tensor:
        """Return the elements of these tiles that keep s: (tiles, few), int64."""
        few, tile = (
            torch.arange(*span, dtype=torch.int32, device=self.device)
            for span in ((0, self.few), (first, first + tiles))
        )
        if self.device.type == "meta":
            return few.long().expand(tiles, -1)
        places = mixed(mixed(tile).view(-1, 1) + few).bitwise_and_(self.every - 1)
        return places.add_(few * self.every).long()


@dataclass(frozen=True, eq=False)
class Segment:
    """The place of one parameter's state."""

    index: int
    group: int
    bank: Bank
    first: int
    """Its first tile."""
    numel: int
    order: tuple[int, ...]
    """Its dimensions by falling stride."""

    @property
    def tiles(self) -> int:
        """Its tiles, of which the last may be used in part."""
        return tiles_of(self.numel)

    def flat(self, tensor: Tensor) -> Tensor:
        """Return the elements of a tensor in the order of the parameter's memory, as a view if possible."""
        return tensor.detach().permute(self.order).reshape(-1)

    def shaped(self, flat: Tensor, shape: torch.Size) -> Tensor:
        """Return elements in the order of the parameter's memory as a view in its shape."""
        inverse = sorted(range(len(self.order)), key=self.order.__getitem__)
        return flat.view([shape[dim] for dim in self.order]).permute(inverse)

    def views(self, shape: torch.Size) -> dict[str, Tensor]:
        """Return the state by name, in the parameter's shape; drawn elements flat, tile after tile."""
        views: dict[str, Tensor] = {}
        for name, (data, exponents) in self.bank.held.items():
            here = slice(self.first, self.first + self.tiles)
            whole = data.shape[1] == TILE
            views[name] = (
                self.shaped(data[here].view(-1)[: self.numel], shape) if whole else data[here].view(-1)
            )
            if self.bank.bits == 8:
                views[f"{name}_exponent"] = exponents[here].view(-1)[
                    : -(-self.numel // BLOCK) if whole else None
                ]
        return views


class Layout:
    """The tiles and banks of all parameters."""

    def __init__(self, groups: Sequence[Mapping[str, Any]], bits: int, every: int) -> None:
        members: dict[tuple[Any, ...], list[tuple[int, int, Tensor]]] = {}
        parameters = [
            (number, parameter) for number, group in enumerate(groups) for parameter in group["params"]
        ]
        for index, (number, parameter) in enumerate(parameters):
            small = parameter.numel() < SMALL
            key = parameter.device, parameter.dtype, min(every, 1) if small else every, small
            members.setdefault(key, []).append((index, number, parameter))
        self.banks: list[Bank] = []
        for (device, dtype, sparse, _), entries in members.items():
            # One tile more than is used: a compiled call takes at least two.
            bank = Bank(device, dtype, 1 + sum(tiles_of(p.numel()) for _, _, p in entries), bits, sparse)
            first = 0
            for index, number, p in sorted(entries, key=lambda entry: entry[1]):
                order = tuple(sorted(range(p.dim()), key=p.stride, reverse=True))
                bank.segments.append(Segment(index, number, bank, first, p.numel(), order))
                first += tiles_of(p.numel())
            self.banks.append(bank)
        self.segments = sorted(
            (segment for bank in self.banks for segment in bank.segments), key=lambda segment: segment.index
        )
        self.device: torch.device = parameters[0][1].device


def tiles_of(numel: int) -> int:
    """Return the tiles that the state of a parameter takes."""
    return -(-numel // TILE)
