"""The plan of a run and a report on its images, printed before it: `train.py --check`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data.index import Index
from data.record import BadFile
from data.report import DatasetReport, report
from trainer.config.schema import TrainConfig
from trainer.diffusion.conditioning import Tokenize
from trainer.errors import UserError
from trainer.output import counted, say, wrapped
from trainer.planning.contact_sheets import ContactSheets
from trainer.planning.disk import plan_disk
from trainer.planning.memory import Estimate
from trainer.planning.plan import Plan, aligned
from trainer.planning.prepare import prepare
from trainer.training.latent_cache import plan_latents
from trainer.training.launch import expected
from trainer.training.precision import imagined_precision, resolve_precision
from trainer.training.ranks import Processes


def check(
    config: TrainConfig,
    notes: Sequence[str],
    *,
    weights_only: bool,
    as_json: bool = False,
    contact_sheets: Path | None = None,
    vram: float | None = None,
) -> int:
    """Check everything that needs no weights, scan the images, print a report on them and the plan.

    Args:
        as_json: print one JSON object and nothing else on the standard output.
        contact_sheets: folder for sheets of the images; drawing them also finds damaged ones.
        vram: GiB of the GPU to plan for, which this machine may lack; None plans for this machine.

    Returns:
        The exit code: 1 if on_bad_image is error and some file cannot be used, else 0.

    Raises:
        UserError: the model, the checkpoint, the environment or the images do not allow the run.
    """
    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        findings = _examine(config, notes, weights_only, contact_sheets, vram)
    refused = bool(findings.data.bad) and config.data.on_bad_image == "error"
    if as_json:
        text = json.dumps(findings.as_json(usable=not refused), indent=1)
        lines = text.replace("\x7f", "\\u007f").split("\n")
    else:
        lines = findings.lines(refused=refused)
    say(*lines, stream=sys.stdout)
    return 1 if refused else 0


@dataclass(frozen=True)
class _Findings:
    notes: Sequence[str]
    plan: Plan
    rows: Sequence[tuple[str, str]]
    data: DatasetReport
    sheets: Sequence[Path]
    memory: Estimate

    def lines(self, *, refused: bool) -> list[str]:
        """Return the findings as plain text."""
        sheets = [f"contact sheets: {len(self.sheets)} in {self.sheets[0].parent}"] if self.sheets else []
        refusal = f"on_bad_image is error: a run would be refused for {len(self.data.bad)} of the files."
        return [
            *(f"Note: {note}" for note in self.notes),
            *(f"Changed: {change}" for change in self.plan.changed),
            *self.data.lines(),
            *sheets,
            "",
            *(part for row in aligned(self.rows) for part in wrapped(row, hang=13)),
            "",
            *self.memory.lines(),
            *(["", refusal] if refused else []),
        ]

    def as_json(self, *, usable: bool) -> dict[str, Any]:
        """Return the findings as JSON values."""
        return {
            "usable": usable,
            "notes": list(self.notes),
            "changed": list(self.plan.changed),
            "data": self.data.as_json(),
            "steps": self.plan.total_steps,
            "steps_of_first_epoch": self.plan.steps_of_epoch,
            "plan": dict(self.rows),
            "memory": self.memory.as_json(),
            "contact_sheets": [str(path) for path in self.sheets],
        }


def _examine(
    config: TrainConfig,
    notes: Sequence[str],
    weights_only: bool,
    contact_sheets: Path | None,
    vram: float | None,
) -> _Findings:
    processes = expected(config.loop.gpuid)
    elsewhere = vram is not None and processes.device.type != "cuda"
    precision = (
        imagined_precision(config.precision)
        if elsewhere
        else resolve_precision(config.precision, processes.device)
    )
    plan = prepare(config, processes, precision, weights_only=weights_only)
    notes = [*notes, *processes.notes, *plan.notes]
    index = plan.split.train
    tokenize = None if plan.models.tokenizer is None else plan.tokenize(plan.models.tokenizer)
    data = _report(plan, index, tokenize)
    sheets, damaged = _draw(data, index, plan.config, contact_sheets) if contact_sheets else ([], ())
    if damaged:
        names = {file.name for file in damaged}
        sound = tuple(record for record in index.records if record.name not in names)
        index = replace(index, records=sound, bad=(*index.bad, *damaged))
        data = _report(plan, index, tokenize)
        plan = replace(plan, latents=_latents(plan, index, processes))
        files = counted(len(damaged), "damaged image")
        notes.append(
            f"{files} will be skipped but counted in the steps: a step that would show one has fewer images"
        )
    disk = plan_disk(plan.config, plan.artifact, plan.counts, precision.weights)
    rows = [*plan.rows(), *disk.rows(Path(plan.config.logging.logdir))]
    memory = plan.memory(precision, None if vram is None else round(vram * 2**30))
    return _Findings(notes, plan, rows, data, sheets, memory)


def _report(plan: Plan, index: Index, tokenize: Tokenize | None) -> DatasetReport:
    options, images = plan.config.data, plan.images_per_step
    return report(index, options, images_per_step=images, tokens=tokenize, duplicates=True)


def _draw(
    dataset: DatasetReport, index: Index, config: TrainConfig, folder: Path
) -> tuple[list[Path], tuple[BadFile, ...]]:
    """Write the contact sheets; return their paths and the images that could not be decoded."""
    place = folder.resolve()
    if root := next((root for root in dataset.roots if place.is_relative_to(Path(root).resolve())), None):
        raise UserError(f"--contact_sheets: {folder} lies inside {root}; name a folder outside the images.")
    used = [record for record in index.records if record.multiply > 0]
    sheets = ContactSheets(used, config.data.resolutions, {long.name: long.cut for long in dataset.long})
    return list(sheets.write(folder)), tuple(sheets.bad.values())


def _latents(plan: Plan, index: Index, processes: Processes) -> Any:
    config, vae = plan.config, plan.models.vae.config
    epochs, here = config.loop.max_epochs, processes.on_machine
    return plan_latents(config.cache, config.data, index, vae, epochs=epochs, processes=here)
