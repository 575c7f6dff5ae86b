"""Fine-tune Stable Diffusion: `python train.py --config train.json`."""

from __future__ import annotations

import sys


def main(arguments: list[str]) -> int:
    """Run the command line and return the exit code: 0 done, 1 the run failed, 2 something must be put right before it can begin."""
    from trainer.environment import check_environment
    from trainer.errors import UserError

    problems: tuple[str, ...] = ()
    code = 0
    try:
        from data.errors import DataError
        from trainer.config import load_config

        notes = check_environment()
        loaded = load_config(arguments)
        try:
            if loaded.action == "check":
                from trainer.check import check

                return check(loaded.config, [*notes, *loaded.notes])
            from trainer.build import run_training

            run_training(loaded.config, [*notes, *loaded.notes])
        except DataError as error:
            problems, code = error.problems, 2
    except UserError as error:
        problems, code = error.problems, error.exit_code
    for problem in problems:
        print(problem, file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
