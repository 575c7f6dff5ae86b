"""From pixels to the latent distribution of the VAE."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def encode_pixels(
    vae: Any, pixels_BCHW: Tensor, autocast: Callable[[], AbstractContextManager[Any]]
) -> Tensor:
    """Return mean and standard deviation of each image's latents, concatenated in C, in fp32.

    The weight of each latent in the loss, 0 to 1, follows where the pixels have a fourth channel: the mean
    over its pixels.
    """
    images_B3HW, masks_BCHW = pixels_BCHW[:, :3], pixels_BCHW[:, 3:]
    with torch.no_grad(), autocast():
        distribution = vae.encode(images_B3HW).latent_dist
    moments_BCHW = torch.cat([distribution.mean.float(), distribution.std.float()], dim=1)
    if masks_BCHW.shape[1] == 0:
        return moments_BCHW
    height, width = moments_BCHW.shape[-2:]
    weights_B1HW = F.adaptive_avg_pool2d((masks_BCHW + 1) / 2, (height, width))
    return torch.cat([moments_BCHW, weights_B1HW], dim=1)
