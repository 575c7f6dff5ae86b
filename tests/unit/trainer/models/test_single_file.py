"""The key map between diffusers and the original layout, against diffusers' converter and known names."""

import re

import pytest
import torch
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)

from tests.tiny import tiny_models
from trainer.models import sd2, sd15
from trainer.models.family import SD1, SD2
from trainer.models.networks import empty_models
from trainer.models.pipeline import Models
from trainer.models.single_file import NETWORKS, from_original, layout, to_original


def full_size(family=SD1) -> Models:
    return empty_models(family.default, None, "configs")


@pytest.fixture(scope="module")
def sd15_file():
    return to_original(full_size())


@pytest.fixture(scope="module")
def sd2_file():
    return to_original(full_size(SD2))


@pytest.mark.parametrize(("configs", "published"), [(SD1, sd15), (SD2, sd2)])
def test_the_configs_are_of_the_published_size(configs, published):
    models = full_size(configs)
    assert {
        name: sum(p.numel() for p in getattr(models, name).parameters()) for name in NETWORKS
    } == published.PARAMETERS


@pytest.mark.parametrize(
    ("prefix", "count"),
    [
        ("model.diffusion_model.", 686),
        ("first_stage_model.", 248),
        ("cond_stage_model.transformer.text_model.", 197),
    ],
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


@pytest.mark.parametrize(
    ("prefix", "count"),
    [("model.diffusion_model.", 686), ("first_stage_model.", 248), ("cond_stage_model.model.", 4 + 23 * 12)],
)
def test_sd2_has_the_original_number_of_tensors_but_for_what_it_does_not_use(sd2_file, prefix, count):
    assert sum(name.startswith(prefix) for name in sd2_file) == count
    assert len(sd2_file) == 686 + 248 + 4 + 23 * 12


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.diffusion_model.input_blocks.1.1.proj_in.weight", (320, 320)),
        ("model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight", (320, 1024)),
        ("model.diffusion_model.middle_block.1.proj_out.weight", (1280, 1280)),
        ("first_stage_model.encoder.mid.attn_1.q.weight", (512, 512, 1, 1)),
        ("cond_stage_model.model.positional_embedding", (77, 1024)),
        ("cond_stage_model.model.token_embedding.weight", (49408, 1024)),
        ("cond_stage_model.model.ln_final.bias", (1024,)),
        ("cond_stage_model.model.transformer.resblocks.0.ln_1.weight", (1024,)),
        ("cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight", (3072, 1024)),
        ("cond_stage_model.model.transformer.resblocks.0.attn.in_proj_bias", (3072,)),
        ("cond_stage_model.model.transformer.resblocks.22.attn.out_proj.weight", (1024, 1024)),
        ("cond_stage_model.model.transformer.resblocks.22.mlp.c_fc.weight", (4096, 1024)),
        ("cond_stage_model.model.transformer.resblocks.22.mlp.c_proj.weight", (1024, 4096)),
    ],
)
def test_sd2_tensors_stand_where_the_original_has_them(sd2_file, name, shape):
    assert tuple(sd2_file[name].shape) == shape


def through_diffusers(tensors, models):
    """Return what diffusers' own converter makes of a file in the original layout."""
    second = models.family is SD2
    text = (
        convert_open_clip_checkpoint(models.text_encoder, dict(tensors))
        if second
        else convert_ldm_clip_checkpoint(dict(tensors))
    )
    return {
        "unet": convert_ldm_unet_checkpoint(dict(tensors), models.unet.config),
        "vae": convert_ldm_vae_checkpoint(dict(tensors), models.vae.config),
        "text_encoder": {
            key.removeprefix("text_model."): tensor
            for key, tensor in text.items()
            if "position_ids" not in key
        },
    }


@pytest.mark.parametrize("shape", ["small", "mini", "sd15", "sd2"])
def test_diffusers_reads_the_same_weights_back(shape):
    models = tiny_models(1, shape)
    converted = through_diffusers(to_original(models), models)
    for network in NETWORKS:
        own = getattr(models, network).state_dict()
        assert set(converted[network]) == set(own)
        assert all(torch.equal(converted[network][key], own[key]) for key in own)


@pytest.mark.parametrize("configs", [SD1, SD2])
def test_diffusers_agrees_on_full_size_names_and_shapes(configs):
    models = full_size(configs)
    converted = through_diffusers(to_original(models), models)
    for network in NETWORKS:
        own = {key: tuple(tensor.shape) for key, tensor in getattr(models, network).state_dict().items()}
        assert {key: tuple(tensor.shape) for key, tensor in converted[network].items()} == own


@pytest.mark.parametrize("shape", ["small", "mini", "sd15", "sd2"])
def test_there_and_back_is_exact(shape):
    models = tiny_models(2, shape)
    tensors = to_original(models)
    for network in NETWORKS:
        own = getattr(models, network)
        back = from_original(tensors, network, own)
        assert all(tensor.untyped_storage().nbytes() == 4 * tensor.numel() for tensor in back.values()), (
            "none keeps its neighbours"
        )
        assert list(back) == list(own.state_dict())
        assert all(
            torch.equal(back[key], tensor) and back[key].shape == tensor.shape
            for key, tensor in own.state_dict().items()
        )


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


@pytest.mark.parametrize("key", ["encoder.layers.0.self_attn.norm.weight", "text_projection.weight"])
def test_an_unknown_part_of_an_sd2_text_encoder_is_a_bug_not_a_loss(key):
    models = tiny_models(0, "small")
    with pytest.raises(ValueError, match="no name for"):
        layout("text_encoder", models.text_encoder.config, {key: torch.zeros(1)}, reader=SD2.text)


def test_an_unknown_part_is_a_bug_not_a_loss():
    models = tiny_models()
    weights = {**models.unet.state_dict(), "add_embedding.linear_1.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match=re.escape("no name for add_embedding.linear_1.weight")):
        layout("unet", models.unet.config, weights)
