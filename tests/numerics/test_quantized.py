"""One byte for each element of optimizer state."""

import pytest
import torch

from trainer.optim.dadapt.quantized import BLOCK, decode, encode

NEAREST = torch.tensor(0.5)


def stored(values, noise, signed):
    codes, exponents = encode(values, noise, signed)
    kind = torch.int8 if signed else torch.uint8
    assert torch.equal(codes.to(kind).to(torch.int32), codes.to(torch.int32)), "no code is out of range"
    assert exponents.min() >= 0 and exponents.max() <= 255
    return codes.to(kind), exponents.to(torch.uint8)


@pytest.mark.parametrize("signed", [True, False])
def test_every_code_comes_back(signed):
    codes = torch.arange(-126, 127).to(torch.int8) if signed else torch.arange(1, 255).to(torch.uint8)
    codes = torch.cat([codes, codes[-BLOCK + len(codes) :]]).view(1, BLOCK)
    for exponent in (40, 100, 127, 200):
        exponents = torch.full((1, 1), exponent, dtype=torch.uint8)
        values = decode(codes, exponents)
        assert values.unique().numel() == codes.unique().numel()
        again, back = stored(values, NEAREST, signed)
        assert torch.equal(again, codes) and torch.equal(back, exponents)


@pytest.mark.parametrize(("signed", "bound"), [(True, 0.065), (False, 0.033)])
def test_error_of_the_upper_four_octaves(signed, bound):
    values = torch.linspace(1 / 16, 0.96, 4 * BLOCK).view(4, BLOCK)
    values[:, 0] = 0.96
    for noise in (0.0, 0.5, 1 - 2**-17):
        codes, exponents = stored(values, torch.tensor(noise), signed)
        assert ((decode(codes, exponents) - values).abs() / values).max() < bound


@pytest.mark.parametrize("signed", [True, False])
def test_rounding_is_unbiased(signed):
    torch.manual_seed(0)
    values = torch.rand(1, BLOCK) * torch.logspace(-4, 0, BLOCK)
    values = values * torch.where(torch.rand(1, BLOCK) < 0.5, -1.0, 1.0) if signed else values
    repeated = values.expand(4000, BLOCK)
    codes, exponents = stored(repeated, torch.rand(4000, BLOCK), signed)
    mean = decode(codes, exponents).mean(0) / values[0]
    assert (mean - 1).abs().mean() < 0.005, "a single step is up to a hundred times that"


@pytest.mark.parametrize("largest", [0.4843, 0.4844, 0.96, 0.969, 0.99, 1.0, 1.7e-9, 3e5])
@pytest.mark.parametrize("signed", [True, False])
def test_the_largest_value_is_never_cut_off(signed, largest):
    values = torch.full((1, BLOCK), largest)
    seen = torch.stack(
        [
            decode(*stored(values, torch.full((1, BLOCK), noise), signed))
            for noise in torch.linspace(0.01, 0.99, 50)
        ]
    )
    assert seen.mean().item() == pytest.approx(largest, rel=0.002)


def test_zero_and_tiny_values():
    values = torch.zeros(2, BLOCK)
    values[0, :3] = torch.tensor([2.5, 0.0, 1e-37])
    for noise in (0.0, 0.5, 1 - 2**-17):
        back = decode(*stored(values, torch.tensor(noise), signed=True))
        assert not back[0, 1:].any() and not back[1].any(), "a first moment or s of 0 stays 0"
        back = decode(*stored(values, torch.tensor(noise), signed=False))
        assert (back > 0).all() and (back[0, 1:] < 1e-8).all() and (back[1] < 1e-30).all(), (
            "a second moment never becomes 0"
        )


def test_signs():
    values = torch.tensor([[1.0, -1.0, 0.3, -0.3] * (BLOCK // 4)])
    back = decode(*stored(values, NEAREST, signed=True))
    assert torch.equal(back[0, 0::2], -back[0, 1::2]) and torch.equal(back.sign(), values.sign())
