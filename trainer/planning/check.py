"""The plan of a run and what its data hold, told before it: what is trained on what, for how long, and where it goes."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.config.paths import shown_path
from trainer.models.ema import plan_ema
from trainer.output import say
from trainer.planning.memory import estimate, size_of_device, work_of

if TYPE_CHECKING:
    from data.index import Index
    from data.record import BadFile
    from data.report import DatasetReport
    from trainer.config.schema import TrainConfig
    from trainer.diffusion.conditioning import Tokenize
    from trainer.models.pipeline import Part
    from trainer.optim import OptimizerOptions
    from trainer.planning.memory import Estimate
    from trainer.training.latent_cache import LatentPlan
    from trainer.training.precision import Precision
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
    """Check all that can be checked without loading weights, scan the images, print what they hold and the plan.

    Args:
        config: the checked configuration.
        notes: what its author should know, from before.
        weights_only: whether a checkpoint gives its weights to a new run instead of being continued.
        as_json: whether to print one JSON object, and nothing else on the standard output.
        contact_sheets: a folder for pictures of the data, which also finds damaged images.
        vram: GiB of the card that the run is for, which need not be in this machine; None for the device of
        this machine.

    Returns:
        The exit code: 1 if on_bad_image is error and some file cannot be used, else 0.

    Raises:
        UserError: the model, the checkpoint or the environment does not allow the run.
        DataError: the images do not.
    """
    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        findings = _examine(config, notes, weights_only, contact_sheets, vram)
    refused = bool(findings.data.bad) and config.data.on_bad_image == "error"
    if as_json:
        lines = (
            json.dumps(findings.as_json(usable=not refused), indent=1).replace("\x7f", "\\u007f").split("\n")
        )
    else:
        lines = findings.lines(refused=refused)
    say(*lines, stream=sys.stdout)
    return 1 if refused else 0


@dataclass(frozen=True)
class _Findings:
    notes: Sequence[str]
    changed: Sequence[str]
    """What differs from the run that is continued."""
    data: DatasetReport
    sheets: Sequence[Path]
    steps_of_first_epoch: int
    steps: int
    plan: Sequence[tuple[str, str]]
    memory: Estimate

    def lines(self, *, refused: bool) -> list[str]:
        """Return the findings as plain text."""
        sheets = [f"contact sheets: {len(self.sheets)} in {self.sheets[0].parent}"] if self.sheets else []
        refusal = (
            ["", f"on_bad_image is error: a run would be refused for {len(self.data.bad)} of the files."]
            if refused
            else []
        )
        told = [*(f"Note: {note}" for note in self.notes), *(f"Changed: {change}" for change in self.changed)]
        return [
            *told,
            *self.data.lines(),
            *sheets,
            "",
            *aligned(self.plan),
            "",
            *self.memory.lines(),
            *refusal,
        ]

    def as_json(self, *, usable: bool) -> dict[str, Any]:
        """Return the findings as JSON holds them."""
        return {
            "usable": usable,
            "notes": list(self.notes),
            "changed": list(self.changed),
            "data": self.data.as_json(),
            "steps": self.steps,
            "steps_of_first_epoch": self.steps_of_first_epoch,
            "plan": dict(self.plan),
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
    from trainer.models.quiet import quiet_libraries

    quiet_libraries()  # before anything imports diffusers, which speaks as it loads
    import torch

    from data.saved_index import FEWEST, remembered_index
    from trainer.checkpoints.export import size_beside
    from trainer.checkpoints.saver import plan_disk
    from trainer.config import check_fused_backward, check_rates, check_schedules
    from trainer.errors import UserError
    from trainer.evaluation.validation import split_images
    from trainer.models.load import describe as describe_model
    from trainer.models.lora import read_adapter
    from trainer.models.trainable import apply_freezing
    from trainer.planning.resume import changes, check_same_run, describe, find_start
    from trainer.run.build import (
        choose_samples,
        choose_seed,
        count_steps,
        log_folder_problem,
        make_loader,
        make_tokenize,
        read_prompts,
        read_validation_file,
        set_noise_schedule,
    )
    from trainer.training.latent_cache import cache_folder, plan_latents
    from trainer.training.precision import imagined_precision, resolve_precision
    from trainer.training.ranks import expected

    processes = expected(config.loop.gpuid)
    check_fused_backward(config, processes=processes.count)
    start = find_start(config, weights_only=weights_only)
    config, prompts = read_prompts(config)
    config = replace(config, loop=replace(config.loop, seed=choose_seed(config.loop.seed, start)))
    kept = cache_folder(config.cache, config.logging.logdir)
    validation_file = read_validation_file(config)
    index = remembered_index(config.data, kept)
    split = split_images(validation_file, config.data, index, kept, save=len(index.records) >= FEWEST)
    index = split.train
    device = processes.device
    elsewhere = vram is not None and device.type != "cuda"
    precision = (
        imagined_precision(config.precision) if elsewhere else resolve_precision(config.precision, device)
    )
    check_fused_backward(config, precision)
    total_steps = count_steps(config, index, processes)
    models = describe_model(replace(config.model, resume_ckpt=start.model, revision=start.revision))
    config = replace(config, model=replace(config.model, revision=models.revision or start.revision))
    notes = [
        *notes,
        *processes.notes,
        *start.notes,
        *split.notes,
        *check_schedules(config, total_steps),
        *models.notes,
    ]
    set_noise_schedule(config, prompts, models)
    parts = apply_freezing(models, config.parts, config.optimizers.freezing)
    check_rates(config, {network: part.trained for network, part in parts.counts.items()})
    if problem := log_folder_problem(Path(config.logging.logdir)):
        raise UserError(problem)

    tokenize = make_tokenize(config, models.tokenizer)
    counting = None if models.tokenizer is None else tokenize
    data, read = _report(config, index, processes, counting), index
    sheets, damaged = _draw(data, index, config, contact_sheets) if contact_sheets else ([], ())
    if damaged:
        names = {file.name for file in damaged}
        sound = tuple(record for record in index.records if record.name not in names)
        read = replace(index, records=sound, bad=(*index.bad, *damaged))
        data = _report(config, read, processes, counting)
        files = f"{len(damaged)} damaged image{'s' if len(damaged) > 1 else ''}"
        notes = [
            *notes,
            f"{files} will be skipped but counted in the steps: a step that would show one has fewer images",
        ]
    first = make_loader(config, index, tokenize, processes, pin=False).steps_in(0)
    latents = plan_latents(
        config.cache,
        config.data,
        read,
        models.vae.config,
        epochs=config.loop.max_epochs,
        processes=processes.on_machine,
    )
    changed: Sequence[str] = ()
    if start.about is not None:
        about = describe(config, index, parts, total_steps, processes.count)
        check_same_run(about, start.about, str(start.checkpoint))
        changed = changes(about, start.about)
    if start.adapter is not None:
        read_adapter(start.adapter, parts, config.parts.lora)
    batch = batch_line(config, processes)
    about_run = (
        config,
        models.source,
        parts.counts,
        precision,
        first,
        total_steps,
        batch,
        latents,
        split.lines(),
    )
    plan = plan_rows(*about_run, run=start.run)
    lora = config.parts.lora is not None  # of which checkpoints hold the matrices alone, in fp32
    disk = plan_disk(
        config.saving,
        networks={
            network: (part.trained, part.trained if lora else part.total)
            for network, part in parts.counts.items()
        },
        vae=0 if lora else sum(parameter.numel() for parameter in models.vae.parameters()),
        optimizers={"unet": config.optimizers.unet, "text encoder": config.optimizers.text_encoder},
        weights=torch.float32 if lora else precision.weights,
        epochs=config.loop.max_epochs,
        averaged=config.ema.active,
        beside=0 if lora else size_beside(models),
    )
    plan += disk.rows(Path(config.logging.logdir))
    work = work_of(
        config,
        index,
        choose_samples(config, prompts, index),
        latents_kept=latents.mode != "no",
        trains_text=parts.counts["text encoder"].trained > 0,
        held_out=(validation_file.batch_size or config.data.batch_size) if split.held_out else 0,
    )
    memory = estimate(
        config,
        models,
        precision,
        work,
        holds=round(vram * 2**30) if vram is not None else size_of_device(precision),
    )
    return _Findings(notes, changed, data, sheets, first, total_steps, plan, memory)


def plan_rows(
    config: TrainConfig,
    model: str,
    parts: Mapping[str, Part],
    precision: Precision,
    steps_of_epoch: int,
    total_steps: int,
    batch: str,
    latents: LatentPlan,
    held_out: Sequence[str] = (),
    *,
    run: Path | None = None,
) -> list[tuple[str, str]]:
    """Return the plan as names and texts.

    Args:
        config: the checked configuration.
        model: where the weights come from.
        parts: what learns of each network.
        precision: device and number format.
        steps_of_epoch: optimizer steps of the first epoch.
        total_steps: optimizer steps of the run.
        batch: as `batch_line` says it.
        latents: how the run comes by them.
        held_out: what is measured and not trained.
        run: the folder of a resumed run.
    """
    averaged = plan_ema(config.ema, total_steps)
    loop, saving, samples = config.loop, config.saving, config.samples
    optimizers: dict[str, OptimizerOptions] = {
        "unet": config.optimizers.unet,
        "text encoder": config.optimizers.text_encoder,
    }
    name = "-".join(part for part in (config.logging.project_name, config.logging.run_name) if part)
    lines = [("model", model)]
    for network, part in parts.items():
        learning = f"{_optimizer(optimizers[network])}; " if part.trained else ""
        lines.append(
            (network, f"{learning}trains {part.what}: {part.trained:,} of {part.total:,} parameters")
        )
    limits = [f"{loop.stop_after_steps}"] if loop.stop_after_steps else []
    limits += [f"{loop.max_train_time:g} minutes of training"] if loop.max_train_time else []
    stop = f", stopping after {' or '.join(limits)}" if limits else ""
    every = f"every {saving.save_every_n_epochs} epochs and " if saving.save_every_n_epochs else ""
    folder, single = (
        ("diffusers folder", "single .safetensors")
        if config.parts.lora is None
        else ("LoRA folder", "LoRA .safetensors")
    )
    form = {"both": f"{folder} and {single}", "diffusers": folder, "single": single}
    lines += [
        ("steps", f"{total_steps:,} = {loop.max_epochs} epochs of {steps_of_epoch:,}{stop}"),
        ("batch", batch),
        ("latents", str(latents)),
        *([("held out", ", ".join(held_out))] if held_out else []),
        *([("ema", averaged)] if averaged else []),
        ("precision", f"{precision.name} on {precision.device}"),
        ("seed", str(loop.seed)),
        (
            "samples",
            f"every {samples.sample_steps} steps, from {samples.sample_prompts or 'four captions of the data'}",
        ),
        (
            "checkpoints",
            f"{every}at the end: {form['diffusers' if saving.no_save_ckpt else saving.save_format]}",
        ),
        ("outputs", shown_path(run or Path(config.logging.logdir) / f"{name}-<time>")),
    ]
    return lines


def batch_line(config: TrainConfig, processes: Processes) -> str:
    """Return how many images a step has, and how they are shared out, in words."""
    size, accumulated, count = config.data.batch_size, config.loop.grad_accum, processes.count
    among = f", {size * accumulated} on each of {count} processes" if count > 1 else ""
    passes = f" in {accumulated} passes of {size}" if accumulated > 1 else ""
    return f"{size * accumulated * count} images a step{among}{passes}, resolution {' and '.join(map(str, config.data.resolutions))}"


def aligned(rows: Sequence[tuple[str, str]]) -> list[str]:
    """Return names and texts as lines."""
    return [f"{name:<13}{text}" for name, text in rows]


def _report(
    config: TrainConfig, index: Index, processes: Processes, tokenize: Tokenize | None
) -> DatasetReport:
    from data.report import report
    from trainer.run.build import images_per_step

    return report(
        index,
        config.data,
        images_per_step=images_per_step(config, processes),
        tokens=tokenize,
        duplicates=True,
    )


def _draw(
    dataset: DatasetReport, index: Index, config: TrainConfig, folder: Path
) -> tuple[list[Path], tuple[BadFile, ...]]:
    """Write the contact sheets; return their paths and the images that could not be decoded."""
    from trainer.planning.contact_sheets import ContactSheets

    used = [record for record in index.records if record.multiply > 0]
    sheets = ContactSheets(used, config.data.resolutions, {long.name: long.cut for long in dataset.long})
    return list(sheets.write(folder)), tuple(sheets.bad.values())


def _optimizer(options: OptimizerOptions) -> str:
    rate = f"lr {options.lr:g}" + (" x the d it finds" if options.adapts else "")
    rate_max = getattr(options, "rate_max", math.inf)
    return f"{options.optimizer}, {rate}{f', at most {rate_max:g}' if rate_max < math.inf else ''}, {options.lr_scheduler}"
