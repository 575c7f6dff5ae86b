"""A deterministic judge of the colours and the shape in a generated image.

The background is the commonest colour along the border. A pixel's coverage by the object is its distance from
the background. The shape is the renderer's template that overlaps the coverage best (soft Dice), over all
sizes and places. Images are resized to 64 pixels first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from .drawing import COLOURS, FACE, IMAGE_SIZE, PALETTE, SHAPES, Item, Scene, draw_item, render
from .scenes import Combination, combinations, held_out, scene_of

Floats = NDArray[np.float32]

_RADII = tuple(np.arange(8.0, 28.5, 1.0))
_FACE_THRESHOLD = 0.55
_BORDER = 3
_FAINT = 30.0
_BLURS = (0.0, 1.4)


@dataclass(frozen=True)
class Verdict:
    """The judge's reading of an image."""

    background: str
    """A name of the palette."""
    colour: str
    """The object's colour, a name of the palette; empty without an object."""
    shape: str
    """One of the six shapes; empty without an object."""
    confidence: float
    """Overlap of the best shape less that of the second best, in 0..1; 0.02 is a close call."""
    overlap: float
    """Soft Dice of the best shape, in 0..1; above 0.9 for clean shapes."""
    face: float
    """Correlation of the object's inside with eyes and mouth, in -1..1; above 0.55 for smiling faces."""

    @property
    def is_face(self) -> bool:
        """True if the object is a smiling face."""
        return self.face > _FACE_THRESHOLD


@dataclass(frozen=True)
class Figures:
    """Shares in 0..1 of images that match their prompt."""

    count: int
    background: float
    colour: float
    shape: float
    all: float

    def __str__(self) -> str:
        """Return one line for people."""
        shares = {name: value for name, value in asdict(self).items() if name != "count"}
        return f"{self.count} pictures: " + ", ".join(f"{name} {value:.2f}" for name, value in shares.items())


@dataclass(frozen=True)
class ConceptFigures:
    """Shares in 0..1 after a fine-tune on smiling faces."""

    faces: float
    """Concept prompts whose image is a smiling face."""
    face_background: float
    face_colour: float
    kept_background: float
    """Unrelated prompts with the right background."""
    kept_colour: float
    kept_shape: float
    leaked: float
    """Unrelated prompts that became a smiling face."""


def judge(image: Image.Image) -> Verdict:
    """Judge one image with at most one object."""
    pixels_HWC = _pixels(image)
    border_NC = _border(pixels_HWC)
    background = _commonest(border_NC)
    near = _names(border_NC) == COLOURS.index(background)
    ground_C = np.median(border_NC[near], axis=0)
    distance_HW = np.linalg.norm(pixels_HWC - ground_C, axis=2)
    if float(np.percentile(distance_HW, 97)) < _FAINT:
        return Verdict(background, "", "", 0.0, 0.0, 0.0)
    colour, object_C = _object_colour(pixels_HWC, distance_HW)
    span_C = object_C - ground_C
    reach = float(np.linalg.norm(span_C))
    coverage_HW = np.clip((pixels_HWC - ground_C) @ span_C / reach**2, 0, 1).astype(np.float32)
    scores = _match(coverage_HW)
    order = sorted(scores, key=lambda shape: -scores[shape])
    best, second = scores[order[0]], scores[order[1]]
    face = _face_score(pixels_HWC, distance_HW > 0.5 * reach, object_C)
    return Verdict(background, colour, order[0], best - second, best, face)


def judge_prompts(images: Sequence[Image.Image], wanted: Sequence[Combination]) -> Figures:
    """Compare images with their prompts; both sequences have the same length, at least one.

    Raises:
        ValueError: the lengths differ.
    """
    rows = []
    for image, combination in zip(images, wanted, strict=True):
        seen = judge(image)
        right = (seen.background == combination.background, seen.colour == combination.colour)
        rows.append((*right, seen.shape == combination.shape))
    table = np.array(rows, dtype=bool)
    background, colour, shape = (float(v) for v in table.mean(axis=0))
    return Figures(len(rows), background, colour, shape, float(table.all(axis=1).mean()))


