"""State on disk comes back bit for bit."""

import math

import pytest
import torch
from safetensors.torch import load_file

from trainer.config.schema import optimizer_classes
from trainer.optim.optimizer_set import OptimizerSet
from trainer.state_file import read_entry, read_state, write_state


def test_round_trip_of_every_kind_of_value(tmp_path):
    shared = torch.randn(256)
    state = {
        "numbers": [1, -2.5, 1e-308, 0.1, math.inf, -math.inf, True, None, "text"],
        "nested": {
            0: {"exp_avg": torch.randn(3, 4), "map": shared},
            1: {"codes": torch.randint(0, 255, (5,), dtype=torch.uint8), "map": shared},
        },
        "tuple": (0.9, 0.999),
        "half": torch.randn(7).to(torch.bfloat16),
        "transposed": torch.randn(3, 5).t(),
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "$odd": {"$tensor": 1},
    }
    write_state(state, tmp_path / "state")
    back = read_state(tmp_path / "state")

    assert back["numbers"] == state["numbers"]
    assert back["tuple"] == (0.9, 0.999) and isinstance(back["tuple"], tuple)
    assert list(back["nested"]) == [0, 1]
    for key in ("half", "transposed", "channels_last", "empty", "scalar"):
        assert back[key].dtype == state[key].dtype and torch.equal(back[key], state[key]), key
    for number in (0, 1):
        for key, tensor in state["nested"][number].items():
            assert torch.equal(back["nested"][number][key], tensor)
    assert back["$odd"] == {"$tensor": 1}


def test_shared_tensors_are_written_once_and_the_file_is_plain_safetensors(tmp_path):
    shared = torch.randn(1000)
    write_state([shared, shared, shared], tmp_path / "state")
    tensors = load_file(tmp_path / "state.safetensors")
    assert len(tensors) == 1 and torch.equal(next(iter(tensors.values())), shared)


def test_what_cannot_be_saved_is_named(tmp_path):
    with pytest.raises(TypeError, match=r"state\.a\.1: a set"):
        write_state({"a": [0, {1}]}, tmp_path / "state")


@pytest.mark.parametrize("name", ["adamw", "dadapt_adam"])
def test_state_of_another_length_than_its_weights_is_refused(name):
    """Torch would accept it, and fail in the first step."""
    weights = [torch.nn.Parameter(torch.ones(4, 4)), torch.nn.Parameter(torch.ones(4))]
    optimizers = OptimizerSet({"unet": optimizer_classes()[name](lr=1e-3)}, {"unet": weights}, total_steps=9)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizers.step(torch.tensor(0.0))
    saved = optimizers.state_dict()
    optimizers.load_state_dict(saved)
    moment = next(key for key, value in saved["unet"]["state"][1].items() if value.shape == (4,))
    saved["unet"]["state"][1][moment] = torch.zeros(3)
    with pytest.raises(ValueError, match=rf"{moment} of \(3,\) beside weights of \(4,\)"):
        optimizers.load_state_dict(saved)


def _flat(value, name=""):
    if isinstance(value, dict):
        return {
            key: item for part, inner in value.items() for key, item in _flat(inner, f"{name}.{part}").items()
        }
    if isinstance(value, (list, tuple)):
        return _flat(dict(enumerate(value)), name)
    return {name: value}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", optimizer_classes())
def test_every_optimizers_state_comes_back_in_its_own_dtype_whatever_its_weights_have(tmp_path, name, dtype):
    """torch's own loading would cast floating-point state to the dtype of the weights."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((64, 80), (7,))
    weights = [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]
    options = {"unet": optimizer_classes()[name](lr=1e-2)}
    gradients = [[torch.randn(shape, generator=generator).to(dtype) for shape in shapes] for _ in range(4)]

    def step(optimizers, parameters, number):
        optimizers.set_rates(number)
        for parameter, gradient in zip(parameters, gradients[number], strict=True):
            parameter.grad = gradient.clone()
        optimizers.step(torch.tensor(0.0))

    first = OptimizerSet(options, {"unet": weights}, total_steps=10)
    for number in range(3):
        step(first, weights, number)
    write_state(first.state_dict(), tmp_path / "state")
    copies = [torch.nn.Parameter(weight.detach().clone()) for weight in weights]
    second = OptimizerSet(options, {"unet": copies}, total_steps=10)
    second.load_state_dict(read_state(tmp_path / "state"))
    step(first, weights, 3)
    step(second, copies, 3)
    left, right = _flat(first.state_dict()), _flat(second.state_dict())
    assert left.keys() == right.keys()
    for key, value in left.items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == right[key].dtype and torch.equal(value, right[key]), key
        else:
            assert value == right[key], key
    assert all(torch.equal(one, other) for one, other in zip(weights, copies, strict=True))


def test_the_scale_of_fp16_goes_on(tmp_path):
    scaler, again = (torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3) for _ in range(2))
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    for factor in (1.0, float("inf"), 1.0, 1.0):
        scaler.scale((weight * factor).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    write_state(scaler.state_dict(), tmp_path / "scaler")
    again.load_state_dict(read_state(tmp_path / "scaler"))
    assert again.state_dict() == scaler.state_dict() and again.get_scale() == 2.0**9


def test_one_entry_is_read_by_its_place(tmp_path):
    state = {
        "optimizers": {"unet": {"state": {0: {"s": torch.zeros(9)}, "adaptation": {"d": torch.tensor(0.5)}}}}
    }
    state["groups"] = [{"d": 2.5}]
    write_state(state, tmp_path / "state")
    assert read_entry(tmp_path / "state", "optimizers", "unet", "state", "adaptation", "d") == 0.5
    assert read_entry(tmp_path / "state", "groups", 0, "d") == 2.5
    for place in (("optimizers", "unet", "state", 1), ("groups", 1), ("optimizers", "vae")):
        with pytest.raises(LookupError):
            read_entry(tmp_path / "state", *place)
