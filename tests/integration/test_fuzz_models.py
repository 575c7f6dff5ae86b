"""Damaged model folders and files: each ends in one sentence, or is a model that works."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch

from tests.tiny import tiny_models, write_tiny_folder
from trainer.checkpoints.export import save_single_file
from trainer.errors import UserError
from trainer.models.load import load_models
from trainer.models.options import ModelOptions
from trainer.models.single_file import to_original

VALUES = (
    None,
    True,
    0,
    -1,
    10**7,
    10**30,
    0.5,
    float("nan"),
    "",
    "x",
    "../../x",
    [],
    [0],
    [8] * 1000,
    {},
    {"a": 1},
)


def spoil(path, draw):
    """Damage a file: its bytes, or a value of its JSON."""
    if path.suffix == ".json" and draw.random() < 0.7:
        content = json.loads(path.read_text())
        place = content
        while True:
            key = draw.choice(list(place) if isinstance(place, dict) else range(len(place)))
            if not isinstance(place[key], (dict, list)) or not place[key] or draw.random() < 0.3:
                break
            place = place[key]
        if draw.random() < 0.2:
            del place[key]
        else:
            place[key] = draw.choice(VALUES)
        path.write_text(json.dumps(content))
        return
    content = bytearray(path.read_bytes())
    kind = draw.choice(("flip", "header", "cut", "grow", "zeros"))
    if kind == "cut":
        content = content[: draw.randrange(len(content))]
    elif kind == "grow":
        content += bytes(draw.randrange(1, 100))
    else:
        for _ in range(draw.choice((1, 1, 5, 50))):
            place = draw.randrange(min(len(content), 2000) if kind == "header" else len(content))
            content[place] = 0 if kind == "zeros" else content[place] ^ 1 << draw.randrange(8)
    path.write_bytes(content)


def mutate(sources, place, draw):
    """Return a damaged copy of a model folder or file."""
    source = draw.choice(sources)
    target = place / source.name
    if source.is_dir():
        shutil.copytree(source, target)
        files = sorted(path for path in target.rglob("*") if path.is_file())
    else:
        shutil.copy(source, target)
        files = [target]
    for _ in range(draw.choice((1, 1, 2))):
        if (path := draw.choice(files)).stat().st_size:
            try:
                spoil(path, draw)
            except (ValueError, IndexError):  # damaged before
                continue
    return target


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("sound")
    single, models = folder / "x.safetensors", tiny_models()
    save_single_file(models, single, torch.float32)
    torch.save({"state_dict": to_original(models)}, folder / "x.ckpt")
    found = write_tiny_folder(folder / "model")
    return [found, found, single, folder / "x.ckpt"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_damaged_models_end_in_a_sentence_or_work(seed, sources, tmp_path):
    refused = loaded = 0
    for number in range(100):
        draw = random.Random(f"{seed} {number}")
        place = tmp_path / str(number)
        place.mkdir()
        path = mutate(sources, place, draw)
        try:
            models = load_models(ModelOptions(resume_ckpt=str(path)))
        except UserError as error:
            refused += 1
            assert len(error.problems) == 1 and "\n" not in str(error) and str(path) in str(error), (
                f"{seed} {number}: {error}"
            )
        else:
            loaded += 1
            assert len(models.tokenizer("a photo").input_ids) > 2
        shutil.rmtree(place)
    print(f"seed {seed}: {refused} refused, {loaded} loaded")
    assert refused and loaded
