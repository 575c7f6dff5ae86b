"""Updating the parameters inside backward gives the plain step's results, bit for bit."""

import gc
import math

import pytest
import torch
from torch import nn

from trainer.optim.dadapt.optimizer import DAdaptAdam


class Net(nn.Module):
    """A net with shared, unused, dead (its gradient is always zero) and ragged parameters."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(60, 70)
        self.shared = nn.Linear(70, 70)
        self.norm = nn.LayerNorm(70)
        self.unused = nn.Parameter(torch.ones(33))
        self.dead = nn.Parameter(torch.ones(3000))
        self.last = nn.Linear(70, 3)
        self.late = nn.Parameter(torch.zeros(70))

    def forward(self, x, late):
        x = self.first(x).tanh()
        x = self.shared(self.shared(x).tanh())
        if late:
            x = x + self.late
        return self.last(self.norm(x)) + 0.0 * self.dead.sum()


def build(fused, dtype=torch.float32, **options):
    torch.manual_seed(0)
    net = Net().to(dtype)
    last = [*net.last.parameters(), net.dead]
    others = [p for p in net.parameters() if not any(p is q for q in last)]
    groups = [{"params": others}, {"params": last, "layer_scale": 0.5, "weight_decay": 0.3}]
    return net, DAdaptAdam(
        groups, fused_backward=fused, **{"decouple": True, "weight_decay": 0.1, "d0": 1e-5, **options}
    )


def loss_of(net, step, scale=1.0):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(16, 60, generator=generator).to(net.first.weight.dtype)
    out = net(x, late=step >= 5)
    if step in (0, 1):
        out = out * 0.0
    return ((out - x[:, :3]) ** 2).mean() * scale if step not in (0, 1) else out.sum()


def everything(net, optimizer):
    values = [p.detach() for p in net.parameters()]
    values += [value for p in net.parameters() for value in optimizer.state[p].values()]
    values += [optimizer.d, optimizer.d_hat, optimizer.l1]
    return [value.clone() for value in values]


def assert_same(found, expected):
    for number, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(a, b), number


@pytest.mark.parametrize(
    ("dtype", "bits", "decouple"),
    [
        (torch.float32, 32, True),
        (torch.float32, 32, False),
        (torch.float32, 8, True),
        (torch.bfloat16, 32, True),
        (torch.bfloat16, 8, True),
    ],
)
def test_bit_equal_to_the_plain_step_over_a_hundred_steps(dtype, bits, decouple):
    (plain, a), (fused, b) = (
        build(way, dtype, decouple=decouple, state_bits=bits, use_bias_correction=True)
        for way in (False, True)
    )
    for step in range(100):
        for net, optimizer in ((plain, a), (fused, b)):
            lr = 0.0 if step == 3 else min(1.0, step / 20)
            for group in optimizer.param_groups:
                group["lr"] = lr
            loss_of(net, step).backward()
            optimizer.step()
            optimizer.zero_grad()
        if step < 10 or step % 10 == 9:
            assert_same(everything(fused, b), everything(plain, a))
    assert b.param_groups[0]["d"] > 1e-4


def test_backward_itself_updates_and_leaves_no_gradient():
    layer = nn.Linear(160, 128)  # its bias is one of the small parameters, which wait for step()
    optimizer = DAdaptAdam(layer.parameters(), d0=1e-3, compile=False, fused_backward=True)
    for step in (2, 3):
        before = [p.detach().clone() for p in layer.parameters()]
        d = optimizer.d.clone()
        layer(torch.ones(3, 160)).square().sum().backward()
        assert all(p.grad is None for p in layer.parameters())
        changed = [not torch.equal(p, old) for p, old in zip(layer.parameters(), before, strict=True)]
        assert changed == [True, False]
        assert torch.equal(optimizer.d, d), "d moves in step()"
        optimizer.step()
        assert not torch.equal(layer.bias, before[1])
        assert optimizer.param_groups[0]["k"] == step - 1


@pytest.mark.parametrize("bits", [32, 8])
def test_a_loss_that_is_not_finite_gates_everything(bits):
    net, optimizer = build(True, state_bits=bits)
    for step in range(2, 6):
        loss_of(net, step).backward()
        optimizer.step()
    before = everything(net, optimizer)
    loss = loss_of(net, 6, scale=math.nan)
    optimizer.gate(loss.isfinite())
    loss.backward()
    optimizer.step()
    assert_same(everything(net, optimizer), before)
    assert optimizer.not_finite == 0, "gated, not counted"

    loss = loss_of(net, 7)
    loss.backward()
    optimizer.step()
    assert not torch.equal(everything(net, optimizer)[3], before[3]), "the gate holds for one step"


@pytest.mark.parametrize(("bad", "bits"), [(math.nan, 32), (math.inf, 32), (math.nan, 8)])
def test_a_gradient_that_is_not_finite_gates_its_own_parameter_and_is_counted(bad, bits):
    def spoil(gradient):
        gradient = gradient.clone()
        gradient[3, 5] = bad
        return gradient

    (missing, a), (fused, b) = build(False, state_bits=bits), build(True, state_bits=bits)
    for step in range(2, 8):
        loss_of(missing, step).backward()
        handle = fused.shared.weight.register_hook(spoil) if step == 6 else None
        loss_of(fused, step).backward()
        if handle is not None:
            handle.remove()
            missing.shared.weight.grad = None
        a.step()
        b.step()
        a.zero_grad()
    assert b.not_finite == 1
    assert_same(everything(fused, b), everything(missing, a))


def test_found_inf_at_the_end_keeps_d():
    net, optimizer = build(True)
    for step in range(2, 6):
        loss_of(net, step).backward()
        optimizer.step()
    before = {
        key: value.clone()
        for key, value in optimizer.state_dict()["state"]["adaptation"].items()
        if isinstance(value, torch.Tensor)
    }
    loss_of(net, 6).backward()
    optimizer.found_inf, optimizer.grad_scale = torch.tensor(1.0), None
    optimizer.step()
    assert all(
        torch.equal(optimizer.state_dict()["state"]["adaptation"][key], value)
        for key, value in before.items()
    )


def test_what_does_not_fit_is_refused():
    net, optimizer = build(True)
    loss_of(net, 2).backward()
    with pytest.raises(RuntimeError, match="second gradient"):
        loss_of(net, 3).backward()

    net, optimizer = build(True)
    loss_of(net, 2).backward()
    optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 0.5
    with pytest.raises(RuntimeError, match="lr was changed"):
        optimizer.step()

    net, optimizer = build(True)
    loss_of(net, 2).backward()
    optimizer.found_inf, optimizer.grad_scale = torch.tensor(0.0), torch.tensor(1024.0)
    with pytest.raises(RuntimeError, match="loss scale"):
        optimizer.step()


def test_an_optimizer_that_is_gone_updates_nothing():
    net, optimizer = build(True)
    del optimizer
    gc.collect()
    before = net.first.weight.detach().clone()
    loss_of(net, 2).backward()
    assert torch.equal(net.first.weight, before) and net.first.weight.grad is not None


@pytest.mark.parametrize("bits", [32, 8])
def test_a_fused_backward_reads_nothing_back(bits):
    net, _ = build(False)
    net = net.to("meta")
    optimizer = DAdaptAdam(
        net.parameters(), fused_backward=True, state_bits=bits, decouple=True, weight_decay=0.1
    )
    for _ in range(3):
        loss = net(torch.empty(16, 60, device="meta"), True).sum()
        optimizer.gate(loss.isfinite())
        loss.backward()
        optimizer.step()
