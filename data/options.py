"""Options of the data: the images and how they are shown to the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Le, MinLen, MultipleOf

Resolution = Annotated[int, Ge(64), Le(8192), MultipleOf(64)]


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """The captioned images and how they are shown to the model."""

    data_root: str | tuple[str, ...] = "input"
    """The folder of captioned images, sub-folders included, or a .json, .jsonl, .csv or .parquet list of
    images; or several of these."""

    resolution: Resolution | Annotated[tuple[Resolution, ...], MinLen(1)] = 512
    """The training resolution in pixels, a multiple of 64: images are resized into aspect buckets of about
    its square in area. With a list, each showing of an image takes the next resolution, so an epoch is no
    longer."""

    batch_size: Annotated[int, Ge(1)] = 2
    """Images per forward and backward pass on one device; a step has batch_size x grad_accum x processes."""

    flip_p: Annotated[float, Ge(0), Le(1)] = 0.0
    """Probability of mirroring an image left to right."""

    crop_jitter: Annotated[float, Ge(0), Le(1)] = 0.0
    """The largest distance of a crop from the middle, as a share of the way to the edge, drawn anew each
    time; small distances are likelier."""

    alpha_mask: bool = False
    """Train the opaque parts of an image alone: its transparency is its mask. A mask file comes first."""

    cond_dropout: Annotated[float, Ge(0), Le(1)] = 0.04
    """Probability of training an image with the empty caption, which guidance uses when sampling."""

    shuffle_tags: bool = False
    """Shuffle the comma-separated tags after the main prompt, anew each epoch."""

    keep_tags: Annotated[int, Ge(0)] = 0
    """Keep the first n tags in place when tags are shuffled or dropped. In folders named as kohya's, the
    words before the first comma are a tag."""

    tag_dropout: Annotated[float, Ge(0), Le(1)] = 0.0
    """Probability of dropping each tag after the main prompt and keep_tags, anew for each showing."""

    wildcards: bool = False
    """Of `{a|b}` in a caption show one alternative, drawn anew for each showing, and of a sample prompt one
    for the whole run. `{{` and `}}` are braces then. Measurements of the loss take the first alternative."""

    caption_prefix: str = ""
    """Text in front of every caption, with a space between; the empty caption of cond_dropout stays empty."""

    caption_lines: bool = False
    """Take each line of a .txt or .caption file as a caption of its own, and draw one for each showing of the
    image."""

    max_tokens: Literal[75, 150, 225] = 75
    """The most tokens of a caption. CLIP reads 75 at a time; more are encoded as 75-token chunks that the
    UNet attends to together, in training and in samples alike."""

    on_bad_image: Literal["skip", "error"] = "skip"
    """Skip images and captions that cannot be used and name them, or refuse the run. Damage inside an image
    shows when it is read: before training with cached latents, else in the run, which skips the image either
    way."""

    num_workers: Annotated[int, Ge(0), Le(256)] | None = None
    """DataLoader workers; null chooses by the size of the images and the number of cores, 0 reads images in
    the training process."""

    @property
    def resolutions(self) -> tuple[int, ...]:
        """One resolution or several."""
        return (self.resolution,) if isinstance(self.resolution, int) else self.resolution
