"""The step of D-Adaptation Adam and of AdamW on a GPU, as one Triton kernel for all shapes and formats.

A program advances one tile of TILE elements of one tensor, neighbours in memory. State lies flat, tile after
tile, and every tensor begins a new one. So the number of a tile says where its state is, how it is rounded
and which slots its sums go to: nothing depends on the order in which tiles or tensors come. The host reads
nothing back.

Needs triton 3.6 or later.
"""

from __future__ import annotations

import triton
import triton.language as tl

ONE = tl.constexpr(127 << 23)  # the bits of 1.0 in fp32
SIGN = tl.constexpr(-(1 << 31))
COLUMNS = tl.constexpr(0x6A09E667)  # quantized.py


@triton.jit
def _mix(x):
    """Permute 32 bits so that each bit of x changes half of the others (lowbias32, by C. Wellons)."""
    x = (x ^ (x >> 16)) * 0x21F0AAAD
    x = (x ^ (x >> 15)) * 0xD35A2D97
    return x ^ (x >> 15)


@triton.jit
def _offset(SIGNED: tl.constexpr):
    return ONE - (ONE >> 2) + ((7 if SIGNED else 8) << 23)


@triton.jit
def _load(data, exponents, place, block, SIGNED: tl.constexpr, BITS: tl.constexpr):
    """Return state in fp32: quantized.decode."""
    x = tl.load(data + place)
    if BITS == 8:
        unit = (tl.load(exponents + block).to(tl.int32) << 23).to(tl.float32, bitcast=True)
        level = x.to(tl.float32)
        bits = tl.maximum(tl.abs(level).to(tl.int32, bitcast=True) - _offset(SIGNED), 0) << 2
        x = bits.to(tl.float32, bitcast=True) * unit
        if SIGNED:
            x = (x.to(tl.int32, bitcast=True) | (level.to(tl.int32, bitcast=True) & SIGN)).to(
                tl.float32, bitcast=True
            )
    return x


@triton.jit
def _store(data, exponents, place, block, x, noise, SIGNED: tl.constexpr, BITS: tl.constexpr):
    """Keep state given in fp32, a row of it by one exponent: quantized.encode."""
    if BITS == 8:
        size = tl.abs(x)
        bound = tl.max(size, axis=1, keep_dims=True) * ((32 / 31 if SIGNED else 64 / 63) * (1 + 2e-5))
        exponent = tl.maximum((bound.to(tl.int32, bitcast=True) >> 23) + 1, 40)
        part = size * ((254 - exponent) << 23).to(tl.float32, bitcast=True)
        bits = (part.to(tl.int32, bitcast=True) >> 2) + _offset(SIGNED)
        if not SIGNED:
            bits = tl.maximum(bits, ONE)
        code = (bits.to(tl.float32, bitcast=True) + noise).to(tl.int32)
        if SIGNED:
            code = tl.where(x < 0, -code, code)
        tl.store(exponents + block, exponent.to(tl.uint8))
        x = code.to(data.dtype.element_ty)
    tl.store(data + place, x)


