"""The key map between diffusers and the original layout, against diffusers' own converter and SD 1.5's known names."""

import re

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_ldm_clip_checkpoint, convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint

from tests.tiny import tiny_models
from trainer.models import sd15
from trainer.models.load import Models
from trainer.models.networks import SD15, empty_text_encoder, empty_unet, empty_vae
from trainer.models.single_file import NETWORKS, from_original, layout, to_original


def full_size() -> Models:
    return Models(
        unet=empty_unet(SD15.unet),
        text_encoder=empty_text_encoder(SD15.text_encoder),
        vae=empty_vae(SD15.vae),
        tokenizer=None,  # pyright: ignore[reportArgumentType]
        scheduler_config=dict(SD15.scheduler),
        source="configs",
    )


@pytest.fixture(scope="module")
def sd15_file():
    return to_original(full_size())


def test_the_configs_are_those_of_sd15():
    models = full_size()
    assert {name: sum(p.numel() for p in getattr(models, name).parameters()) for name in NETWORKS} == sd15.PARAMETERS


@pytest.mark.parametrize(
    ("prefix", "count"), [("model.diffusion_model.", 686), ("first_stage_model.", 248), ("cond_stage_model.transformer.text_model.", 197)]
)
def test_sd15_has_the_original_number_of_tensors(sd15_file, prefix, count):
    assert sum(name.startswith(prefix) for name in sd15_file) == count
    assert len(sd15_file) == 686 + 248 + 197


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.diffusion_model.time_embed.2.weight", (1280, 1280)),
        ("model.diffusion_model.input_blocks.0.0.weight", (320, 4, 3, 3)),
        ("model.diffusion_model.input_blocks.1.1.proj_in.weight", (320, 320, 1, 1)),
        ("model.diffusion_model.input_blocks.3.0.op.weight", (320, 320, 3, 3)),
        ("model.diffusion_model.input_blocks.4.0.skip_connection.weight", (640, 320, 1, 1)),
        ("model.diffusion_model.input_blocks.8.1.transformer_blocks.0.attn2.to_k.weight", (1280, 768)),
        ("model.diffusion_model.input_blocks.11.0.out_layers.3.weight", (1280, 1280, 3, 3)),
        ("model.diffusion_model.middle_block.2.emb_layers.1.weight", (1280, 1280)),
        ("model.diffusion_model.output_blocks.2.1.conv.weight", (1280, 1280, 3, 3)),
        ("model.diffusion_model.output_blocks.5.2.conv.weight", (1280, 1280, 3, 3)),
        ("model.diffusion_model.output_blocks.8.2.conv.weight", (640, 640, 3, 3)),
        ("model.diffusion_model.output_blocks.11.1.transformer_blocks.0.ff.net.0.proj.weight", (2560, 320)),
        ("model.diffusion_model.out.2.bias", (4,)),
        ("first_stage_model.encoder.down.1.block.0.nin_shortcut.weight", (256, 128, 1, 1)),
        ("first_stage_model.encoder.mid.attn_1.q.weight", (512, 512, 1, 1)),
        ("first_stage_model.decoder.mid.attn_1.proj_out.weight", (512, 512, 1, 1)),
        ("first_stage_model.decoder.up.0.block.0.nin_shortcut.weight", (128, 256, 1, 1)),
        ("first_stage_model.decoder.up.3.upsample.conv.weight", (512, 512, 3, 3)),
        ("first_stage_model.quant_conv.weight", (8, 8, 1, 1)),
        ("cond_stage_model.transformer.text_model.encoder.layers.11.mlp.fc1.weight", (3072, 768)),
        ("cond_stage_model.transformer.text_model.embeddings.position_ids", (1, 77)),
    ],
)
def test_sd15_tensors_stand_where_the_original_has_them(sd15_file, name, shape):
    assert tuple(sd15_file[name].shape) == shape


def through_diffusers(tensors, models):
    """Return what diffusers' own converter makes of a file in the original layout."""
    text = convert_ldm_clip_checkpoint(dict(tensors))
    return {
        "unet": convert_ldm_unet_checkpoint(dict(tensors), models.unet.config),
        "vae": convert_ldm_vae_checkpoint(dict(tensors), models.vae.config),
        "text_encoder": {key.removeprefix("text_model."): tensor for key, tensor in text.items() if "position_ids" not in key},
    }


@pytest.mark.parametrize("shape", ["small", "mini", "sd15"])
def test_diffusers_reads_the_same_weights_back(shape):
    models = tiny_models(1, shape)
    converted = through_diffusers(to_original(models), models)
    for network in NETWORKS:
        own = getattr(models, network).state_dict()
        assert set(converted[network]) == set(own)
        assert all(torch.equal(converted[network][key], own[key]) for key in own)


def test_diffusers_agrees_on_full_size_names_and_shapes(sd15_file):
    models = full_size()
    converted = through_diffusers(sd15_file, models)
    for network in NETWORKS:
        own = {key: tuple(tensor.shape) for key, tensor in getattr(models, network).state_dict().items()}
        assert {key: tuple(tensor.shape) for key, tensor in converted[network].items()} == own


@pytest.mark.parametrize("shape", ["small", "mini", "sd15"])
def test_there_and_back_is_exact(shape):
    models = tiny_models(2, shape)
    tensors = to_original(models)
    for network in NETWORKS:
        own = getattr(models, network)
        back = from_original(tensors, network, own.config, own)
        assert list(back) == list(own.state_dict())
        assert all(torch.equal(back[key], tensor) and back[key].shape == tensor.shape for key, tensor in own.state_dict().items())


def test_no_two_tensors_share_a_place():
    models = tiny_models(0, "sd15")
    tensors = sum(len(getattr(models, network).state_dict()) for network in NETWORKS)
    assert len(to_original(models)) == tensors + 1  # position_ids


def test_nothing_is_copied():
    models = tiny_models()
    tensors = to_original(models)
    assert tensors["first_stage_model.encoder.mid.attn_1.q.weight"].data_ptr() == (
        models.vae.get_parameter("encoder.mid_block.attentions.0.to_q.weight").data_ptr()
    )


def test_an_unknown_part_is_a_bug_not_a_loss():
    models = tiny_models()
    weights = {**models.unet.state_dict(), "add_embedding.linear_1.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match=re.escape("no name for add_embedding.linear_1.weight")):
        layout("unet", models.unet.config, weights)
