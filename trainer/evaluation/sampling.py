"""Samples during training: prompts from a file or from the data, fixed seeds, grids with captions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from PIL import Image
from torch import Tensor
from transformers import CLIPTokenizer

from data.captions.wildcards import choose, drawn
from data.rng import stream
from trainer.diffusion.conditioning import Tokenize, encode_text
from trainer.evaluation.image_grid import labelled_row, tiled
from trainer.evaluation.options import SamplePrompt, SamplePrompts
from trainer.evaluation.schedulers import build_pipeline
from trainer.models.pipeline import Models
from trainer.models.placement import evaluating

Drawn = dict[tuple[int, float], Image.Image | str]
"""By the prompt's number and the guidance scale, a sample, or the reason why it could not be drawn."""

UNRELATED = ("a bowl of fruit on a wooden table", "a city street at night in the rain")
"""Default prompts beside captions of the data: their samples change when the model burns."""

_GUIDANCE_RESCALE = 0.7
"""For zero-terminal SNR, where guidance overexposes (arXiv 2305.08891, section 3.4)."""


@dataclass(frozen=True)
class Samples:
    """The samples of one step."""

    grid: Image.Image
    """All of them, with their captions."""
    rows: tuple[tuple[str, Image.Image], ...]
    """By TensorBoard tag, the samples of each prompt."""
    problems: tuple[str, ...]
    """One sentence for each failure; the grid shows the reason in place of the sample."""

    def save(self, folder: Path, step: int, suffix: str = "") -> Path:
        """Write the grid into `folder` as `gs00100.png` or `gs00100-suffix.png`, and return its path."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"gs{step:05d}{'-' * bool(suffix)}{suffix}.png"
        self.grid.save(path)
        return path


class Sampler:
    """Draw the same prompts from the same noise again and again, to watch a model learn.

    Every sample has its own generator on the CPU: training is equal to the bit with and without samples, and
    a sample does not depend on the others in its batch.

    Args:
        prompts: the prompts; the other arguments are the training's, used where it sets no value.
        captions: captions of the data, for random captions and where there are no prompts.
        chunks: 75-token chunks of a prompt.
        wildcards: of `{a|b}` in a prompt draw one alternative, the same at every step.
    """

    def __init__(
        self,
        prompts: SamplePrompts,
        *,
        resolution: int,
        seed: int,
        batch_size: int,
        captions: Sequence[str] = (),
        clip_skip: int = 0,
        chunks: int = 1,
        wildcards: bool = False,
    ) -> None:
        self._options = prompts
        self._resolution = prompts.resolution or resolution
        self._run_seed = seed
        self._batch_size = prompts.batch_size or max(1, batch_size // 2)
        self._captions = tuple(captions)
        self._clip_skip = clip_skip
        self._chunks = chunks
        self._wildcards = wildcards
        self.prompts: tuple[SamplePrompt, ...] = prompts.samples or tuple(
            SamplePrompt(prompt=text) for text in (*_two(self._captions), *UNRELATED)
        )
        self._reported_long: set[str] = set()

    def draw(
        self,
        models: Models,
        *,
        step: int,
        device: torch.device,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        check: Callable[[], None] = lambda: None,
    ) -> Samples:
        """Draw all prompts with the networks as they are now, and leave each module in its mode.

        Args:
            models: on `device`, not wrapped for several processes.
            step: shown on the grid; also picks random captions and seeds.
            check: called between the steps of the sampler; raises a BaseException to abort.
        """
        drawing = self._drawing(models, device, autocast, check)
        jobs = self._jobs(step)
        problems = self._long_prompts(jobs, models.tokenizer)
        drawn = self._draw(drawing, jobs)
        problems += [
            f"sample '{_short(job.text)}' at cfg {cfg:g} could not be drawn: {reason}"
            for cfg in self._options.cfgs
            for batch in self._batches(jobs)
            for job in batch
            if isinstance(reason := drawn[job.number, cfg], str)
        ]
        several = len(self._options.cfgs) > 1
        labels = [f"cfg {cfg:g}" if several else "" for cfg in self._options.cfgs]
        rows = [
            labelled_row([drawn[job.number, cfg] for cfg in self._options.cfgs], labels, job.text)
            for job in jobs
        ]
        grid = tiled(rows, columns=1 if several else min(4, len(rows)), title=self._title(step))
        tags = [self._tag(job) for job in jobs]
        return Samples(grid, tuple(zip(tags, rows, strict=True)), tuple(problems))

    def images(
        self,
        models: Models,
        *,
        device: torch.device,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> Drawn:
        """Return the samples that `draw` would put on a grid."""
        return self._draw(self._drawing(models, device, autocast, lambda: None), self._jobs(0))

    def largest(self) -> tuple[tuple[int, int], int]:
        """Return width and height of the largest batch of samples, and the UNet's batch size for it."""
        batch = max(self._batches(self._jobs(0)), key=lambda jobs: len(jobs) * jobs[0].width * jobs[0].height)
        return (batch[0].width, batch[0].height), len(batch) * (2 if max(self._options.cfgs) > 1 else 1)

    def _drawing(
        self,
        models: Models,
        device: torch.device,
        autocast: Callable[[], AbstractContextManager[Any]],
        check: Callable[[], None],
    ) -> Drawing:
        pipeline = build_pipeline(models, self._options.scheduler)
        # tqdm disables itself outside a terminal where `disable` is None.
        pipeline.set_progress_bar_config(
            disable=None if self._options.show_progress_bars else True, leave=False
        )
        steps = self._options.num_inference_steps
        return Drawing(pipeline, steps, self._clip_skip, self._chunks, device, autocast, check)

    def _draw(self, drawing: Drawing, jobs: Sequence[_Job]) -> Drawn:
        drawn: Drawn = {}
        pipeline = drawing.pipeline
        with evaluating(pipeline.unet, pipeline.text_encoder, pipeline.vae):
            for cfg in self._options.cfgs:
                for batch in self._batches(jobs):
                    for job, image in zip(batch, drawing.attempt(batch, cfg), strict=True):
                        drawn[job.number, cfg] = image
        return drawn

    def _jobs(self, step: int) -> list[_Job]:
        return [self._job(number, prompt, step) for number, prompt in enumerate(self.prompts)]

    def _job(self, number: int, prompt: SamplePrompt, step: int) -> _Job:
        text = prompt.prompt
        if prompt.random_caption and self._captions:
            draws = stream(self._run_seed, "sample caption", step, number)
            text = self._captions[draws.integers(len(self._captions))]
        if self._wildcards:
            text = with_choices(text, self._run_seed, number)
        seeds = (prompt.seed, self._options.seed, self._run_seed)
        seed = next(seed for seed in seeds if seed is not None)
        if seed == -1:
            seed = int(stream(self._run_seed, "sample seed", step, number).integers(2**31))
        size = prompt.size or _size(self._resolution, prompt.aspect_ratio)
        return _Job(number, text, prompt.negative_prompt, seed, *size)

    def _long_prompts(self, jobs: Sequence[_Job], tokenizer: CLIPTokenizer) -> list[str]:
        """Report each prompt that exceeds the text encoder's limit, once."""
        tokenize = Tokenize(tokenizer, self._chunks)
        found = []
        for job in jobs:
            (tokens,) = tokenize.counts([job.text])
            if tokens > tokenize.limit and job.text not in self._reported_long:
                self._reported_long.add(job.text)
                found.append(
                    f"sample '{_short(job.text)}' has {tokens} tokens and the text encoder reads "
                    f"{tokenize.limit}: the rest is not drawn"
                )
        return found

    def _batches(self, jobs: Sequence[_Job]) -> Iterator[list[_Job]]:
        sizes: dict[tuple[int, int], list[_Job]] = {}
        for job in jobs:
            sizes.setdefault((job.width, job.height), []).append(job)
        for same in sizes.values():
            for start in range(0, len(same), self._batch_size):
                yield same[start : start + self._batch_size]

    def _title(self, step: int) -> str:
        options = self._options
        cfg = f", cfg {options.cfgs[0]:g}" if len(options.cfgs) == 1 else ""
        return f"step {step} ({options.scheduler}, {options.num_inference_steps} steps{cfg})"

    def _tag(self, job: _Job) -> str:
        random_caption = self.prompts[job.number].random_caption
        return f"sample_prompts/{job.number} {'random caption' if random_caption else _short(job.text)}"


