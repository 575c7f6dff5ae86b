"""The scripts around models: convert_checkpoint both ways, and what make_full_size fills networks with."""

import pytest
import torch

from scripts import convert_checkpoint, make_full_size
from tests.tiny import tiny_models, write_tiny_folder
from trainer.models.load import load_models
from trainer.models.networks import empty_text_encoder, empty_unet, empty_vae
from trainer.models.options import ModelOptions
from trainer.models.single_file import NETWORKS


def assert_same(path, reference):
    models = load_models(ModelOptions(resume_ckpt=str(path)))
    for network in NETWORKS:
        expected = getattr(reference, network).state_dict()
        assert all(
            torch.equal(tensor, expected[name])
            for name, tensor in getattr(models, network).state_dict().items()
        )


def test_there_and_back_through_the_command_line(tmp_path, capsys):
    folder = write_tiny_folder(tmp_path / "a")
    assert convert_checkpoint.main([str(folder), str(tmp_path / "b.safetensors"), "--fp32"]) == 0
    assert (
        convert_checkpoint.main([str(tmp_path / "b.safetensors"), str(tmp_path / "new" / "c"), "--fp32"]) == 0
    )
    assert_same(tmp_path / "b.safetensors", tiny_models())
    assert_same(tmp_path / "new" / "c", tiny_models())
    assert "written in" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b.safetensors", "new"]


def test_a_conversion_can_replace_the_vae(tmp_path):
    folder, other = write_tiny_folder(tmp_path / "a"), write_tiny_folder(tmp_path / "b", seed=1)
    assert convert_checkpoint.main([str(folder), str(tmp_path / "c"), "--fp32", "--vae", str(other)]) == 0
    mixed = tiny_models()
    mixed.vae = tiny_models(1).vae
    assert_same(tmp_path / "c", mixed)


@pytest.mark.parametrize(
    ("source", "target", "said"),
    [
        ("a", "a", "exists already"),
        ("a", "x.ckpt", ".ckpt files are not written"),
        ("nothing.safetensors", "x", "source: there is no folder or file"),
    ],
)
def test_what_cannot_be_converted_is_said_plainly(source, target, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_tiny_folder(tmp_path / "a")
    assert convert_checkpoint.main([source, target]) == 2
    assert said in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_random_weights_keep_activations_finite_and_depend_on_the_seed_alone():
    reference = tiny_models(0, "sd15")
    networks = []
    for seed in (0, 0, 1):
        generator = torch.Generator().manual_seed(seed)
        unet, text = (
            empty_unet(reference.unet.config),
            empty_text_encoder(reference.text_encoder.config.to_dict()),
        )
        vae = empty_vae(reference.vae.config)
        for network in (unet, text, vae):
            make_full_size.fill_randomly(network, generator)
        networks.append((unet, text, vae))
    first, again, other = (unet.get_parameter("mid_block.resnets.0.conv1.weight") for unet, _, _ in networks)
    assert torch.equal(first, again) and not torch.equal(first, other)
    unet, text, vae = networks[0]
    with torch.no_grad():
        latents = vae.encode(torch.rand(1, 3, 64, 64) * 2 - 1).latent_dist.mean
        context = text(torch.zeros(1, 77, dtype=torch.int64)).last_hidden_state
        predicted = unet(latents, torch.tensor([500]), context).sample
    assert predicted.isfinite().all() and 1e-3 < predicted.std() < 10


def test_a_folder_in_use_is_not_touched(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    assert make_full_size.main(["--out", str(tmp_path)]) == 2
    assert "is not empty; name a new folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
