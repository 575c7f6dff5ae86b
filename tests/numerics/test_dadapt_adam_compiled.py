"""The compiled path: packs of small parameters, large ones in place. It equals eager up to last bits.

Most tests run the kernels uncompiled, which shows everything but the compiler's own work; the slow ones
compile.
"""

import itertools
import math
import os
import subprocess
import sys
import warnings
from functools import partial

import pytest
import torch
import torch._dynamo
from torch import nn

from trainer.optim.dadapt import choice, eager
from trainer.optim.dadapt.choice import EAGER, Choice, Trial, choose
from trainer.optim.dadapt.eager import Arrival, TorchEngine
from trainer.optim.dadapt.kernels import CompiledKernel, advance_bytes, advance_float, estimate_bytes
from trainer.optim.dadapt.optimizer import DAdaptAdam
from trainer.optim.dadapt.state import TILE, Layout

# Large and a multiple of a row; large and ragged; a pack that is full, and small ones, ragged, of one row and
# of one element.
SHAPES = [(30,), (512, 1024), (7, 100_000), (40, 3), (TILE,), (300, 1000), (400, 600), (1,), (90, 70)]


@pytest.fixture
def calls(monkeypatch):
    """Run kernels uncompiled; return the list of how many rows each call had."""
    seen = []

    def uncompiled(bits, every):
        def whole(p, *arguments):
            assert p.is_contiguous() and len(p) >= 2
            seen.append(p.numel() // TILE)
            return (advance_float if bits == 32 else advance_bytes)(p, *arguments)

        return Choice("default", CompiledKernel(whole, estimate_bytes if every > 1 else None))

    keys = itertools.product((8, 32), (0, 1, 16), (torch.float32, torch.bfloat16))
    monkeypatch.setattr(choice, "chosen", {(*key, dtype): uncompiled(*key) for *key, dtype in keys})
    return seen


def parameters(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def optimizer_over(params, **options):
    groups = [{"params": params[:5]}, {"params": params[5:], "layer_scale": 0.5, "weight_decay": 0.3}]
    return DAdaptAdam(groups, **{"decouple": True, "weight_decay": 0.1, "d0": 1e-5, **options})


def set_gradients(params, step):
    generator = torch.Generator().manual_seed(step)
    for index, p in enumerate(params):
        p.grad = ((torch.randn(p.shape, generator=generator) + 1) * 10.0 ** -(index % 4)).to(p.dtype)


def train(params, optimizer, steps, edit=lambda params, step: None):
    for step in range(steps):
        set_gradients(params, step)
        edit(params, step)
        optimizer.step()


def missing_and_zero(params, step):
    params[step % len(params)].grad = None
    params[(step + 3) % len(params)].grad = torch.zeros_like(params[(step + 3) % len(params)])
    if step < 2:
        params[8].grad = torch.zeros_like(params[8])


def everything(params, optimizer):
    values = [p.detach() for p in params] + [value for p in params for value in optimizer.state[p].values()]
    return [value.clone() for value in [*values, optimizer.d, optimizer.d_hat, optimizer.l1]]


def assert_same(found, expected):
    for number, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(a, b), number


def assert_close(params, optimizer, other_params, other):
    assert optimizer.param_groups[0]["d"] == pytest.approx(other.param_groups[0]["d"], rel=1e-5)
    assert optimizer.param_groups[0]["d"] > 1.5e-5
    rounds = optimizer.state_bits == 8 or params[0].dtype == torch.bfloat16
    for a, b in zip(params, other_params, strict=True):
        apart = (a - b).abs() > 1e-6 + 1e-5 * b.abs()
        assert apart.float().mean() <= (1e-3 if rounds else 0), (
            "last bits seldom decide how something is rounded"
        )
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("decouple", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packs_and_large_parameters_give_what_the_eager_path_gives(calls, bits, decouple, dtype):
    results = []
    for compile in (True, False):
        params = parameters(dtype)
        optimizer = optimizer_over(params, compile=compile, state_bits=bits, decouple=decouple)
        train(params, optimizer, 8, missing_and_zero)
        results.append((params, optimizer))
    assert results[0][1].compiled and not results[1][1].compiled and calls
    assert_close(*results[0], *results[1])


@pytest.mark.parametrize(("bits", "every"), [(32, 1), (32, 0), (8, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_advanced_together_or_alone_end_with_the_same_bits(bits, every, dtype):
    """Whole tiles only, ragged, with one missing in between, and gradients in another order of memory."""
    shapes = [(TILE,), (2, TILE), (30,), (7, 300), (64, 32, 3, 3), (3, TILE), (40, 100)]
    draws = torch.Generator().manual_seed(0)
    table = torch.tensor([0.9, 1e-4, 0.999, 1e-3, 0.9995, 5e-7, 1e-8, 1e-5, 1.0, 0.0, 1.0, 1.0, 1.0])
    start, *steps = ([torch.randn(shape, generator=draws).to(dtype) for shape in shapes] for _ in range(4))
    results = []
    for together in (True, False):
        params = [value.clone(memory_format=torch.preserve_format) for value in start]
        params[4] = params[4].to(memory_format=torch.channels_last)
        layout = Layout([{"params": params}], bits, every)
        engines = [TorchEngine(bank, None, [1.0]) for bank in layout.banks]
        sums = []
        for number, gradients in enumerate(steps):
            for engine in engines:
                engine.begin(number, scaled=False, coupled=False)
                arrivals = [
                    Arrival(segment, params[segment.index], gradients[segment.index], None, table)
                    for segment in engine.bank.segments
                    if number != 1 or segment.index != 2
                ]
                for pack in [arrivals] if together else [[arrival] for arrival in reversed(arrivals)]:
                    engine.advance(pack)
                sums.append(engine.totals())
        state = [tensor for bank in layout.banks for pair in bank.held.values() for tensor in pair]
        results.append([*params, *state, *sums])
    assert_same(*results)


def other_layout(bits, channels_last, scale):
    p = nn.Parameter(torch.linspace(-1, 1, 640_000).view(64, 100, 10, 10).clone())
    if channels_last:
        p = nn.Parameter(p.detach().to(memory_format=torch.channels_last))
    optimizer = DAdaptAdam([p], compile=True, state_bits=bits, d0=1e-3)
    for step in range(4):
        p.grad = (
            torch.randn(p.shape, generator=torch.Generator().manual_seed(step)) * scale
        )  # its elements are always in logical order
        optimizer.found_inf, optimizer.grad_scale = (
            torch.tensor(0.0),
            torch.tensor(scale) if scale != 1 else None,
        )
        optimizer.step()
    return p, optimizer


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("bits", [32, 8])
def test_scaled_gradients(calls, bits, channels_last):
    assert_same(
        *(
            everything([p], optimizer)
            for p, optimizer in (other_layout(bits, channels_last, scale) for scale in (1.0, 1024.0))
        )
    )


def test_weights_in_another_order_of_memory(calls):
    (a, plain), (b, strided) = (other_layout(32, channels_last, 1.0) for channels_last in (False, True))
    assert b.is_contiguous(memory_format=torch.channels_last)
    assert plain.d_hat.item() == pytest.approx(strided.d_hat.item(), rel=1e-6), (
        "sums are added up in another order"
    )
    for name in ("exp_avg", "exp_avg_sq", "s"):
        torch.testing.assert_close(plain.state[a][name], strided.state[b][name], rtol=1e-6, atol=0)
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def backward(params, step, spoil=None):
    """Run a backward pass with the gradients of `set_gradients`, except `spoil`, for all but two."""
    holders = [nn.Parameter(torch.empty_like(p)) for p in params]
    set_gradients(holders, step)
    out = [step % len(params), 4]
    total = params[0].new_zeros(())
    for index, (p, holder) in enumerate(zip(params, holders, strict=True)):
        gradient = holder.grad
        if spoil == index:
            gradient.view(-1)[0] = math.nan
        if index not in out:
            total = total + _Gives.apply(p, gradient)
    total.backward()


class _Gives(torch.autograd.Function):
    @staticmethod
    def forward(ctx, p, gradient):
        ctx.gradient = gradient
        return p.new_zeros(())

    @staticmethod
    def backward(ctx, _):
        return ctx.gradient, None


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_backward_is_bit_equal(calls, bits, dtype):
    (a, plain), (b, fused) = (
        (params, optimizer_over(params, compile=True, state_bits=bits, fused_backward=way))
        for way, params in ((False, parameters(dtype)), (True, parameters(dtype)))
    )
    for step in range(12):
        backward(a, step)
        backward(b, step)
        plain.step()
        plain.zero_grad()
        fused.step()
        assert_same(everything(b, fused), everything(a, plain))
    assert fused.param_groups[0]["d"] > 1.5e-5


@pytest.mark.parametrize(("tiles", "of_calls"), [(1025, [2, 1025]), (2049, [2, 1024, 1025])])
def test_large_bf16_weights_are_advanced_in_parts_to_the_bit(calls, monkeypatch, tiles, of_calls):
    """The compiled step keeps a copy of the gradient in fp32, as large as two of the weights."""
    results = []
    for part in (eager.WIDENED_TILES, 10**6):
        monkeypatch.setattr(eager, "WIDENED_TILES", part)
        p = nn.Parameter(torch.linspace(-1, 1, tiles * TILE + 5).bfloat16())
        optimizer = DAdaptAdam([p], compile=True, state_bits=8, d0=1e-4)
        calls.clear()
        for step in range(3):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step)).bfloat16()
            optimizer.step()
        results.append((everything([p], optimizer), sorted({*calls})))
    (parts, few), (whole, one) = results
    assert_same(parts, whole)
    assert few == of_calls and one == [2, tiles]


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("index", [0, 2, 8])
def test_a_gradient_that_is_not_finite(calls, bits, index):
    params = parameters()
    optimizer = optimizer_over(params, compile=True, state_bits=bits)
    train(params, optimizer, 3)
    before = everything(params, optimizer)
    set_gradients(params, 3)
    params[index].grad.view(-1)[-1] = math.inf
    optimizer.step()
    assert_same(everything(params, optimizer), before)

    (a, missing), (b, fused) = (
        (params, optimizer_over(params, compile=True, state_bits=bits, fused_backward=way))
        for way, params in ((False, parameters()), (True, parameters()))
    )
    for step in range(4, 8):
        backward(a, step)
        backward(b, step, spoil=index if step == 6 else None)
        if step == 6:
            a[index].grad = None
        missing.step()
        missing.zero_grad()
        fused.step()
    assert fused.not_finite == (0 if index in (6 % len(a), 4) else 1)
    assert_same(everything(b, fused), everything(a, missing))


def test_the_number_of_calls_does_not_follow_the_number_of_tensors(calls):
    params = [nn.Parameter(torch.zeros(320)) for _ in range(400)] + [
        nn.Parameter(torch.zeros(1024, 1024)) for _ in range(2)
    ]
    optimizer = DAdaptAdam(params, compile=True)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert sorted(calls) == [144, 256, 512, 512]


def test_compiling_is_chosen_by_size_and_saved(calls):
    small = DAdaptAdam([nn.Parameter(torch.zeros(1000))])
    assert not small.compiled and DAdaptAdam([nn.Parameter(torch.zeros(1 << 24))]).compiled
    assert DAdaptAdam([nn.Parameter(torch.zeros(1 << 20))], state_bits=8).compiled, "8 bits gain more"
    assert not DAdaptAdam([nn.Parameter(torch.zeros(1 << 20))]).compiled
    one = DAdaptAdam([nn.Parameter(torch.zeros(1000))], compile=True)
    small.load_state_dict(one.state_dict())
    assert small.compiled
    fixed = DAdaptAdam([nn.Parameter(torch.zeros(1000))], compile=False)
    with pytest.warns(
        UserWarning, match=r"^the saved run stepped through a compiler, this one does without a compiler"
    ):
        fixed.load_state_dict(one.state_dict())
    assert not fixed.compiled
    large = DAdaptAdam([nn.Parameter(torch.zeros(1 << 24))])
    other = DAdaptAdam([nn.Parameter(torch.zeros(1 << 24))], compile=False)
    large.load_state_dict(other.state_dict())
    assert not large.compiled


def test_a_forbidden_compiler_is_not_used(monkeypatch):
    monkeypatch.setattr(choice, "chosen", {})
    with (
        torch._dynamo.config.patch(disable=True),
        pytest.warns(UserWarning, match="TORCH_COMPILE_DISABLE is set"),
    ):
        assert not DAdaptAdam([nn.Parameter(torch.zeros(1000))], compile=True).compiled


def test_a_resumed_run_whose_compiler_is_gone_says_so(calls, monkeypatch):
    saved = DAdaptAdam([nn.Parameter(torch.zeros(1000))], compile=True).state_dict()
    monkeypatch.setattr(choice, "chosen", dict.fromkeys(choice.chosen, Choice(EAGER, None)))
    resumed = DAdaptAdam([nn.Parameter(torch.zeros(1000))])
    with pytest.warns(UserWarning, match=r"stepped through a compiler, this one does without"):
        resumed.load_state_dict(saved)
    assert not resumed.compiled


def test_where_compiling_does_not_work_one_line_says_so(monkeypatch):
    def broken(*arguments, **options):
        raise OSError("no compiler found\nand a second line")

    monkeypatch.setattr(choice, "chosen", {})
    monkeypatch.setattr(torch, "compile", broken)
    params = parameters()
    with pytest.warns(
        UserWarning, match=r"torch\.compile does not work here \(no compiler found and a second line\)"
    ) as caught:
        optimizer = optimizer_over(params, compile=True)
        train(params, optimizer, 2)
        train(parameters(), optimizer_over(parameters(), compile=True), 1)
    assert len(caught) == 1 and "\n" not in str(caught[0].message)
    assert not optimizer.compiled and optimizer.param_groups[0]["k"] == 2


@pytest.fixture
def trials(monkeypatch, tmp_path):
    """Simulate a new machine with 512-bit vectors; return its seconds by way, and the ways compiled."""
    seconds, compiled = {"default": 2.0, "512-bit vectors": 1.0, EAGER: 3.0}, []

    def uncompiled(bits, every, options):
        compiled.append(next(way for way, given in choice.WAYS.items() if given == options))
        kernel = CompiledKernel(partial(advance_bytes), estimate_bytes)
        names[kernel.whole] = compiled[-1]
        return kernel

    names = {}
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(choice, "chosen", {})
    monkeypatch.setattr(choice, "compile_kernel", uncompiled)
    monkeypatch.setattr(choice, "has_512_bits", lambda: True)
    monkeypatch.setattr(
        Trial, "timed", lambda trial: seconds[names[trial.kernel.whole] if trial.kernel else EAGER]
    )
    return seconds, compiled


KEY = 8, 16, torch.float32


@pytest.mark.parametrize("fastest", ["default", "512-bit vectors", EAGER])
def test_the_fastest_way_is_chosen_once_for_all_processes(trials, monkeypatch, fastest):
    seconds, compiled = trials
    seconds[fastest] = 0.5
    first = choose(*KEY)
    assert first.way == fastest and choose(*KEY) is first and compiled == ["default", "512-bit vectors"]
    monkeypatch.setattr(choice, "chosen", {})  # as in the next process
    seconds.clear()
    assert choose(*KEY).way == fastest, "kept, without any timing"
    assert compiled[2:] == ["default" if fastest == EAGER else fastest], "the others are not compiled again"


def test_the_first_choice_written_holds_for_processes_that_measured_at_the_same_time(trials, monkeypatch):
    seconds, _ = trials
    slow, folder = Trial.timed, choice.own_cache()

    def other_process_is_first(trial):
        for name in [path.name for path in folder.iterdir()] or [place.name]:
            (folder / name).write_text("default")
        return slow(trial)

    choose(*KEY)
    (place,) = folder.iterdir()
    place.unlink()
    monkeypatch.setattr(choice, "chosen", {})
    monkeypatch.setattr(Trial, "timed", other_process_is_first)
    assert choose(*KEY).way == "default" and seconds["default"] > seconds["512-bit vectors"]
    assert [path.name for path in folder.iterdir()] == [place.name], "nothing is left behind"


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512", reason="needs two kinds of vectors in one CPU"
)
def test_code_of_other_vectors_is_not_taken_from_the_cache(tmp_path):
    """torch's own key of it names no CPU, and the compiler's test fails or finds wrong results then."""
    code = (
        "import torch; from trainer.models.compiled import require_compiler; "
        "require_compiler(torch.device('cpu'))"
    )
    for capability in ("avx512", "avx2", "avx512"):
        env = {"ATEN_CPU_CAPABILITY": capability, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
        subprocess.run([sys.executable, "-c", code], env=os.environ | env, check=True)
    assert len(list(tmp_path.glob("cpu-*"))) == 2


def test_eager_is_only_chosen_where_other_processes_learn_of_it(trials, monkeypatch):
    seconds, _ = trials
    seconds[EAGER] = 0.1

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(choice.os, "link", full)
    assert choose(*KEY).way == "512-bit vectors", "this choice does not show in results"


def test_a_way_that_gives_other_bits_is_not_taken(trials, monkeypatch):
    usual = Trial.run
    monkeypatch.setattr(
        Trial,
        "run",
        lambda trial: [part + (trial.kernel is not None and len(trials[1]) > 1) for part in usual(trial)],
    )
    assert choose(*KEY).way == "default"


def test_a_step_is_not_compiled_where_that_is_slower_but_for_a_run_that_was(trials):
    trials[0][EAGER] = 0.1
    size = 1 << 20
    automatic, asked = (
        DAdaptAdam([nn.Parameter(torch.zeros(size))], state_bits=8, compile=way) for way in (None, True)
    )
    assert not automatic.compiled and asked.compiled
    automatic.load_state_dict(asked.state_dict())
    assert automatic.compiled


@pytest.mark.slow
@pytest.mark.parametrize("bits", [32, 8])
def test_compiled_ways_give_the_same_bits(bits, monkeypatch, tmp_path):
    if not choice.has_512_bits():
        pytest.skip("this CPU or this compiler has no vectors of 512 bits, so there is one way")
    every = 1 if bits == 32 else 16
    results = [
        Trial(choice.compile_kernel(bits, every, options), bits, every, torch.float32).run()
        for options in choice.WAYS.values()
    ]
    assert_same(*results)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [32, 8])
def test_compiled_for_real(bits, dtype):
    """Close to eager, bit-equal if fused, reproducible, one graph for all shapes, groups and instances."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "torch.compile does not work")
        results = []
        for compile, fused in ((True, False), (True, True), (True, False), (False, False)):
            params = parameters(dtype)
            optimizer = optimizer_over(params, compile=compile, state_bits=bits, fused_backward=fused)
            optimizer.state_dict()  # allocates, and compiles
            if compile:
                assert optimizer.compiled
            with torch.compiler.set_stance("fail_on_recompile"):
                for step in range(8):
                    backward(params, step)
                    optimizer.step()
                    optimizer.zero_grad()
            results.append((params, optimizer))
    assert_same(everything(*results[1]), everything(*results[0]))
    assert_same(everything(*results[2]), everything(*results[0]))
    assert_close(*results[0], *results[3])


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
def test_compiled_state_round_trip(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        params = parameters()
        optimizer = optimizer_over(params, compile=True, state_bits=8)
        train(params, optimizer, 3)
        copies = [nn.Parameter(p.detach().clone()) for p in params]
        again = optimizer_over(copies, state_bits=8)
        again.load_state_dict(optimizer.state_dict())
        assert again.compiled
        train(params, optimizer, 3)
        train(copies, again, 3)
        assert_same(everything(copies, again), everything(params, optimizer))
    finally:
        torch.set_num_threads(before)
