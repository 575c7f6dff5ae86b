"""What is trained: which networks, and which layers of the text encoder are frozen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge


@dataclass(frozen=True, kw_only=True)
class TrainableOptions:
    """Which networks learn, and how their forward pass is stored."""

    disable_textenc_training: bool = False
    """Freeze the whole text encoder."""

    disable_unet_training: bool = False
    """Freeze the whole UNet."""

    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: much less memory for about a quarter more time."""

    attn_type: Literal["sdp", "slice", "xformers"] = "sdp"
    """Attention: sdp is torch's fused attention, slice computes it in slices with less memory; xformers is answered by sdp."""


@dataclass(frozen=True, kw_only=True)
class FreezingOptions:
    """Which layers of the text encoder keep their weights (`text_encoder_freezing` of the optimizer file)."""

    freeze_front_n_layers: int | None = None
    """Freeze the first n layers; a negative -k trains only the last k."""

    unfreeze_last_n_layers: Annotated[int, Ge(0)] | None = None
    """Train only the last n layers; wins over freeze_front_n_layers."""

    freeze_embeddings: bool | None = None
    """Freeze the token and position embeddings; null follows the layers: frozen as soon as any layer is."""

    freeze_final_layer_norm: bool = False
    """Freeze the layer norm after the last layer."""
