r"""Kill a training run at random moments, and check that nothing is lost and the result is equal to the bit.

    python scripts/torture.py --out /tmp/torture --kills 200 --config train.json \
        --max_epochs 12 --save_every_n_epochs 1

Options that this script does not know go to train.py. One run is never killed. Another is killed with SIGKILL
(on Windows: ended by the system) and resumed with `--resume_ckpt findlast` until it finishes. Half of the
kills come at any moment, half while a checkpoint is being written. After each kill every checkpoint must be
whole, and no earlier resumable step may be lost. The finished run must have the other's weights, optimizer
state and curves. Then the next run starts, until there were enough kills.

A power failure, which also loses unwritten data of the system, is not tested.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.processes import started

_LONGEST = 1800.0
"""Seconds after which a child that has not ended is a failure."""


class Broken(AssertionError):
    """A broken guarantee."""


@dataclass
class Tally:
    """Counts of kills and runs."""

    kills: int = 0
    while_saving: int = 0
    before_any_checkpoint: int = 0
    runs: int = 0
    """Runs that were finished and compared."""
    resumed_at: list[int] = field(default_factory=list)
    """Steps at which runs resumed."""

    def __str__(self) -> str:
        """Return it as a sentence."""
        return (
            f"{self.kills} kills, {self.while_saving} of them while a checkpoint was being written and "
            f"{self.before_any_checkpoint} before the first one; {self.runs} runs finished, each equal to "
            "the bit; every checkpoint whole, none lost"
        )


def main(argv: list[str] | None = None) -> int:
    """Kill and resume the run that the arguments describe."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs; must be empty")
    parser.add_argument("--kills", type=int, default=200, help="number of kills (200)")
    parser.add_argument("--moments", type=int, default=0, help="seed of the random moments (0)")
    options, arguments = parser.parse_known_args(argv)
    if options.out.exists() and any(options.out.iterdir()):
        print(f"--out: {options.out} is not empty; name a new folder.", file=sys.stderr)
        return 2
    began = time.monotonic()
    try:
        tally = torture(arguments, options.out, kills=options.kills, seed=options.moments, say=print)
    except Broken as error:
        print(f"BROKEN: {error}", file=sys.stderr)
        return 1
    print(f"{tally}. {time.monotonic() - began:.0f} s.")
    return 0


def torture(
    arguments: Sequence[str], out: Path, *, kills: int, seed: int, say: Any = lambda _: None
) -> Tally:
    """Kill runs of train.py `kills` times and finish the last of them.

    Args:
        arguments: train.py's, without logdir and resume_ckpt.
        out: the folder for runs and their output.
        kills: number of kills.
        seed: of the moments.
        say: takes a line for every tenth kill.

    Raises:
        Broken: a checkpoint was lost or is not whole, or a result differs.
    """
    out.mkdir(parents=True, exist_ok=True)
    draws = random.Random(seed)
    # The fork server imports the libraries now, not during the next run, which is timed.
    started(["--help"], out / "help.txt").join(_LONGEST)
    began = time.monotonic()
    child = started([*arguments, "--logdir", str(out / "alone")], out / "alone.txt")
    child.join(_LONGEST)
    if child.exitcode != 0:
        raise Broken(f"the run without kills ended with {child.exitcode}; see {out / 'alone.txt'}")
    length = time.monotonic() - began
    alone = only_run(out / "alone")

    tally = Tally()
    while tally.kills < kills:
        logdir = out / f"killed{tally.runs}"
        killed_run(arguments, logdir, draws, length, kills, tally, say)
        compare(alone, finished_run(logdir))
        tally.runs += 1
    return tally


