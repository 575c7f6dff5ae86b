"""scripts/grid.py: which models it finds, the pictures it draws, and checkpoints merged to the bit."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from scripts import grid
from scripts.grids.blend import BLEND
from scripts.grids.columns import Column, Reading, find_columns, find_reading, load
from scripts.grids.draw import draw, read_prompts
from tests.runs import ADAMW, model, run_of, workplace, write  # noqa: F401
from tests.tiny import tiny_models, write_tiny_folder
from trainer.checkpoints.export import save_single_file
from trainer.checkpoints.listing import checkpoints, single_files
from trainer.errors import UserError
from trainer.evaluation.sampling import Sampler
from trainer.models.lora import LORA_FILE
from trainer.models.single_file import to_original
from trainer.models.tensor_file import TensorFile

UNET = "model.diffusion_model.input_blocks.0.0.weight"
BIAS = UNET.replace("weight", "bias")


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """Three single files of different weights, the third in fp16."""
    folder = tmp_path_factory.mktemp("files")
    paths = [folder / f"{name}.safetensors" for name in "abc"]
    for seed, path in enumerate(paths):
        dtype = torch.float16 if seed == 2 else torch.float32
        save_single_file(tiny_models(seed), path, dtype, {"sd_dadapt.run": "its run", "sd_dadapt.step": "9"})
    return paths


def test_a_run_its_base_and_a_lora_are_drawn(workplace, capsys, monkeypatch):  # noqa: F811
    write(workplace, ADAMW, max_epochs=2, save_every_n_epochs=1, lora={"rank": 2, "alpha": 4})
    assert train.main([]) == 0
    run = run_of(workplace)
    folders = checkpoints(run)
    capsys.readouterr()
    prompts = {
        "cfgs": [3],
        "num_inference_steps": 2,
        "samples": [{"prompt": "a red circle"}, {"prompt": "a blue square", "size": [64, 72]}],
    }
    (workplace / "two.json").write_text(json.dumps(prompts))
    other = write_tiny_folder(workplace / "other", seed=5)
    command = [
        str(run),
        "--against",
        str(other),
        "--prompts",
        "two.json",
        "--seeds",
        "1",
        "2",
        "--steps",
        "1",
        "2",
        "--out",
        "g/all.png",
    ]
    assert grid.main(command) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "g/all.png, g/all.html: 32 samples"
    html = (workplace / "g/all.html").read_text()
    assert html.count("data:image/jpeg;base64,") == 32 and "http" not in html
    for heading in (
        "<th>base</th><th>step 3</th><th>step 6</th><th>other</th>",
        "seed 1, steps 1",
        "seed 2, steps 2",
        "a blue square",
    ):
        assert heading in html
    picture = Image.open(workplace / "g/all.png")
    assert picture.width > 4 * 256 and picture.height > 4 * 2 * 256, (
        "enlarged by a whole factor: 64 pixels are 256"
    )

    # What is in a cell is what the model draws alone, with the LoRA merged into its base.
    columns = find_columns([str(run)], base=None, against=[])
    assert [column.label for column in columns] == ["base", "step 3", "step 6"]
    asked = read_prompts(["two.json"])
    cells = draw(columns, asked, seeds=[1, 2], steps=[1, 2], batch_size=3).cells
    alone = draw(columns[2:], asked, seeds=[2], batch_size=1).cells
    assert np.array_equal(np.asarray(cells[2, 1, 1, 0, 1]), np.asarray(alone[0, 1, 0, 0, 0]))
    assert cells[2, 1, 1, 0, 1].size == (64, 72)
    assert not np.array_equal(np.asarray(cells[0, 0, 0, 0, 0]), np.asarray(cells[0, 0, 1, 0, 0])), (
        "seeds differ"
    )

    base = load(columns[0]).unet.state_dict()
    file = TensorFile(folders[0] / LORA_FILE)
    layer = next(
        name.removesuffix(".lora_A.weight")
        for name in file
        if name.startswith("unet.") and name.endswith("to_q.lora_A.weight")
    )
    change = 2.0 * file[f"{layer}.lora_B.weight"] @ file[f"{layer}.lora_A.weight"]
    assert change.abs().max() > 0
    weight = f"{layer.removeprefix('unet.')}.weight"
    merged = load(columns[2]).unet.state_dict()[weight]
    torch.testing.assert_close(merged, base[weight] + change, rtol=0, atol=1e-6)
    [single] = [path for path in single_files(run / "ckpts", run.name) if "gs00006" in path.name]
    [named] = find_columns([str(single)], base=None, against=[])[1:]
    torch.testing.assert_close(
        load(named).unet.state_dict()[weight], merged, rtol=0, atol=2e-3
    )  # it is kept in fp16
    with pytest.raises(UserError, match="is a LoRA, which needs a base model"):
        find_columns([str(single)], base="none", against=[])

    # Axes the other way round.
    flat = [
        "--x",
        "seeds",
        "--y",
        "checkpoints",
        "--prompts",
        "a red circle",
        "--cfgs",
        "1",
        "2",
        "--seeds",
        "4",
        "5",
        "--steps",
        "1",
    ]
    assert grid.main([str(folders[0]), "--base", "none", "--out", "flat.png", *flat]) == 0
    page = (workplace / "flat.html").read_text()
    assert "<th>seed 4</th><th>seed 5</th>" in page and "<h2>cfg 1</h2>" in page and "<h2>cfg 2</h2>" in page


def test_prompts_are_read_as_in_the_samples_of_the_run(workplace):  # noqa: F811
    samples = [{"prompt": "a {red|blue|green|black} {circle|square}"} for _ in range(4)]
    prompts = {"cfgs": [3], "num_inference_steps": 1, "seed": 5, "resolution": 64, "samples": samples}
    write(workplace, ADAMW, max_epochs=1, wildcards=True, clip_skip=2, max_tokens=150)
    (workplace / "prompts.json").write_text(json.dumps(prompts))
    assert train.main(["--stop_after_steps", "1"]) == 0
    run = run_of(workplace)
    events = EventAccumulator(str(run), size_guidance={"images": 0}).Reload()
    shown = sorted(events.Tags()["images"])
    assert len({tag.split(" ", 1)[1] for tag in shown}) > 1

    assert grid.main([str(run), "--base", "none", "--prompts", "prompts.json"]) == 0
    page = (workplace / "grid.html").read_text()
    assert "clip_skip 2, 150 tokens" in page
    [column] = find_columns([str(run)], base="none", against=[])
    asked = read_prompts(["prompts.json"])
    drawn = draw([column], asked, reading=find_reading([str(checkpoints(run)[0])]))
    assert [f"sample_prompts/{n} {text}" for n, text in enumerate(drawn.values["prompts"])] == shown
    assert all(text in page for text in drawn.values["prompts"])

    seed = json.loads((run / "train.json").read_text())["seed"]
    sampler = Sampler(asked, resolution=64, seed=seed, batch_size=4, clip_skip=2, chunks=2, wildcards=True)
    there = sampler.images(load(column), device=torch.device("cpu"))
    for (number, _), picture in there.items():
        assert np.array_equal(np.asarray(picture), np.asarray(drawn.cells[0, number, 0, 0, 0]))


def test_a_checkpoint_whose_manifest_is_damaged_is_still_a_column(tmp_path):
    for step in (3, 6):
        folder = tmp_path / "run" / "ckpts" / f"run-ep01-gs{step:05d}"
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text(
            '{"format": 2, "step": 6, "project": "run"}' if step > 3 else "{"
        )
    columns = find_columns([str(tmp_path / "run")], base="none", against=[])
    assert [column.label for column in columns] == ["step 3", "step 6"]


def test_the_train_json_of_the_working_directory_is_no_run(three, tmp_path, monkeypatch, capsys):
    (tmp_path / "train.json").write_text('{"resume_ckpt": "somewhere", "wildcards": true, "seed": 1}')
    (tmp_path / "a.safetensors").symlink_to(three[0])
    monkeypatch.chdir(tmp_path)
    assert find_reading(["a.safetensors"]) == Reading()
    assert grid.main(["a.safetensors"]) == 2
    assert "--base: no run named here records its base" in capsys.readouterr().err


def test_a_weighted_sum_is_exact(three, tmp_path, capsys):
    out = tmp_path / "sum.safetensors"
    assert (
        grid.main(["--blend", *map(str, three), "--weights", "0.5", "0.75", "-0.25", "--out", str(out)]) == 0
    )
    a, b, c = (load_file(path) for path in three)
    found = load_file(out)
    assert found.keys() == a.keys()
    for name, tensor in found.items():
        if tensor.is_floating_point():
            expected = 0.5 * a[name].double() + 0.75 * b[name].double() - 0.25 * c[name].double()
            assert torch.equal(tensor, expected.float()), name
            assert tensor.dtype == torch.float32, "as the first file is kept"
        else:
            assert torch.equal(tensor, a[name])
    with safe_open(out, "pt") as file:
        header = file.metadata()
    made = json.loads(header[BLEND])
    assert made["method"] == "weighted sum"
    assert [(each["name"], each["factor"]) for each in made["files"]] == [
        ("a.safetensors", 0.5), ("b.safetensors", 0.75), ("c.safetensors", -0.25)
    ]  # fmt: skip
    assert all(len(each["sha256"]) == 64 for each in made["files"])
    assert (
        header["modelspec.merged_from"] == "a.safetensors, b.safetensors, c.safetensors"
        and header["modelspec.title"] == "sum"
    )
    assert not [key for key in header if key.startswith(("sd_dadapt.run", "sd_dadapt.step"))], (
        "no run may take it for its own checkpoint"
    )
    assert load(Column("sum", str(out))).unet.conv_in.weight.equal(found[UNET]), "it loads"
    # A model with itself is itself.
    same = tmp_path / "same.safetensors"
    assert (
        grid.main(["--blend", str(three[2]), str(three[2]), "--weights", "0.7", "0.3", "--out", str(same)])
        == 0
    )
    assert all(
        torch.equal(tensor, c[name]) and tensor.dtype == c[name].dtype
        for name, tensor in load_file(same).items()
    )


def test_a_difference_is_added_exactly(three, tmp_path, capsys):
    out = tmp_path / "difference.safetensors"
    a, b, c = (str(path) for path in three)
    assert grid.main(["--blend", a, b, c, "--add_difference", "0.5", "--out", str(out)]) == 0
    one, two, three_ = load_file(a), load_file(b), load_file(c)
    for name, tensor in load_file(out).items():
        if tensor.is_floating_point():
            assert torch.equal(
                tensor, (one[name].double() + 0.5 * two[name].double() - 0.5 * three_[name].double()).float()
            ), name
    assert json.loads(TensorFile(out).metadata[BLEND])["method"] == "add difference"
    # A + 1 (B - A) is B.
    assert (
        grid.main(["--blend", a, b, a, "--add_difference", "1", "--out", str(tmp_path / "b.safetensors")])
        == 0
    )
    for name, tensor in load_file(tmp_path / "b.safetensors").items():
        torch.testing.assert_close(tensor, two[name], rtol=0, atol=1e-7)


def test_what_cannot_be_merged_is_said(three, tmp_path, capsys):
    a, b, _ = map(str, three)
    tensors = load_file(a)
    other = tmp_path / "other.safetensors"
    save_file({**tensors, BIAS: torch.zeros(1)}, other)
    part = tmp_path / "part.safetensors"
    save_file({name: tensor for name, tensor in tensors.items() if name != UNET}, part)
    velocity = tmp_path / "velocity.safetensors"
    save_file(tensors, velocity, {"modelspec.prediction_type": "v"})
    lora = tmp_path / "lora.safetensors"
    save_file({"lora_unet_x.lora_down.weight": torch.zeros(1, 1)}, lora)
    out = ["--out", str(tmp_path / "out.safetensors")]
    for arguments, sentence in (
        (
            [a, b, "--weights", "0.7", "0.4", *out],
            "0.7 and 0.4 add up to 1.1; choose numbers that add up to 1",
        ),
        ([a, b, "--weights", "1", *out], "1 numbers for 2 files"),
        ([a, "--weights", "1", *out], "one file is named; name two or more"),
        ([a, b, *out], "give --weights"),
        ([a, b, "--weights", "0.5", "0.5", "--add_difference", "1", *out], "give --weights"),
        ([a, b, "--add_difference", "1", *out], "takes three files"),
        ([a, b, "--weights", "0.5", "0.5"], "--out: name the .safetensors file"),
        (
            [a, b, "--weights", "0.5", "0.5", "--out", str(tmp_path / "x.ckpt")],
            "does not end in .safetensors",
        ),
        ([a, b, "--weights", "0.5", "0.5", "--out", b], "exists already"),
        ([a, str(tmp_path), "--weights", "0.5", "0.5", *out], "is a folder"),
        ([a, str(tmp_path / "no.safetensors"), "--weights", "0.5", "0.5", *out], "there is no file"),
        ([a, str(other), "--weights", "0.5", "0.5", *out], f"{BIAS} is (8,) in {a} and (1,) in"),
        ([a, str(part), "--weights", "0.5", "0.5", *out], f"part.safetensors has no {UNET} (1 such tensors)"),
        ([str(part), a, "--weights", "0.5", "0.5", *out], f"part.safetensors has no {UNET} (1 such tensors)"),
        ([a, str(velocity), "--weights", "0.5", "0.5", *out], "predicts epsilon and"),
        ([a, str(lora), "--weights", "0.5", "0.5", *out], "is a LoRA"),
    ):
        assert grid.main(["--blend", *arguments]) == 2, sentence
        assert sentence in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "lora.safetensors",
        "other.safetensors",
        "part.safetensors",
        "velocity.safetensors",
    ]


def test_files_of_sd2_are_merged_and_what_they_predict_stays_said(tmp_path, capsys):
    tensors = to_original(tiny_models(0, "sd2"))
    paths = [tmp_path / f"{name}.ckpt" for name in ("a", "b", "velocity")]
    torch.save({"state_dict": tensors, "global_step": 875_000}, paths[0])
    torch.save(
        {"state_dict": {name: 3 * tensor for name, tensor in tensors.items()}, "global_step": 875_000},
        paths[1],
    )
    torch.save({"state_dict": tensors}, paths[2])
    out = tmp_path / "out.safetensors"
    assert grid.main(["--blend", *map(str, paths[:2]), "--weights", "0.5", "0.5", "--out", str(out)]) == 0
    assert all(torch.equal(tensor, 2 * tensors[name]) for name, tensor in load_file(out).items())
    with safe_open(out, "pt") as file:
        assert file.metadata()["modelspec.prediction_type"] == "epsilon"
    assert (
        grid.main(
            [
                "--blend",
                str(paths[0]),
                str(paths[2]),
                "--weights",
                "0.5",
                "0.5",
                "--out",
                str(tmp_path / "no.safetensors"),
            ]
        )
        == 2
    )
    assert "a.ckpt predicts epsilon and" in capsys.readouterr().err


def test_text_encoders_under_either_name_are_merged(three, tmp_path):
    """Files written with newer transformers name the text encoder's tensors without text_model."""
    bare = tmp_path / "bare.safetensors"
    save_file(
        {name.replace(".text_model.", ".", 1): tensor for name, tensor in load_file(three[1]).items()}, bare
    )
    out = [tmp_path / f"{name}.safetensors" for name in ("one", "other")]
    for second, target in zip((three[1], bare), out, strict=True):
        assert (
            grid.main(
                ["--blend", str(three[0]), str(second), "--weights", "0.5", "0.5", "--out", str(target)]
            )
            == 0
        )
    left, right = map(load_file, out)
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "--base: no run named here records its base"),
        (["nowhere"], "nowhere: there is no such run, checkpoint or model"),
        (["--base", "none"], "no model to draw with"),
        (["nowhere/at/all", "--base", "none", "--prompts", "x"], "there is no folder or file nowhere/at/all"),
        (["--base", "m", "--x", "seeds", "--y", "seeds"], "both are seeds"),
        (["--base", "m", "--out", "x.jpg"], "does not end in .png"),
        (["--base", "m", "--weights", "1"], "name the files with --blend"),
        (["--base", "m", "--prompts", "none.json"], "none.json"),
    ],
)
def test_what_cannot_be_drawn_is_said(arguments, sentence, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert grid.main(arguments) == 2
    assert sentence in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