def judge_concept(
    faces: Sequence[Image.Image],
    face_wanted: Sequence[tuple[str, str]],
    unrelated: Sequence[Image.Image],
    unrelated_wanted: Sequence[Combination],
) -> ConceptFigures:
    """Judge a fine-tune by its faces and by unrelated prompts.

    Args:
        face_wanted: the (face colour, background) of each image in `faces`.
    """
    seen = [judge(image) for image in faces]
    backgrounds = [v.background == ground for v, (_, ground) in zip(seen, face_wanted, strict=True)]
    colours = [v.colour == colour for v, (colour, _) in zip(seen, face_wanted, strict=True)]
    kept = judge_prompts(unrelated, unrelated_wanted)
    leaked = [judge(image).is_face for image in unrelated]
    return ConceptFigures(
        faces=_share([v.is_face for v in seen]),
        face_background=_share(backgrounds),
        face_colour=_share(colours),
        kept_background=kept.background,
        kept_colour=kept.colour,
        kept_shape=kept.shape,
        leaked=_share(leaked),
    )


def judge_pipeline(
    generate: Callable[[list[str], int], list[Image.Image]], seed: int = 0
) -> tuple[Figures, list[Image.Image]]:
    """Generate the held-out prompts and judge the images.

    Args:
        generate: takes prompts and a seed, returns one image a prompt.
    """
    wanted = held_out()
    images = generate([c.prompt for c in wanted], seed)
    return judge_prompts(images, wanted), images


def self_check(view: Callable[[list[Image.Image]], list[Image.Image]], seed: int = 0) -> Figures:
    """Return the judge's own accuracy, on one new scene of every combination.

    Args:
        view: changes the images before they are judged, for example by a pass through an autoencoder.
    """
    rng = np.random.default_rng((seed, 336))
    wanted = combinations()
    return judge_prompts(view([render(scene_of(c, rng)) for c in wanted]), wanted)


