"""Every optimizer of the union: against its published equations, and what must hold of each by itself.

The tests run over the union itself: an optimizer that is added there without an entry in `CASES` fails.
"""

import itertools
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import get_args

import numpy as np
import pytest
import torch
from diffusers.optimization import get_scheduler

from trainer.config.schema import keys_of, optimizer_classes
from trainer.errors import UserError
from trainer.optim.gradients import finish_gradients
from trainer.optim.optimizer_set import OptimizerSet
from trainer.optim.schedules import ScheduleOptions, SchedulerName, rate_factor
from trainer.state_file import read_state, write_state

NAMES = list(optimizer_classes())
ADAPTIVE = [name for name in NAMES if optimizer_classes()[name].adapts]
LARGE = 64 * 80
"""Elements of the first parameter: enough for bitsandbytes to keep 8 bits, a whole number of its blocks."""
SHAPES = [(64, 80), (5, 4, 3, 3), (7,)]


def as_it_is(value, signed):
    return value


def in_blocks(value, signed):
    """Round as bitsandbytes does: in blocks of 256, to the nearest of 256 values times the largest."""
    from bitsandbytes.functional import create_dynamic_map

    codes = np.sort(create_dynamic_map(signed=signed).double().numpy())
    blocks = value[:LARGE].reshape(-1, 256)
    largest = np.abs(blocks).max(axis=1, keepdims=True)
    above = np.searchsorted((codes[1:] + codes[:-1]) / 2, blocks / np.where(largest > 0, largest, 1.0))
    return np.concatenate([(codes[above] * largest).ravel(), value[LARGE:]])


def adamw(x, gradients, o, rounded=as_it_is):
    """Loshchilov & Hutter, arXiv 1711.05101, algorithm 2."""
    (beta1, beta2), m, v = o.betas, 0.0, 0.0
    for t, g in enumerate(gradients, 1):
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        x = x - o.lr * (m / (1 - beta1**t) / (np.sqrt(v / (1 - beta2**t)) + o.epsilon) + o.weight_decay * x)
        m, v = rounded(m, True), rounded(v, False)
    return x, None


def adamw_in_blocks(x, gradients, o):
    return adamw(x, gradients, o, in_blocks)


def lion(x, gradients, o, rounded=as_it_is):
    """Chen et al., arXiv 2302.06675, algorithm 2."""
    (beta1, beta2), m = o.betas, 0.0
    for g in gradients:
        x = x - o.lr * (np.sign(beta1 * m + (1 - beta1) * g) + o.weight_decay * x)
        m = rounded(beta2 * m + (1 - beta2) * g, True)
    return x, None


def lion_in_blocks(x, gradients, o):
    return lion(x, gradients, o, in_blocks)


def dadapt_adam(x, gradients, o):
    """Defazio & Mishchenko, arXiv 2301.07733, algorithm 5, with the library's decay and layer_scale."""
    (beta1, beta2), q, d, w, m, v, s = o.betas, math.sqrt(o.betas[1]), o.d0, 0.0, 0.0, 0.0, np.zeros_like(x)
    decay = (o.weight_decay, 0.0) if o.decouple else (0.0, o.weight_decay)
    limit, cap = getattr(o, "d_max", math.inf), getattr(o, "rate_max", math.inf) / o.layer_scale
    for k, g in enumerate(gradients):
        rate, g = min(d * o.lr * o.correction(k), cap), g + decay[1] * x
        w = q * w + (1 - q) * o.layer_scale * rate * (g @ (s / (np.sqrt(v) + o.epsilon)))
        m = beta1 * m + (1 - beta1) * o.layer_scale * rate * g
        v = beta2 * v + (1 - beta2) * g * g
        s = q * s + (1 - q) * rate * g
        x = x - decay[0] * rate * x - m / (np.sqrt(v) + o.epsilon)
        d = max(d, min(w / ((1 - q) * o.layer_scale * np.abs(s).sum()), d * o.growth_rate, limit))
    return x, d