@dataclass(frozen=True)
class _Job:
    """One prompt, drawn at each guidance scale."""

    number: int
    text: str
    negative: str
    seed: int
    width: int
    height: int


@dataclass(frozen=True)
class Drawing:
    """diffusers' pipeline and its settings."""

    pipeline: StableDiffusionPipeline
    steps: int
    clip_skip: int
    chunks: int
    device: torch.device
    autocast: Callable[[], AbstractContextManager[Any]]
    check: Callable[[], None]

    def attempt(self, batch: list[_Job], cfg: float) -> list[Image.Image | str]:
        """Draw a batch, or after a failure, such as out of memory, one by one; a reason replaces a sample."""
        try:
            return self.images(batch, cfg)
        except Exception as error:  # no failed sample may end hours of training
            reason = " ".join(str(error).split()) or type(error).__name__
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if len(batch) == 1:
            return [reason]
        return [image for job in batch for image in self.attempt([job], cfg)]

    def images(self, batch: list[_Job], cfg: float) -> list[Image.Image | str]:
        """Draw a batch."""
        # Noise is drawn on the CPU, so that a sample is the same on every device.
        generators = [torch.Generator("cpu").manual_seed(job.seed) for job in batch]
        rescaled = self.pipeline.scheduler.config.get("rescale_betas_zero_snr")
        with torch.no_grad(), self.autocast():
            latents_BCHW = self.pipeline(
                prompt_embeds=self._context([job.text for job in batch]),
                negative_prompt_embeds=self._context([job.negative for job in batch]) if cfg > 1 else None,
                width=batch[0].width,
                height=batch[0].height,
                guidance_scale=cfg,
                guidance_rescale=_GUIDANCE_RESCALE if rescaled else 0.0,
                num_inference_steps=self.steps,
                generator=generators,
                output_type="latent",
                return_dict=False,
                callback_on_step_end=lambda *_: self.check() or {},  # type: ignore[arg-type]
            )[0]
            # One by one, since decoding takes the most memory.
            return [_decode(self.pipeline.vae, latents_1CHW) for latents_1CHW in latents_BCHW.split(1)]

    def _context(self, texts: list[str]) -> Tensor:
        tokens_BT = Tokenize(self.pipeline.tokenizer, self.chunks)(texts)
        return encode_text(self.pipeline.text_encoder, tokens_BT.to(self.device), self.clip_skip)


