"""From pixels to the latent distribution of the VAE."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor


def encode_pixels(
    vae: Any, pixels_BCHW: Tensor, autocast: Callable[[], AbstractContextManager[Any]]
) -> Tensor:
    """Return mean and standard deviation of each image's latents, concatenated in C, in fp32."""
    with torch.no_grad(), autocast():
        distribution = vae.encode(pixels_BCHW).latent_dist
    return torch.cat([distribution.mean.float(), distribution.std.float()], dim=1)
