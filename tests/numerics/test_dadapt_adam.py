"""DAdaptAdam against the published optimizer, and what must hold of it by itself."""

import contextlib
import io
import itertools
import math

import pytest
import torch
from dadaptation import DAdaptAdam as Published

from trainer.optim.dadapt import learned, tiled
from trainer.optim.dadapt.optimizer import DAdaptAdam, TiledAdamW
from trainer.optim.dadapt.quantized import BLOCK, encode
from trainer.state_file import read_state, write_state

SHAPES = [(3, 700), (5,), (41, 100), (2, 3, 4)]


def published(groups, **options):
    with contextlib.redirect_stdout(io.StringIO()):
        return Published(groups, **options)


def parameters(seed=0, dtype=torch.float64, shapes=SHAPES):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
        for shape in shapes
    ]


def gentle(params, step, seed=7):
    """Gradients that raise d by orders of magnitude and depend too weakly on p for rounding to grow."""
    generator = torch.Generator().manual_seed(seed * 100_003 + step)
    for index, p in enumerate(params):
        noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        scale = torch.logspace(-3, 1, p.numel(), dtype=torch.float64).view(p.shape)
        p.grad = (scale * (0.1 * (-1) ** index + noise + 0.1 * torch.tanh(p.detach().double() / 10))).to(
            p.dtype
        )


def always(params, step):
    pass


def some_missing(params, step):
    if step % 3 == 0:
        params[step % len(params)].grad = None
    if step % 50 == 49:
        for p in params:
            p.grad = None
    params[1].grad = None if step < 5 else params[1].grad


def some_zero(params, step):
    if step < 3 or step % 20 == 0:
        for p in params:
            p.grad.zero_()
    params[0].grad.zero_()
    if step > 10:
        params[step % len(params)].grad.zero_()


def alone_and_zero(params, step):
    """Every tenth step has a gradient for the first parameter alone, zero in all other steps."""
    params[0].grad.zero_()
    if step % 10 == 9:
        for p in params[1:]:
            p.grad = None


def constant(step, total):
    return [1.0, 1.0]


def warm_up_and_holes(step, total):
    rate = (
        0.0 if step in (0, 1, 90, 91) else min(1.0, step / 20) * 0.5 * (1 + math.cos(math.pi * step / total))
    )
    return [rate, rate]


def both(build, edit, rates, steps, **options):
    """Run the published optimizer and ours; return (published d, our d) per step and both results."""
    ours, theirs = parameters(), parameters()
    scales = options.pop("scales")
    eps = options.pop("eps", (1e-8, 1e-8))

    def groups(params):
        return [
            {"params": params[:2], "layer_scale": scales[0], "eps": eps[0]},
            {"params": params[2:], "layer_scale": scales[1], "eps": eps[1]},
        ]

    a, b = published(groups(theirs), **options), build(groups(ours), **options)
    ds = []
    for step in range(steps):
        for params, optimizer in ((theirs, a), (ours, b)):
            for group, lr in zip(optimizer.param_groups, rates(step, steps), strict=True):
                group["lr"] = lr
            gentle(params, step)
            edit(params, step)
            optimizer.step()
        ds.append((a.param_groups[0]["d"], b.param_groups[0]["d"]))
    return ds, theirs, ours, a, b


EDITS = (always, some_missing, some_zero, alone_and_zero)
RATES = (constant, warm_up_and_holes)


def apart(found, expected):
    return max(
        ((a - b).abs().max() / max(1.0, b.abs().max().item())).item()
        for a, b in zip(found, expected, strict=True)
    )


def last_bits_apart(theirs, edit, rates, steps, **options):
    """Return the published optimizer's distance from itself if last bits of the start change; worst of 3."""

    def build(groups, **options):
        for p in (p for group in groups for p in group["params"]):
            p.data *= 1 + 2.0**-52 * torch.randint(-1, 2, p.shape, generator=generator).double()
        return published(groups, **options)

    worst = 0.0
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        _, _, moved, _, _ = both(build, edit, rates, steps, **options)
        worst = max(worst, apart(moved, theirs))
    return worst


