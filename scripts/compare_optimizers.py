r"""Train the same with several optimizer files, and write a report of how they compare.

    python scripts/compare_optimizers.py --config train.json optimizer.json optimizer_dadapt.json \
        --out compare --seeds 1 2 --max_epochs 10

The first file after --config is the train.json, the others are optimizer files. The first optimizer file is
the baseline of the others. Options that this script does not know go to train.py, for every run alike. Data,
order, noise, timesteps and validation images are the same for every file. The seed is train.json's, or each
of --seeds in turn.

A finished run is not repeated: stop the comparison with Ctrl-C, then resume it with the same command, or add
a file or a seed. The result is report/report.html in the folder --out, a page without external files, and the
same as report.md.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from trainer.checkpoints.lock import locked
from trainer.errors import UserError
from trainer.output import say


def main(argv: list[str] | None = None) -> int:
    """Run the comparison."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--config",
        type=Path,
        nargs="+",
        required=True,
        metavar="FILE",
        help="train.json, then two or more optimizer files",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("compare"), help="folder for the runs and the report (compare)"
    )
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        help="train every file with each of these seeds (default: train.json's)",
    )
    parser.add_argument(
        "--prompts",
        type=Path,
        help="prompts of the samples that are shown (default: sample_prompts of train.json)",
    )
    parser.add_argument(
        "--unrelated",
        type=Path,
        help="prompts that the training is not about, whose drift is measured (default: --prompts)",
    )
    arguments = sys.argv[1:] if argv is None else argv
    options, changes = parser.parse_known_args(arguments)
    try:
        compare(options, changes, shlex.join(["python", "scripts/compare_optimizers.py", *arguments]))
    except UserError as error:
        say(*error.problems, stream=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("Stopped. The same command resumes.", file=sys.stderr)
        return 130
    return 0


def compare(options: argparse.Namespace, changes: list[str], command: str) -> None:
    """Train what is left, and write the report.

    Raises:
        UserError: a file or an option cannot be used.
    """
    from scripts.compare.measures import Compared, measure, settings_of, trained_parameters
    from scripts.compare.pictures import draw_pictures
    from scripts.compare.report import write_report
    from scripts.compare.runs import finish, names, plan_runs
    from scripts.grids.columns import Reading
    from scripts.grids.draw import read_prompts

    train, *optimizers = options.config
    if len(optimizers) < 2:
        raise UserError("--config: name train.json and then two or more optimizer files.")
    runs = plan_runs(train, optimizers, options.out, options.seeds, changes)
    shown = options.prompts or runs[0].config.get("sample_prompts")
    if shown is None:
        raise UserError(
            "--prompts: train.json names no sample_prompts; name a .json or .txt file of prompts to compare "
            "samples of."
        )
    prompts = read_prompts([str(shown)])
    unrelated = read_prompts([str(options.unrelated)]) if options.unrelated else prompts
    with suppress(OSError):  # which locking it reports
        options.out.mkdir(parents=True, exist_ok=True)
    with locked(options.out):
        ends = finish(runs, print)
        trained = {run.optimizer: trained_parameters(run) for run in runs}
        files = []
        for label, name in names(runs).items():
            own = [end for end in ends if end.planned.label == label]
            files.append(Compared(name, tuple(measure(end, trained[end.planned.optimizer]) for end in own)))
        words = f"{len(unrelated.samples or ())} prompts of {(options.unrelated or Path(shown)).name}"
        if not options.unrelated:
            words += " (all sample prompts; name those that the training is not about with --unrelated)"
        resolution = runs[0].config["resolution"]
        files, drawn = draw_pictures(
            files,
            prompts,
            unrelated,
            words,
            base=runs[0].config["resume_ckpt"],
            resolution=resolution if isinstance(resolution, int) else max(resolution),
            reading=Reading.of(runs[0].config),
            say=lambda words: print(f"drawing: {words}"),
        )
        page = write_report(files, drawn, options.out, settings=settings_of(runs[0]), command=command)
        print(f"{page}: done. Curves:  tensorboard --logdir {shlex.quote(str(options.out / 'runs'))}")


if __name__ == "__main__":
    sys.exit(main())
