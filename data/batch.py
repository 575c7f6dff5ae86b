"""A micro-batch on the CPU, as the trainer gets it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from data.record import BadFile


@dataclass(frozen=True)
class Batch:
    """The images of one forward and backward pass, in CPU memory."""

    pixels_BCHW: Tensor | None
    """float32 in [-1, 1], sRGB, then with masks the weight in the loss; None with moments_BCHW."""
    tokens_BT: Tensor
    """int64."""
    loss_scale_B: Tensor
    """float32, the weight of each image in the loss."""
    epoch: int
    positions: tuple[int, ...]
    """By image, its position in the epoch's plan: the key of its random draws."""
    records: tuple[int, ...]
    names: tuple[str, ...]
    captions: tuple[str, ...]
    """As tokenized: after dropout and shuffling."""
    filler: bool = False
    """The only image keeps this rank in step: loss_scale is 0, and it is not counted."""
    failed: tuple[BadFile, ...] = ()
    """Planned images that could not be read."""
    moments_BCHW: Tensor | None = None
    """float32, the VAE's cached output: mean and standard deviation, with masks the weight, all in C."""

    def __len__(self) -> int:
        return len(self.positions)

    def pin_memory(self) -> Batch:
        """Return the batch in page-locked memory, from which copies to a GPU run beside the computation."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **{name: tensor.pin_memory() for name, tensor in tensors.items()})


def to_pixels(images: Sequence[np.ndarray]) -> Tensor:
    """Stack uint8 images of one size, each (height, width, C), into float32 (B, C, H, W) in [-1, 1]."""
    stacked = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    return stacked.to(torch.float32, memory_format=torch.contiguous_format).div_(127.5).sub_(1)
