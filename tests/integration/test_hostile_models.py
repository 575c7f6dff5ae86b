"""Model folders of strangers: no name and no link makes the program read or write outside it."""

import json
import os
import shutil

import pytest

import train
from tests.runs import ADAMW, run_of, write
from tests.tiny import write_parts_beside, write_tiny_folder
from trainer.checkpoints.export import copy_beside
from trainer.errors import UserError
from trainer.models.load import load_models
from trainer.models.options import ModelOptions

SHORT = {"max_epochs": 1, "fixed_loss_images": 0, "first_samples": False, "save_format": "diffusers"}


@pytest.fixture
def pack(workplace):
    """Return a model four levels down in a downloaded folder; what must stay untouched lies beside it."""
    return write_tiny_folder(workplace / "pack" / "x" / "y" / "model")


def name_part(folder, name, entry=("diffusers", "X")):
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, name: entry}))


def everything(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "name",
    ["../../../trainer", "{outside}", "/", "", ".", "..", "unet/../../other", "a\\b", "c:", "nul\x00l"],
)
def test_a_name_in_the_index_that_is_a_path_is_refused_before_anything_is_written(
    workplace, pack, name, capsys
):
    outside = workplace / "pack" / "trainer"
    outside.mkdir()
    (outside / "errors.py").write_text("ran = True")
    (workplace / "trainer").mkdir()
    (workplace / "trainer" / "errors.py").write_text("mine")
    name_part(pack, name.format(outside=outside))
    write(workplace, ADAMW, model=str(pack), **SHORT)
    before = everything(workplace)
    assert train.main([]) == 2
    error = capsys.readouterr().err
    assert "model_index.json has the key" in error and error[-1] == "\n" and error.count("\n") == 1
    assert everything(workplace) == before


def test_a_part_that_nobody_knows_is_left_out_and_said_so(pack):
    write_parts_beside(pack)
    models = load_models(ModelOptions(resume_ckpt=str(pack)))
    assert set(models.beside) == {"safety_checker", "feature_extractor"}
    assert any("without the base's watermark" in note for note in models.notes)
    name_part(pack, "safety_checker", ("os", "system"))
    assert set(load_models(ModelOptions(resume_ckpt=str(pack))).beside) == {"feature_extractor"}


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege there")
@pytest.mark.parametrize(
    "place",
    [
        "safety_checker",
        "safety_checker/key",
        "unet",
        "unet/config.json",
        "text_encoder/adapter_config.json",
        "tokenizer",
        "tokenizer/vocab.json",
        "scheduler/scheduler_config.json",
        "vae/diffusion_pytorch_model.safetensors",
        "model_index.json",
    ],
)
def test_a_link_that_leads_outside_the_model_is_refused(workplace, pack, place, capsys):
    write_parts_beside(pack)
    private = workplace / "private"
    private.mkdir()
    target = pack / place
    if target.exists():
        target.rename(private / target.name)
    else:
        (private / target.name).write_text("{}")
    target.symlink_to(private / target.name)
    write(workplace, ADAMW, model=str(pack), **SHORT)
    for arguments in ([], ["--check"], ["--vae", str(pack)]):
        if arguments == ["--vae", str(pack)]:
            if not place.startswith("vae"):
                continue
            arguments += ["--resume_ckpt", str(write_tiny_folder(workplace / "other"))]
        assert train.main(arguments) == 2
        error = capsys.readouterr().err
        assert f"leads outside the folder, to {private / target.name}" in error and "Traceback" not in error
    assert not (workplace / "logs").exists()


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege there")
def test_links_inside_a_model_and_a_link_to_it_are_followed(workplace, pack):
    weights = pack / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_name("kept"))
    weights.symlink_to("kept")
    (workplace / "link").symlink_to(pack)
    load_models(ModelOptions(resume_ckpt=str(workplace / "link")))


def test_copying_a_models_parts_onto_themselves_leaves_them(tmp_path):
    folder = write_tiny_folder(tmp_path / "model")
    write_parts_beside(folder)
    models = load_models(ModelOptions(resume_ckpt=str(folder)))
    before = everything(folder / "safety_checker")
    for link in (False, True):
        copy_beside(models, folder, link=link)
    assert everything(folder / "safety_checker") == before


@pytest.mark.parametrize(
    "model", ["../pack/x/y/model", "..\\pack", "pack", "..", "a/b/c", "", "findlast", 3, None, ["x"]]
)
def test_the_base_of_a_lora_is_a_hub_id_or_an_absolute_path(tmp_path, model, monkeypatch):
    from trainer.checkpoints.base import read_base
    from trainer.models.lora import LORA_FILE
    from trainer.models.options import BASE_FILE

    (tmp_path / "pack").mkdir()
    monkeypatch.chdir(tmp_path)
    (tmp_path / LORA_FILE).touch()
    (tmp_path / BASE_FILE).write_text(json.dumps({"model": model, "fingerprint": ""}))
    name = model in ("pack", "findlast")  # a published name is no path
    with pytest.raises(
        UserError, match="is not found on this machine" if name else "the base of the LoRA cannot be read"
    ):
        read_base(tmp_path)


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege there")
def test_links_and_names_that_leave_a_checkpoint_are_refused(workplace, capsys):
    write(workplace, ADAMW, **SHORT)
    assert train.main(["--stop_after_steps", "1"]) == 0
    checkpoint = next((run_of(workplace) / "ckpts").iterdir())
    private = workplace / "private"
    shutil.copytree(checkpoint / "resume", private)
    manifest = checkpoint / "resume" / "manifest.json"
    kept = manifest.read_text()
    content = json.loads(kept)
    content["files"]["../../../../../private/state.json"] = {"size": 1, "sha256": ""}
    manifest.write_text(json.dumps(content))
    assert train.main(["--resume_ckpt", str(checkpoint)]) == 2
    assert "leads outside the folder" in capsys.readouterr().err
    manifest.write_text(kept)
    for link in (checkpoint / "resume" / "training.json", checkpoint / "resume"):
        shutil.rmtree(link) if link.is_dir() else link.unlink()
        link.symlink_to(private if link.name == "resume" else private / link.name)
        assert train.main(["--resume_ckpt", str(checkpoint)]) == 2
        assert "leads outside the folder" in capsys.readouterr().err
