import json

import pytest
import torch
from safetensors.torch import save_file

from scripts.same_results import digest_of_losses, digest_of_tensors


def test_a_changed_bit_or_name_changes_the_digest_of_tensors_and_metadata_does_not(tmp_path):
    def digest(name="weight", value=1.0, metadata="old"):
        file = tmp_path / "model.safetensors"
        save_file({name: torch.tensor([0.5, value]), "other": torch.zeros(2, 2)}, file, {"made": metadata})
        return digest_of_tensors([file], tmp_path)

    assert digest() == digest(metadata="newer")
    assert len({digest(), digest(value=1.0 + 2**-23), digest(name="renamed")}) == 3


def test_losses_are_compared_and_speed_is_not(tmp_path):
    def digest(*rows):
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return digest_of_losses(tmp_path)

    row = {"step": 1, "loss/log_step": 0.25, "performance/images per second": 3.0}
    assert digest(row) == digest({**row, "performance/images per second": 4.0})
    assert len({digest(row), digest({**row, "step": 2}), digest({**row, "loss/log_step": 0.25000001})}) == 3


def test_nothing_is_not_equal_to_nothing(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "performance/ram": 1.0}\n')
    with pytest.raises(SystemExit, match="no losses"):
        digest_of_losses(tmp_path)
    with pytest.raises(SystemExit, match="no tensors"):
        digest_of_tensors([], tmp_path)
