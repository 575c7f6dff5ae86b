"""The runs of a comparison: one for every optimizer file and seed, each trained once."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from scripts.compare.machines import note_machine, note_start, read_machines
from scripts.compare.progress import Progress
from scripts.processes import started, train_into
from trainer.errors import UserError

DONE = "done.json"
"""The file beside a run's folder that records how the run ended; missing until then."""

_PEAK, _MACHINES = ".peak", ".machines"
"""Endings of files beside a run's output."""

_OWN = ("config", "optimizer_config", "seed", "logdir", "project_name", "resume_ckpt")
"""train.py's keys that the comparison sets itself; train.json names the model to start from."""
_PLACES = ("logdir", "cache_dir", "save_ckpt_dir")
"""Keys of places, which do not tell runs apart."""


@dataclass(frozen=True)
class Planned:
    """One run of a comparison."""

    label: str
    """The optimizer file's name in the report."""

    optimizer: Path
    seed: int
    logdir: Path
    """The folder of this run alone."""

    arguments: tuple[str, ...]
    """train.py's."""

    config: dict[str, Any]
    """Every key of both files but places, with its value."""

    @property
    def output(self) -> Path:
        """The file with the run's output."""
        return self.logdir / "output.txt"


@dataclass(frozen=True)
class Finished:
    """A run that has ended."""

    planned: Planned
    folder: Path | None
    """The run's folder, with its events; None if the run failed before making one."""

    code: int
    """train.py's exit code: 0, or 1 if it failed."""

    peak: int | None
    """Peak bytes of its process; None if the system does not report them, or the run was resumed."""

    machines: tuple[str | None, ...]
    """The machine of each process that trained it, one after the other; None if it is not recorded."""

    @property
    def reason(self) -> str:
        """The last line of a failed run's output."""
        if not self.code:
            return ""
        lines = self.planned.output.read_text(encoding="utf-8", errors="replace").splitlines()
        return next((line for line in reversed(lines) if line.strip()), f"exit code {self.code}")


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
        UserError: a file has mistakes, or a file or argument cannot be compared.
    """
    _check_arguments(optimizers, changes)
    problems: list[str] = []
    planned = []
    for seed in seeds or (None,):
        for label, optimizer in zip(labels(optimizers), optimizers, strict=True):
            arguments = ["--config", str(train), "--optimizer_config", str(optimizer.resolve()), *changes]
            arguments += ["--project_name", "run", *([] if seed is None else ["--seed", str(seed)])]
            try:
                planned.append(_plan(label, optimizer, out, arguments))
            except UserError as error:
                problems += [problem for problem in error.problems if problem not in problems]
    if problems:
        raise UserError(problems)
    return planned


def _check_arguments(optimizers: Sequence[Path], changes: Sequence[str]) -> None:
    """Raise UserError for a key that the comparison sets itself, or an optimizer file named twice."""
    for word in changes:
        if word.startswith("--") and word[2:].partition("=")[0].replace("-", "_") in _OWN:
            raise UserError(
                f"{word}: the comparison sets this itself; name files after --config, seeds after --seeds, "
                "a folder with --out."
            )
    seen: set[Path] = set()
    for path in optimizers:
        if path.resolve() in seen:
            raise UserError(f"--config: {path} is named twice; name each optimizer file once.")
        seen.add(path.resolve())


def _plan(label: str, optimizer: Path, out: Path, arguments: list[str]) -> Planned:
    """Return one run.

    Raises:
        UserError: its configuration has mistakes, or cannot be compared.
    """
    from trainer.config import flattened, load_config

    config = load_config(arguments).config
    if config.loop.seed == -1:
        raise UserError(
            "seed: -1 draws another seed for each run, which cannot be compared; "
            "name one or more with --seeds."
        )
    if config.loop.stop_after_steps is not None or config.loop.max_train_time is not None:
        raise UserError(
            "stop_after_steps, max_train_time: the runs would end at different steps; "
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
    # Latents and hashes of contents are the same for all, so the runs share one cache.
    cache = str(config.cache.cache_dir or out / "cache")
    shared = (*arguments, "--logdir", str(logdir), "--cache_dir", cache)
    return Planned(label, optimizer, config.loop.seed, logdir, shared, json.loads(json.dumps(known)))


def labels(files: Sequence[Path]) -> list[str]:
    """Return a name for each file: its stem, after its folder's name where stems are equal."""
    stems = [path.stem for path in files]
    names = [
        stem if stems.count(stem) == 1 else f"{path.resolve().parent.name} {stem}"
        for path, stem in zip(files, stems, strict=True)
    ]
    return [name if names.count(name) == 1 else f"{name} {number + 1}" for number, name in enumerate(names)]


def names(runs: Sequence[Planned]) -> dict[str, str]:
    """Return the names in the report, by label: optimizer and rate, with the label if they repeat."""
    words = {run.label: optimizer_words(run.config) for run in runs}
    repeated = [name for name in words.values() if list(words.values()).count(name) > 1]
    return {label: f"{name} ({label})" if name in repeated else name for label, name in words.items()}


