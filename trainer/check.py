"""The plan of a run, told before it: what is trained on what, for how long, and where it goes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainer.cache import LatentPlan
    from trainer.config.schema import TrainConfig
    from trainer.models.trainable import Part
    from trainer.optim import OptimizerOptions
    from trainer.precision import Precision


def check(config: TrainConfig, notes: Sequence[str], *, weights_only: bool) -> None:
    """Check all that can be checked without loading weights, scan the images and print the plan.

    Raises:
        UserError: the model, the checkpoint or the environment does not allow the run.
        DataError: the images do not.
    """
    from data.report import report
    from data.saved_index import remembered_index
    from trainer.build import (
        Tokenize,
        choose_device,
        choose_seed,
        count_steps,
        log_folder_problem,
        make_loader,
        read_prompts,
        set_noise_schedule,
    )
    from trainer.cache import cache_folder, plan_latents
    from trainer.config import check_fused_backward, check_rates, check_schedules
    from trainer.errors import UserError
    from trainer.models.load import describe as describe_model
    from trainer.models.quiet import quiet_libraries
    from trainer.models.trainable import apply_freezing
    from trainer.precision import resolve_precision
    from trainer.resume import changes, check_same_run, describe, find_start

    quiet_libraries()
    for note in notes:
        print(f"Note: {note}")
    start = find_start(config, weights_only=weights_only)
    config, prompts = read_prompts(config)
    config = replace(config, loop=replace(config.loop, seed=choose_seed(config.loop.seed, start)))
    index = remembered_index(config.data, cache_folder(config.cache, config.logging.logdir), save=False)
    precision = resolve_precision(config.precision, choose_device(config.loop.gpuid))
    check_fused_backward(config, precision)
    total_steps = count_steps(config, index)
    for note in check_schedules(config, total_steps):
        print(f"Note: {note}")
    models = describe_model(replace(config.model, resume_ckpt=start.model))
    for note in models.notes:
        print(f"Note: {note}")
    set_noise_schedule(config, prompts, models)
    parts = apply_freezing(models, config.parts, config.optimizers.freezing)
    check_rates(config, {network: part.trained for network, part in parts.counts.items()})
    if problem := log_folder_problem(Path(config.logging.logdir)):
        raise UserError(problem)

    tokenizer = models.tokenizer
    count_tokens = None if tokenizer is None else Tokenize(tokenizer).count
    dataset = report(index, resolution=config.data.resolution, batch_size=config.data.batch_size, count_tokens=count_tokens)
    loader = make_loader(config, index, Tokenize(tokenizer), pin=False)
    latents = plan_latents(config.cache, config.data, index, models.vae.config, epochs=config.loop.max_epochs)
    if start.about is not None:
        about = describe(config, index, parts, total_steps)
        check_same_run(about, start.about, str(start.checkpoint))
        for change in changes(about, start.about):
            print(f"Changed: {change}")
    print("\n".join(dataset.lines()))
    print()
    print("\n".join(plan_lines(config, models.source, parts.counts, precision, loader.steps_in(0), total_steps, latents)))


def plan_lines(
    config: TrainConfig,
    model: str,
    parts: Mapping[str, Part],
    precision: Precision,
    steps_of_epoch: int,
    total_steps: int,
    latents: LatentPlan,
) -> list[str]:
    """Return the plan as aligned lines.

    Args:
        config: the checked configuration.
        model: where the weights come from.
        parts: what learns of each network.
        precision: device and number format.
        steps_of_epoch: optimizer steps of the first epoch.
        total_steps: optimizer steps of the run.
        latents: how the run comes by them.
    """
    data, loop, saving, samples = config.data, config.loop, config.saving, config.samples
    accumulated = f" in {loop.grad_accum} passes of {data.batch_size}" if loop.grad_accum > 1 else ""
    optimizers: dict[str, OptimizerOptions] = {"unet": config.optimizers.unet, "text encoder": config.optimizers.text_encoder}
    lines = [("model", model)]
    for network, part in parts.items():
        learning = f"{_optimizer(optimizers[network])}; " if part.trained else ""
        lines.append((network, f"{learning}trains {part.what}: {part.trained:,} of {part.total:,} parameters"))
    stop = f", stopping after {loop.stop_after_steps}" if loop.stop_after_steps else ""
    every = f"every {saving.save_every_n_epochs} epochs and " if saving.save_every_n_epochs else ""
    form = {"both": "diffusers folder and single .safetensors", "diffusers": "diffusers folder", "single": "single .safetensors"}
    lines += [
        ("steps", f"{total_steps:,} = {loop.max_epochs} epochs of {steps_of_epoch:,}{stop}"),
        ("batch", f"{data.batch_size * loop.grad_accum} images a step{accumulated}, resolution {data.resolution}"),
        ("latents", str(latents)),
        ("precision", f"{precision.name} on {precision.device}"),
        ("seed", str(loop.seed)),
        ("samples", f"every {samples.sample_steps} steps, from {samples.sample_prompts or 'four captions of the data'}"),
        ("checkpoints", f"{every}at the end: {form['diffusers' if saving.no_save_ckpt else saving.save_format]}"),
        ("outputs", str(Path(config.logging.logdir) / f"{config.logging.project_name}-<time>")),
    ]
    return [f"{name:<13}{text}" for name, text in lines]


def _optimizer(options: OptimizerOptions) -> str:
    rate = f"lr {options.lr:g}" + (" x the d it finds" if options.adapts else "")
    return f"{options.optimizer}, {rate}, {options.lr_scheduler}"
