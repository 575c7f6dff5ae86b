"""Two ranks with averaged gradients: d is bit-equal on both, and that of one rank with the whole batch."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from scripts.processes import quick_context
from trainer.optim.dadapt.optimizer import DAdaptAdam


def run_rank(rank: int, world: int, bits: int, folder: Path) -> None:
    """Train as one of some ranks, and save d of every step and the weights."""
    torch.set_num_threads(1)
    dtype = torch.float64 if bits == 32 else torch.float32
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(40, 60), nn.Tanh(), nn.Linear(60, 5)).to(dtype)
    model = net
    if world > 1:
        rendezvous = f"file://{folder}/rendezvous"
        dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world)
        model = DistributedDataParallel(net)
    optimizer = DAdaptAdam(
        net.parameters(), decouple=True, weight_decay=0.01, use_bias_correction=True, state_bits=bits
    )
    ds = []
    for step in range(40):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(16, 40, generator=generator, dtype=torch.float64).to(dtype)
        own = x[rank::world]
        loss = (model(own) - own[:, :5].sin()).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ds.append(optimizer.d.clone())
    torch.save((torch.stack(ds), [p.detach() for p in net.parameters()]), folder / f"{world}-{rank}.pt")
    if world > 1:
        dist.destroy_process_group()


def run(folder: Path, world: int, bits: int):
    processes = [
        quick_context().Process(target=run_rank, args=(rank, world, bits, folder)) for rank in range(world)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
        assert process.exitcode == 0
    return [torch.load(folder / f"{world}-{rank}.pt", weights_only=True) for rank in range(world)]


@pytest.mark.parametrize("bits", [32, 8])
def test_two_processes(tmp_path, bits):
    (first, second), (single,) = run(tmp_path, 2, bits), run(tmp_path, 1, bits)
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))
    assert first[0][-1] > 1e-4, "d has moved"
    # At 8 bits the last bits of a gradient, added up in another order, now and then decide how something is
    # rounded.
    tolerance = 1e-10 if bits == 32 else 2e-2
    torch.testing.assert_close(first[0], single[0], rtol=tolerance, atol=0)
    for a, b in zip(first[1], single[1], strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
