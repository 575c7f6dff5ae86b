"""State on disk comes back bit for bit."""

import math

import pytest
import torch
from safetensors.torch import load_file

from trainer.state import read_state, write_state


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