def dadapt_lion(x, gradients, o):
    """The same estimate for sign steps; the library adds d*lr times the gradient to the mean."""
    (beta1, beta2), q, d, w, m, s = o.betas, math.sqrt(o.betas[1]), o.d0, 0.0, 0.0, np.zeros_like(x)
    for g in gradients:
        rate = d * o.lr
        u = np.sign(beta1 * m + (1 - beta1) * g)
        x = x - rate * (u + o.weight_decay * x)
        m = beta2 * m + (1 - beta2) * rate * g
        w = q * w + (1 - q) * rate * (u @ s)
        s = q * s + (1 - q) * rate * u
        d = max(d, w / ((1 - q) * np.abs(s).sum()))
    return x, d


def dadapt_sgd(x, gradients, o):
    """Defazio & Mishchenko, arXiv 2301.07733, algorithm 4, momentum averaging, coupled weight decay."""
    d, w, s, x0, first = o.d0, 0.0, np.zeros_like(x), x, None
    for g in gradients:
        first = np.linalg.norm(g) if first is None else first
        rate, g = d * o.lr / first, g + o.weight_decay * x
        w += rate * (g @ s)
        s = s + rate * g
        d = max(d, min(2 * w / np.linalg.norm(s), d * o.growth_rate))
        x = o.momentum * x + (1 - o.momentum) * (x0 - s)
    return x, d


def prodigy(x, gradients, o):
    """Mishchenko & Defazio, arXiv 2306.06101, algorithm 4, r and s divided by d0 as in the library."""
    (beta1, beta2), beta3, m, v, r, x0 = o.betas, math.sqrt(o.betas[1]), 0.0, 0.0, 0.0, x
    d = largest = o.d0
    sizes = [math.prod(shape) for shape in SHAPES]  # each parameter is sliced by itself
    seen = np.concatenate(
        [
            start + np.arange(0, size, o.slice_p)
            for start, size in zip(np.cumsum([0, *sizes]), sizes, strict=False)
        ]
    )
    s = np.zeros(len(seen))
    decay = (o.weight_decay, 0.0) if o.decouple else (0.0, o.weight_decay)
    for k, g in enumerate(gradients):
        rate, g = d * o.lr * o.correction(k), g + decay[1] * x
        r = beta3 * r + d / o.d0 * rate * (g[seen] @ (x0 - x)[seen])
        s = beta3 * s + d / o.d0 * (d if o.safeguard_warmup else rate) * g[seen]
        m = beta1 * m + (1 - beta1) * d * g
        v = beta2 * v + (1 - beta2) * d * d * g * g
        d_hat = o.d_coef * r / np.abs(s).sum()
        d = max(d, d_hat) if d == o.d0 else d
        largest = max(largest, d_hat)
        d = min(largest, d * o.growth_rate)
        x = x - rate * (decay[0] * x + m / (np.sqrt(v) + d * o.epsilon))
    return x, d


@dataclass(frozen=True)
class Case:
    """How one optimizer is tested.

    `agrees` is the largest difference from the equations, relative to the longest way that a weight has come,
    among a share of the weights: a sign may fall otherwise where what decides is 0 to within rounding, and
    bitsandbytes does not always take the nearest code.
    """

    equations: Callable
    lr: float = 1.0
    settings: dict = field(default_factory=dict)
    """The settings of the comparison with the equations: every option away from its default."""
    bytes: float = field(kw_only=True)
    """Bytes of state for each parameter, on a large weight."""
    library: str = ""
    """The module without which it cannot be built; its first part is the package."""
    first_step: float = 1.0
    """Length of each weight's first step over the measured rate; NaN: it depends on the gradient."""
    dtype: torch.dtype = torch.float64
    share: float = 1.0
    agrees: float = 1e-9
    d_agrees: float = 1e-9
    tiny: dict = field(default_factory=dict)
    """Settings under which a factor on the loss cancels: nothing is added to the gradient or to its root."""