@triton.jit
def _advance(
    P, G, numel, tile, at, c, seed, m_, v_, s_, em_, ev_, es_, slots,
    EVERY: tl.constexpr, BITS: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Advance tile `tile` of a tensor, which is tile `at` of all, with the coefficients at c."""
    block_row, column = tl.arange(0, TILE // BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    inside = block_row * BLOCK + column
    here, block = at.to(tl.int64) * TILE + inside, at.to(tl.int64) * (TILE // BLOCK) + block_row
    place = tile.to(tl.int64) * TILE + inside
    mask = place < numel
    full = (tile.to(tl.int64) + 1) * TILE <= numel
    if full:  # a mask of odd length would part the loads into single elements
        w, g = tl.load(P + place).to(tl.float32), tl.load(G + place).to(tl.float32)
    else:
        w, g = (
            tl.load(P + place, mask=mask, other=0).to(tl.float32),
            tl.load(G + place, mask=mask, other=0).to(tl.float32),
        )
    m = _load(m_, em_, here, block, True, BITS)
    v = _load(v_, ev_, here, block, False, BITS)
    key = _mix(seed.to(tl.uint32))
    by_block = _mix(key ^ (at.to(tl.uint32) * (TILE // BLOCK) + block_row.to(tl.uint32))) >> 16
    by_column = _mix((key ^ COLUMNS) + column.to(tl.uint32)) >> 16
    noise = ((by_block + by_column) & 0xFFFF).to(tl.float32) * 2**-16 + 2**-17
    unscale, coupled, eps = tl.load(c + 8), tl.load(c + 9), tl.load(c + 6)
    keep_v, gain_v = tl.load(c + 2), tl.load(c + 3)
    if EVERY > 1:  # one element drawn in each EVERY: read again, from the cache
        few: tl.constexpr = TILE // EVERY
        j = tl.arange(0, few)[None, :]
        drawn = j * EVERY + (_mix(_mix(at.to(tl.uint32)) + j.to(tl.uint32)) % EVERY).to(tl.int32)
        place_few = tile.to(tl.int64) * TILE + drawn
        mask_few = place_few < numel
        gs = tl.load(G + place_few, mask=mask_few, other=0).to(tl.float32) * unscale
        gs += tl.load(P + place_few, mask=mask_few, other=0).to(tl.float32) * coupled
        # Before any thread stores: a sum, for which all threads wait, lies between.
        vs = _load(
            v_,
            ev_,
            at.to(tl.int64) * TILE + drawn,
            at.to(tl.int64) * (TILE // BLOCK) + drawn // BLOCK,
            False,
            BITS,
        )
        s_noise = _mix(key ^ (at.to(tl.uint32) * (TILE // BLOCK))) >> 16
        s_noise = ((s_noise + (_mix((key ^ COLUMNS) + j.to(tl.uint32)) >> 16)) & 0xFFFF).to(
            tl.float32
        ) * 2**-16 + 2**-17

    g = g * unscale
    squares = tl.sum(g * g)
    finite = squares < float("inf")
    ok = finite & (tl.load(c + 10) != 0)
    g += w * coupled
    if EVERY > 0:  # D-Adaptation
        if EVERY == 1:
            gs, vs, s_here, s_block, s_noise = g, v, here, block, noise
            s = _load(s_, es_, s_here, s_block, True, BITS)
        else:
            s_here, s_block = at.to(tl.int64) * few + j, at.to(tl.int64) + tl.arange(0, 1)[:, None]
            s = _load(s_, es_, s_here, s_block, True, BITS)
        num = tl.sum(s / (tl.sqrt(vs) + eps) * gs)
        s = s * tl.load(c + 4) + gs * tl.load(c + 5)
        l1 = tl.sum(tl.abs(s))
        weight = tl.load(c + 11) * EVERY
        tl.store(slots + at * 4, tl.where(ok, num, 0.0) * weight)
        tl.store(slots + at * 4 + 1, tl.where(ok, l1, 0.0) * weight)
        if ok:
            _store(s_, es_, s_here, s_block, s, s_noise, True, BITS)
    tl.store(slots + at * 4 + 2, squares)
    tl.store(slots + at * 4 + 3, tl.where(finite, 0.0, 1.0))

    m = m * tl.load(c + 0) + g * tl.load(c + 1)
    v = v * keep_v + g * gain_v * g
    w -= tl.load(c + 12) * m / (tl.sqrt(v) + eps) + w * tl.load(c + 7)
    if P.dtype.element_ty == tl.bfloat16:  # stochastic rounding: bf16 is the upper half of fp32
        bits = (by_block + (_mix((key ^ COLUMNS) + (BLOCK + column).to(tl.uint32)) >> 16)) & 0xFFFF
        w = ((w.to(tl.int32, bitcast=True) + bits.to(tl.int32)) & -65536).to(tl.float32, bitcast=True)
    if ok:
        _store(m_, em_, here, block, m, noise, True, BITS)
        _store(v_, ev_, here, block, v, noise, False, BITS)
        if full:
            tl.store(P + place, w.to(P.dtype.element_ty))
        else:
            tl.store(P + place, w.to(P.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["seed"])
def step_all(
    table, addresses, owner, coef, seed, m_, v_, s_, em_, ev_, es_, slots, DTYPE: tl.constexpr,
    EVERY: tl.constexpr, BITS: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Advance every tensor that has a gradient.

    Addresses: of weights and gradient. Table: elements, first tile, group.
    """
    at = tl.program_id(0)
    i = tl.load(owner + at)
    gradient = tl.load(addresses + i * 2 + 1)
    if gradient != 0:
        weights = tl.load(addresses + i * 2)
        P = tl.multiple_of(weights.to(tl.pointer_type(DTYPE)), 16)  # type: ignore[arg-type]
        G = tl.multiple_of(gradient.to(tl.pointer_type(DTYPE)), 16)  # type: ignore[arg-type]
        entry = table + i * 4
        tile = at - tl.load(entry + 1).to(tl.int32)
        _advance(
            P, G, tl.load(entry), tile, at, coef + tl.load(entry + 2) * 16, seed,
            m_, v_, s_, em_, ev_, es_, slots, EVERY, BITS, TILE, BLOCK,
        )  # fmt: skip


@triton.jit(do_not_specialize=["numel", "first", "group", "seed"])
def step_one(
    P, G, numel, first, group, coef, seed, m_, v_, s_, em_, ev_, es_, slots,
    EVERY: tl.constexpr, BITS: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Advance one tensor, as soon as its gradient is complete."""
    tile = tl.program_id(0)
    _advance(
        P,
        G,
        numel,
        tile,
        first + tile,
        coef + group * 16,
        seed,
        m_,
        v_,
        s_,
        em_,
        ev_,
        es_,
        slots,
        EVERY,
        BITS,
        TILE,
        BLOCK,
    )


@triton.jit
def begin(hyper, d, k, l1, blocked, scale, dlr, coef):
    """Write the coefficients of one group, and the rate of the step, d * lr * bias correction, to dlr."""
    group, lane = tl.program_id(0), tl.arange(0, 16)
    rate = tl.load(d) * tl.load(hyper)
    steps = (tl.load(k) + 1).to(tl.float64)
    root = tl.sqrt(
        1 - tl.exp(steps * tl.load(hyper + 3))
    )  # the logarithm of a beta is -inf where there is no correction
    corrected = tl.minimum(rate * root / (1 - tl.exp(steps * tl.load(hyper + 2))), tl.load(hyper + 1))
    row = hyper + 8 + group * 64 + lane
    value = tl.load(row) + tl.load(row + 16) * corrected + tl.load(row + 32) * rate + tl.load(row + 48) * root
    value = tl.where(lane == 7, tl.where(tl.load(l1) > 0, value, 0.0), value)
    value = tl.where(lane == 8, 1 / tl.load(scale).to(tl.float64), value)
    value = tl.where(lane == 10, tl.where(tl.load(blocked) == 0, value, 0.0), value)
    tl.store(coef + group * 16 + lane, value.to(tl.float32))
    if group == 0:
        tl.store(dlr, corrected)


@triton.jit
def finish(hyper, sums, dlr, blocked, d, weighted, d_hat, l1, k, not_finite, ADAPTS: tl.constexpr):
    """Move W, d_hat, d, |s|_1 and k, after the sums of all tiles."""
    gate = tl.load(blocked) == 0
    if ADAPTS:
        root, length = tl.load(hyper + 4), tl.load(sums + 1)
        w = root * tl.load(weighted) + (1 - root) * tl.load(sums) * tl.load(dlr)
        found = w / ((1 - root) * length)
        old = tl.load(d)
        new = tl.maximum(old, tl.minimum(found, tl.minimum(old * tl.load(hyper + 5), tl.load(hyper + 6))))
        # An overflow of the sums must not reach d, from which nothing comes back.
        if gate & (length > 0) & (tl.abs(found) < float("inf")):
            tl.store(weighted, w)
            tl.store(d_hat, found)
            tl.store(d, new)
            tl.store(l1, length)
            tl.store(k, tl.load(k) + 1)
    elif gate:
        tl.store(k, tl.load(k) + 1)
    if gate:
        tl.store(not_finite, tl.load(not_finite) + tl.load(sums + 3).to(tl.int64))