def assert_parity(edit, rates, decouple, decay, bias, growth, scales, steps):
    options = {
        "decouple": decouple,
        "weight_decay": decay,
        "use_bias_correction": bias,
        "growth_rate": growth,
        "scales": scales,
    }
    ds, theirs, ours, a, b = both(DAdaptAdam, edit, rates, steps, **options)
    assert ds[-1][0] > 2e-6, "d has to move for this to show anything"
    for expected, found in ds:
        assert found == pytest.approx(expected, rel=1e-12, abs=0)
    bound = 1e-10
    if decay and not decouple and apart(ours, theirs) >= bound:
        # Where a weight's gradient is nothing but its decay and d is large, d * decay * (1 - beta1) / sqrt(v)
        # exceeds 1: each step multiplies any difference by it, up to twelvefold here. No order of additions
        # survives that, not even the published one's, of which the start alone differs here.
        bound = max(bound, 4 * last_bits_apart(theirs, edit, rates, steps, **options))
        assert bound < 1e-8
    assert apart(ours, theirs) < bound
    assert b.param_groups[0]["k"] == a.param_groups[0]["k"]
    assert b.param_groups[0]["numerator_weighted"] == pytest.approx(
        a.param_groups[0]["numerator_weighted"], rel=1e-10
    )


@pytest.mark.parametrize("rates", RATES)
@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("decouple", [False, True])
def test_parity_with_the_published_optimizer(edit, rates, decouple):
    assert_parity(edit, rates, decouple, 0.1, False, 1.05, (1.0, 0.5), 200)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("edit", "rates", "decouple", "decay", "bias", "growth", "scales"),
    itertools.product(
        EDITS, RATES, (False, True), (0.0, 0.1), (False, True), (math.inf, 1.05), ((1.0, 1.0), (1.0, 0.5))
    ),
)
def test_parity_on_every_combination(edit, rates, decouple, decay, bias, growth, scales):
    assert_parity(edit, rates, decouple, decay, bias, growth, scales, 200)


def snapshot(optimizer, params):
    """Return copies of everything a step may change."""
    scalars = optimizer.state_dict()["state"]["adaptation"]  # allocates the state, if nothing has yet
    saved = [p.detach().clone() for p in params]
    for p in params:
        saved += [value.clone() for value in optimizer.state[p].values()]
    return saved + [scalars[key].clone() for key in ("d", "k", "numerator_weighted", "d_hat", "l1")]


def train(optimizer, params, steps, first=0, edit=always):
    for step in range(first, first + steps):
        gentle(params, step)
        edit(params, step)
        optimizer.step()


