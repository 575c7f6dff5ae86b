"""What is known of a base, and what a run's curves keep."""

import json
import math
import re

import pytest
import torch
from huggingface_hub import metadata_load

from tests.tiny import tiny_models
from trainer.checkpoints.artifact import Adapters, WholeModel
from trainer.checkpoints.format import TrainState
from trainer.models.options import LoraOptions
from trainer.models.tensor_file import write_tensors
from trainer.reporting.curves import MOST, Curves
from trainer.reporting.model_card import OPENRAIL, PAGE, Card, Origin, origin_of


def test_the_licence_of_a_base_is_told_only_where_it_is_known(tmp_path):
    assert origin_of("stable-diffusion-v1-5/stable-diffusion-v1-5").license == OPENRAIL
    assert origin_of("someone/something") == Origin("someone/something", "someone/something", None)
    assert origin_of("models/mini-sd") == Origin("mini-sd", None, "apache-2.0")
    folder = tmp_path / "model"
    folder.mkdir()
    assert origin_of(str(folder)) == Origin("model")
    for text in (
        "no header",
        "---\nlicense: [1\n---\n",
        "---\nlicense: 3\n---\n",
        "---\n- a\n---\n",
        f"---\na: {'[' * 5000}\n---\n",
    ):
        (folder / PAGE).write_text(text)
        assert origin_of(str(folder)) == Origin("model"), text
    for said, license_ in (
        ("", None),
        ("CreativeML Open RAIL-M", OPENRAIL),
        ("CreativeML Open RAIL++-M", None),
        ("my own", None),
    ):
        write_tensors(
            tmp_path / "a.safetensors", {"x": torch.zeros(1)}, torch.float32, {"modelspec.license": said}
        )
        assert origin_of(str(tmp_path / "a.safetensors")) == Origin("a", license=license_)
    (tmp_path / "old.ckpt").write_bytes(b"pickle")
    assert origin_of(str(tmp_path / "old.ckpt")) == Origin("old")


@pytest.mark.parametrize("lora", [False, True])
def test_a_page_without_curves_and_samples_has_a_header_for_the_hub(tmp_path, lora):
    base = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    card = Card(
        project="my faces",
        origin=origin_of(base),
        curves=Curves({"loss": "loss"}, {"rate": "unet"}),
        state=TrainState(step=1200, images=4800, seconds=600),
        total_steps=1200,
        losses={"loss": "loss"},
        rates={"unet": "rate"},
        plan=[("seed", "5")],
        files={"train.json": '{"lr": 1e-5}'},
        artifact=Adapters(LoraOptions(), tiny_models(), None) if lora else WholeModel(tiny_models()),
    )
    card.write(tmp_path, tmp_path / "samples")
    assert [path.name for path in tmp_path.iterdir()] == [PAGE]
    header = metadata_load(tmp_path / PAGE)
    assert header is not None and header["license"] == OPENRAIL and header["base_model"] == base
    assert (
        header["base_model_relation"] == ("adapter" if lora else "finetune")
        and ("lora" in header["tags"]) == lora
    )
    text = (tmp_path / PAGE).read_text()
    assert f"[{base}](https://huggingface.co/{base}): 1,200 of 1,200 steps, 4,800 images." in text
    assert (
        'load_lora_weights("YOUR_NAME/my-faces")' if lora else 'from_pretrained("YOUR_NAME/my-faces")'
    ) in text
    assert "| time | 10.0 minutes of training |" in text and "![" not in text and "Open RAIL-M" in text


HOSTILE = "x](http://evil) <script>alert(1)</script> `a` | b\n\n# c \x1b[31m\u202e ![i](http://evil/i.png)"


@pytest.mark.parametrize("lora", [False, True])
def test_names_and_licences_of_strangers_are_text_on_the_page_and_nothing_else(tmp_path, lora):
    folder = tmp_path / "".join(letter for letter in HOSTILE if letter not in "/\x00")
    folder.mkdir()
    (folder / PAGE).write_text(f"---\nlicense: {HOSTILE!r}\nbase_model: {HOSTILE!r}\n---\n")
    origin = origin_of(str(folder))
    assert (origin.license, origin.hub) == (None, None)
    card = Card(
        project=HOSTILE,
        origin=origin,
        curves=Curves({"loss": "loss"}, {"rate": "unet"}),
        state=TrainState(),
        total_steps=1,
        losses={},
        rates={},
        plan=[("unet", HOSTILE)],
        files={"train.json": json.dumps({"project_name": HOSTILE + "```"})},
        artifact=Adapters(LoraOptions(), tiny_models(), None) if lora else WholeModel(tiny_models()),
    )
    card.load_state_dict({"name": folder.name, "hub": HOSTILE, "license": HOSTILE})
    card.write(tmp_path, tmp_path / "samples")
    text = (tmp_path / PAGE).read_text()
    shown = re.sub(r"```.*?\n```", "", text, flags=re.DOTALL)
    assert "\x1b" not in text and "\u202e" not in shown and "\n# c" not in text
    shown = re.sub(r"`[^`\n]*`|\\.", "", shown)  # code spans and what is escaped
    assert not re.search(r"\]\(http://evil|<script|!\[i\]", shown)
    assert "from_pretrained(" in text and compile(
        text.partition("```python\n")[2].partition("\n```")[0], "page", "exec"
    )


def test_long_curves_are_thinned_and_continued_ones_end_as_whole_ones(tmp_path):
    whole, first, second = (Curves({"loss": "l"}, {"rate": "r"}, noisy="loss") for _ in range(3))
    for step in range(2 * MOST):
        values = {"loss": math.nan if step % 7 == 0 else 1 / (1 + step), "rate": 0.0, "other": 1.0}
        whole.scalars(values, step)
        if step == MOST + 5:
            second.load_state_dict(first.state_dict() | {"gone": [[0, 1.0]]})
        (first if step < MOST + 5 else second).scalars(values, step)
    assert str(second.state_dict()) == str(whole.state_dict())  # NaN is not equal to itself
    points = whole.points("rate")
    assert points[0] == (0, 0.0) and MOST // 2 < len(points) <= MOST and points[-1][0] == 2 * MOST - 1
    assert (
        all(math.isfinite(value) for _, value in whole.points("loss"))
        and whole.begun
        and not Curves({"loss": "l"}, {}).begun
    )
    whole.draw(tmp_path / "picture")  # a rate of 0 has no logarithm
    assert (tmp_path / "picture").read_bytes().startswith(b"\x89PNG")


def test_steps_that_were_taken_back_are_made_again():
    curves = Curves({"loss": "l"}, {})
    for step, value in ((0, 5.0), (2, 4.0), (4, math.nan), (6, math.nan), (4, 3.0)):
        curves.scalars({"loss": value}, step)
    assert curves.state_dict() == {"loss": [[0, 5.0], [2, 4.0], [4, 3.0]]}
