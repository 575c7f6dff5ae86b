"""The GPU's kernel: in Triton's interpreter against torch's step, and compiled ahead of time."""

import math
import os
import re
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.optim.dadapt import device, learned, tiled
from trainer.optim.dadapt.adam import Coefficients
from trainer.optim.dadapt.device import TritonEngine, works
from trainer.optim.dadapt.eager import Arrival, TorchEngine
from trainer.optim.dadapt.optimizer import DAdaptAdam
from trainer.optim.dadapt.state import Layout

VARIANTS = [(8, 16), (8, 1), (32, 1), (8, 0)]
ARCHITECTURES = (75, 80, 86, 89, 90, 120)


@pytest.fixture
def interpreted(monkeypatch):
    """Let Triton's interpreter run the kernels, on the CPU."""
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton runs on the GPU here")
    monkeypatch.setattr(tiled, "KERNEL_DEVICES", ("cpu",))
    for module in (tiled, learned):
        monkeypatch.setattr(module, "on_device", lambda device: True)


def table(**values):
    usual = {
        "keep_m": 0.9,
        "gain_m": 1e-4,
        "keep_v": 0.999,
        "gain_v": 1e-3,
        "keep_s": 0.9995,
        "gain_s": 5e-7,
        "eps": 1e-8,
        "decay": 1e-4,
    }
    usual |= {"unscale": 1.0, "gate": 1.0, "weight": 1.0, "out": 1.0, **values}
    row = [usual.get(name, 0.0) for name in Coefficients._fields]
    return torch.tensor(row + [0.0] * (16 - len(row)))


def tensors(dtype):
    """A vector below a tile, one ending in a tile, a channels-last convolution, a sampled matrix."""
    draws = torch.Generator().manual_seed(0)
    made = [
        torch.randn(shape, generator=draws).to(dtype) * 0.1
        for shape in ((320,), (4099,), (33, 20, 3, 3), (130, 127))
    ]
    made[2] = made[2].contiguous(memory_format=torch.channels_last)
    return [nn.Parameter(each) for each in made]


@pytest.mark.parametrize(("bits", "every"), VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_gives_what_torch_gives(interpreted, dtype, bits, every):
    rows = torch.stack([table(unscale=0.5), table(weight=0.5, coupled=0.02, decay=0.0)])
    found = []
    for kernel in (True, False):
        params = tensors(dtype)
        layout = Layout([{"params": params[:2]}, {"params": params[2:]}], bits, every)
        engines = {
            bank: TritonEngine(bank, rows) if kernel else TorchEngine(bank, None, [1.0, 0.5])
            for bank in layout.banks
        }
        sums = []
        for step in range(2):
            draws = torch.Generator().manual_seed(step)
            for engine in engines.values():
                engine.begin(step, True, True)
            for bank, engine in engines.items():
                arrivals = []
                for segment in bank.segments:
                    p = params[segment.index]
                    g = (
                        torch.randn(p.shape, generator=draws) * 10 ** torch.randn(p.shape, generator=draws)
                    ).to(dtype)
                    live = None
                    if segment.index == 0 and step == 1:
                        g[7], live = math.nan, torch.tensor(False)
                    if segment.index == 1 and step == 1:
                        continue  # no gradient
                    # Gradients of the convolution lie in another order than its weights.
                    arrivals.append(
                        Arrival(segment, p, g, live, rows[segment.group, : len(Coefficients._fields)])
                    )
                engine.advance(arrivals)
            sums.append(sum(engine.totals()[:2] for engine in engines.values()))
        if kernel:
            assert sum(engine.totals()[3] for engine in engines.values()) == 1, "one tile was not finite"
        found.append(
            (
                params,
                [value for bank in layout.banks for pair in bank.held.values() for value in pair],
                torch.stack(sums),
            )
        )
    (ours, state, sums), (theirs, expected, theirs_sums) = found
    for number, (a, b) in enumerate((a, b) for a, b in zip(state, expected, strict=True) if b.numel()):
        if bits == 8:
            assert torch.equal(a, b), f"{number}: codes and exponents"
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7 * b.abs().max().item())
    for a, b in zip(ours, theirs, strict=True):
        # torch takes a root on the CPU by way of its reciprocal, so the last bit may differ.
        torch.testing.assert_close(
            a, b, rtol=1e-2 if dtype == torch.bfloat16 else 3e-7, atol=0 if dtype == torch.bfloat16 else 1e-9
        )
        assert (a != b).float().mean() < (1e-3 if dtype == torch.bfloat16 else 0.2)
        assert not torch.equal(a, tensors(dtype)[0]) or a.shape != (320,)
    if every:
        torch.testing.assert_close(sums, theirs_sums, rtol=1e-5, atol=0)
        assert (sums[:, 1] > 0).all()


