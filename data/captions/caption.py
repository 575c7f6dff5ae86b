"""A caption: the main prompt and the tags after it, and the text they become for one showing of the image."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True, slots=True)
class Tag:
    """A piece of a caption after the main prompt; tags of larger weight tend to come first when tags are shuffled."""

    text: str
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Caption:
    """What an image shows, in words; `source` names where the words were found."""

    main: str
    tags: tuple[Tag, ...] = ()
    source: str = ""

    @property
    def text(self) -> str:
        """Return the whole caption in its written order."""
        return ", ".join(piece for piece in (self.main, *(tag.text for tag in self.tags)) if piece)


def parse_caption(text: str, source: str) -> Caption:
    """Split a text on commas into the main prompt and tags; white space, line ends included, becomes single spaces."""
    main, *tags = (" ".join(piece.split()) for piece in text.split(","))
    return Caption(main, tuple(Tag(tag) for tag in tags if tag), source)


def render(caption: Caption, draws: np.random.Generator, *, cond_dropout: float, shuffle_tags: bool, keep_tags: int) -> str:
    """Return the caption's text for one showing of its image.

    Args:
        draws: the generator of this showing; it is used in the same order whatever the options are.
        cond_dropout: probability of the empty string.
        shuffle_tags: whether to shuffle the tags; the main prompt always comes first.
        keep_tags: how many tags keep their place in front of the shuffled ones.
    """
    if draws.random() < cond_dropout:
        return ""
    if not shuffle_tags:
        return caption.text
    kept, loose = caption.tags[:keep_tags], caption.tags[keep_tags:]
    # An exponential race: each tag in turn wins with a chance proportional to its weight; weight 0 never beats another tag.
    finish = [time / tag.weight if tag.weight > 0 else np.inf for tag, time in zip(loose, draws.exponential(size=len(loose)), strict=True)]
    shuffled = tuple(loose[place] for place in np.argsort(finish, kind="stable"))
    return replace(caption, tags=kept + shuffled).text
