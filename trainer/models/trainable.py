"""Trained parameters: which networks, and which layers of the text encoder are frozen."""

from __future__ import annotations

from typing import Any

from torch import nn

from trainer.errors import UserError
from trainer.models.lora import attach
from trainer.models.options import FreezingOptions, TrainableOptions
from trainer.models.pipeline import Models, Part, TrainedParts
from trainer.networks import TEXT_ENCODER, UNET, by_network


def apply_freezing(models: Models, parts: TrainableOptions, freezing: FreezingOptions) -> TrainedParts:
    """Decide what is trained: set requires_grad on parameters, and train or eval mode on networks.

    Also turns on gradient checkpointing and attention slicing if configured. The VAE is never trained. Works
    on the meta device too.

    Raises:
        UserError: a layer count that the text encoder does not have, or nothing left to train.
    """
    text_encoder_trains, what = _freeze_text_encoder(
        models.text_encoder, freezing, disabled=parts.disable_textenc_training
    )
    unet_trains = not parts.disable_unet_training
    models.unet.requires_grad_(unet_trains)
    models.vae.requires_grad_(False)
    networks: dict[str, nn.Module] = by_network(models)
    words = {UNET: "everything" if unet_trains else "nothing", TEXT_ENCODER: what}
    if (adapters := parts.lora) is not None:
        words = {name: attach(network, adapters) for name, network in networks.items()}
        text_encoder_trains = words[TEXT_ENCODER] != "nothing"
    if not unet_trains and not text_encoder_trains:
        reason = "disable_textenc_training" if parts.disable_textenc_training else "text_encoder_freezing"
        raise UserError(
            f"disable_unet_training and {reason} together leave nothing to train; "
            "let the UNet or text encoder layers train."
        )

    models.vae.eval()
    models.unet.train(unet_trains)
    models.text_encoder.train(text_encoder_trains)
    if parts.gradient_checkpointing:
        # The text encoder's gradient passes through the UNet, so even a frozen UNet's activations count.
        models.unet.enable_gradient_checkpointing()
        if text_encoder_trains:
            models.text_encoder.activation_checkpointing_enable({"use_reentrant": False})
    if parts.attn_type == "slice":
        models.unet.set_attention_slice("auto")

    trained = {
        name: [(key, p) for key, p in network.named_parameters() if p.requires_grad]
        for name, network in networks.items()
    }
    return TrainedParts(
        parameters={name: parameters for name, parameters in trained.items() if parameters},
        counts={
            name: Part(
                sum(p.numel() for _, p in trained[name]),
                sum(p.numel() for p in network.parameters()),
                words[name],
            )
            for name, network in networks.items()
        },
    )


def _freeze_text_encoder(text_encoder: Any, freezing: FreezingOptions, *, disabled: bool) -> tuple[bool, str]:
    """Set requires_grad; return whether anything is trained, and its name in words."""
    # transformers before 5.6 keep the layers one level deeper.
    tower = getattr(text_encoder, "text_model", text_encoder)
    layers = tower.encoder.layers
    frozen = _frozen_layers(freezing, len(layers))
    if disabled:
        text_encoder.requires_grad_(False)
        return False, "nothing"
    text_encoder.requires_grad_(True)
    for layer in layers[:frozen]:
        layer.requires_grad_(False)
    freeze_embeddings = frozen > 0 if freezing.freeze_embeddings is None else freezing.freeze_embeddings
    tower.embeddings.requires_grad_(not freeze_embeddings)
    tower.final_layer_norm.requires_grad_(not freezing.freeze_final_layer_norm)

    trained = [] if freeze_embeddings else ["embeddings"]
    if frozen < len(layers):
        trained.append(f"layers {frozen + 1}-{len(layers)} of {len(layers)}")
    if not freezing.freeze_final_layer_norm:
        trained.append("final layer norm")
    everything = frozen == 0 and len(trained) == 3
    return bool(trained), "everything" if everything else ", ".join(trained) or "nothing"


def _frozen_layers(freezing: FreezingOptions, layers: int) -> int:
    """Return the number of frozen front layers."""
    last, front = freezing.unfreeze_last_n_layers, freezing.freeze_front_n_layers
    if last is not None:
        if last > layers:
            raise UserError(
                f"text_encoder_freezing.unfreeze_last_n_layers: {last} is more than the {layers} layers of "
                f"this model's text encoder; give 0 to {layers}."
            )
        return layers - last
    if front is None:
        return 0
    if abs(front) > layers:
        raise UserError(
            f"text_encoder_freezing.freeze_front_n_layers: {front} does not fit the {layers} layers of this "
            f"model's text encoder; give -{layers} to {layers} (a negative -k trains only the last k)."
        )
    return front if front >= 0 else layers + front
