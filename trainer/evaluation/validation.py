"""Losses that can be compared over time: the same images, noise and timesteps at every evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from annotated_types import Ge, Gt, Lt

if TYPE_CHECKING:
    import torch

    from data.batch import Batch
    from data.dataset import DataOptions, Images
    from data.index import Index
    from trainer.diffusion.objective import Networks, Objective

TIMESTEPS = 4
EVALUATION = -1  # in an epoch's place: no training image ever draws the same noise
VALIDATION_LOSS = "loss/val"


@dataclass(frozen=True, kw_only=True)
class FixedLossOptions:
    """The fixed-noise loss, logged as loss/stabilize-train from step 0."""

    fixed_loss_images: Annotated[int, Ge(0)] = 16
    """How many training images the fixed-noise loss is measured on, each at 4 timesteps; 0 turns it off."""


@dataclass(frozen=True, kw_only=True)
class ValidationOptions:
    """Whether images are held out of training, to see how the model does on what it has not seen."""

    validation_config: str | None = None
    """A .json file: which images are held out of training, and how often their loss is measured, as loss/val; null holds out none."""

    stop_on_overfit: bool = False
    """Save and end the run when the validation loss has risen for three measurements while that of training
    images fell. Needs validation_config."""


@dataclass(frozen=True, kw_only=True)
class ValidationFile:
    """The keys of the file that validation_config names. The default is no file: nothing is held out.

    Losses are measured before the first step, as often as `every_n_epochs` says, and after the last.
    """

    batch_size: Annotated[int, Ge(1)] | None = None
    """Images and timesteps that are measured at a time, at least 4; null takes the training's."""

    every_n_epochs: Annotated[float, Gt(0)] = 1.0
    """Epochs between two measurements; 0.25 measures four times in each."""

    seed: Annotated[int, Ge(0)] = 555
    """Draws the automatic split and the fixed noise."""

    validate_training: bool = True
    """Measure loss/val, on the images of val_split_mode; extra_manual_datasets are measured without it too."""

    val_split_mode: Literal["automatic", "manual", "none"] = "automatic"
    """Where the images of loss/val come from: held out of data_root, from manual_data_root, or nowhere."""

    auto_split_proportion: Annotated[float, Gt(0), Lt(1)] = 0.15
    """The share of images that an automatic split holds out, chosen by the content of their files."""

    manual_data_root: str | None = None
    """A folder of captioned images for loss/val, not trained where it lies inside data_root."""

    extra_manual_datasets: dict[str, str] | None = None
    """More folders of captioned images by name, measured as loss/val and the name, not trained either."""

    stabilize_training_loss: bool = False
    """Measure the fixed-noise loss on stabilize_split_proportion of the training images instead of on fixed_loss_images."""

    stabilize_split_proportion: Annotated[float, Gt(0), Lt(1)] = 0.15
    """The share of training images for it."""


@dataclass(frozen=True)
class HeldOut:
    """Images whose loss is measured and which are not trained."""

    tag: str
    index: Index
    keys: tuple[tuple[int, ...], ...]
    """By record id, where the image's fixed noise is drawn: from its content and the seed, whatever is beside it."""


@dataclass(frozen=True)
class Split:
    """What is trained and what is held out."""

    train: Index
    held_out: tuple[HeldOut, ...] = ()
    notes: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """Return what is held out, in words."""
        return [f"{len(held.index.records):,} images as {held.tag}" for held in self.held_out]


def split_images(
    file: ValidationFile, data: DataOptions, index: Index, remembered: Path, *, save: bool = True
) -> Split:
    """Return which images are trained and which are held out.

    Args:
        file: what is asked for.
        data: how images are found.
        index: everything below data_root.
        remembered: the folder in which hashes of contents are kept for later runs.
        save: whether to keep them.

    Raises:
        DataError: a folder holds no images, or nothing is left to train on.
    """
    from data.errors import DataError
    from data.index import build_index
    from data.latents import contents_of
    from data.split import hold_out, take_out

    roots: dict[str, str] = {}
    automatic = file.validate_training and file.val_split_mode == "automatic"
    if file.validate_training and file.val_split_mode == "manual" and file.manual_data_root is not None:
        roots[VALIDATION_LOSS] = file.manual_data_root
    roots |= {f"{VALIDATION_LOSS} {name}": root for name, root in (file.extra_manual_datasets or {}).items()}

    notes: list[str] = []
    found: dict[str, Index] = {}
    for tag, root in roots.items():
        try:
            found[tag] = build_index(replace(data, data_root=root))
        except DataError as error:
            raise DataError(
                [problem.replace("data_root: ", f"validation ({tag}): ", 1) for problem in error.problems]
            ) from error
        inside = {record.path.resolve() for record in found[tag].records}
        shared = {
            identity for identity, record in enumerate(index.records) if record.path.resolve() in inside
        }
        if shared:
            index, _ = take_out(index, shared)
            notes.append(f"{len(shared)} images of data_root are not trained: they are held out as {tag}")
    if automatic:
        contents = contents_of(index.records, remembered / "contents-split.json", save=save)
        index, held = hold_out(index, contents, proportion=file.auto_split_proportion, seed=file.seed)
        found = {VALIDATION_LOSS: held, **found}
    if not any(record.multiply > 0 for record in index.records):
        raise DataError(
            "validation: every image of data_root is held out, and none is left to train on; name other folders"
        )
    sets = []
    for number, (tag, held) in enumerate(found.items()):
        memory = "split" if automatic and tag == VALIDATION_LOSS else f"val-{number}"
        contents = contents_of(
            held.records, remembered / f"contents-{memory}.json", save=save and memory != "split"
        )
        keys = tuple(
            (file.seed, int(contents.get(identity, "0")[:15], 16)) for identity in range(len(held.records))
        )
        sets.append(HeldOut(tag, held, keys))
    return Split(index, tuple(sets), tuple(notes))