def grid(images: Sequence[Image.Image], columns: int = 10, side: int = 96) -> Image.Image:
    """Paste images into one sheet."""
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * side, rows * side), (128, 128, 128))
    for i, image in enumerate(images):
        small = image.convert("RGB").resize((side - 4, side - 4), Image.Resampling.BICUBIC)
        sheet.paste(small, (i % columns * side + 2, i // columns * side + 2))
    return sheet


def _share(values: Sequence[bool]) -> float:
    return float(np.mean(values)) if values else float("nan")


def _pixels(image: Image.Image) -> Floats:
    image = image.convert("RGB")
    if image.size != (IMAGE_SIZE, IMAGE_SIZE):
        image = image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX)
    return np.asarray(image, dtype=np.float32)


def _border(pixels_HWC: Floats) -> Floats:
    inside = np.ones(pixels_HWC.shape[:2], dtype=bool)
    inside[_BORDER:-_BORDER, _BORDER:-_BORDER] = False
    return pixels_HWC[inside]


def _names(colours_NC: Floats) -> NDArray[np.int64]:
    """Return the index of the nearest palette colour for each row."""
    palette_PC = np.array(list(PALETTE.values()), dtype=np.float32)
    return np.linalg.norm(colours_NC[:, None] - palette_PC, axis=2).argmin(axis=1)


def _commonest(colours_NC: Floats) -> str:
    return COLOURS[int(np.bincount(_names(colours_NC), minlength=len(COLOURS)).argmax())]


def _object_colour(pixels_HWC: Floats, distance_HW: Floats) -> tuple[str, Floats]:
    """Return the name and sRGB value of the object's colour, that of most pixels off the background.

    Blurred borders are mixtures of two colours and may carry any name, so pixels whose neighbours differ do
    not vote.
    """
    steps = [
        np.linalg.norm(pixels_HWC - np.roll(pixels_HWC, shift, axis), axis=2)
        for shift in (-1, 1)
        for axis in (0, 1)
    ]
    away = distance_HW > max(_FAINT, 0.25 * float(np.percentile(distance_HW, 97)))
    calm = away & (np.max(steps, axis=0) < 30.0)
    votes_NC = pixels_HWC[calm if calm.sum() >= 12 else away]
    colour = _commonest(votes_NC)
    return colour, np.median(votes_NC[_names(votes_NC) == COLOURS.index(colour)], axis=0)


def _mask(shape: str, radius: float, blur: float) -> Floats:
    """Return the coverage (64, 64) of a centred shape, in 0..1."""
    scene = Scene("black", (Item(shape, "white", 0.5, 0.5, radius / IMAGE_SIZE),))
    picture = render(scene).convert("L")
    values = np.asarray(picture.filter(ImageFilter.GaussianBlur(blur)) if blur else picture, dtype=np.float32)
    return (values - values.min()) / max(float(values.max() - values.min()), 1.0)


@lru_cache(maxsize=1)
def _templates() -> tuple[list[str], NDArray[np.complex64], Floats]:
    """Return shape names, conjugate spectra (N, 64, 33) and energies (N,) of every shape, size and blur."""
    keys = [(shape, float(radius), blur) for shape in SHAPES for radius in _RADII for blur in _BLURS]
    masks = np.stack([_mask(*key) for key in keys])
    centred = np.fft.ifftshift(masks, axes=(1, 2))
    spectra = np.conj(np.fft.rfft2(centred)).astype(np.complex64)
    return [key[0] for key in keys], spectra, (masks**2).sum(axis=(1, 2))


def _match(coverage_HW: Floats) -> dict[str, float]:
    """Return every shape's best soft Dice, 2ab / (aa + bb), over places, sizes and blurs."""
    names, spectra, energies = _templates()
    correlation = np.fft.irfft2(np.fft.rfft2(coverage_HW)[None] * spectra, s=coverage_HW.shape)
    dice = (
        2
        * correlation.reshape(len(names), -1).max(axis=1)
        / (energies + float((coverage_HW**2).sum()) + 1e-6)
    )
    scores: dict[str, float] = {}
    for shape, value in zip(names, dice, strict=True):
        scores[shape] = max(scores.get(shape, 0.0), float(value))
    return scores


@lru_cache(maxsize=1)
def _face_details() -> tuple[Floats, NDArray[np.bool_]]:
    """Return the ink (32, 32) of eyes and mouth on a face that fills the frame, and the disc compared."""
    canvas = Image.new("RGB", (256, 256), PALETTE["yellow"])
    draw_item(ImageDraw.Draw(canvas), Item(FACE, "yellow", 0.5, 0.5, 0.5), 256)
    values = np.asarray(canvas.reduce(8).convert("L"), dtype=np.float32)
    row, column = np.mgrid[0:32, 0:32] - 15.5
    return values.max() - values, row**2 + column**2 < (0.86 * 16) ** 2


def _face_score(pixels_HWC: Floats, inside_HW: NDArray[np.bool_], object_C: Floats) -> float:
    """Return the best correlation of the inside's departures from the object's colour with eyes and mouth."""
    rows, columns = np.where(inside_HW)
    if len(rows) < 60:
        return 0.0
    top, bottom = np.percentile(rows, (0.5, 99.5))
    left, right = np.percentile(columns, (0.5, 99.5))
    x, y, radius = (left + right + 1) / 2, (top + bottom + 1) / 2, (right - left + bottom - top + 2) / 4
    ink = Image.fromarray(np.linalg.norm(pixels_HWC - object_C, axis=2).astype(np.float32))
    details, disc = _face_details()
    best = -1.0
    for scale in (0.9, 1.0, 1.08):
        for dx in (-1.5, 0.0, 1.5):
            for dy in (-1.5, 0.0, 1.5):
                r = radius * scale
                box = (x + dx - r, y + dy - r, x + dx + r, y + dy + r)
                if box[0] < 0 or box[1] < 0 or box[2] > IMAGE_SIZE or box[3] > IMAGE_SIZE:
                    continue
                seen = np.asarray(ink.resize((32, 32), Image.Resampling.BILINEAR, box=box))[disc]
                if seen.std() < 8.0:
                    continue
                best = max(best, float(np.corrcoef(seen, details[disc])[0, 1]))
    return best
