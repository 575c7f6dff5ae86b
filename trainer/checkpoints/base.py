"""The base under a LoRA: published by its name, and found on this machine by a path that is not published."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from data.regular import load_json
from trainer.checkpoints.export import write_json
from trainer.checkpoints.format import RESUME
from trainer.contained import inside
from trainer.errors import UserError
from trainer.models.ema import SUFFIX
from trainer.models.lora import LORA_FILE
from trainer.models.options import BASE_FILE
from trainer.models.pipeline import Models
from trainer.state_file import as_kind

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_NAME = re.compile(r"[^/\\]+")


@dataclass(frozen=True)
class Base:
    """The model under a LoRA."""

    model: str
    """A hub id or an absolute path; in a published record, the path's last part."""
    fingerprint: str
    """A hash of values of each of its tensors."""
    revision: str | None = None
    """Its commit on the hub."""

    @property
    def name(self) -> str:
        """The hub id, or the name of the folder or file."""
        return Path(self.model).name if self.local else self.model

    @property
    def local(self) -> bool:
        """True if the model is named by its path on this machine."""
        return Path(self.model).is_absolute()

    def publish(self, folder: Path) -> None:
        """Write the record that a LoRA's folder carries, without a path."""
        write_json(folder / BASE_FILE, asdict(replace(self, model=self.name)))

    def keep(self, folder: Path) -> None:
        """Write a local model's path into a folder that is not published."""
        if self.local:
            write_json(folder / BASE_FILE, asdict(self))


def base_of(models: Models, model: str, adapter: Path | None) -> Base:
    """Return the base of a LoRA from the name that it was loaded by, before adapters are attached to it.

    An `adapter`, the checkpoint of an earlier LoRA, must have been trained on these weights.
    """
    path = Path(model).expanduser()
    base = Base(str(path.resolve()) if path.exists() else model, _fingerprint(models), models.revision)
    record = _published(adapter) if adapter is not None else None
    if record is not None and record.fingerprint != base.fingerprint:
        raise UserError(
            f"resume_ckpt: the LoRA in {adapter} was trained on other weights than {base.model} holds now; "
            f"put {record.name} back as it was, or name it as resume_ckpt in the file of --config."
        )
    return base


def read_base(folder: Path, otherwise: str | None = None) -> Base | None:
    """Return the base of a checkpoint's LoRA by a name that loads it; None for a whole model.

    If the recorded model is not found, it is `otherwise`.
    """
    record = _published(folder)
    if record is None or _HUB_ID.fullmatch(record.model):
        return record
    known = [record, *_kept(folder, record.fingerprint)]
    for base in known:
        if base.local and Path(base.model).exists():
            return base
    if otherwise is not None:
        return replace(record, model=otherwise)
    raise UserError(
        f"resume_ckpt: {folder} is a LoRA, and its base, {known[-1].model}, is not found on this machine; "
        "put it back, or name it as resume_ckpt in the file of --config and the LoRA with --resume_ckpt."
    )


def _published(folder: Path) -> Base | None:
    if not (folder / LORA_FILE).is_file() or not (folder / BASE_FILE).is_file():
        return None
    try:
        return _read(folder)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{folder / BASE_FILE}: the base of the LoRA cannot be read ({error}); choose another checkpoint."
        ) from error


def _kept(folder: Path, fingerprint: str) -> Iterator[Base]:
    """Yield the unpublished records of the same weights, from the resume state and from the run folder."""
    checkpoint = folder.resolve()
    if checkpoint.name == SUFFIX:
        checkpoint = checkpoint.parent
    places = [checkpoint / RESUME]
    if checkpoint.parent.name == "ckpts":
        places.append(checkpoint.parent.parent)
    for place in places:
        try:
            base = _read(place)
        except (OSError, ValueError, TypeError):  # absent, or another program's file
            continue
        if base.fingerprint == fingerprint:
            yield base


def _read(folder: Path) -> Base:
    """Return a record; ValueError or TypeError if it has other fields, or names no model."""
    base = as_kind(Base, load_json(inside(folder, BASE_FILE)))
    named = _HUB_ID.fullmatch(base.model) or _NAME.fullmatch(base.model)
    if not base.local and (not named or base.model in (".", "..")):
        raise ValueError(f"{base.model!r} is neither a hub id, a name nor an absolute path")
    return base


def _fingerprint(models: Models) -> str:
    """Return a hash over 64 evenly spread values of each tensor of UNet and text encoder."""
    found = hashlib.blake2b(digest_size=16)
    for network in (models.unet, models.text_encoder):
        for name, tensor in network.state_dict().items():
            flat = tensor.reshape(-1)
            count = min(64, flat.numel())
            places = torch.linspace(0, flat.numel() - 1, count, dtype=torch.float64).round().long()
            found.update(f"{name} {tuple(tensor.shape)}".encode())
            found.update(flat[places].to("cpu", torch.float32).numpy().tobytes())
    return found.hexdigest()