def choose_images(records: int, count: int, seed: int) -> tuple[int, ...]:
    """Return `count` of the record numbers 0..records-1, or all where there are fewer, drawn once for the run, in ascending order."""
    from data.rng import stream

    chosen = stream(seed, "fixed loss images").permutation(records)[:count]
    return tuple(sorted(int(record) for record in chosen))


class Measured(NamedTuple):
    """A mean loss over images and timesteps."""

    loss: float
    """By the training's definition, without an image's own loss_scale."""

    mse: float
    """The plain mean squared error, which runs of other definitions share."""


class FixedLoss:
    """The training loss on fixed images, noise and timesteps, whose changes are changes of the model and nothing else.

    Args:
        batches: the fixed images, uncropped by chance: no flips, no dropped captions.
        objective: the training objective; its timestep range is divided into four equal parts, whose middles
        are measured.
        keys: by record id, what keys an image's noise; the record id where it is None.
    """

    def __init__(
        self, batches: Sequence[Batch], objective: Objective, keys: Sequence[tuple[int, ...]] | None = None
    ) -> None:
        start, end = objective.options.timestep_start, objective.options.timestep_end
        self._timesteps = [int(start + (end - start) * (part + 0.5) / TIMESTEPS) for part in range(TIMESTEPS)]
        self._batches = list(batches)
        self._objective = objective
        self._keys = keys

    def measure(
        self,
        networks: Networks,
        autocast: Callable[[], AbstractContextManager[Any]],
        device: torch.device,
        check: Callable[[], None] = lambda: None,
    ) -> Measured:
        """Return the mean loss over images and timesteps; synchronises once. The first time encodes the images, one batch at a time.

        Args:
            networks: as they train.
            autocast: the context in which the networks compute.
            device: where they are.
            check: called before each batch; raises to break off.
        """
        import torch

        from trainer.diffusion.loss import image_losses
        from trainer.diffusion.moments import encode_pixels
        from trainer.diffusion.objective import Inputs

        sums, images = [], 0
        with torch.no_grad():
            for number, batch in enumerate(self._batches):
                check()
                if batch.pixels_BCHW is not None:
                    moments = encode_pixels(networks.vae, batch.pixels_BCHW.to(device), autocast).cpu()
                    batch = self._batches[number] = replace(batch, pixels_BCHW=None, moments_BCHW=moments)
                keys = [(record,) if self._keys is None else self._keys[record] for record in batch.records]
                parts = [
                    self._objective.place(batch, [(EVALUATION, part, *key) for key in keys], [t] * len(batch))
                    for part, t in enumerate(self._timesteps)
                ]
                inputs = Inputs.cat(parts).to(device)
                prediction, target = self._objective.predict(networks, inputs, autocast)
                loss = self._objective.judge(prediction, target, inputs.t_B).sum()
                sums.append(torch.stack([loss, image_losses(prediction, target, inputs.t_B, "mse").sum()]))
                images += len(inputs.t_B)
        loss, mse = torch.stack(sums).sum(dim=0).tolist()
        return Measured(loss / images, mse / images)


class Validation:
    """The losses of held-out images.

    Args:
        losses: by tag.
        every_n_epochs: epochs between two measurements.
    """

    def __init__(self, losses: Mapping[str, FixedLoss], every_n_epochs: float) -> None:
        self.losses = dict(losses)
        self._every = every_n_epochs

    def due(self, before: float, after: float, *, last: bool = False) -> bool:
        """Return whether something is to be measured after a step.

        Args:
            before: epochs finished before the step.
            after: epochs finished after it.
            last: whether it is the run's last.
        """
        slack = 1e-9  # sums of fractions of an epoch
        if last or not self.losses:
            return bool(self.losses)
        return math.floor(after / self._every + slack) > math.floor(before / self._every + slack)


def held_out_batches(
    images: Images, records: int, size: int, encode: Callable[[Batch], Batch]
) -> list[Batch]:
    """Return images that are held out as batches of one bucket each.

    Args:
        images: their reader; files that cannot be read are named in its `bad`.
        records: how many there are.
        size: images of a batch.
        encode: replaces an image's pixels by what the VAE makes of them, which takes a 24th of the memory.
    """
    by_size: dict[torch.Size, list[Batch]] = {}
    for identity in range(records):
        for batch in images.plain([identity]):
            encoded = encode(batch)
            moments = encoded.moments_BCHW
            assert moments is not None, "encoding makes moments"
            by_size.setdefault(moments.shape, []).append(encoded)
    return [
        _joined(same[start : start + size])
        for same in by_size.values()
        for start in range(0, len(same), size)
    ]


def _joined(batches: Sequence[Batch]) -> Batch:
    import torch

    tensors = ("tokens_BT", "loss_scale_B", "moments_BCHW")
    tuples = ("positions", "records", "names", "captions")
    joined: dict[str, Any] = {
        name: torch.cat([getattr(batch, name) for batch in batches]) for name in tensors
    }
    joined |= {name: tuple(item for batch in batches for item in getattr(batch, name)) for name in tuples}
    return replace(batches[0], **joined)
