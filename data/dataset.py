"""Images by position: a record, decoded, cropped to its bucket and captioned, as CPU tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Gt, Le, MultipleOf


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Where the captioned images are and how they are shown to the model."""

    data_root: str | tuple[str, ...] = "input"
    """The folder of captioned images, or a list of folders; sub-folders are searched too."""

    resolution: Annotated[int, Ge(64), MultipleOf(64)] = 512
    """The training resolution in pixels, a multiple of 64: images are resized into aspect buckets of about its square in area."""

    batch_size: Annotated[int, Ge(1)] = 2
    """Images in one forward and backward pass on one device."""

    flip_p: Annotated[float, Ge(0), Le(1)] = 0.0
    """Probability of mirroring an image left to right."""

    cond_dropout: Annotated[float, Ge(0), Le(1)] = 0.04
    """Probability of training an image with the empty caption, which is what guidance at sampling time contrasts with."""

    shuffle_tags: bool = False
    """Shuffle the comma-separated tags after the main prompt, anew each epoch."""

    keep_tags: Annotated[int, Ge(0)] = 0
    """Keep the first n tags in place when tags are shuffled."""

    num_workers: Annotated[int, Ge(0)] | None = None
    """Processes that read images; null chooses by the number of cores, 0 reads in the training process."""
