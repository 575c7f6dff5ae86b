"""The start of a run, from a model or a checkpoint of its own, and the changes that a resumed run allows."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from data.atomic import WINDOWS
from trainer.checkpoints.base import read_base
from trainer.checkpoints.format import RESUME, RUN, TrainState, is_checkpoint, read_resume
from trainer.checkpoints.listing import branch_from, find_last, newest_of, require_resumable
from trainer.checkpoints.run_folder import run_of
from trainer.config import FORMAT, clip_skip_of_format_1, flattened
from trainer.errors import UserError, said
from trainer.models.tensor_file import read_metadata
from trainer.networks import by_network
from trainer.output import shown_path
from trainer.state_file import read_state

if TYPE_CHECKING:
    from data.index import Index
    from trainer.checkpoints.saver import Stateful
    from trainer.config import TrainConfig
    from trainer.models.pipeline import TrainedParts

_NEW_RUN = "or start a new run from its weights with --resume_weights_only"

_OWN_TO_A_START = ("resume_ckpt", "stop_after_steps", "max_train_time", "optimizer_config")
"""Keys of one start, which do not describe the run."""

_GIVEN_BY_RESUMING = ("resume_ckpt", "base_model", "resume_weights_only")


@dataclass(frozen=True)
class Start:
    """The model or checkpoint that a run starts from."""

    model: str
    """A name that `load_models` loads."""
    checkpoint: Path | None = None
    """The checkpoint folder of the resumed run."""
    revision: str | None = None
    """The model's commit, tag or branch on the hub."""
    run: Path | None = None
    """The resumed run's folder; None for a new run and for a checkpoint that was copied out of its run."""
    state: TrainState | None = None
    adapter: Path | None = None
    """The checkpoint folder whose adapters are attached to the model."""
    branch: int = 0
    """How often the run has gone back to an older checkpoint."""
    about: Mapping[str, Any] | None = None
    """The resumed run's record in its checkpoint."""
    weights_of: Path | None = None
    """The checkpoint folder whose weights a new run starts from."""
    notes: Sequence[str] = ()
    """Sentences about the choice: damaged newer checkpoints, a run that is not resumed."""


def find_start(config: TrainConfig, *, weights_only: bool) -> Start:
    """Find the model or checkpoint that resume_ckpt names.

    A checkpoint folder, a run folder (its newest whole checkpoint) and `findlast` resume a run, or start a
    new one from its weights if `weights_only`. Anything else is a base model.

    Raises:
        UserError: there is no checkpoint to resume, it is damaged, or it holds no resume state.
    """
    named = config.model.resume_ckpt
    folder = Path(named)
    damaged: list[str] = []
    noted: list[str] = []
    if named == "findlast":
        folder, damaged = find_last(
            Path(config.logging.logdir), config.logging.project_name, weights_only=weights_only
        )
    elif (folder / "ckpts").is_dir():
        folder, damaged = newest_of(folder, weights_only=weights_only)
    elif not is_checkpoint(folder):
        if config.model.revision is not None and folder.expanduser().exists():
            raise UserError(
                f"revision: {named} is a file or folder, and only models on the hub have revisions; "
                "set it to null."
            )
        noted = [] if weights_only else _of_run(folder, Path(config.logging.logdir))
        weights_only = True
    elif not weights_only:
        require_resumable(folder)
    notes = [*noted, *(f"{problem}; {folder.name} is used instead" for problem in damaged)]
    base = read_base(folder, config.file_model)
    whole = named if folder == Path(named) else str(folder)  # a hub id is no path
    model, adapter = (whole, None) if base is None else (base.model, folder)
    if weights_only:
        recorded = base is not None and base.model != config.file_model
        revision = base.revision if base and recorded else config.model.revision
        weights_of = folder if is_checkpoint(folder) else None
        return Start(model, revision=revision, adapter=adapter, weights_of=weights_of, notes=notes)
    state, about = read_resume(folder)
    run = run_of(folder)
    branch, newest = (0, None) if run is None else branch_from(folder, run)
    if newest is not None and not damaged:
        notes.append(
            f"{newest.name} is newer than {folder.name} and stays; findlast takes it until this start has "
            "saved a checkpoint"
        )
    if run is None:
        notes.append(
            f"{folder} lies outside the folder of its run, "
            f"so the resumed run gets a new one in {config.logging.logdir}"
        )
    revision = about["config"].get("revision") if base is None else base.revision
    notes += _migrate(about)
    return Start(model, folder, revision, run, state, adapter, branch, about, notes=notes)


def with_recorded_revisions(config: TrainConfig, about: Mapping[str, Any]) -> TrainConfig:
    """Return the configuration with the resumed run's commits of the same VAE and EMA model on the hub."""
    then = about["config"]
    model, ema = config.model, config.ema
    if model.vae_revision is None and model.vae == then.get("vae"):
        model = replace(model, vae_revision=then.get("vae_revision"))
    if ema.ema_resume_revision is None and ema.ema_resume_model == then.get("ema_resume_model"):
        ema = replace(ema, ema_resume_revision=then.get("ema_resume_revision"))
    return replace(config, model=model, ema=ema)


