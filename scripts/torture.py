"""Kill a training run at random moments, again and again, and see that nothing is ever lost and the result is the same to the bit.

    python scripts/torture.py --out /tmp/torture --kills 200 --config train.json --max_epochs 12
    --save_every_n_epochs 1

Everything after the script's own options goes to train.py. One run is left alone; another is killed with
SIGKILL (on Windows: ended by the system), half of the times at any moment and half while a checkpoint is
being written, and continued with `--resume_ckpt findlast` until it is done. After each kill every checkpoint
has to be whole, and the last step that could be gone on from before still has to be there; the finished run
must have the other's weights, optimizer state and curves. Then the next one begins, until enough kills are
made.

SIGKILL says nothing about a power failure, which also loses what the system had not written yet.
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
"""Seconds after which a child that neither ends nor dies is a failure."""


class Broken(AssertionError):
    """A promise that was not kept."""


@dataclass
class Tally:
    """What was done to the runs."""

    kills: int = 0
    while_saving: int = 0
    before_any_checkpoint: int = 0
    runs: int = 0
    """Runs that were finished and compared."""
    resumed_at: list[int] = field(default_factory=list)
    """The steps that runs went on from."""

    def __str__(self) -> str:
        """Return it as a sentence."""
        return (
            f"{self.kills} kills, {self.while_saving} of them while a checkpoint was being written and "
            f"{self.before_any_checkpoint} before "
            f"the first one; {self.runs} runs finished, each to the bit; every checkpoint whole, none lost"
        )


def main(argv: list[str] | None = None) -> int:
    """Torture the run that the arguments describe."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for the runs; must not hold anything yet"
    )
    parser.add_argument("--kills", type=int, default=200, help="how many times to kill (200)")
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
    """Kill runs of train.py until it has been done `kills` times and the last of them is finished.

    Args:
        arguments: train.py's, without logdir and resume_ckpt.
        out: the folder for runs and their output.
        kills: how many times.
        seed: of the moments.
        say: is told of every tenth kill.

    Raises:
        Broken: a checkpoint was lost or is not whole, or a result differs.
    """
    out.mkdir(parents=True, exist_ok=True)
    draws = random.Random(seed)
    started(["--help"], out / "help.txt").join(
        _LONGEST
    )  # waits for the imports, which the next one, being timed, then need not
    began = time.monotonic()
    child = started([*arguments, "--logdir", str(out / "alone")], out / "alone.txt")
    child.join(_LONGEST)
    if child.exitcode != 0:
        raise Broken(f"the run that is left alone ended with {child.exitcode}; see {out / 'alone.txt'}")
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
    """Make one whole run out of many pieces."""
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
            raise Broken(f"{logdir}: a run could go on from step {reached} before, and can from {now} now")
        tally.before_any_checkpoint += now == 0
        tally.resumed_at.append(now)
        reached = now
        if tally.kills % 10 == 0:
            say(f"{tally.kills} kills; at step {reached}")


def inspect(logdir: Path) -> int:
    """Return the highest step that a run in `logdir` can go on from, 0 if none, having looked at every file that can be seen.

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
        for file in (run / "ckpts").glob(
            "[!.]*.safetensors"
        ):  # a draft that a kill left behind has a hidden name
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
                raise Broken(f"{theirs / part / file.name} is not what it is in the run that was left alone")
    left, right = curves(alone), curves(killed)
    if left != right:
        different = [tag for tag in left.keys() | right.keys() if left.get(tag) != right.get(tag)]
        raise Broken(f"{killed}: other curves than in the run that was left alone: {', '.join(different)}")


def curves(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Return what TensorBoard shows of a run but its speed: step and value by tag."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if not tag.startswith("performance/")]
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}


def only_run(logdir: Path) -> Path:
    """Return the folder of the only run."""
    (run,) = (path.parent for path in logdir.glob("*/ckpts"))
    return run


def finished_run(logdir: Path) -> Path:
    """Return the folder of the run that has come to its end; one that was killed before its first checkpoint has left a folder too."""
    (run,) = (path.parents[2] for path in logdir.glob("*/ckpts/last-*/manifest.json"))
    return run


def drafts(logdir: Path) -> set[tuple[str, int]]:
    """Return name and inode of what is being written, or was when its process was killed."""
    found = set()
    for path in logdir.glob("*/ckpts/.draft-*"):
        with suppress(FileNotFoundError):  # it has just been renamed
            found.add((path.name, path.stat().st_ino))
    return found


def seen_saving(child: BaseProcess, logdir: Path, left: set[tuple[str, int]], longest: float) -> bool:
    """Wait until something else is being written than what was `left`; return whether it was before `longest` seconds are over."""
    end = time.monotonic() + longest
    while time.monotonic() < end and child.is_alive():
        if drafts(logdir) - left:
            return True
        time.sleep(0.002)
    return False


if __name__ == "__main__":
    sys.exit(main())
