"""The optimizer benchmark: the tensors of each network, and the table and JSON of a run."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from scripts.bench.optimizers import BASE, CONTENDERS, CONTIGUOUS_ONLY, shapes


@pytest.mark.parametrize(
    ("network", "tensors", "parameters"),
    [
        ("unet", 686, 859_520_964),
        ("text_encoder", 196, 123_060_480),
        ("mini", 286, 4_192_900),
        ("lora", 112, 172_032),
    ],
)
def test_the_tensors_are_those_of_the_network(network, tensors, parameters):
    found = shapes(network)
    assert (len(found), sum(shape.numel() for shape in found)) == (tensors, parameters)


@pytest.mark.parametrize("name", [name for name in CONTENDERS if "fused" not in name])
def test_every_contender_steps(name):
    if "adv" in name:
        pytest.importorskip("adv_optm")
    generator = torch.Generator().manual_seed(0)
    sizes = ((8, 4, 3, 3), (16, 8), (8,))
    params = [torch.nn.Parameter(torch.randn(size, generator=generator)) for size in sizes]
    before = [parameter.detach().clone() for parameter in params]
    optimizer = CONTENDERS[name](params)
    for _ in range(3):
        for parameter in params:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 4 and name not in CONTIGUOUS_ONLY:
                parameter.grad = parameter.grad.to(memory_format=torch.channels_last)
        optimizer.step()
    assert all(not torch.equal(now, then) for now, then in zip(params, before, strict=True))


def test_it_prints_a_table(tmp_path):
    root, file = Path(__file__).resolve().parents[2], tmp_path / "found.json"
    options = ["--network", "mini", "--every", "20", "--rounds", "1", "--threads", "1", "--json", str(file)]
    command = [sys.executable, "scripts/bench_optimizer.py", *options, "--only", "dadapt_adam, eager"]
    output = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=240, check=True).stdout
    assert re.search(r"streaming [\d.]+ GB/s", output) and "torch" in output.splitlines()[2]
    assert re.search(r"^adamw +[\d.]+ +1\.00 +[\d.]+ +1\.00 +8\.00 ", output, re.MULTILINE)
    assert re.search(
        r"^dadapt_adam, eager +[\d.]+ +[\d.]+ +[\d.]+ +[\d.]+ +1[23]\.\d\d +\d+ +0$", output, re.MULTILINE
    )
    rounds = json.loads(file.read_text())["1 threads"]
    assert set(rounds) == {BASE, "dadapt_adam, eager", "streaming memory"}
    assert all(figures["wall"] > 0 for [figures] in rounds.values())
