"""Fine-tune Stable Diffusion: `python train.py --config train.json`."""

from __future__ import annotations

import sys

from data.errors import DataError
from trainer.environment import check_environment
from trainer.errors import UserError


def main(arguments: list[str]) -> int:
    """Run the command line and return the exit code.

    0 is done, 1 a run that failed, 2 something that must be put right before it can begin, 130 interrupted.
    """
    try:
        notes = check_environment()
        from trainer.config import load_config

        loaded = load_config(arguments)
        if loaded.action == "check":
            from trainer.check import check

            check(loaded.config, [*notes, *loaded.notes])
        else:
            from trainer.build import run_training

            run_training(loaded.config, [*notes, *loaded.notes])
    except KeyboardInterrupt:
        print("Interrupted; the last checkpoint is whole: --resume_ckpt findlast goes on from it.", file=sys.stderr)
        return 130
    except (UserError, DataError) as error:
        print(*error.problems, sep="\n", file=sys.stderr)
        return getattr(error, "exit_code", 2)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
