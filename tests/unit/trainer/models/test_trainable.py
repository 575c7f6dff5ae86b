"""What is frozen keeps its weights and holds no gradient; what learns moves."""

import pytest
import torch

from tests.tiny import TEXT_LAYERS, tiny_models
from trainer.errors import UserError
from trainer.models.options import FreezingOptions, TrainableOptions
from trainer.models.trainable import apply_freezing
from trainer.networks import TEXT_ENCODER, UNET

EMBEDDINGS, NORM = "embeddings", "final_layer_norm"


def groups(names):
    """The text encoder's parts that `names` belong to: layer numbers, embeddings, final norm."""
    found = set()
    for name in names:
        words = name.removeprefix("text_model.").split(".")
        found.add(int(words[2]) if words[0] == "encoder" else words[0])
    return found


def one_step(models, parts):
    """Run a real forward and backward pass through both networks and a step on what learns."""
    tokens_BT = torch.randint(0, 500, (2, 77), generator=torch.Generator().manual_seed(0))
    latents_BCHW = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    context_BTD = models.text_encoder(tokens_BT).last_hidden_state
    predicted_BCHW = models.unet(latents_BCHW, torch.tensor([10, 500]), context_BTD).sample
    predicted_BCHW.square().mean().backward()
    learning = [p for named in parts.parameters.values() for _, p in named]
    torch.optim.SGD(learning, lr=1.0).step()


@pytest.mark.parametrize(
    ("freezing", "learning"),
    [
        ({}, {EMBEDDINGS, 0, 1, 2, 3, NORM}),
        ({"freeze_front_n_layers": 0}, {EMBEDDINGS, 0, 1, 2, 3, NORM}),
        ({"freeze_front_n_layers": 3}, {3, NORM}),
        ({"freeze_front_n_layers": 4}, {NORM}),
        ({"freeze_front_n_layers": -1}, {3, NORM}),
        ({"freeze_front_n_layers": -4}, {EMBEDDINGS, 0, 1, 2, 3, NORM}),
        ({"unfreeze_last_n_layers": 2}, {2, 3, NORM}),
        ({"unfreeze_last_n_layers": 0}, {NORM}),
        ({"unfreeze_last_n_layers": 3, "freeze_front_n_layers": 3}, {1, 2, 3, NORM}),
        ({"freeze_front_n_layers": 3, "freeze_embeddings": False}, {EMBEDDINGS, 3, NORM}),
        ({"freeze_embeddings": True}, {0, 1, 2, 3, NORM}),
        ({"freeze_front_n_layers": 2, "freeze_final_layer_norm": True}, {2, 3}),
    ],
)
def test_frozen_parameters_do_not_move_and_hold_no_gradient(freezing, learning):
    models = tiny_models()
    parts = apply_freezing(models, TrainableOptions(), FreezingOptions(**freezing))
    assert groups(name for name, _ in parts.parameters[TEXT_ENCODER]) == learning
    before = {name: p.detach().clone() for name, p in models.text_encoder.named_parameters()}
    one_step(models, parts)
    for name, parameter in models.text_encoder.named_parameters():
        if groups([name]) <= learning:
            assert parameter.grad is not None, name
        else:
            assert (
                not parameter.requires_grad
                and parameter.grad is None
                and torch.equal(parameter, before[name])
            ), name
    moved = {name for name, p in models.text_encoder.named_parameters() if not torch.equal(p, before[name])}
    assert groups(moved) == learning


def test_counts_are_those_of_the_parameters():
    models = tiny_models()
    parts = apply_freezing(models, TrainableOptions(), FreezingOptions(freeze_front_n_layers=3))
    for name, network in ((UNET, models.unet), (TEXT_ENCODER, models.text_encoder)):
        assert parts.counts[name].total == sum(p.numel() for p in network.parameters())
        assert parts.counts[name].trained == sum(p.numel() for p in network.parameters() if p.requires_grad)
    assert parts.counts[UNET].what == "everything"
    assert parts.counts[TEXT_ENCODER].what == "layers 4-4 of 4, final layer norm"
    assert parts.counts[TEXT_ENCODER].trained < parts.counts[TEXT_ENCODER].total


@pytest.mark.parametrize(
    ("options", "frozen", "learns"),
    [
        ({"disable_textenc_training": True}, "text_encoder", UNET),
        ({"disable_unet_training": True}, "unet", TEXT_ENCODER),
    ],
)
def test_a_disabled_network_holds_no_gradient_and_the_other_learns(options, frozen, learns):
    models = tiny_models()
    parts = apply_freezing(models, TrainableOptions(**options), FreezingOptions())
    assert list(parts.parameters) == [learns]
    before = {name: p.clone() for name, p in getattr(models, frozen).named_parameters()}
    one_step(models, parts)
    assert all(
        p.grad is None and torch.equal(p, before[name])
        for name, p in getattr(models, frozen).named_parameters()
    )
    assert not getattr(models, frozen).training
    assert all(p.grad is not None for _, p in parts.parameters[learns])


def test_the_vae_never_learns():
    models = tiny_models()
    apply_freezing(models, TrainableOptions(), FreezingOptions())
    assert not any(p.requires_grad for p in models.vae.parameters()) and not models.vae.training


@pytest.mark.parametrize(
    ("freezing", "key"),
    [
        ({"freeze_front_n_layers": 5}, "freeze_front_n_layers: 5"),
        ({"freeze_front_n_layers": -5}, "freeze_front_n_layers: -5"),
        ({"unfreeze_last_n_layers": 5}, "unfreeze_last_n_layers: 5"),
    ],
)
def test_layers_that_the_model_does_not_have_are_refused(freezing, key):
    with pytest.raises(UserError, match=key) as caught:
        apply_freezing(tiny_models(), TrainableOptions(), FreezingOptions(**freezing))
    assert f"{TEXT_LAYERS} layers of this model" in str(caught.value)


def test_nothing_left_to_train_is_refused():
    freezing = FreezingOptions(unfreeze_last_n_layers=0, freeze_final_layer_norm=True)
    with pytest.raises(
        UserError, match="disable_unet_training and text_encoder_freezing together leave nothing"
    ):
        apply_freezing(tiny_models(), TrainableOptions(disable_unet_training=True), freezing)
    both = TrainableOptions(disable_unet_training=True, disable_textenc_training=True)
    with pytest.raises(UserError, match="disable_unet_training and disable_textenc_training together"):
        apply_freezing(tiny_models(), both, FreezingOptions())


@pytest.mark.parametrize("options", [{"gradient_checkpointing": True}, {"attn_type": "slice"}])
def test_cheaper_forward_passes_give_the_same_gradients(options):
    gradients, kept = [], []
    for chosen in (TrainableOptions(), TrainableOptions(**options)):
        models = tiny_models()
        parts = apply_freezing(models, chosen, FreezingOptions(freeze_front_n_layers=2))
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor, saved=saved: saved.append(tensor.numel()) or tensor, lambda t: t
        ):
            one_step(models, parts)
        kept.append(sum(saved))
        gradients.append([p.grad for named in parts.parameters.values() for _, p in named])
    for plain, cheap in zip(*gradients, strict=True):
        torch.testing.assert_close(cheap, plain, rtol=1e-4, atol=1e-6)
    if "attn_type" in options:
        assert {type(processor).__name__ for processor in models.unet.attn_processors.values()} == {
            "SlicedAttnProcessor"
        }
    else:
        assert models.text_encoder.is_gradient_checkpointing
        assert kept[1] < 0.6 * kept[0], kept
