"""The text encoder's warm-up: paint a thumbnail of the scene from its caption.

Twelve narrow layers learn almost nothing from the UNet's loss while their outputs are noise. A few minutes of
direct supervision give the UNet words that differ by colour, shape and place.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from .drawing import Scene, render, to_array
from .networks import WIDTH, new_text_encoder
from .scenes import RADII, caption, sample_scene
from .state import Run
from .vae import cosine

_THUMBNAIL = 20


@dataclass(frozen=True)
class TextOptions:
    """Settings of the text encoder's warm-up."""

    steps: int = 1500
    batch: int = 64
    lr: float = 1e-3
    tokens: int = 28
    seed: int = 2


def load_tokenizer(work: Path) -> CLIPTokenizer:
    """Return the work folder's tokenizer."""
    return CLIPTokenizer.from_pretrained(work / "tokenizer")


def tokenize(tokenizer: CLIPTokenizer, captions: list[str], tokens: int) -> Tensor:
    """Return token ids (B, tokens), padded as SD pads."""
    ids: Tensor = tokenizer(
        captions, padding="max_length", truncation=True, max_length=tokens, return_tensors="pt"
    ).input_ids
    return ids


def train_text(
    work: Path, options: TextOptions, stop_at: int | None = None, save_every_s: float = 120.0
) -> bool:
    """Start or resume the text encoder's warm-up; return True once it is complete."""
    torch.manual_seed(options.seed)
    tokenizer = load_tokenizer(work)
    end: Any = tokenizer.eos_token_id
    encoder = new_text_encoder(tokenizer).train()
    head = nn.Sequential(nn.Linear(WIDTH, 256), nn.GELU(), nn.Linear(256, 3 * _THUMBNAIL**2))
    parameters = [*encoder.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=options.lr, weight_decay=1e-3, fused=True)
    run = Run(work / "text.pt", {"text": encoder, "head": head, "optimizer": optimizer}, save_every_s)

    def train_step(step: int) -> float:
        rng = np.random.default_rng((options.seed, step))
        scenes = [sample_scene(rng) for _ in range(options.batch)]
        ids_BT = tokenize(tokenizer, [caption(scene, rng) for scene in scenes], options.tokens)
        target_BD = torch.from_numpy(
            to_array([render(_tidy(scene), _THUMBNAIL) for scene in scenes])
        ).flatten(1)
        for group in optimizer.param_groups:
            group["lr"] = options.lr * cosine(step, options.steps, 50)
        states_BTD = encoder(ids_BT).last_hidden_state
        end_B = ids_BT.eq(end).int().argmax(1).numpy()
        position_B = torch.from_numpy(rng.integers(end_B, options.tokens))
        loss = (head(states_BTD[torch.arange(options.batch), position_B]) - target_BD).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return run.advance(options.steps, train_step, stop_at, "text")


def load_text_encoder(work: Path, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Return the warmed-up text encoder of the work folder."""
    encoder = new_text_encoder(tokenizer)
    encoder.load_state_dict(torch.load(work / "text.pt", weights_only=True)["parts"]["text"])
    return encoder


def _tidy(scene: Scene) -> Scene:
    """Return the scene at the positions and sizes that its caption implies."""
    if len(scene.items) == 1:
        item = scene.items[0]
        return Scene(scene.background, (replace(item, x=0.5, y=0.5, radius=sum(RADII[item.size]) / 2 / 64),))
    tidy = (replace(item, x=x, y=0.5, radius=0.2) for item, x in zip(scene.items, (0.27, 0.73), strict=True))
    return Scene(scene.background, tuple(tidy))
