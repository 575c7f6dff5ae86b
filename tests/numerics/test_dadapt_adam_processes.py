"""Two ranks with averaged gradients: d is bit-equal on both, and that of one rank with the whole batch."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

_PROGRAM = """
import sys
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from trainer.optim.dadapt.optimizer import DAdaptAdam

rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)
if world > 1:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
for bits, dtype in ((32, torch.float64), (8, torch.float32)):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(40, 60), nn.Tanh(), nn.Linear(60, 5)).to(dtype)
    model = DistributedDataParallel(net) if world > 1 else net
    settings = dict(decouple=True, weight_decay=0.01, use_bias_correction=True, state_bits=bits)
    optimizer = DAdaptAdam(net.parameters(), **settings)
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
    weights = [p.detach() for p in net.parameters()]
    torch.save((torch.stack(ds), weights), f"{folder}/{world}-{rank}-{bits}.pt")
if world > 1:
    dist.destroy_process_group()
"""


def run(folder: Path, world: int):
    """Train with 32 and with 8 bits of state in each of some processes."""
    root = Path(__file__).resolve().parents[2]
    commands = [[sys.executable, "-c", _PROGRAM, str(rank), str(world), str(folder)] for rank in range(world)]
    processes = [
        subprocess.Popen(command, cwd=root, stderr=subprocess.PIPE, text=True) for command in commands
    ]
    for process in processes:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    run(folder, 2)
    run(folder, 1)
    return folder


@pytest.mark.parametrize("bits", [32, 8])
def test_two_processes(results, bits):
    first, second, single = (
        torch.load(results / f"{name}-{bits}.pt", weights_only=True) for name in ("2-0", "2-1", "1-0")
    )
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))
    assert first[0][-1] > 1e-4, "d has moved"
    # At 8 bits the last bits of a gradient, added up in another order, now and then decide how something is
    # rounded.
    tolerance = 1e-10 if bits == 32 else 2e-2
    torch.testing.assert_close(first[0], single[0], rtol=tolerance, atol=0)
    for a, b in zip(first[1], single[1], strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
