"""Fine-tune Stable Diffusion: `python train.py --config train.json`."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

from trainer.environment import check_environment
from trainer.errors import UserError
from trainer.output import open_streams, say
from trainer.training.launch import rank, rank_on_machine
from trainer.training.ranks import ReportedElsewhere
from trainer.training.signals import Interrupted, StopSignals


def main(arguments: list[str]) -> int:
    """Run the command line and return the exit code.

    0: done. 1: a run that failed, or a check that found files which a run would refuse. 2: an error to fix
    before a run can start. 128 and more: the signal that ended it, 130 for Ctrl-C and 143 for SIGTERM.
    """
    with StopSignals() as signals:
        try:
            notes = check_environment()
            from trainer.config import load_config

            loaded = load_config(arguments)
            from trainer.models.quiet import quiet_libraries

            quiet_libraries()  # before anything imports diffusers, which logs as it loads
            if loaded.command.check:
                if rank() > 0:  # rank 0 checks for all
                    return 0
                from trainer.planning.check import check

                _end_of_imports()
                sheets = loaded.command.contact_sheets
                return check(
                    loaded.config,
                    [*notes, *loaded.notes],
                    weights_only=loaded.command.resume_weights_only,
                    as_json=loaded.command.check == "json",
                    contact_sheets=Path(sheets) if sheets else None,
                    vram=loaded.command.vram,
                )
            from trainer.run.lifecycle import run_training

            _end_of_imports()
            run_training(
                loaded.config,
                [*notes, *loaded.notes],
                weights_only=loaded.command.resume_weights_only,
                arguments=arguments,
                signals=signals,
            )
        except ReportedElsewhere as error:
            return error.exit_code
        except Interrupted as error:
            say(f"Stopped by {error}.", stream=sys.stderr)
            return error.exit_code
        except UserError as error:
            if rank_on_machine() == 0:  # the other ranks have found the same, or rank 0 reports theirs
                say(*error.problems, stream=sys.stderr)
            return error.exit_code
    return 0


def _end_of_imports() -> None:
    """Let garbage be collected, among later objects alone, if this is the program's own process."""
    if not gc.isenabled():
        gc.freeze()
        gc.enable()


if __name__ == "__main__":
    open_streams()
    gc.disable()  # importing the libraries would walk half a million objects again and again, for a second
    sys.exit(main(sys.argv[1:]))
