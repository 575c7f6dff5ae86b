"""From caption tokens to the context that the UNet attends to."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
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


class Contexts:
    """What a text encoder that does not learn makes of every caption of a run, computed once and kept in CPU memory.

    Captions are encoded one at a time, so that a context does not depend on the captions beside it.
    """

    def __init__(self) -> None:
        self._by_tokens: dict[bytes, Tensor] = {}

    def add(
        self,
        captions: Iterable[str],
        tokenize: Callable[[list[str]], Tensor],
        text_encoder: Any,
        *,
        clip_skip: int,
        device: torch.device,
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        """Encode captions; those that come out as the same tokens are encoded once.

        Args:
            captions: as they are shown to the model.
            tokenize: turns B captions into tokens (B, T).
            text_encoder: on `device`, in evaluation mode.
            clip_skip: as for `encode_text`.
            device: where to compute.
            autocast: the context in which the network computes.
        """
        import torch

        for caption in captions:
            tokens_1T = tokenize([caption])
            key = _key(tokens_1T[0])
            if key not in self._by_tokens:
                with torch.no_grad(), autocast():
                    context_1TD = encode_text(text_encoder, tokens_1T.to(device), clip_skip)
                self._by_tokens[key] = context_1TD[0].cpu()

    def of(self, tokens_BT: Tensor) -> Tensor:
        """Return the context_BTD of captions that were added, on the CPU."""
        import torch

        return torch.stack([self._by_tokens[_key(tokens_T)] for tokens_T in tokens_BT])


def _key(tokens_T: Tensor) -> bytes:
    return tokens_T.numpy().tobytes()