def trained(dtype, fused, steps=2, place="cpu"):
    torch.manual_seed(1)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Flatten(), nn.Linear(128, 130))
    net = net.to(place, dtype).to(memory_format=torch.channels_last)
    optimizer = DAdaptAdam(
        [{"params": list(net.parameters()), "layer_scale": 0.7}], d0=1e-3, decouple=True, weight_decay=0.05,
        state_bits=8,
        use_bias_correction=True, rate_max=0.1, fused_backward=fused,
    )  # fmt: skip
    draws = torch.Generator().manual_seed(3)
    for step in range(steps):
        x, y = (torch.randn(shape, generator=draws).to(place, dtype) for shape in ((4, 3, 6, 6), (4, 130)))
        loss = (net(x) - y).pow(2).mean() * (math.nan if step == 0 else 1.0)
        if fused:
            optimizer.gate(loss.isfinite())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return net, optimizer


def everything(net, optimizer):
    values = [*net.parameters(), *(value for p in net.parameters() for value in optimizer.state[p].values())]
    return [value.detach().clone() for value in [*values, optimizer.d, optimizer.d_hat, optimizer.l1]]


def test_a_fused_backward_equals_the_plain_step_and_that_of_torch(interpreted, monkeypatch):
    plain, fused = (everything(*trained(torch.float32, way)) for way in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(plain, fused, strict=True))
    net, by_kernel = trained(torch.float32, False)
    assert by_kernel.param_groups[0]["k"] == 1, "the step whose loss was not finite was left out"
    monkeypatch.setattr(tiled, "KERNEL_DEVICES", ())
    other, by_torch = trained(torch.float32, False)
    assert by_kernel.d_hat.item() == pytest.approx(by_torch.d_hat.item(), rel=1e-5) and by_torch.l1 > 0
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_kernel_that_gives_something_else_is_not_used(interpreted, monkeypatch):
    from trainer.optim.dadapt import triton_kernel

    monkeypatch.setattr(device, "_tried", {})
    assert works(torch.device("cpu"), torch.float32, 32, 1)
    monkeypatch.setattr(device, "_tried", {})
    monkeypatch.setattr(triton_kernel, "step_one", triton_kernel.begin)
    with pytest.warns(
        UserWarning,
        match=r"^the optimizer's Triton kernel does not work here \(.*\): it runs without it, slower$",
    ):
        assert not works(torch.device("cpu"), torch.float32, 32, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not works(torch.device("cpu"), torch.float32, 32, 1), "and this is said once"


class Operations(TorchDispatchMode):
    """Counts the operations that would launch something."""

    count = 0
    VIEWS = (
        "view",
        "detach",
        "as_strided",
        "permute",
        "slice",
        "select",
        "expand",
        "unsqueeze",
        "alias",
        "_unsafe_view",
        "split",
        "t.",
    )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__
        if not name.startswith(
            (*self.VIEWS, "empty", "new_empty", "_to_copy.default_cpu")
        ) and not _on_host_alone(args, kwargs):
            self.count += 1
        return func(*args, **(kwargs or {}))


def _on_host_alone(args, kwargs):
    found = [each for each in (*args, *(kwargs or {}).values()) if isinstance(each, torch.Tensor)]
    wanted = (kwargs or {}).get("device")
    return all(each.device.type == "cpu" for each in found) and (
        wanted is None or torch.device(wanted).type == "cpu"
    )


@pytest.fixture(scope="module")
def unet():
    from trainer.models.family import SD1
    from trainer.models.networks import empty_unet

    with torch.device("meta"):
        return empty_unet(SD1.default.unet).to(memory_format=torch.channels_last)


@pytest.mark.parametrize(("bits", "fused", "most"), [(8, False, 20), (32, False, 20), (8, True, 1500)])
def test_launches_of_a_step_of_stable_diffusion(unet, bits, fused, most):
    params = [nn.Parameter(p.detach()) for p in unet.parameters()]
    optimizer = DAdaptAdam(params, state_bits=bits, decouple=True, weight_decay=0.1, fused_backward=fused)
    for _ in range(2):
        gradients = [torch.empty_like(p) for p in params]
        optimizer.state_dict()
        if fused:
            optimizer.gate(torch.ones((), device="meta"))
        else:
            optimizer.found_inf = torch.zeros((), device="meta")
        before, operations = optimizer.launches, Operations()
        with operations:
            for p, g in zip(params, gradients, strict=True):
                p.grad = g
                if fused:
                    optimizer.arrive(p)
            optimizer.step()
        launches = optimizer.launches - before
        print(
            f"{len(params)} tensors, {bits} bits, fused {fused}: {launches} own launches, "
            f"{operations.count} of torch"
        )
        assert launches >= 3 and launches + operations.count <= most
        optimizer.zero_grad()


_AHEAD = """
import sys
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import triton.language as tl
from trainer.optim.dadapt import triton_kernel

for line in sys.stdin:
    name, architecture, dtype, bits, every, path = line.split()
    kernel = getattr(triton_kernel, name)
    state = ("*i8", "*u8", "*i8") if bits == "8" else ("*fp32",) * 3
    kinds = {
        **dict(zip(("m_", "v_", "s_"), state)), **{key: "*u8" for key in ("em_", "ev_", "es_")},
        "slots": "*fp32", "coef": "*fp32", "seed": "i32", "table": "*i64", "addresses": "*i64",
        "owner": "*i32",
        "P": "*" + dtype, "G": "*" + dtype, "numel": "i32", "first": "i32", "group": "i32",
        "hyper": "*fp64", "d": "*fp64", "k": "*i64", "l1": "*fp64", "blocked": "*fp32", "scale": "*fp32",
        "dlr": "*fp64",
        "sums": "*fp64", "weighted": "*fp64", "d_hat": "*fp64", "not_finite": "*i64",
    }
    constants = {
        "EVERY": int(every), "BITS": int(bits), "TILE": 2048, "BLOCK": 256, "ADAPTS": True,
        "DTYPE": tl.float32 if dtype == "fp32" else tl.bfloat16,
    }
    names = kernel.arg_names
    signature = {each: kinds.get(each, "constexpr") for each in names}
    aligned = [["tt.divisibility", 16]]
    source = ASTSource(
        fn=kernel, signature=signature,
        constexprs={(number,): constants[each] for number, each in enumerate(names) if each not in kinds},
        attrs={(number,): aligned for number, each in enumerate(names) if signature[each].startswith("*")},
    )
    made = compile(source, target=GPUTarget("cuda", int(architecture), 32), options={"num_warps": 8})
    open(path, "wb").write(made.asm["cubin"])
"""


def compiled_ahead(cases):
    """Compile (kernel, architecture, dtype, bits, every) without a GPU; yield each with its resources."""
    triton = pytest.importorskip("triton")
    reader = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / str(number) for number in range(len(cases))]
        lines = "".join(
            f"{' '.join(map(str, case))} {path}\n" for case, path in zip(cases, paths, strict=True)
        )
        environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        command = [sys.executable, "-c", _AHEAD]
        root = Path(__file__).parents[2]
        answer = subprocess.run(
            command, input=lines, cwd=root, env=environment, capture_output=True, text=True
        )
        assert answer.returncode == 0, answer.stderr[-3000:]
        for case, path in zip(cases, paths, strict=True):
            text = subprocess.run(
                [reader, "-res-usage", path], capture_output=True, text=True, check=True
            ).stdout
            found = re.search(r"REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", text)
            assert found, text
            yield case, *map(int, found.groups())