ADAM = {"epsilon": 1e-5, "betas": (0.8, 0.95), "weight_decay": 0.3}
LION = {"betas": (0.8, 0.95), "weight_decay": 0.3}
GROWING = {**ADAM, "d0": 1e-4, "growth_rate": 1.3, "decouple": False, "lr": 0.7}
DADAPT = {**GROWING, "layer_scale": 0.5, "use_bias_correction": True}
FUSED = {"fused_backward": True}
PRODIGY = {**GROWING, "use_bias_correction": False, "safeguard_warmup": False, "d_coef": 1.5, "slice_p": 3}
SGD = {"momentum": 0.6, "weight_decay": 0.05, "d0": 1e-2, "growth_rate": 1.3, "lr": 0.7}
BITSANDBYTES, DADAPTATION = "bitsandbytes.optim", "dadaptation"
UNCORRECTED = 0.1 / math.sqrt(0.001)
"""The first step of an Adam without bias correction: (1 - beta1) / sqrt(1 - beta2)."""
IN_BLOCKS = {"dtype": torch.float32, "library": BITSANDBYTES}
FREE = {"d_max": 1e3, "rate_max": 1e3}
CASES = {
    "adamw": Case(adamw, 1e-2, ADAM, bytes=8, tiny={"epsilon": 1e-300}),
    "adamw8bit": Case(
        adamw_in_blocks, 1e-2, ADAM, bytes=2.03, **IN_BLOCKS, share=0.9, agrees=1e-3, tiny={"epsilon": 1e-37}
    ),
    "adamw8bit_fused": Case(
        adamw,
        1e-2,
        {**ADAM, **FUSED},
        bytes=2.01,
        dtype=torch.float32,
        share=0.95,
        agrees=0.1,
        tiny={"epsilon": 1e-37},
    ),
    "lion": Case(lion, 1e-2, LION, bytes=4, **IN_BLOCKS, share=0.99, agrees=1e-5),
    "lion8bit": Case(lion_in_blocks, 1e-2, LION, bytes=1.02, **IN_BLOCKS, share=0.99, agrees=1e-5),
    "dadapt_adam": Case(
        dadapt_adam,
        settings={**DADAPT, **FUSED, "d_max": 3e-3, "rate_max": 5e-4},
        bytes=12,
        first_step=UNCORRECTED,
        tiny={"epsilon": 1e-300, "d0": 1e-4},
    ),
    "dadapt_adam8bit": Case(
        dadapt_adam,
        settings={**DADAPT, **FUSED, **FREE},
        bytes=2.08,
        first_step=UNCORRECTED,
        dtype=torch.float32,
        share=0.99,
        agrees=0.1,
        d_agrees=0.05,
        tiny={"epsilon": 1e-37, "d0": 1e-4},
    ),
    "dadapt_adam_reference": Case(
        dadapt_adam,
        settings=DADAPT,
        bytes=12,
        library=DADAPTATION,
        first_step=UNCORRECTED,
        tiny={"epsilon": 1e-300, "d0": 1e-4},
    ),
    "dadapt_lion": Case(
        dadapt_lion,
        settings={**LION, "d0": 1e-4, "lr": 0.7},
        bytes=8,
        library=DADAPTATION,
        tiny={"d0": 1e-4},
    ),
    "dadapt_sgd": Case(
        dadapt_sgd, settings=SGD, bytes=12, library=DADAPTATION, first_step=math.nan, tiny={"d0": 1e-4}
    ),
    "prodigy": Case(
        prodigy,
        settings=PRODIGY,
        bytes=16,
        library="prodigyopt",
        first_step=UNCORRECTED,
        tiny={"epsilon": 1e-300, "d0": 1e-4},
    ),
}


def options_of(name, **settings) -> ScheduleOptions:
    return optimizer_classes()[name](**{"lr": CASES[name].lr, **settings})