def killed_run(
    arguments: Sequence[str],
    logdir: Path,
    draws: random.Random,
    length: float,
    kills: int,
    tally: Tally,
    say: Any = lambda _: None,
) -> None:
    """Kill and resume one run until it finishes."""
    reached = 0
    while True:
        resume = ["--resume_ckpt", "findlast"] if reached else []
        left = drafts(logdir)
        child = started([*arguments, "--logdir", str(logdir), *resume], logdir.with_suffix(".txt"))
        if tally.kills >= kills:
            child.join(_LONGEST)
        else:
            saving = draws.random() < 0.5 and seen_saving(child, logdir, left, length)
            child.join(draws.random() * (0.25 if saving else length))
        if child.exitcode is not None:
            if child.exitcode != 0:
                raise Broken(f"a run ended with {child.exitcode}; see {logdir.with_suffix('.txt')}")
            return
        child.kill()
        child.join()
        tally.kills += 1
        tally.while_saving += bool(drafts(logdir) - left)
        now = inspect(logdir)
        if now < reached:
            raise Broken(f"{logdir}: the run could resume from step {reached} before, and now from {now}")
        tally.before_any_checkpoint += now == 0
        tally.resumed_at.append(now)
        reached = now
        if tally.kills % 10 == 0:
            say(f"{tally.kills} kills; at step {reached}")


def inspect(logdir: Path) -> int:
    """Check every visible file of the runs in `logdir`; return the highest resumable step, 0 if none.

    Raises:
        Broken: a checkpoint is not whole, or a single file is cut short.
    """
    from trainer.checkpoints.format import RESUME, model_problem, read_resume, resume_problem
    from trainer.checkpoints.listing import checkpoints
    from trainer.errors import UserError
    from trainer.models.tensor_file import TensorFile

    highest = 0
    for run in sorted(logdir.glob("*-*")):
        for folder in checkpoints(run):
            problem = model_problem(folder) or (
                resume_problem(folder) if (folder / RESUME).exists() else None
            )
            if problem:
                raise Broken(problem)
            if (folder / RESUME).exists():
                highest = max(highest, read_resume(folder)[0].step)
        for file in (run / "ckpts").glob("[!.]*.safetensors"):  # drafts have hidden names
            try:
                TensorFile(file)
            except UserError as error:
                raise Broken(str(error)) from error
    return highest


def compare(alone: Path, killed: Path) -> None:
    """Compare the last checkpoints and the curves of two runs.

    Raises:
        Broken: they differ.
    """
    from trainer.checkpoints.listing import checkpoints

    ours, theirs = (checkpoints(run)[0] for run in (alone, killed))
    for part in ("unet", "text_encoder", "vae", "resume"):
        for file in sorted((ours / part).glob("*.safetensors")):
            if file.read_bytes() != (theirs / part / file.name).read_bytes():
                raise Broken(f"{theirs / part / file.name} differs from the run without kills")
    left, right = curves(alone), curves(killed)
    if left != right:
        different = [tag for tag in left.keys() | right.keys() if left.get(tag) != right.get(tag)]
        raise Broken(f"{killed}: curves differ from the run without kills: {', '.join(different)}")


def curves(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Return a run's curves in TensorBoard without its speed: step and value by tag."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if not tag.startswith("performance/")]
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}


def only_run(logdir: Path) -> Path:
    """Return the folder of the only run."""
    (run,) = (path.parent for path in logdir.glob("*/ckpts"))
    return run


def finished_run(logdir: Path) -> Path:
    """Return the folder of the finished run; a kill before the first checkpoint leaves a folder too."""
    (run,) = (path.parents[2] for path in logdir.glob("*/ckpts/last-*/manifest.json"))
    return run


def drafts(logdir: Path) -> set[tuple[str, int]]:
    """Return name and inode of every draft, whether being written or left by a kill."""
    found = set()
    for path in logdir.glob("*/ckpts/.draft-*"):
        with suppress(FileNotFoundError):  # renamed meanwhile
            found.add((path.name, path.stat().st_ino))
    return found


def seen_saving(child: BaseProcess, logdir: Path, left: set[tuple[str, int]], longest: float) -> bool:
    """Wait for a draft other than those `left`; return False after `longest` seconds without one."""
    end = time.monotonic() + longest
    while time.monotonic() < end and child.is_alive():
        if drafts(logdir) - left:
            return True
        time.sleep(0.002)
    return False


if __name__ == "__main__":
    sys.exit(main())
