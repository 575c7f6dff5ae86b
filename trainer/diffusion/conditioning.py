"""From captions to the context that the UNet attends to."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

_CACHED = 20_000
"""Captions with cached tokens: most runs repeat their captions, and the tokenizer takes 0.1 ms for each."""


@dataclass(frozen=True)
class Tokenize:
    """Turn captions into tokens; picklable, for DataLoader workers.

    A text encoder reads a window of 77 tokens: a start, 75 of the caption, an end. Longer captions are cut
    into 75-token chunks, each in its own window. Every caption gets `chunks` windows, padded with those of
    the empty caption, so that an image's context does not depend on the others in its batch.
    """

    tokenizer: Any
    """CLIP's; its `model_max_length` is the window."""
    chunks: int = 1
    """Windows per caption."""
    known: dict[str, list[int]] = field(default_factory=dict, repr=False, compare=False)
    """Cached tokens by caption."""

    @property
    def limit(self) -> int:
        """The number of caption tokens that are read."""
        return self.chunks * (self.tokenizer.model_max_length - 2)

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """Return int64 tokens (B, chunks x window)."""
        return torch.tensor([self._windows(tokens) for tokens in self._tokens(captions)], dtype=torch.int64)

    def counts(self, texts: Sequence[str]) -> list[int]:
        """Return the number of tokens of each whole text, beyond the limit too."""
        return [len(tokens) for tokens in self._encode(texts)]

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        return self.tokenizer(list(texts), add_special_tokens=False, verbose=False).input_ids if texts else []

    def _tokens(self, captions: Sequence[str]) -> list[list[int]]:
        new = [caption for caption in dict.fromkeys(captions) if caption not in self.known]
        fresh = dict(zip(new, self._encode(new), strict=True))
        tokens = [fresh[caption] if caption in fresh else self.known[caption] for caption in captions]
        self.known.update(itertools.islice(fresh.items(), max(0, _CACHED - len(self.known))))
        return tokens

    def _windows(self, tokens: list[int]) -> list[int]:
        clip = self.tokenizer
        size = clip.model_max_length
        windows: list[int] = []
        for start in range(0, self.limit, size - 2):
            window = [clip.bos_token_id, *tokens[start : start + size - 2], clip.eos_token_id]
            windows += window + [clip.pad_token_id] * (size - len(window))
        return windows


def encode_text(text_encoder: Any, tokens_BT: Tensor, clip_skip: int = 0) -> Tensor:
    """Return the context_BTD of CLIP's text transformer: windows encoded one by one, concatenated in T.

    Args:
        text_encoder: a CLIPTextModel, possibly wrapped for several processes.
        tokens_BT: token ids; T is a multiple of the encoder's window, 77 for CLIP.
        clip_skip: n takes the n-th hidden state from the end, 0 and 1 the last; then the final layer norm.
    """
    plain = getattr(text_encoder, "module", text_encoder)
    # Windows become further rows of the batch, and afterwards further positions of the context.
    tokens_NW = tokens_BT.reshape(-1, plain.config.max_position_embeddings)
    if clip_skip <= 1:
        hidden_NWD = text_encoder(tokens_NW).last_hidden_state
    else:
        skipped_NWD = text_encoder(tokens_NW, output_hidden_states=True).hidden_states[-clip_skip]
        hidden_NWD = getattr(plain, "text_model", plain).final_layer_norm(skipped_NWD)
    return hidden_NWD.reshape(*tokens_BT.shape, -1)


class Contexts:
    """A frozen text encoder's output for every caption of a run, computed once and kept in CPU memory.

    Captions are encoded one at a time, so that a context does not depend on its batch.
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
        """Encode captions on `device`, each token sequence once."""
        for caption in captions:
            tokens_1T = tokenize([caption])
            key = _key(tokens_1T[0])
            if key not in self._by_tokens:
                with torch.no_grad(), autocast():
                    context_1TD = encode_text(text_encoder, tokens_1T.to(device), clip_skip)
                self._by_tokens[key] = context_1TD[0].cpu()

    def lookup(self, tokens_BT: Tensor) -> Tensor:
        """Return the context_BTD of encoded captions, on the CPU."""
        return torch.stack([self._by_tokens[_key(tokens_T)] for tokens_T in tokens_BT])


def _key(tokens_T: Tensor) -> bytes:
    return tokens_T.numpy().tobytes()