def parameters(dtype=torch.float32, seed=0):
    """Return the parameters, the second with the strides of channels last."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in SHAPES]
    drawn[1] = drawn[1].to(memory_format=torch.channels_last)
    return [torch.nn.Parameter(value) for value in drawn]


@cache
def gradient(shape, step, index, dtype):
    """Gradients independent of weights, half equal from step to step, over four orders of magnitude."""
    generator = torch.Generator().manual_seed(1000 * step + index)
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    direction = torch.linspace(-1, 1, math.prod(shape), dtype=torch.float64).sign().view(shape)
    scale = torch.logspace(-3, 1, math.prod(shape), dtype=torch.float64).view(shape)
    return (scale * (0.5 * direction + noise)).to(dtype)


def give_gradients(params, step, scale=1.0, missing=()):
    for index, p in enumerate(params):
        # With the strides of the parameter, as autograd gives it.
        p.grad = (
            None
            if index in missing
            else torch.empty_like(p).copy_(scale * gradient(p.shape, step, index, p.dtype))
        )


def train(optimizer, params, steps, first=0, scale=1.0, missing=lambda step: ()):
    """Step; return d before each step, for optimizers that have one."""
    ds = []
    for step in range(first, first + steps):
        ds.append(optimizer.param_groups[0].get("d"))
        give_gradients(params, step, scale, missing(step))
        optimizer.step()
    return [float(d) for d in ds if d is not None]


def flat(tensors):
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def make_set(options, params, steps=100):
    """Return the parameters as two networks of a run."""
    networks = {"unet": params[:2], "text encoder": params[2:]}
    return OptimizerSet(dict.fromkeys(networks, options), networks, total_steps=steps)


def train_set(optimizers, params, steps, first=0, missing=lambda step: ()):
    for step in range(first, first + steps):
        optimizers.set_rates(step)
        give_gradients(params, step, missing=missing(step))
        optimizers.step(torch.tensor(0.0))
        optimizers.zero_grad()


def everything(optimizers, params):
    """Return what a step may change, as pairs of a place and a tensor or number, copied."""
    found = [(f"weights.{index}", p.detach().clone()) for index, p in enumerate(params)]

    def walk(value, place):
        if isinstance(value, torch.Tensor):
            found.append((place, value.detach().clone()))
        elif isinstance(value, dict):
            for key, item in value.items():
                walk(item, f"{place}.{key}")
        elif isinstance(value, (list, tuple)):
            for number, item in enumerate(value):
                walk(item, f"{place}.{number}")
        else:
            found.append((place, value))

    walk(optimizers.state_dict(), "state")
    return found


def assert_same(found, expected):
    assert [place for place, _ in found] == [place for place, _ in expected]
    for (place, a), (_, b) in zip(found, expected, strict=True):
        assert torch.equal(a, b) if isinstance(b, torch.Tensor) else a == b, place


@pytest.mark.parametrize("defaults", [True, False], ids=["defaults", "every option changed"])
@pytest.mark.parametrize("name", NAMES)
def test_steps_are_those_of_the_equations(name, defaults):
    case = CASES[name]
    options = options_of(name, **({} if defaults else case.settings))
    params = parameters(case.dtype)
    start = flat(params).double().numpy()
    optimizer = options.build(params, options.lr)
    train(optimizer, params, 40)
    pieces = [
        [gradient(shape, step, i, case.dtype).double().numpy().ravel() for i, shape in enumerate(SHAPES)]
        for step in range(40)
    ]
    gradients = [np.concatenate(piece) for piece in pieces]
    expected, d = case.equations(start, gradients, options)
    moved = np.abs(expected - start).max()
    assert moved > 1e-5
    off = np.sort(np.abs(flat(params).double().numpy() - expected)) / moved
    assert off[int(case.share * (len(off) - 1))] < case.agrees
    if d is not None:
        assert d > 1.5 * options.d0, "d has to grow for this to show anything"
        assert float(optimizer.param_groups[0]["d"]) == pytest.approx(d, rel=case.d_agrees)


@pytest.mark.parametrize("name", NAMES)
def test_every_option_is_away_from_its_default_in_the_test_against_the_equations(name):
    keys = set(keys_of(optimizer_classes()[name])) - {"optimizer", *keys_of(ScheduleOptions)}
    assert set(CASES[name].settings) - {"lr"} == keys
    assert all(CASES[name].settings[key] != keys_of(optimizer_classes()[name])[key].default for key in keys)


SHOWING = {"d0": 3e-4, "growth_rate": 1.001, "d_max": 2e-4, "rate_max": 1e-4, "slice_p": 2}
"""Values that change the first 30 steps, of keys whose value in `Case.settings` might not."""
GROUP_KEYS = {"epsilon": "eps", "d0": "d"}


@pytest.mark.parametrize(
    ("name", "key"),
    [
        (name, key)
        for name, case in CASES.items()
        for key in case.settings
        if key not in ("lr", "fused_backward")  # which changes memory and not the path
    ],
)
def test_every_key_reaches_the_library_and_does_something(name, key):
    around = {"decouple": {"weight_decay": 0.1}, "safeguard_warmup": {"lr": 0.5}}.get(key, {})
    plain = options_of(name, **around, **({"d0": 1e-4} if name in ADAPTIVE else {}))
    value = SHOWING.get(key, CASES[name].settings[key])
    paths = []
    for options in (plain, replace(plain, **{key: value})):
        params = parameters()
        optimizer = options.build(params, options.lr)
        group = optimizer.param_groups[0]
        assert group[GROUP_KEYS.get(key, key)] == getattr(options, key)
        assert getattr(options, key) == value or options is plain
        train(optimizer, params, 30)
        paths.append(flat(params))
    assert not torch.equal(*paths)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.library])
def test_a_library_that_is_not_installed_is_said_in_a_sentence(name, monkeypatch):
    library = CASES[name].library.partition(".")[0]
    monkeypatch.setitem(sys.modules, CASES[name].library, None)
    for ours in ("dadapt_sgd", "strided"):  # which derive from a library's class
        monkeypatch.delitem(sys.modules, f"trainer.optim.{ours}", raising=False)
    with pytest.raises(
        UserError, match=rf"^optimizer {name}: {library} does not load .*`pip install {library}`, or choose"
    ):
        options_of(name).build(parameters(), 1.0)


@pytest.mark.parametrize("name", get_args(SchedulerName))
@pytest.mark.parametrize("lr", [1.0, 1e-6, 5e-8, 1e-10])
@pytest.mark.parametrize("warmup", [0, 10, 20])
def test_every_schedule_is_diffusers_and_bears_every_rate(name, lr, warmup):
    options = ScheduleOptions(lr=lr, lr_scheduler=name, lr_warmup_steps=warmup, lr_decay_steps=20)
    factor = rate_factor(options, 15)
    factors = [factor(step) for step in range(30)]
    assert all(0 <= value <= 1 for value in factors) and max(factors) > 0.9
    if name == "polynomial" and warmup < 20:
        assert factors[warmup:21] == sorted(factors[warmup:21], reverse=True) and lr * factors[
            20
        ] == pytest.approx(min(1e-7, lr / 10))
    if lr >= 1e-6 and (name, warmup) != ("polynomial", 20):  # where diffusers divides by 0
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=lr)
        theirs = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=20)
        assert factors == pytest.approx([theirs.lr_lambdas[0](step) for step in range(30)])


@pytest.mark.parametrize("name", NAMES)
def test_building_and_stepping_prints_nothing(name, capfd):
    params = parameters()
    options = options_of(name)
    train(options.build(params, options.lr), params, 2)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("name", "slices"), [*((name, None) for name in NAMES), ("prodigy", 11)])
def test_bytes_of_state_for_each_parameter(name, slices):
    """On a large weight; the figures of docs/optimizers.md."""
    p = torch.nn.Parameter(torch.ones(640, 320))
    options = options_of(name, **({"slice_p": slices} if slices else {}))
    optimizer = options.build([p], options.lr)
    p.grad = torch.ones_like(p)
    optimizer.step()
    own = {
        key: value
        for key, value in optimizer.state[p].items()
        if isinstance(value, torch.Tensor) and not key.startswith("qmap")
    }
    stored = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in own.values()}
    expected = 8.73 if slices else CASES[name].bytes
    assert sum(stored.values()) / p.numel() == pytest.approx(expected, rel=2e-2)


@pytest.mark.parametrize("name", NAMES)
def test_two_runs_are_equal_to_the_bit(name):
    runs = []
    for _ in range(2):
        params = parameters()
        optimizers = make_set(options_of(name, **CASES[name].settings), params)
        train_set(optimizers, params, 20)
        runs.append(everything(optimizers, params))
    assert_same(*runs)


@pytest.mark.parametrize("settings", [False, True], ids=["defaults", "every option changed"])
@pytest.mark.parametrize("name", NAMES)
def test_state_on_disk_continues_a_run_to_the_bit(name, settings, tmp_path):
    """With a warm-up from 0, and gradients that are missing now and then, before and after."""

    def missing(step):
        return (step % 3,) if step % 4 == 1 or step == 0 else ()

    brake = (
        {"growth_rate": 1.001} if settings and "growth_rate" in CASES[name].settings else {}
    )  # so that d stays behind its estimate
    options = options_of(
        name, lr_scheduler="cosine", lr_warmup_steps=4, **(CASES[name].settings if settings else {}) | brake
    )
    params = parameters()
    optimizers = make_set(options, params)
    train_set(optimizers, params, 10, missing=missing)
    write_state(optimizers.state_dict(), tmp_path / "optimizers")
    weights = [p.detach().contiguous().clone() for p in params]
    measures = {
        (network, key): float(value)
        for network, found in optimizers.measures().items()
        for key, value in found.items()
    }
    train_set(optimizers, params, 9, first=10, missing=missing)

    again = parameters(seed=1)
    resumed = make_set(options, again)
    for p, weight in zip(again, weights, strict=True):
        p.data.copy_(weight)
    resumed.load_state_dict(read_state(tmp_path / "optimizers"))
    resumed.set_rates(9)
    for (network, key), expected in measures.items():
        assert float(resumed.measures()[network][key]) == expected, (
            "what is logged after going on is what would have been logged"
        )
    train_set(resumed, again, 9, first=10, missing=missing)
    assert_same(everything(resumed, again), everything(optimizers, params))
    for found, expected in zip(resumed.optimizers, optimizers.optimizers, strict=True):
        groups = [
            {key: optimizer.param_groups[0][key] for key in optimizer.param_groups[0]}
            for optimizer in (found, expected)
        ]
        assert all(groups[0][key] == groups[1][key] for key in groups[1].keys() - {"params"}), (
            "an entry is missing in learned_keys"
        )


@pytest.mark.parametrize("name", NAMES)
def test_state_before_the_first_step_goes_to_disk_and_back(name, tmp_path):
    """As where every step so far was skipped."""
    params = parameters()
    optimizers = make_set(options_of(name), params)
    write_state(optimizers.state_dict(), tmp_path / "optimizers")
    again = parameters()
    resumed = make_set(options_of(name), again)
    resumed.load_state_dict(read_state(tmp_path / "optimizers"))
    train_set(optimizers, params, 3)
    train_set(resumed, again, 3)
    assert_same(everything(resumed, again), everything(optimizers, params))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", NAMES)
def test_a_gradient_that_is_not_finite_changes_nothing_in_any_network(name, bad):
    params = parameters()
    optimizers = make_set(options_of(name), params)
    train_set(optimizers, params, 3)
    before = everything(optimizers, params)
    give_gradients(params, 3)
    params[2].grad[1] = bad
    _, found_inf = finish_gradients(optimizers.parameters, optimizers.optimizers, scaler=None, clip=None)
    optimizers.step(found_inf)
    after = everything(optimizers, params)
    uncounted = [
        entry for entry in after if not entry[0].endswith("adaptation.steps")
    ]  # counts calls, which key the rounding
    assert_same(uncounted, [entry for entry in before if not entry[0].endswith("adaptation.steps")])
    train_set(optimizers, params, 1, first=4)
    assert not torch.equal(params[0].detach(), before[0][1])


@pytest.mark.parametrize("name", NAMES)
def test_weights_keep_their_strides(name):
    """Channels last, and dimensions of 1, whose strides say nothing."""
    shapes = [(16, 24, 3, 3), (16, 24, 1, 1), (1, 40, 3, 3)]
    params = [
        torch.nn.Parameter(torch.zeros(shape).to(memory_format=torch.channels_last)) for shape in shapes
    ]
    options = options_of(name)
    optimizer = options.build(params, options.lr)
    for _ in range(2):
        for index, p in enumerate(params):
            p.grad = gradient(p.shape, 0, index, p.dtype).to(memory_format=torch.channels_last)
        before = [(p.stride(), p.data_ptr(), p.grad) for p in params]
        optimizer.step()
        assert [(p.stride(), p.data_ptr()) for p in params] == [
            (stride, place) for stride, place, _ in before
        ]
        assert all(p.grad is kept for p, (_, _, kept) in zip(params, before, strict=True))
    signs = [
        (-p.detach().sign() == gradient(p.shape, 0, index, p.dtype).sign()).all()
        for index, p in enumerate(params)
    ]
    assert all(signs), "every weight went against its own gradient"


@pytest.mark.parametrize("name", NAMES)
def test_a_parameter_without_gradients_stays_as_it_is(name):
    params = parameters()
    optimizers = make_set(options_of(name), params)
    start = [p.detach().clone() for p in params]
    train_set(optimizers, params, 3, missing=lambda step: (1,))
    assert torch.equal(params[1].detach(), start[1])
    assert not torch.equal(params[0].detach(), start[0]) and not torch.equal(params[2].detach(), start[2])


@pytest.mark.parametrize("when", [0, 3])
@pytest.mark.parametrize("name", NAMES)
def test_a_step_without_any_gradient_changes_nothing(name, when):
    params = parameters()
    options = options_of(name)
    optimizer = options.build(params, options.lr)
    train(optimizer, params, when)
    start, d = flat(params), optimizer.param_groups[0].get("d")
    train(optimizer, params, 2, first=when, missing=lambda step: (0, 1, 2))
    assert torch.equal(flat(params), start) and optimizer.param_groups[0].get("d") == d
    train(optimizer, params, 2, first=when)
    assert flat(params).isfinite().all() and not torch.equal(flat(params), start)


@pytest.mark.parametrize("when", [0, 3])
@pytest.mark.parametrize("name", NAMES)
def test_zero_gradients_do_no_harm(name, when):
    params = parameters()
    options = options_of(name, weight_decay=0.0)
    optimizer = options.build(params, options.lr)
    train(optimizer, params, when)
    start, d = flat(params), optimizer.param_groups[0].get("d")
    train(optimizer, params, 2, first=when, scale=0.0)
    if when == 0:
        assert torch.equal(flat(params), start), "nothing to go by"
    assert d is None or float(optimizer.param_groups[0]["d"]) >= float(d)
    train(optimizer, params, 6, first=when)
    assert flat(params).isfinite().all() and not torch.equal(flat(params), start)
    assert d is None or math.isfinite(optimizer.param_groups[0]["d"])


@pytest.mark.parametrize("name", NAMES)
def test_a_step_at_rate_zero_moves_no_weight_and_no_d(name):
    """The first step of every warm-up, and a restart in the middle."""
    params = parameters()
    options = options_of(name)
    optimizer = options.build(params, options.lr)
    for steps in (0, 8):
        train(optimizer, params, steps)
        start, d = flat(params), optimizer.param_groups[0].get("d")
        optimizer.param_groups[0]["lr"] = 0.0
        train(optimizer, params, 2, first=steps)
        assert torch.equal(flat(params), start), steps
        assert optimizer.param_groups[0].get("d") == d
        optimizer.param_groups[0]["lr"] = options.lr
    train(optimizer, params, 2, first=10)
    assert flat(params).isfinite().all() and not torch.equal(flat(params), start)


@pytest.mark.parametrize("name", NAMES)
def test_a_constant_factor_on_the_loss_leaves_the_path_unchanged(name):
    """A power of two, which is exact in binary."""
    case = CASES[name]
    paths = []
    for scale in (1.0, 2.0**12):
        params = parameters(case.dtype)
        options = options_of(name, **case.tiny)
        optimizer = options.build(params, options.lr)
        ds = train(optimizer, params, 30, scale=scale)
        paths.append((flat(params), torch.tensor(ds)))
    for found, expected in zip(*paths, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    assert name not in ADAPTIVE or paths[0][1][-1] > 1e-4


@pytest.mark.parametrize("name", ADAPTIVE)
def test_d_never_falls(name):
    params = parameters()
    options = options_of(name)
    ds = train(options.build(params, options.lr), params, 60)
    assert all(later >= earlier for earlier, later in itertools.pairwise(ds))
    assert ds[-1] > ds[0] == pytest.approx(1e-6)


@pytest.mark.parametrize("name", ["lion", "lion8bit", "dadapt_lion"])
def test_every_weight_moves_by_the_rate(name):
    options = options_of(name, weight_decay=0.0)
    params = [torch.nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
    optimizer = options.build(params, options.lr)
    for step in range(4):
        before, rate = flat(params), options.measure(optimizer)["rate"]
        train(optimizer, params, 1, first=step)
        torch.testing.assert_close(
            (flat(params) - before).abs(), torch.full_like(before, rate), rtol=1e-5, atol=0
        )


RATE_KEYS = [
    (name, key)
    for name in NAMES
    for key in ("lr", "d0", "layer_scale")
    if key in keys_of(optimizer_classes()[name])
]


@pytest.mark.parametrize(("name", "key"), RATE_KEYS)
def test_the_measured_rate_is_what_acts(name, key):
    """By the length of the first step."""
    growth = {"growth_rate": 1.0} if "growth_rate" in keys_of(optimizer_classes()[name]) else {}
    options = options_of(name, weight_decay=0.0, **growth)
    options = replace(options, **{key: 0.25 * getattr(options, key)})
    params = [torch.nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
    optimizer = options.build(params, options.lr)
    rate = float(options.measure(optimizer)["rate"])
    train(optimizer, params, 1)
    length = flat(params).norm().item()
    each = CASES[name].first_step
    if math.isnan(each):  # it divides by the first gradient, and goes along it
        assert rate == 0
        rate = options.measure(optimizer)["rate"]
        assert length == pytest.approx(rate * flat([p.grad for p in params]).norm().item(), rel=1e-4)
    else:
        assert length == pytest.approx(rate * each * math.sqrt(flat(params).numel()), rel=1e-2)


@pytest.mark.parametrize("name", NAMES)
def test_it_converges(name):
    """Minimise the mean of |p - target| in 300 steps of a falling rate, given or estimated."""
    torch.manual_seed(0)
    target = torch.randn(5120)
    p = torch.nn.Parameter(torch.zeros(5120))
    options = options_of(
        name,
        lr=1.0 if name in ADAPTIVE else 2e-2,
        lr_scheduler="linear",
        lr_decay_steps=300,
        lr_warmup_steps=0,
        weight_decay=0.0,
    )
    optimizers = OptimizerSet({"unet": options}, {"unet": [p]}, total_steps=300)
    for step in range(300):
        optimizers.set_rates(step)
        (p - target).abs().mean().backward()
        optimizers.step(torch.tensor(0.0))
        optimizers.zero_grad()
    assert (p - target).abs().mean() < 0.05
