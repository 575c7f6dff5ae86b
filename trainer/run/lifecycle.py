"""The life of a run: prepare, build, train, close. Exceptions become sentences here."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace

from trainer.checkpoints.lock import locked
from trainer.config.schema import TrainConfig
from trainer.environment import check_cuda
from trainer.errors import UserError, said
from trainer.models.compiled import require_compiler
from trainer.planning.memory_advice import cheapest_key
from trainer.planning.plan import Plan
from trainer.planning.prepare import prepare
from trainer.reporting.console import Console
from trainer.run.build import build
from trainer.run.closing import HANG, how_to_resume, results
from trainer.run.learned_rate import export_learned_rate
from trainer.run.out_of_memory import is_out_of_memory, memory_table
from trainer.training.launch import connect
from trainer.training.loop import train
from trainer.training.precision import resolve_precision
from trainer.training.ranks import Processes
from trainer.training.run import Run
from trainer.training.signals import StopSignals


def run_training(
    config: TrainConfig,
    notes: Sequence[str],
    *,
    weights_only: bool,
    arguments: Sequence[str],
    signals: StopSignals,
) -> None:
    """Train as configured, from the first event to the closing lines; on several ranks, together.

    The command line in `arguments` becomes the one that resumes the run.

    Raises:
        UserError: something must be put right before the run can start, or the run has failed.
        Interrupted: a signal has ended the run.
        ReportedElsewhere: rank 0 reports why this rank ends.
    """
    processes = connect(config.loop.gpuid, signals)
    console = Console(enabled=processes.main)
    with processes.together(), ExitStack() as ending:
        for note in [*notes, *check_cuda(), *processes.notes]:
            console.event(f"Note: {note}")
        try:
            run = start(config, console, processes, ending, weights_only=weights_only, signals=signals)
        except Exception as error:
            if (explained := _explained(error, config)) is None:
                raise
            raise explained from error
        console.start(total_steps=run.cadence.total_steps, first_step=run.state.step)
        failed = False
        try:
            train(run)
        except Exception as error:
            failed = True
            if (explained := _explained(error, config, run)) is None:
                raise
            raise explained from error
        finally:
            _close(run, config, arguments, failed=failed)


def start(
    config: TrainConfig,
    console: Console,
    processes: Processes,
    ending: ExitStack,
    *,
    weights_only: bool,
    signals: StopSignals,
) -> Run:
    """Plan and build a run; `ending` takes what must be done when it has ended, however far it came."""
    precision = resolve_precision(config.precision, processes.device)
    precision = replace(precision, paced=config.optimizers.apply_grad_scaler_step_tweaks)
    if config.parts.compile:
        require_compiler(precision.device)

    def plan() -> Plan:
        return prepare(
            config,
            processes,
            precision,
            weights_only=weights_only,
            claim=lambda folder: ending.enter_context(locked(folder)),
        )

    return build(processes.first(plan), precision, console, processes, ending, signals)


def _close(run: Run, config: TrainConfig, arguments: Sequence[str], *, failed: bool) -> None:
    """Close what a run holds open, and show the closing lines."""
    console, state = run.records.console, run.state
    console.close()
    run.loader.close()
    run.records.loggers.close()
    if not run.processes.main:
        return
    for line in results(run, config, failed=failed):
        console.event(line, hang=HANG)
    for line in how_to_resume(run, config, arguments, failed=failed):
        console.event(line, whole=True)
    if failed or state.step == 0:  # a failed run will be resumed, or its rate is what made it fail
        return
    for line in export_learned_rate(run, config):
        console.event(line, hang=HANG)


def _explained(error: Exception, config: TrainConfig, run: Run | None = None) -> UserError | None:
    """Return an error of memory or of a killed DataLoader worker as sentences; None for any other."""
    exit_code = 2 if run is None else 1
    if _is_of_worker(error):
        return UserError(_worker_killed(error), exit_code=exit_code)
    if not is_out_of_memory(error):
        return None
    if run is None:
        return UserError([f"Memory has run out before the first step ({said(error)}).", cheapest_key(config)])
    sentence = f"Memory has run out in step {run.state.step + 1} ({said(error)}). Where it is:"
    return UserError([sentence, *memory_table(run), cheapest_key(config)], exit_code=1)


def _is_of_worker(error: Exception) -> bool:
    """Return whether a DataLoader worker was killed or shared memory ran out; torch has no class for it."""
    words = str(error)
    return isinstance(error, RuntimeError) and (
        words.startswith("DataLoader worker") or "shared memory" in words
    )


def _worker_killed(error: Exception) -> str:
    last = str(error).strip().splitlines()[-1]
    return (
        "a DataLoader worker was killed or could not hand an image over, most likely because memory ran out, "
        "main memory or a container's shared memory: set num_workers lower, 0 reads without workers "
        f"({last})."
    )
