"""Train once for every optimizer file and seed; what is finished already is left as it is."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from scripts.processes import started, train_into
from trainer.errors import UserError

DONE = "done.json"
"""Beside a run's folder: how the run ended. While it is missing, the run is not finished."""

_PEAK = ".peak"
_OWN = ("config", "optimizer_config", "seed", "logdir", "project_name", "resume_ckpt")
"""train.py's keys that the comparison sets itself. A model to start from is named in train.json."""
_PLACES = ("logdir", "cache_dir", "save_ckpt_dir")
"""Keys that say where things are, and nothing about the run."""


@dataclass(frozen=True)
class Planned:
    """One run of a comparison."""

    label: str
    """Of the optimizer file, as the report shows it."""

    optimizer: Path
    seed: int
    logdir: Path
    """The folder of this run alone."""

    arguments: tuple[str, ...]
    """train.py's."""

    config: dict[str, Any]
    """Every key of both files with its value, but for those that say where things are."""

    @property
    def output(self) -> Path:
        """The file with what the run printed."""
        return self.logdir / "output.txt"


@dataclass(frozen=True)
class Finished:
    """A run that has come to its end."""

    planned: Planned
    folder: Path | None
    """The run's folder, with its events; None where there was none yet when it failed."""

    code: int
    """train.py's exit code: 0, or 1 where it could not go on."""

    peak: int | None
    """The most bytes that its process has held; None where the system does not say, or the run was made in several parts."""

    parts: int
    """In how many parts it was made."""

    @property
    def reason(self) -> str:
        """Why it failed, in the run's own words."""
        lines = self.planned.output.read_text(encoding="utf-8", errors="replace").splitlines()
        return (
            next((line for line in reversed(lines) if line.strip()), f"exit code {self.code}")
            if self.code
            else ""
        )


def plan_runs(
    train: Path, optimizers: Sequence[Path], out: Path, seeds: Sequence[int] | None, changes: Sequence[str]
) -> list[Planned]:
    """Return all runs, the first seed of every file before the second of any.

    Args:
        train: the train.json.
        optimizers: the optimizer files.
        out: the comparison's folder.
        seeds: one run of each file for each of them; None takes the seed of train.json.
        changes: further arguments of train.py, the same for all.

    Raises:
        UserError: a file has mistakes, or a file or argument is of no use here.
    """
    from trainer.config import flattened, load_config

    taken = [
        word
        for word in changes
        if word.startswith("--") and word[2:].partition("=")[0].replace("-", "_") in _OWN
    ]
    if taken:
        raise UserError(
            f"{taken[0]}: the comparison sets this itself; name files after --config, seeds after --seeds, "
            "a folder with --out."
        )
    doubled = [
        path
        for number, path in enumerate(optimizers)
        if path.resolve() in [other.resolve() for other in optimizers[:number]]
    ]
    if doubled:
        raise UserError(f"--config: {doubled[0]} is named twice; name each optimizer file once.")
    problems: list[str] = []
    planned = []
    for seed in seeds or (None,):
        for label, optimizer in zip(labels(optimizers), optimizers, strict=True):
            arguments = [
                "--config",
                str(train),
                "--optimizer_config",
                str(optimizer.resolve()),
                *changes,
                "--project_name",
                "run",
            ]
            arguments += [] if seed is None else ["--seed", str(seed)]
            try:
                config = load_config(arguments).config
            except UserError as error:
                problems += [problem for problem in error.problems if problem not in problems]
                continue
            if config.loop.seed == -1:
                raise UserError(
                    "seed: -1 draws another seed for each run, which cannot be compared; "
                    "name one or more with --seeds."
                )
            if config.loop.stop_after_steps is not None or config.loop.max_train_time is not None:
                raise UserError(
                    "stop_after_steps, max_train_time: the runs would end at different places; "
                    "shorten them by max_epochs."
                )
            model = Path(config.model.resume_ckpt)
            if model.name == "findlast" or (model / "ckpts").is_dir() or (model / "resume").is_dir():
                raise UserError(
                    f"resume_ckpt: {config.model.resume_ckpt} belongs to a run; "
                    "every run of a comparison starts from a model."
                )
            logdir = out / "runs" / label / f"seed-{config.loop.seed}"
            known = {key: value for key, value in flattened(config).items() if key not in _PLACES}
            # Latents and hashes of contents are the same for all.
            shared = [
                *arguments,
                "--logdir",
                str(logdir),
                "--cache_dir",
                str(config.cache.cache_dir or out / "cache"),
            ]
            planned.append(
                Planned(
                    label, optimizer, config.loop.seed, logdir, tuple(shared), json.loads(json.dumps(known))
                )
            )
    if problems:
        raise UserError(problems)
    return planned