def restore_state(parts: Mapping[str, Stateful], checkpoint: Path) -> None:
    """Load the state of a resumed run's parts, if it is of these, from a whole checkpoint."""
    path = checkpoint / RESUME / "training.json"
    problem = ""
    try:
        saved = read_state(path.with_suffix(""))
        problem = next(
            (f"it holds none of the {name}" for name in ("optimizers", "meter") if name not in saved), ""
        )
        for name in parts.keys() & saved.keys():
            parts[name].load_state_dict(saved[name])
    except (
        OSError,
        SafetensorError,
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
        RuntimeError,
    ) as error:
        problem = said(error)
    if problem:
        raise UserError(
            f"{path}: the state of the run cannot be used ({problem}); choose another checkpoint, "
            "or start a new run from its weights with --resume_weights_only."
        )


def _migrate(about: dict[str, Any]) -> list[str]:
    """Convert a checkpoint's configuration to today's format, and return notes on changed numbers."""
    config = about["config"]
    skip = config.get("clip_skip", 0)
    if about.get("config_format") == FORMAT or skip == 0:
        return []
    now = config["clip_skip"] = clip_skip_of_format_1(skip)
    return [
        f"clip_skip: the run started with {skip}, which is {now} now: the penultimate layer was 1, and is 2; "
        f"to train it as before, set clip_skip to {now}"
    ]


def _of_run(file: Path, logdir: Path) -> list[str]:
    """Return a note if `file` is a run's single file, which cannot be resumed."""
    run = read_metadata(file).get(RUN) if file.is_file() and file.suffix.lower() == ".safetensors" else None
    if run is None:
        return []
    folder = next(
        (place for place in (file.parent.parent, logdir / run) if place.name == run and place.is_dir()), run
    )
    return [
        f"resume_ckpt: {file.name} starts a new run from these weights; "
        f"to resume theirs, name the run's folder, {folder}"
    ]


def about_run(
    config: TrainConfig, index: Index, parts: TrainedParts, total_steps: int, processes: int
) -> dict[str, Any]:
    """Return the record of a run in its checkpoints: configuration, data and trained parts."""
    optimizers = by_network(config.optimizers)
    return {
        "project": config.logging.project_name,
        "total_steps": total_steps,
        "same": {
            "seed": config.loop.seed,
            "data": index.fingerprint(),
            "images": len(index.records),
            "resolution": config.data.resolution
            if isinstance(config.data.resolution, int)
            else list(config.data.resolution),
            "images per step": config.data.batch_size * config.loop.grad_accum * processes,
            "channels_last": config.precision.channels_last,  # 8-bit state has blocks along memory
            "compile": config.parts.compile,  # compiled steps round differently
            **{f"what learns of the {network}": part.what for network, part in parts.counts.items()},
            **{
                f"the optimizer of the {network}": optimizers[network].optimizer
                for network in parts.parameters
            },
        },
        "config_format": FORMAT,
        "config": {**flattened(config), "processes": processes},
    }


def check_same_run(now: Mapping[str, Any], then: Mapping[str, Any], checkpoint: str) -> None:
    """Refuse to resume a run with another seed, data, batch, trained part or optimizer.

    `now` and `then` are `about_run` of this start and of the checkpoint.
    """
    words = {"data": "the images or captions have changed"}
    before, after = {"compile": False, **then["same"]}, now["same"]  # older checkpoints lack compile
    differences = [
        words.get(key, f"{key} was {before.get(key, 'none')}, and is {after.get(key, 'none')} now")
        for key in dict.fromkeys([*after, *before])
        if before.get(key) != after.get(key)
    ]
    if differences:
        raise UserError(
            [
                f"resume_ckpt: {checkpoint} belongs to another run, which this configuration cannot "
                f"continue; put these back, {_NEW_RUN}."
            ]
            + [f"  {difference}" for difference in differences]
        )


def changes(now: Mapping[str, Any], then: Mapping[str, Any]) -> list[str]:
    """Return the keys that a resumed run's configuration changes, each as "key: old -> new"."""
    before, after = {"processes": 1, **then["config"]}, now["config"]
    return [
        f"{key}: {_shown(before.get(key))} -> {_shown(after.get(key))}"
        for key in dict.fromkeys([*before, *after])
        if key not in _OWN_TO_A_START and before.get(key) != after.get(key)
    ]


def resume_words(
    arguments: Sequence[str],
    folder: Path,
    *,
    changed: Mapping[str, str],
    launcher: Sequence[str] = ("python",),
    program: str = "train.py",
) -> list[str]:
    """Return the words of the command that resumes a run, from those of this start.

    `changed` keys would stop it again: their new values, null to lift a limit. `launcher` comes before
    `program`, the path of train.py.
    """
    given: set[str] = set()
    kept: list[str] = []
    dropped = False
    for word in arguments:
        if word.startswith("--"):
            name = word[2:].partition("=")[0].replace("-", "_")
            given.add(name)
            dropped = name in (*_GIVEN_BY_RESUMING, *changed)
            if dropped:
                continue
        elif dropped:
            dropped = False
            continue
        kept.append(word)
    words = [*launcher, program, *kept, "--resume_ckpt", shown_path(folder)]
    for name, value in changed.items():
        words += [] if name in given and value == "null" else [f"--{name}", value]
    return words


def joined(words: Sequence[str]) -> str:
    """Return words as a command line, quoted for the shell."""
    return subprocess.list2cmdline(words) if WINDOWS else shlex.join(words)


def _shown(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