def assert_no_spills(cases):
    for case, registers, stack, local in compiled_ahead(cases):
        print(*case, f"{registers} registers, stack {stack}, local {local}")
        assert stack == 0 and local == 0, case


def test_compiled_ahead_of_time():
    assert_no_spills([("step_one", architecture, "fp32", 8, 16) for architecture in ARCHITECTURES])


@pytest.mark.slow
def test_every_variant_compiled_ahead_of_time():
    cases = [
        (name, architecture, dtype, bits, every)
        for architecture in ARCHITECTURES
        for name in ("step_all", "step_one")
        for dtype in ("fp32", "bf16")
        for bits, every in VARIANTS
    ]
    assert_no_spills(
        [*cases, *((name, each, "fp32", 8, 16) for each in ARCHITECTURES for name in ("begin", "finish"))]
    )


@pytest.mark.gpu
@pytest.mark.parametrize(("bits", "every"), VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(monkeypatch, dtype, bits, every):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert works(torch.device("cuda"), dtype, bits, every)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_on_a_gpu(monkeypatch, dtype):
    torch.backends.cudnn.deterministic = True
    plain, fused = (everything(*trained(dtype, way, 30, "cuda")) for way in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(plain, fused, strict=True))
    net, by_kernel = trained(dtype, False, 30, "cuda")
    assert by_kernel._on_kernel and by_kernel.param_groups[0]["k"] == 29
    monkeypatch.setattr(tiled, "KERNEL_DEVICES", ())
    other, by_torch = trained(dtype, False, 30, "cuda")
    assert not by_torch._on_kernel
    assert by_kernel.d.item() == pytest.approx(by_torch.d.item(), rel=0.02)
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.02)
