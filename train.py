"""Fine-tune Stable Diffusion: `python train.py --config train.json`."""

from __future__ import annotations

import sys

from trainer.environment import check_environment
from trainer.errors import UserError
from trainer.output import open_streams, say
from trainer.training.ranks import ToldElsewhere, rank, rank_on_machine
from trainer.training.signals import Interrupted, StopSignals


def main(arguments: list[str]) -> int:
    """Run the command line and return the exit code.

    0 is done, 1 a run that failed or a check that found files which a run would refuse, 2 something that must
    be put right before it can begin, 128 and more a signal that ended it: 130 for Ctrl-C, 143 for SIGTERM.
    """
    with StopSignals() as signals:
        try:
            notes = check_environment()
            from trainer.config import load_config

            loaded = load_config(arguments)
            from trainer.models.quiet import quiet_libraries

            quiet_libraries()  # before anything imports diffusers, which logs as it loads
            if loaded.action == "check":
                if rank() > 0:  # of several processes the first checks for all
                    return 0
                from trainer.planning.check import check

                return check(
                    loaded.config,
                    [*notes, *loaded.notes],
                    weights_only=loaded.weights_only,
                    as_json=loaded.check_json,
                    contact_sheets=loaded.contact_sheets,
                    vram=loaded.vram,
                )
            from trainer.run.lifecycle import run_training

            run_training(
                loaded.config,
                [*notes, *loaded.notes],
                weights_only=loaded.weights_only,
                arguments=arguments,
                signals=signals,
            )
        except ToldElsewhere as error:
            return error.exit_code
        except Interrupted as error:
            say(f"Stopped by {error}.", stream=sys.stderr)
            return error.exit_code
        except UserError as error:
            if (
                rank_on_machine() == 0
            ):  # of several processes the others have found the same, or the first tells it
                say(*error.problems, stream=sys.stderr)
            return error.exit_code
    return 0


if __name__ == "__main__":
    open_streams()
    sys.exit(main(sys.argv[1:]))
