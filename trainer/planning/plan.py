"""The plan of a run, made before weights load: what `--check` prints and `build` turns into a run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trainer.checkpoints.artifact import Artifact
from trainer.config import TrainConfig
from trainer.diffusion.conditioning import Tokenize
from trainer.evaluation.options import SamplePrompts, ValidationFile
from trainer.evaluation.sampling import Sampler
from trainer.evaluation.validation import Split
from trainer.models.ema import plan_ema
from trainer.models.pipeline import Models, Part
from trainer.networks import TEXT_ENCODER, by_network
from trainer.output import shown_path
from trainer.planning.memory import Estimate, estimate, size_of_device, work_of
from trainer.planning.resume import Start
from trainer.training.latent_cache import LatentPlan
from trainer.training.precision import Precision


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything about a run that is decided before weights load; the same on all ranks."""

    config: TrainConfig
    """The configuration with its open values decided: seed, revision, steps between samples."""
    start: Start
    prompts: SamplePrompts
    validation: ValidationFile
    split: Split
    models: Models
    """The networks on the meta device."""
    artifact: Artifact
    counts: Mapping[str, Part]
    """Trained and all parameters, by network."""
    total_steps: int
    steps_of_epoch: int
    """Optimizer steps of the first epoch."""
    text_stop: int | None
    """Optimizer steps after which the text encoder is frozen."""
    ranks: int
    latents: LatentPlan
    about: Mapping[str, Any]
    """The run as its checkpoints record it."""
    learned_d: frozenset[str]
    """Networks whose d starts at a checkpoint's."""
    changed: tuple[str, ...]
    """Differences from the resumed run's configuration."""
    notes: tuple[str, ...]
    computes: str
    """Dtype and device in words."""

    @property
    def images_per_step(self) -> int:
        """Images of a full optimizer step over all ranks."""
        return images_per_step(self.config, self.ranks)

    @property
    def trains_text(self) -> bool:
        """True if the text encoder has trained parameters."""
        return self.counts[TEXT_ENCODER].trained > 0

    @property
    def validation_batch(self) -> int:
        """Images and timesteps that are validated at a time."""
        return self.validation.batch_size or self.config.data.batch_size

    @property
    def sample_steps(self) -> int:
        """Optimizer steps between samples."""
        steps = self.config.samples.sample_steps
        return max(1, round(self.total_steps / 10)) if steps == "auto" else steps

    def pinned(self, models: Models) -> Plan:
        """Return the plan with the commits of the hub that its networks were loaded from."""
        loaded = {"revision": models.revision, "vae_revision": models.vae_revision}
        commits = {key: commit for key, commit in loaded.items() if commit is not None}
        config = replace(self.config, model=replace(self.config.model, **commits))
        about = {**self.about, "config": {**self.about["config"], **commits}}
        return replace(self, config=config, about=about)

    def tokenize(self, tokenizer: Any) -> Tokenize:
        """Return the function that turns captions into tokens."""
        return Tokenize(tokenizer, _chunks(self.config))

    def sampler(self) -> Sampler:
        """Return the sampler of the run's prompts."""
        config = self.config
        return Sampler(
            self.prompts,
            resolution=max(config.data.resolutions),
            seed=config.loop.seed,
            batch_size=config.data.batch_size,
            captions=[record.caption.text for record in self.split.train.records],
            clip_skip=config.objective.clip_skip,
            chunks=_chunks(config),
            wildcards=config.data.wildcards,
        )

    def memory(self, precision: Precision, size: int | None = None) -> Estimate:
        """Estimate the peak memory on a device of `size` bytes, by default the precision's own."""
        work = work_of(
            self.config,
            self.split.train,
            self.sampler(),
            latents_kept=self.latents.mode != "no",
            trains_text=self.trains_text,
            held_out=self.validation_batch if self.split.held_out else 0,
        )
        holds = size_of_device(precision) if size is None else size
        return estimate(self.config, self.models, precision, work, holds=holds)

    def rows(self) -> list[tuple[str, str]]:
        """Return the plan as names and texts."""
        config = self.config
        loop, saving = config.loop, config.saving
        limits = [f"{loop.stop_after_steps}"] if loop.stop_after_steps else []
        limits += [f"{loop.max_train_time:g} minutes of training"] if loop.max_train_time else []
        stop = f", stopping after {' or '.join(limits)}" if limits else ""
        every = f"{_every(saving.save_every_n_epochs)} and " if saving.save_every_n_epochs else ""
        kind = "diffusers" if saving.no_save_ckpt else saving.save_format
        averaged, held_out = plan_ema(config.ema, self.total_steps), self.split.lines()
        new = Path(config.logging.logdir) / f"{run_name(config)}-<time>"
        return [
            ("model", shown_path(Path(self.models.source))),
            *((network, self._network(network)) for network in self.counts),
            ("steps", f"{self.total_steps:,} = {loop.max_epochs} epochs of {self.steps_of_epoch:,}{stop}"),
            ("batch", self._batch()),
            *([("masks", self._masks())] if self.split.train.masked else []),
            ("latents", str(self.latents)),
            *([("validation", ", ".join(held_out))] if held_out else []),
            *([("ema", averaged)] if averaged else []),
            ("precision", self.computes),
            ("seed", str(loop.seed)),
            ("samples", self._samples()),
            ("checkpoints", f"{every}at the end: {_forms(self.artifact)[kind]}"),
            ("outputs", shown_path(self.start.run or new)),
        ]

    def _network(self, network: str) -> str:
        part = self.counts[network]
        learning = (
            f"{_optimizer(by_network(self.config.optimizers)[network], network in self.learned_d)}; "
            if part.trained
            else ""
        )
        stops = self.text_stop if network == TEXT_ENCODER else None
        until = "" if stops is None else f", up to step {stops:,} of {self.total_steps:,}"
        return f"{learning}trains {part.what}: {part.trained:,} of {part.total:,} parameters{until}"

    def _samples(self) -> str:
        every, named = self.sample_steps, self.config.samples.sample_prompts
        times = self.prompts.generate_pretrain_samples + math.ceil(self.total_steps / every)
        prompts = shown_path(Path(named)) if named else "two captions of the data and two unrelated prompts"
        return f"every {every} steps, {times} times in all: {prompts}"

    def _batch(self) -> str:
        data, passes = self.config.data, self.config.loop.grad_accum
        own = data.batch_size * passes
        among = f", {own} on each of {self.ranks} processes" if self.ranks > 1 else ""
        split = f" in {passes} passes of {data.batch_size}" if passes > 1 else ""
        sizes = " and ".join(map(str, data.resolutions))
        return f"{own * self.ranks} images a step{among}{split}, resolution {sizes}"

    def _masks(self) -> str:
        records, rest = self.split.train.records, self.config.objective.unmasked_weight
        masked = sum(bool(record.mask) for record in records)
        return f"of {masked:,} of {len(records):,} images; in the loss black counts {rest:g}, white 1"