def optimizer_words(config: Mapping[str, Any]) -> str:
    """Return the optimizers of the trained networks and their rates: `dadapt_adam at d x 0.1`."""
    keys = {"base": "disable_unet_training", "text_encoder_overrides": "disable_textenc_training"}
    found = []
    for section in (section for section, key in keys.items() if not config.get(key)):
        factor = "d x " if f"{section}.d0" in config else ""
        found.append((config[f"{section}.optimizer"], factor + _rate(config[f"{section}.lr"])))
    (first, rate), (last, last_rate) = found[0], found[-1]
    if first != last:
        return f"{first} at {rate} / {last} at {last_rate}"
    return f"{first} at {rate}" if rate == last_rate else f"{first} at {rate} / {last_rate}"


def _rate(lr: float) -> str:
    """Return a learning rate as people write it: 0.1, 1e-4."""
    mantissa, exponent = f"{lr:.2e}".split("e")
    return f"{lr:g}" if lr >= 1e-3 else f"{float(mantissa):g}e{int(exponent)}"


def finish(runs: Sequence[Planned], say: Callable[[str], None]) -> list[Finished]:
    """Train the runs that are not finished, one after the other, and return all runs.

    An interrupted run resumes from its newest checkpoint, or starts anew if it has none.

    Raises:
        UserError: the folder holds runs of another comparison, or a run cannot start.
        KeyboardInterrupt: a run was interrupted.
    """
    before = [finished(run) for run in runs]  # fails on another comparison's runs before hours are spent
    progress = Progress(before.count(None))
    done = []
    for number, (run, end) in enumerate(zip(runs, before, strict=True), start=1):
        if end is None:
            words = f"{number}/{len(runs)}: {run.label}, seed {run.seed}"
            say(words)
            progress.start(words, run.output)
            end = train(run, progress.show)
            progress.end()
            how = (
                f"failed: {end.reason} (delete {run.logdir} to try again)"
                if end.code
                else f"done, {end.folder}"
            )
            say(f"{number}/{len(runs)}: {how}")
        done.append(end)
    return done


def finished(run: Planned) -> Finished | None:
    """Return the end of a run, or None before it.

    Raises:
        UserError: the run in the folder has another configuration.
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
            f"{run.config.get(key)} now; name another folder with --out, or delete this one."
        )
    folder = run.logdir / record["folder"] if record["folder"] else None
    machines = record.get("machines") or [None] * record["parts"]  # older comparisons recorded the number
    return Finished(run, folder, record["code"], record["peak"], tuple(machines))


def train(run: Planned, show: Callable[[], None] = lambda: None) -> Finished:
    """Start or resume one run, and train it to its end; `show` is called every second.

    Raises:
        UserError: it cannot start, or its process was killed.
        KeyboardInterrupt: it was interrupted.
    """
    from trainer.checkpoints.listing import find_last

    run.logdir.mkdir(parents=True, exist_ok=True)
    machines_file, peak_file = (run.output.with_suffix(suffix) for suffix in (_MACHINES, _PEAK))
    try:
        find_last(run.logdir, "run")
        resume = ["--resume_ckpt", "findlast"]
    except UserError:
        resume = []
        machines_file.unlink(missing_ok=True)  # of processes whose steps are lost
    written = run.output.stat().st_size if run.output.exists() else 0
    child = started([*run.arguments, *resume], run.output, measured_train)
    join(child, show)
    code = child.exitcode
    if code not in (0, 1):
        with run.output.open(encoding="utf-8", errors="replace") as file:
            file.seek(written)
            lines = [line for line in file.read().splitlines() if line.strip()]
        if code == 2:
            raise UserError([f"{run.label}, seed {run.seed}: the run could not start.", *lines[-5:]])
        if code in (128 + signal.SIGINT, 128 + signal.SIGTERM):
            raise KeyboardInterrupt
        raise UserError(
            f"{run.label}, seed {run.seed}: the run's process ended with code {code}, as after a kill, "
            f"perhaps for lack of memory; see {run.output}. The same command resumes.",
            exit_code=1,
        )
    names = sorted(path.name for path in run.logdir.glob("run-*"))
    machines = read_machines(machines_file)
    if resume and len(machines) == 1:  # an older version trained the first steps
        machines.insert(0, None)
    record = {
        "folder": names[-1] if names else None,
        "code": code,
        "peak": int(peak_file.read_text()) if peak_file.exists() and len(machines) == 1 else None,
        "machines": machines,
        "config": run.config,
    }
    (run.logdir / DONE).write_text(json.dumps(record, indent=1), encoding="utf-8")
    end = finished(run)
    assert end is not None
    return end


def join(child: BaseProcess, show: Callable[[], None] = lambda: None) -> None:
    """Wait for a run; if this process is asked to end, wait until the run has saved a checkpoint.

    Raises:
        KeyboardInterrupt: this process was asked to end.
    """

    def stop(*_: object) -> None:
        child.terminate()  # not after Ctrl-C, which reaches the run itself: two signals prevent saving
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        while child.exitcode is None:
            child.join(1)
            show()
    except KeyboardInterrupt:
        child.join()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def measured_train(arguments: list[str], output: str) -> None:
    """Run train.py, write peak memory and machine of the process beside its output, and end the process."""
    machines = Path(output).with_suffix(_MACHINES)
    note_start(machines)
    code = train_into(arguments, output)
    note_machine(machines)
    if sys.platform != "win32":
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        Path(output).with_suffix(_PEAK).write_text(
            str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
        )
    os._exit(code)