def labels(files: Sequence[Path]) -> list[str]:
    """Return a name for each file: its own without the ending, after its folder's where two are equal."""
    stems = [path.stem for path in files]
    names = [
        stem if stems.count(stem) == 1 else f"{path.resolve().parent.name} {stem}"
        for path, stem in zip(files, stems, strict=True)
    ]
    return [name if names.count(name) == 1 else f"{name} {number + 1}" for number, name in enumerate(names)]


def finish(runs: Sequence[Planned], say: Callable[[str], None]) -> list[Finished]:
    """Train what is not finished, one run after the other, and return all runs.

    A run that was broken off goes on from its newest checkpoint, or from the beginning where it has none.

    Raises:
        UserError: the folder holds runs of another comparison, or a run cannot begin.
        KeyboardInterrupt: a run was interrupted.
    """
    before = [finished(run) for run in runs]  # another comparison's runs are found before hours are spent
    done = []
    for number, (run, end) in enumerate(zip(runs, before, strict=True), start=1):
        if end is None:
            say(f"{number}/{len(runs)}: {run.label}, seed {run.seed}")
            end = train(run)
            how = (
                f"failed: {end.reason} (delete {run.logdir} to try again)"
                if end.code
                else f"done, {end.folder}"
            )
            say(f"{number}/{len(runs)}: {how}")
        done.append(end)
    return done


def finished(run: Planned) -> Finished | None:
    """Return the end of a run, or None where it has yet to come.

    Raises:
        UserError: the run that is there is another one.
    """
    try:
        record = json.loads((run.logdir / DONE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    different = [
        key
        for key in run.config.keys() | record["config"].keys()
        if run.config.get(key) != record["config"].get(key)
    ]
    if different:
        key = min(different)
        raise UserError(
            f"{run.logdir}: the run there is another one: {key} was {record['config'].get(key)} and is "
            f"{run.config.get(key)} now; name "
            "another folder with --out, or delete this one."
        )
    folder = run.logdir / record["folder"] if record["folder"] else None
    return Finished(run, folder, record["code"], record["peak"], record["parts"])


def train(run: Planned) -> Finished:
    """Make one run, or what is left of it.

    Raises:
        UserError: it cannot begin.
        KeyboardInterrupt: it was interrupted.
    """
    from trainer.checkpoints.listing import find_last

    run.logdir.mkdir(parents=True, exist_ok=True)
    before = sorted(path.name for path in run.logdir.glob("run-*"))
    try:
        find_last(run.logdir, "run")
        resume = ["--resume_ckpt", "findlast"]
    except UserError:
        resume = []
    written = run.output.stat().st_size if run.output.exists() else 0
    child = started([*run.arguments, *resume], run.output, measured_train)
    join(child)
    code = child.exitcode
    if code not in (0, 1):
        with run.output.open(encoding="utf-8", errors="replace") as file:
            file.seek(written)
            said = [line for line in file.read().splitlines() if line.strip()]
        if code == 2:
            raise UserError([f"{run.label}, seed {run.seed}: the run could not begin.", *said[-5:]])
        if code in (128 + signal.SIGINT, 128 + signal.SIGTERM):
            raise KeyboardInterrupt
        raise UserError(
            f"{run.label}, seed {run.seed}: the run's process ended with code {code}, "
            "as one does that is killed, perhaps for memory; see "
            f"{run.output}. The same command goes on.",
            exit_code=1,
        )
    names = sorted(path.name for path in run.logdir.glob("run-*"))
    peak_file = run.output.with_suffix(_PEAK)
    parts = 1 + bool(before)
    record = {
        "folder": names[-1] if names else None,
        "code": code,
        "peak": int(peak_file.read_text()) if peak_file.exists() and parts == 1 else None,
        "parts": parts,
        "config": run.config,
    }
    (run.logdir / DONE).write_text(json.dumps(record, indent=1), encoding="utf-8")
    end = finished(run)
    assert end is not None
    return end


def join(child: BaseProcess) -> None:
    """Wait for a run; where this process is to end before, let the run save a checkpoint, from which it goes on.

    Raises:
        KeyboardInterrupt: this process is to end.
    """

    def stop(*_: object) -> None:
        child.terminate()  # Ctrl-C in a terminal reaches the run by itself, and twice would not let it save
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        child.join()
    except KeyboardInterrupt:
        child.join()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def measured_train(arguments: list[str], output: str) -> None:
    """Be train.py, and leave the most memory that the process has held beside its output."""
    code = train_into(arguments, output)
    if sys.platform != "win32":
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        Path(output).with_suffix(_PEAK).write_text(
            str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
        )
    os._exit(code)