def with_choices(text: str, run_seed: int, number: int) -> str:
    """Return prompt `number` with one alternative of each wildcard, the same at every step of a run."""
    return choose(text, drawn(stream(run_seed, "sample wildcard", number)))


def _two(captions: Sequence[str]) -> list[str]:
    """Return up to two different captions, evenly spread, or the empty prompt."""
    different = list(dict.fromkeys(caption for caption in captions if caption.strip()))
    count = min(2, len(different))
    return [different[number * len(different) // count] for number in range(count)] or [""]


def _size(resolution: int, aspect_ratio: float) -> tuple[int, int]:
    """Return width and height, multiples of 8, of about the square's area."""
    width, height = resolution * math.sqrt(aspect_ratio), resolution / math.sqrt(aspect_ratio)
    return max(8, round(width / 8) * 8), max(8, round(height / 8) * 8)


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."


def _decode(vae: Any, latents_1CHW: Tensor) -> Image.Image:
    latents_1CHW = latents_1CHW.to(vae.dtype) / vae.config.scaling_factor
    pixels_CHW = vae.decode(latents_1CHW, return_dict=False)[0][0].float()
    if not pixels_CHW.isfinite().all():
        raise ArithmeticError("the sample holds values that are not finite (NaN)")
    bytes_HWC = ((pixels_CHW.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0)
    return Image.fromarray(bytes_HWC.cpu().numpy())
