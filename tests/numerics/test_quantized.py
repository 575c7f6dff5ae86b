"""One byte for each element of optimizer state."""

import pytest
import torch

from trainer.optim.quantized import BLOCK, decode, encode

NEAREST = torch.tensor(0.5)


def stored(values, noise, signed):
    codes, scales = encode(values, noise, signed)
    return codes.to(torch.int8 if signed else torch.uint8), scales


@pytest.mark.parametrize("signed", [True, False])
def test_every_code_comes_back(signed):
    codes = torch.arange(-127, 128, dtype=torch.int8) if signed else torch.arange(256).to(torch.uint8)
    codes = torch.cat([codes, codes[-1:]])[:BLOCK].view(1, BLOCK)
    for scale in (1e-20, 0.37, 3.7e8):
        values = decode(codes, torch.tensor([[scale]]))
        again, scales = stored(values, NEAREST, signed)
        assert torch.equal(again, codes)
        torch.testing.assert_close(scales, torch.tensor([[scale]]))


@pytest.mark.parametrize(("signed", "bound"), [(True, 0.065), (False, 0.033)])
def test_error_of_the_upper_four_octaves(signed, bound):
    values = torch.linspace(1 / 16, 1.0, 4 * BLOCK).view(4, BLOCK)
    values[:, 0] = 1.0
    for noise in (0.0, 0.5, 0.999):
        codes, scales = stored(values, torch.tensor(noise), signed)
        assert ((decode(codes, scales) - values).abs() / values).max() < bound


@pytest.mark.parametrize("signed", [True, False])
def test_rounding_is_unbiased(signed):
    torch.manual_seed(0)
    values = torch.rand(1, BLOCK) * torch.logspace(-4, 0, BLOCK)
    values = values * torch.where(torch.rand(1, BLOCK) < 0.5, -1.0, 1.0) if signed else values
    repeated = values.expand(4000, BLOCK)
    codes, scales = stored(repeated, torch.rand(4000, BLOCK), signed)
    mean = decode(codes, scales).mean(0) / values[0]
    assert (mean - 1).abs().mean() < 0.005, "a single step is up to a hundred times that"


def test_largest_zero_and_tiny_values():
    values = torch.zeros(2, BLOCK)
    values[0, :3] = torch.tensor([2.5, 0.0, 1e-37])
    for noise in (0.0, 0.5, 0.999):
        codes, scales = stored(values, torch.tensor(noise), signed=False)
        back = decode(codes, scales)
        torch.testing.assert_close(back[0, 0], torch.tensor(2.5))
        assert back[0, 1] == 0 and not back[1].any()
        assert 0 < back[0, 2] < 1e-8, "a second moment never becomes 0: the first would be divided by eps"


def test_signs():
    values = torch.tensor([[1.0, -1.0, 0.3, -0.3] * (BLOCK // 4)])
    codes, scales = stored(values, NEAREST, signed=True)
    back = decode(codes, scales)
    assert torch.equal(back[0, 0::2], -back[0, 1::2]) and torch.equal(back.sign(), values.sign())
