"""A caption: the main prompt and the tags after it, and the text they become for one showing of the image."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

_HALVES = re.compile("[\ud800-\udfff]")


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
    prefix: str = ""
    """Comes before the main prompt, with a space between."""
    longest: int | None = None
    """Letters of the whole text, beyond which no further tag is added; None is without limit."""
    others: tuple[Caption, ...] = ()
    """Further captions of the same image: each showing draws this one or one of them."""

    @property
    def text(self) -> str:
        """Return the whole caption in its written order, without the others."""
        pieces = list(filter(None, [self.main, *[tag.text for tag in self.tags]]))
        text = ", ".join(pieces)
        if self.longest is not None:
            room = self.longest - (len(self.prefix) + 1 if self.prefix else 0)
            while len(text) > room and len(pieces) > 1:
                text = text[: -len(", " + pieces.pop())]
        return " ".join(filter(None, (self.prefix, text))) if self.prefix else text

    @property
    def empty(self) -> bool:
        """Whether the image has no words of its own."""
        return not self.main and not any(tag.text for tag in self.tags)

    @property
    def versions(self) -> tuple[Caption, ...]:
        """The captions that a showing may draw: the first one and the others."""
        return (self, *self.others)


def squeeze(text: str) -> str:
    """Return a text with every run of white space, line ends included, as a single space, and none at its ends.

    Halves of surrogate pairs, which JSON may spell and names in Latin-1 are read as, become the replacement
    character: no tokenizer takes them.
    """
    return " ".join((text if text.isascii() else _HALVES.sub("\ufffd", text)).split())


def parse_caption(text: str, source: str) -> Caption:
    """Split a text on commas into the main prompt and tags; white space, line ends included, becomes single spaces."""
    main, *tags = map(squeeze, text.split(","))
    return Caption(main, tuple(_tag(tag) for tag in tags if tag), source)


def without_main(caption: Caption) -> Caption:
    """Return the same words with the main prompt as the first of the tags, shuffled or kept in place like them."""
    tags = (_tag(caption.main), *caption.tags) if caption.main else caption.tags
    return replace(caption, main="", tags=tags, others=tuple(map(without_main, caption.others)))


@lru_cache(maxsize=1 << 16)
def _tag(text: str) -> Tag:
    """Return the tag of a text, one object for all images that have it: of 100 000 images the tags take the most memory."""
    return Tag(text)


def render(
    caption: Caption, draws: np.random.Generator, *, cond_dropout: float, shuffle_tags: bool, keep_tags: int
) -> str:
    """Return the caption's text for one showing of its image.

    Args:
        draws: the generator of this showing; it is used in the same order whatever the options are.
        cond_dropout: probability of the empty string.
        shuffle_tags: whether to shuffle the tags; the main prompt always comes first.
        keep_tags: how many tags keep their place in front of the shuffled ones.
    """
    if draws.random() < cond_dropout:
        return ""
    if caption.others:
        caption = caption.versions[draws.integers(len(caption.versions))]
    if not shuffle_tags:
        return caption.text
    kept, loose = caption.tags[:keep_tags], caption.tags[keep_tags:]
    # An exponential race: each tag in turn wins with a chance proportional to its weight; weight 0 never
    # beats another tag.
    finish = [
        time / tag.weight if tag.weight > 0 else np.inf
        for tag, time in zip(loose, draws.exponential(size=len(loose)), strict=True)
    ]
    shuffled = tuple(loose[place] for place in np.argsort(finish, kind="stable"))
    return replace(caption, tags=kept + shuffled).text
