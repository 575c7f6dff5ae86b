"""A caption, the main prompt and tags, and its text for one showing of the image."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from data.captions.wildcards import Pick, choose, drawn, has_wildcards, outside

_SURROGATES = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Tag:
    """A part of a caption after the main prompt; heavier tags tend to come first when tags are shuffled."""

    text: str
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Caption:
    """The caption of an image; `source` is the kind of file it comes from."""

    main: str
    tags: tuple[Tag, ...] = ()
    source: str = ""
    prefix: str = ""
    """Text in front of the main prompt, with a space between."""
    longest: int | None = None
    """Letters of the whole text, beyond which no further tag is added; None is without limit."""
    others: tuple[Caption, ...] = ()
    """Alternatives: each showing draws this caption or one of them."""

    @property
    def text(self) -> str:
        """The whole caption in its written order."""
        parts = list(filter(None, [self.main, *[tag.text for tag in self.tags]]))
        text = ", ".join(parts)
        if self.longest is not None:
            allowed = self.longest - (len(self.prefix) + 1 if self.prefix else 0)
            while len(text) > allowed and len(parts) > 1:
                text = text[: -len(", " + parts.pop())]
        return " ".join(filter(None, (self.prefix, text))) if self.prefix else text

    @property
    def empty(self) -> bool:
        """True without a main prompt and tags."""
        return not self.main and not any(tag.text for tag in self.tags)

    @property
    def versions(self) -> tuple[Caption, ...]:
        """The caption and its alternatives."""
        return (self, *self.others)


def squeeze(text: str) -> str:
    """Replace every run of white space by one space, and strip the ends.

    Lone surrogates, from JSON escapes or undecodable file names, become the replacement character: no
    tokenizer takes them.
    """
    return " ".join((text if text.isascii() else _SURROGATES.sub("\ufffd", text)).split())


def parse_caption(text: str, source: str) -> Caption:
    """Split a text on commas into the main prompt and tags, with squeezed white space."""
    main, *tags = map(squeeze, text.split(","))
    return Caption(main, tuple(_tag(tag) for tag in tags if tag), source)


def without_main(caption: Caption) -> Caption:
    """Return the caption with its main prompt as the first tag, to be shuffled or kept like the others."""
    tags = (_tag(caption.main), *caption.tags) if caption.main else caption.tags
    return replace(caption, main="", tags=tags, others=tuple(map(without_main, caption.others)))


@lru_cache(maxsize=1 << 16)
def _tag(text: str) -> Tag:
    """Return one shared object per tag: the tags of 100 000 images take the most memory."""
    return Tag(text)


def render(
    caption: Caption,
    draw: Callable[[str], np.random.Generator],
    *,
    cond_dropout: float,
    shuffle_tags: bool,
    keep_tags: int,
    tag_dropout: float = 0.0,
    wildcards: bool = False,
) -> str:
    """Return the caption's text for one showing of its image.

    Args:
        draw: returns the generator of a kind of draws of this showing, so that no option changes the others'.
        cond_dropout: probability of the empty string.
        keep_tags: number of tags that stay in front of the shuffled ones, and are not dropped.
        tag_dropout: probability of dropping each other tag.
        wildcards: draw the wildcards first: an alternative may hold commas, and so tags.
    """
    draws = draw("caption")
    if draws.random() < cond_dropout:
        return ""
    if caption.others:
        caption = caption.versions[draws.integers(len(caption.versions))]
    if wildcards:
        caption = chosen(caption, drawn(draw("wildcard")))
    if not shuffle_tags and not tag_dropout:
        return caption.text
    kept, loose = caption.tags[:keep_tags], caption.tags[keep_tags:]
    order = _shuffled(loose, draws) if shuffle_tags else range(len(loose))
    if tag_dropout:
        stays = draw("tag dropout").random(len(loose)) >= tag_dropout
        order = [number for number in order if stays[number]]
    return replace(caption, tags=kept + tuple(loose[number] for number in order)).text


def chosen(caption: Caption, pick: Pick) -> Caption:
    """Return a caption with an alternative of each wildcard, without its other versions."""
    pieces = [Tag(caption.main), *caption.tags]
    if not any(has_wildcards(text) for text in (caption.prefix, ", ".join(tag.text for tag in pieces))):
        return caption
    tags: list[Tag] = []
    for piece in _whole(pieces):
        text = choose(piece.text, pick)
        words = Caption(text) if "," in outside(piece.text) else parse_caption(text, "")
        tags += [replace(piece, text=words.main), *(replace(piece, text=tag.text) for tag in words.tags)]
    main, *others = tags
    return replace(
        caption,
        main=main.text,
        tags=tuple(tag for tag in others if tag.text),
        prefix=choose(caption.prefix, pick),
    )


def _whole(tags: Sequence[Tag]) -> list[Tag]:
    """Join tags again that were split at a comma inside a wildcard."""
    whole: list[Tag] = []
    for tag in tags:
        if whole and "{" in outside(whole[-1].text):
            whole[-1] = replace(whole[-1], text=f"{whole[-1].text}, {tag.text}")
        else:
            whole.append(tag)
    return whole


def _shuffled(tags: Sequence[Tag], draws: np.random.Generator) -> Sequence[int]:
    """Return the numbers of tags in a new order.

    An exponential race: a tag wins with probability proportional to its weight; weight 0 comes last.
    """
    finish = [
        time / tag.weight if tag.weight > 0 else np.inf
        for tag, time in zip(tags, draws.exponential(size=len(tags)), strict=True)
    ]
    return np.argsort(finish, kind="stable").tolist()