def images_per_step(config: TrainConfig, ranks: int) -> int:
    """Return the images of a full optimizer step over all ranks."""
    return config.data.batch_size * config.loop.grad_accum * ranks


def run_name(config: TrainConfig) -> str:
    """Return the name of a run without its time."""
    return "-".join(part for part in (config.logging.project_name, config.logging.run_name) if part)


def aligned(rows: Sequence[tuple[str, str]]) -> list[str]:
    """Return names and texts as lines."""
    return [f"{name:<13}{text}" for name, text in rows]


def _every(epochs: int) -> str:
    return "every epoch" if epochs == 1 else f"every {epochs} epochs"


def _chunks(config: TrainConfig) -> int:
    """Return the 75-token chunks of a caption."""
    return config.data.max_tokens // 75


def _forms(artifact: Artifact) -> dict[str, str]:
    """Return the forms of a checkpoint in words, by save_format."""
    folder, single = artifact.folder_name, artifact.file_name
    return {"both": f"{folder} and {single}", "diffusers": folder, "single": single}


def _optimizer(options: Any, learned: bool) -> str:
    rate = f"lr {options.lr:g}" + (" x the d it finds" if options.adapts else "")
    first = f", from the checkpoint's {options.d0:.3g} on" if learned else ""
    rate_max = getattr(options, "rate_max", math.inf)
    cap = f", at most {rate_max:g}" if rate_max < math.inf else ""
    return f"{options.optimizer}, {rate}{first}{cap}, {options.lr_scheduler}"
