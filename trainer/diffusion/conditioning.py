"""From caption tokens to the context that the UNet attends to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def encode_text(text_encoder: Any, tokens_BT: Tensor, clip_skip: int = 0) -> Tensor:
    """Return the context_BTD of CLIP's text transformer.

    Args:
        text_encoder: a CLIPTextModel, possibly wrapped for several processes.
        tokens_BT: token numbers, T = 77 for CLIP.
        clip_skip: 0 takes the last hidden state, n the n-th before it; both go through the final layer norm.
    """
    if clip_skip == 0:
        return text_encoder(tokens_BT).last_hidden_state
    hidden_BTD = text_encoder(tokens_BT, output_hidden_states=True).hidden_states[-1 - clip_skip]
    plain = getattr(text_encoder, "module", text_encoder)
    return getattr(plain, "text_model", plain).final_layer_norm(hidden_BTD)