def assert_same(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize(("bad", "bits"), [(math.nan, 32), (math.inf, 32), (-math.inf, 8), (1e30, 32)])
def test_a_gradient_that_is_not_finite_changes_nothing(bad, bits):
    params = parameters(dtype=torch.float32)
    optimizer = DAdaptAdam(params, decouple=True, weight_decay=0.1, state_bits=bits)
    train(optimizer, params, 5)
    before = snapshot(optimizer, params)
    gentle(params, 5)
    params[2].grad[3, 7] = bad
    optimizer.step()
    assert_same(snapshot(optimizer, params), before)
    train(optimizer, params, 1, first=6)
    assert not torch.equal(params[0], before[0])


@pytest.mark.parametrize(
    ("bits", "dtype"), [(32, torch.float32), (8, torch.float32), (32, torch.bfloat16), (8, torch.bfloat16)]
)
def test_found_inf_leaves_weights_state_and_d_as_they_are(bits, dtype):
    params = parameters(dtype=dtype)
    optimizer = DAdaptAdam(params, decouple=True, weight_decay=0.1, d0=1e-3, state_bits=bits)
    train(optimizer, params, 5)
    before = snapshot(optimizer, params)
    gentle(params, 5)
    params[0].grad.fill_(math.nan)
    optimizer.found_inf, optimizer.grad_scale = torch.tensor(1.0), None
    optimizer.step()
    assert_same(snapshot(optimizer, params), before)
    gentle(params, 6)
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.step()
    assert all(
        not torch.equal(now, then)
        for now, then in zip(snapshot(optimizer, params)[:4], before[:4], strict=True)
    )
    assert optimizer.param_groups[0]["k"] == 6


@pytest.mark.parametrize("bits", [32, 8])
def test_devices_that_nobody_waits_for_do_the_same(monkeypatch, bits):
    """Where the host cannot look whether a gradient is finite, the step is computed and then not kept."""
    runs = []
    for on_host in (True, False):
        for module in (tiled, learned):
            monkeypatch.setattr(module, "on_device", lambda device, answer=not on_host: answer)
        params = [
            torch.nn.Parameter(p.detach().to(kind))
            for p, kind in zip(parameters(), [torch.float32, torch.bfloat16] * 2, strict=True)
        ]
        # Decoupled decay begins one step later where nobody looks whether the first step has moved anything.
        optimizer = DAdaptAdam(params, weight_decay=0.1, d0=1e-3, state_bits=bits, fused_backward=True)
        for step in range(6):
            gentle(params, step)
            if step % 2:
                params[step % 4].grad.view(-1)[0] = math.nan if step == 1 else math.inf
            optimizer.step()
        runs.append(snapshot(optimizer, params))
        assert optimizer.not_finite == 3
    assert_same(*runs)


KINDS = [(32, torch.float32), (8, torch.float32), (32, torch.bfloat16), (8, torch.bfloat16)]


@pytest.mark.parametrize(("bits", "dtype"), KINDS)
@pytest.mark.parametrize("first", [0, 5])
def test_a_step_at_lr_0_changes_nothing(bits, dtype, first):
    params = parameters(dtype=dtype)
    optimizer = DAdaptAdam(params, decouple=True, weight_decay=0.1, d0=1e-3, state_bits=bits)
    train(optimizer, params, first)
    before = snapshot(optimizer, params)
    optimizer.param_groups[0]["lr"] = 0.0
    train(optimizer, params, 2, first=first)
    assert_same(snapshot(optimizer, params), before)
    optimizer.param_groups[0]["lr"] = 1.0
    train(optimizer, params, 1, first=first)
    assert optimizer.param_groups[0]["k"] == first + 1
    assert all(not torch.equal(p, then) for p, then in zip(params, before[: len(params)], strict=True))


@pytest.mark.parametrize(("bits", "dtype"), KINDS)
def test_nothing_but_zero_gradients_changes_no_weight_and_not_d(bits, dtype):
    params = parameters(dtype=dtype)
    optimizer = DAdaptAdam(params, decouple=True, weight_decay=0.1, d0=1e-3, state_bits=bits)
    before = [p.detach().clone() for p in params]
    for _ in range(3):
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer.step()
    assert_same(params, before)
    group = optimizer.param_groups[0]
    assert (group["k"], group["d"], group["numerator_weighted"]) == (0, 1e-3, 0.0)


@pytest.mark.parametrize(("bits", "dtype"), KINDS)
def test_a_parameter_without_a_gradient_keeps_weights_and_state(bits, dtype):
    params = parameters(dtype=dtype)
    optimizer = DAdaptAdam(params, decouple=True, weight_decay=0.1, d0=1e-3, state_bits=bits)
    train(optimizer, params, 4)
    kept = [params[2].detach().clone(), *(value.clone() for value in optimizer.state[params[2]].values())]
    others = params[0].detach().clone()

    def without(params, step):
        params[2].grad = None

    train(optimizer, params, 3, first=4, edit=without)
    assert_same([params[2].detach(), *optimizer.state[params[2]].values()], kept)
    assert not torch.equal(params[0], others)


def test_grad_scale_divides_the_gradients():
    plain, scaled = parameters(), parameters()
    a, b = DAdaptAdam(plain), DAdaptAdam(scaled)
    for step in range(10):
        gentle(plain, step)
        gentle(scaled, step)
        for p in scaled:
            p.grad *= 2.0 ** (10 + step)
        b.found_inf, b.grad_scale = torch.tensor(0.0), torch.tensor(2.0 ** (10 + step))
        a.step()
        b.step()
    assert_same(snapshot(b, scaled), snapshot(a, plain))


def test_the_overflow_of_a_sum_does_not_reach_d():
    params = parameters(dtype=torch.float32)
    optimizer = DAdaptAdam(params, eps=1e-38, d0=1.0)
    train(optimizer, params, 3)
    before = optimizer.d.clone()
    state = optimizer.state[params[0]]
    state["exp_avg_sq"].zero_()  # <g, s / eps> overflows fp32
    train(optimizer, params, 1, first=3)
    assert torch.equal(optimizer.d, before)


@pytest.mark.parametrize("bits", [32, 8])
def test_steps_are_reproducible_bit_for_bit(bits):
    runs = []
    for _ in range(2):
        params = parameters(dtype=torch.float32)
        optimizer = DAdaptAdam(
            params, decouple=True, weight_decay=0.1, use_bias_correction=True, state_bits=bits
        )
        train(optimizer, params, 30)
        runs.append(snapshot(optimizer, params))
    assert_same(*runs)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("bits", [32, 8])
def test_state_goes_to_disk_and_back_bit_for_bit(tmp_path, bits, fused):
    kinds = (torch.float32, torch.bfloat16, torch.float64 if bits == 32 else torch.float32, torch.float32)
    params = [torch.nn.Parameter(p.detach().to(kind)) for p, kind in zip(parameters(), kinds, strict=True)]
    optimizer = DAdaptAdam(params, decouple=True, weight_decay=0.1, state_bits=bits, fused_backward=fused)
    train(optimizer, params, 12, edit=some_missing)
    write_state(optimizer.state_dict()["state"], tmp_path / "state")
    weights = [p.detach().clone() for p in params]
    train(optimizer, params, 12, first=12, edit=some_missing)

    again = [torch.nn.Parameter(weight) for weight in weights]
    resumed = DAdaptAdam(again, decouple=True, weight_decay=0.2, state_bits=bits, fused_backward=fused)
    resumed.load_state_dict({"state": read_state(tmp_path / "state"), "param_groups": []})
    assert resumed.param_groups[0]["weight_decay"] == 0.2, "hyper-parameters are the configuration's"
    resumed.param_groups[0]["weight_decay"] = 0.1
    train(resumed, again, 12, first=12, edit=some_missing)
    assert_same(snapshot(resumed, again), snapshot(optimizer, params))


def test_loading_its_own_state_changes_nothing():
    params = parameters(dtype=torch.float32)
    optimizer = DAdaptAdam(params)
    train(optimizer, params, 3)
    before = snapshot(optimizer, params)
    optimizer.load_state_dict(optimizer.state_dict())
    assert_same(snapshot(optimizer, params), before)


def test_state_of_another_precision_is_refused_and_changes_nothing():
    optimizer = DAdaptAdam(parameters(dtype=torch.float64))
    other = DAdaptAdam(parameters(dtype=torch.float32))
    with pytest.raises(ValueError, match=r"0\.exp_avg is torch\.float32"):
        optimizer.load_state_dict(other.state_dict())
    eight = DAdaptAdam(parameters(dtype=torch.float32), state_bits=8)
    with pytest.raises(ValueError, match="exp_avg_exponent"):
        eight.load_state_dict(other.state_dict())


def test_groups_read_as_numbers():
    params = parameters()
    optimizer = DAdaptAdam(params, d0=1e-5)
    assert optimizer.param_groups[0]["d"] == 1e-5
    train(optimizer, params, 4)
    group = optimizer.param_groups[0]
    assert isinstance(group["d"], float) and group["d"] == optimizer.d.item() > 1e-5
    assert type(group["k"]) is int and group["k"] == 4
    assert isinstance(group["numerator_weighted"], float) and group["numerator_weighted"] != 0


@pytest.mark.parametrize("bits", [32, 8])
def test_a_step_reads_nothing_back(bits):
    params = [torch.nn.Parameter(torch.empty(shape, device="meta")) for shape in SHAPES]
    optimizer = DAdaptAdam(
        [{"params": params[:2]}, {"params": params[2:], "layer_scale": 0.5}],
        decouple=True,
        weight_decay=0.1,
        state_bits=bits,
    )
    for _ in range(3):
        for p in params:
            p.grad = torch.empty_like(p)
        optimizer.found_inf = torch.empty((), device="meta")
        optimizer.step()
    del optimizer.found_inf
    optimizer.step()


@pytest.mark.parametrize(("bits", "size"), [(32, 12), (8, 2.072)])
def test_bytes_of_state_for_each_parameter(bits, size):
    params = [torch.nn.Parameter(torch.zeros(640, 320, 3, 3)), torch.nn.Parameter(torch.zeros(640))]
    optimizer = DAdaptAdam(params, state_bits=bits, compile=False)  # which takes longer than the step
    params[0].grad = torch.zeros_like(params[0])
    optimizer.step()
    stored = {
        value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()
        for p in params
        for value in optimizer.state[p].values()
    }
    assert sum(stored.values()) / sum(p.numel() for p in params) == pytest.approx(size, rel=4e-3)


def test_layouts_that_are_not_contiguous_train_the_same():
    plain = parameters(shapes=[(6, 4, 3, 3)])
    strided = [torch.nn.Parameter(plain[0].detach().clone().to(memory_format=torch.channels_last))]
    a, b = DAdaptAdam(plain), DAdaptAdam(strided)
    for step in range(5):
        gentle(plain, step)
        gentle(strided, step)
        strided[0].grad = strided[0].grad.to(memory_format=torch.channels_last)
        a.step()
        b.step()
    assert strided[0].is_contiguous(memory_format=torch.channels_last)
    for ours, theirs in zip(
        snapshot(b, strided), snapshot(a, plain), strict=True
    ):  # sums are added up in another order
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def distance_problem(optimizer_of, steps=400):
    """Minimise |p - target|_1; return the optimizer and the mean distance at the end."""
    torch.manual_seed(0)
    target = torch.randn(3000)
    p = torch.nn.Parameter(torch.zeros(3000))
    optimizer = optimizer_of([p])
    ds = []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1 - step / steps
        loss = (p - target).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        ds.append(optimizer.param_groups[0]["d"])
        optimizer.step()
    return ds, (p - target).abs().mean().item()


@pytest.mark.parametrize("bits", [32, 8])
def test_it_converges_and_d_never_falls(bits):
    ds, distance = distance_problem(lambda params: DAdaptAdam(params, state_bits=bits))
    assert distance < 0.05
    assert all(later >= earlier for earlier, later in itertools.pairwise(ds))
    assert ds[0] == 1e-6 and ds[-1] > 1e-3, "the rate was found, not given"


def test_d_max_holds():
    ds, _ = distance_problem(lambda params: DAdaptAdam(params, d_max=1e-4), steps=200)
    assert max(ds) == 1e-4


def test_growth_rate_holds():
    ds, _ = distance_problem(lambda params: DAdaptAdam(params, growth_rate=1.02), steps=100)
    assert max(later / earlier for earlier, later in itertools.pairwise(ds)) == pytest.approx(1.02)


@pytest.mark.parametrize(("bits", "dtype"), [(32, torch.float64), (32, torch.bfloat16), (8, torch.float32)])
def test_a_constant_scale_of_the_loss_leaves_the_path_unchanged(bits, dtype):
    """With tiny eps, g -> 1024 * g scales m and sqrt(v) alike, exactly in binary, 8-bit codes included."""
    paths = []
    for scale in (1.0, 1024.0):
        params = parameters(dtype=dtype)
        optimizer = DAdaptAdam(params, eps=1e-300 if dtype == torch.float64 else 1e-30, state_bits=bits)
        for step in range(40):
            gentle(params, step)
            for p in params:
                p.grad *= scale
            optimizer.step()
        paths.append([p.detach() for p in params] + [optimizer.d])
    assert_same(*paths)
    assert optimizer.d > 1e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, "lr is 0"),
        ({"lr": -1.0}, "lr is -1"),
        ({"betas": (1.0, 0.999)}, "betas"),
        ({"eps": 0.0}, "eps"),
        ({"d0": 0.0}, "d0"),
        ({"d0": 1e-3, "d_max": 1e-4}, "d_max"),
        ({"growth_rate": 0.9}, "growth_rate"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"state_bits": 4}, "state_bits"),
        ({"state_bits": 8}, "float64"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DAdaptAdam(parameters(), **options)


def test_what_cannot_be_trained_is_refused():
    with pytest.raises(ValueError, match="float16"):
        DAdaptAdam(parameters(dtype=torch.float16))
    a, b = parameters()[:2], parameters()[2:]
    with pytest.raises(ValueError, match="growth_rate"):
        DAdaptAdam([{"params": a, "growth_rate": 1.02}, {"params": b}])
    optimizer = DAdaptAdam([{"params": a, "lr": 0.5}, {"params": b, "lr": 0.25}])
    with pytest.raises(ValueError, match="layer_scale"):
        train(optimizer, a + b, 1)


def test_state_of_low_precision_weights_is_fp32():
    params = parameters(dtype=torch.bfloat16)
    optimizer = DAdaptAdam(params, d0=1e-3)
    train(optimizer, params, 3)
    assert {value.dtype for p in params for value in optimizer.state[p].values()} == {torch.float32}


def test_small_steps_move_low_precision_weights_on_average():
    """Each step is 1/100 of the gap of bf16 values near 1: rounding to nearest would lose all."""
    p = torch.nn.Parameter(torch.ones(20_000, dtype=torch.bfloat16))
    optimizer = DAdaptAdam([p], d0=1e-3, lr=0.1)
    reference = torch.nn.Parameter(torch.ones(20_000))
    exact = DAdaptAdam([reference], d0=1e-3, lr=0.1)
    for _ in range(20):
        p.grad, reference.grad = torch.ones_like(p), torch.ones_like(reference)
        optimizer.step()
        exact.step()
    moved = 1 - reference.mean().item()
    assert moved > 1e-3
    assert 1 - p.double().mean().item() == pytest.approx(moved, rel=0.05)


@pytest.mark.parametrize(("seed", "every", "within"), [(0, 1, 0.02), (0, 16, 0.05), (1, 16, 0.05)])
def test_d_at_eight_bits_follows_d_at_thirty_two(seed, every, within):
    """An MLP of 90k parameters on a noisy regression, 300 steps."""
    ends = []
    for bits in (32, 8):
        torch.manual_seed(seed)
        net, teacher = (
            torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 288))
            for _ in range(2)
        )
        optimizer = DAdaptAdam(
            net.parameters(),
            state_bits=bits,
            every=every if bits == 8 else 1,
            decouple=True,
            weight_decay=0.01,
            growth_rate=1.05,
        )
        losses = []
        for _ in range(300):
            x = torch.randn(16, 64)
            with torch.no_grad():
                y = teacher(x) + 0.3 * torch.randn(16, 288)
            loss = (net(x) - y).pow(2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        ends.append((optimizer.d.item(), sum(losses[-50:]) / 50))
    assert ends[0][0] > 1e-4
    assert ends[1][0] == pytest.approx(ends[0][0], rel=within)
    assert ends[1][1] == pytest.approx(ends[0][1], rel=0.02)


@pytest.mark.parametrize("every", [1, 16])
def test_state_of_an_earlier_version_is_converted(every):
    """It had an s for every element, and blocks in the order of indices."""
    shapes = [(40, 30, 4, 4), (300,), (200, 100)]

    def build(bits):
        made = parameters(dtype=torch.float32, shapes=shapes)
        made[0] = torch.nn.Parameter(made[0].detach().to(memory_format=torch.channels_last))
        return made, DAdaptAdam(
            made, state_bits=bits, every=every if bits == 8 else 1, decouple=True, weight_decay=0.1
        )

    params, exact = build(32)
    train(exact, params, 20)
    saved: dict = {"adaptation": {**exact.state_dict()["state"]["adaptation"]}}
    del saved["adaptation"]["tiled"]
    for number, p in enumerate(params):
        saved[number] = {}
        for name, value in exact.state[p].items():
            blocks = torch.nn.functional.pad(value.reshape(-1), (0, -value.numel() % BLOCK)).view(-1, BLOCK)
            codes, exponents = encode(blocks, torch.tensor(0.5), signed=name != "exp_avg_sq")
            codes = codes.to(torch.int32).to(torch.uint8 if name == "exp_avg_sq" else torch.int8)
            saved[number][name] = codes.view(-1)[: value.numel()].view(value.shape)
            saved[number][f"{name}_exponent"] = exponents.to(torch.uint8).view(-1)

    again, resumed = build(8)
    for p, before in zip(again, params, strict=True):
        p.data.copy_(before.detach())
    with pytest.warns(UserWarning, match="state of an earlier version was converted"):
        resumed.load_state_dict({"state": saved, "param_groups": []})
    assert resumed.d == exact.d and resumed.param_groups[0]["k"] == 20
    for p, before in zip(again, params, strict=True):
        segment = resumed._segment_of[p]
        for name, value in exact.state[before].items():
            found = segment.bank.load(name, segment.first, segment.tiles)
            expected = torch.nn.functional.pad(segment.flat(value), (0, -value.numel() % 2048)).view(-1, 2048)
            if found.shape != expected.shape:
                expected = expected.gather(1, segment.bank.drawn(segment.first, segment.tiles))
            assert name != "s" or (found.shape[1] < 2048) == (every == 16 and p.numel() >= 1 << 14)
            torch.testing.assert_close(found, expected, rtol=0.1, atol=0.02 * expected.abs().max().item())
    train(resumed, again, 1, first=20)
    train(exact, params, 1, first=20)
    assert max((a - b).abs().max() for a, b in zip(params, again, strict=True)) < 1e-3


@pytest.mark.parametrize("fused", [False, True])
def test_adamw_on_the_same_state_is_that_of_torch(fused):
    ours, theirs = parameters(), parameters()
    options = {"lr": 1e-2, "betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.1}
    a, b = (
        torch.optim.AdamW(theirs, **options),
        TiledAdamW(ours, **options, state_bits=32, fused_backward=fused),
    )
    for step in range(50):
        for params, optimizer in ((theirs, a), (ours, b)):
            gentle(params, step)
            for group in optimizer.param_groups:
                group["lr"] = 1e-2 * (1 - step / 100)
            optimizer.step()
    for p, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, expected, rtol=1e-11, atol=1e-12)


def test_adamw_in_eight_bits_is_close_to_that_of_torch(tmp_path):
    ours, theirs = parameters(dtype=torch.float32), parameters(dtype=torch.float32)
    a, b = torch.optim.AdamW(theirs, lr=1e-3), TiledAdamW(ours, lr=1e-3)
    start = [p.detach().clone() for p in ours]
    for step in range(40):
        for params, optimizer in ((theirs, a), (ours, b)):
            gentle(params, step)
            optimizer.step()
        if step == 20:
            write_state(b.state_dict()["state"], tmp_path / "state")
            b = TiledAdamW(ours, lr=1e-3)
            b.load_state_dict({"state": read_state(tmp_path / "state"), "param_groups": []})
    ends, expected, starts = (
        torch.cat([p.detach().flatten() for p in params]) for params in (ours, theirs, start)
    )
    assert (ends - expected).abs().mean() < 0.1 * (expected - starts).abs().mean()
    kept = sum(value.numel() * value.element_size() for p in ours for value in b.state[p].values())
    assert kept < 2.2 * sum(p.numel() for p in ours)


def test_a_cap_holds_the_rate_and_not_d():
    params = parameters()
    optimizer = DAdaptAdam(params, rate_max=1e-5)
    train(optimizer, params, 60)
    assert optimizer.rate() == 1e-5 < optimizer.rate(capped=False) == optimizer.d
    capped = optimizer.d.item()
    free_params = parameters()
    free = DAdaptAdam(free_params)
    train(free, free_params, 60)
    assert capped > 2e-5 and 0.1 < capped / free.d.item() < 10, "d goes on"
