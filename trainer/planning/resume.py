"""The start of a run: from a model, or from a checkpoint of its own; and what may change on resume."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.atomic import WINDOWS
from trainer.checkpoints.format import RESUME, RUN, TrainState, is_checkpoint, read_resume
from trainer.checkpoints.listing import find_last, newest_of, require_resumable
from trainer.checkpoints.run_folder import run_of
from trainer.config import FORMAT, clip_skip_of_format_1, flattened
from trainer.errors import UserError, said
from trainer.models.lora import read_base
from trainer.networks import by_network

if TYPE_CHECKING:
    from data.index import Index
    from trainer.checkpoints.saver import Stateful
    from trainer.config import TrainConfig
    from trainer.models.pipeline import TrainedParts

_NEW_RUN = "or start a new run from its weights with --resume_weights_only"

_OWN_TO_A_START = ("resume_ckpt", "stop_after_steps", "max_train_time", "optimizer_config")
"""Keys that say how this start of the run goes, and nothing about the run."""

_GIVEN_BY_RESUMING = ("resume_ckpt", "base_model", "resume_weights_only")


@dataclass(frozen=True)
class Start:
    """Where a run begins."""

    model: str
    """What `load_models` loads."""

    checkpoint: Path | None = None
    """The checkpoint folder of the run that is continued."""

    revision: str | None = None
    """The model's commit, tag or branch on the hub."""

    run: Path | None = None
    """That run's folder; None for a new run and for a checkpoint that was copied out of its run."""

    state: TrainState | None = None
    adapter: Path | None = None
    """The checkpoint folder whose adapters are attached to that model."""

    about: Mapping[str, Any] | None = None
    """What the continued run was, as its checkpoint says."""

    notes: Sequence[str] = ()
    """What to say about the choice: newer checkpoints that are damaged, a run that is not resumed."""


def find_start(config: TrainConfig, *, weights_only: bool) -> Start:
    """Return what resume_ckpt stands for.

    A checkpoint folder, a run folder (its newest whole checkpoint) and `findlast` resume a run, or start a
    new one from its weights if asked to; anything else is a base model.

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
    base = read_base(folder)
    whole = named if folder == Path(named) else str(folder)  # a hub id is no path
    model, adapter = (whole, None) if base is None else (base.model, folder)
    if weights_only:
        return Start(
            model,
            revision=config.model.revision if base is None else base.revision,
            adapter=adapter,
            notes=notes,
        )
    state, about = read_resume(folder)
    run = run_of(folder)
    if run is None:
        notes.append(
            f"{folder} lies outside the folder of its run, "
            f"so the resumed run gets a new one in {config.logging.logdir}"
        )
    revision = about["config"].get("revision") if base is None else base.revision
    return Start(model, folder, revision, run, state, adapter, about, [*notes, *_migrate(about)])


def restore_state(parts: Mapping[str, Stateful], checkpoint: Path) -> None:
    """Give the parts of a resumed run their state from a checkpoint that has been found whole.

    Raises:
        UserError: the state is not there, or not of such parts.
    """
    from safetensors import SafetensorError

    from trainer.state_file import read_state

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
    """Put the configuration of a checkpoint into today's format; return a note of what changes its number."""
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
    """Return a note where `file` is the single file of a run's checkpoint, which cannot be resumed."""
    from trainer.models.tensor_file import read_metadata

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
    """Return the record of a run's configuration in its checkpoints.

    Args:
        config: the run's configuration.
        index: its images.
        parts: what learns.
        total_steps: optimizer steps of the whole run.
        processes: how many share each step.
    """
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
            "channels_last": config.precision.channels_last,  # state in 8 bits is kept in blocks along memory
            "compile": config.parts.compile,  # its last bits are others
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
    """Refuse to resume a run with another seed, other data or other trained parameters.

    Args:
        now: `about_run` of this start.
        then: what it said when the checkpoint was saved.
        checkpoint: the checkpoint's folder.

    Raises:
        UserError: the seed, the data, the batch, the trained parts or their optimizers differ from the
        checkpoint's.
    """
    words = {"data": "the images or captions have changed"}
    before, after = (
        {"compile": False, **then["same"]},
        now["same"],
    )  # older checkpoints do not say that they were not compiled
    differences = [
        words.get(key, f"{key} was {before.get(key, 'none')}, and is {after.get(key, 'none')} now")
        for key in dict.fromkeys([*after, *before])
        if before.get(key) != after.get(key)
    ]
    if differences:
        raise UserError(
            [
                f"resume_ckpt: {checkpoint} belongs to another run, which this configuration cannot "
                "continue; "
                f"put these back, {_NEW_RUN}."
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


def resume_command(
    arguments: Sequence[str],
    folder: Path,
    *,
    changed: Mapping[str, str],
    launcher: Sequence[str] = ("python",),
) -> str:
    """Return the command line that resumes the run in `folder`.

    Args:
        arguments: this start's own, without the program's name.
        folder: the run's.
        changed: keys of the configuration that would stop it again, with the values to give them; null lifts
        one.
        launcher: the words before train.py.
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
    words = [*launcher, "train.py", *kept, "--resume_ckpt", str(folder)]
    for name, value in changed.items():
        words += [] if name in given and value == "null" else [f"--{name}", value]
    return subprocess.list2cmdline(words) if WINDOWS else shlex.join(words)


def _shown(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
