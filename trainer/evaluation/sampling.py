"""Sample pictures while training: prompts from a file or from the data, fixed seeds, grids with captions."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Le, MinLen, MultipleOf

from trainer.errors import UserError

if TYPE_CHECKING:
    import torch
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
    from PIL import Image
    from torch import Tensor
    from transformers import CLIPTextModel, CLIPTokenizer

Side = Annotated[int, Ge(8), MultipleOf(8)]

Scheduler = Literal[
    "ddim", "pndm", "ddpm", "lms", "euler", "euler_a", "kdpm2", "dpm++", "dpm++_2s", "dpm++_2m", "dpm++_sde", "dpm++_2m_sde",
    "dpm++_2s_k", "dpm++_2m_k", "dpm++_sde_k", "dpm++_2m_sde_k",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """Which pictures are drawn while training, and how often."""

    sample_prompts: str | None = None
    """A .txt file with one prompt a line, or a .json file with prompts, seeds, guidance scales and more; null
    takes four captions of the data."""

    sample_steps: Annotated[int, Ge(1)] = 250
    """Draw samples every n optimizer steps, besides before the first and after the last."""


@dataclass(frozen=True, kw_only=True)
class SamplePrompt:
    """One entry of `samples` in a .json file of prompts."""

    prompt: str = ""
    """What to draw."""

    negative_prompt: str = ""
    """What to keep away from."""

    seed: Annotated[int, Ge(-1)] | None = None
    """The seed of the noise that the picture starts from; -1 draws another one each time, null takes the file's."""

    size: tuple[Side, Side] | None = None
    """Width and height in pixels; null goes by aspect_ratio."""

    aspect_ratio: Annotated[float, Ge(0.1), Le(10)] = 1.0
    """Width over height, at the area of the resolution's square."""

    random_caption: bool = False
    """Draw a caption of the data instead, another one each time."""


@dataclass(frozen=True, kw_only=True)
class SamplePrompts:
    """The keys of a .json file of prompts. A .txt file sets the prompts only, and leaves the rest at these defaults.

    The default draws every prompt at three guidance scales, as EveryDream2 does: 7 as people will use the
    model, 4, and 1.01, which shows what the model itself has learned.
    """

    resolution: Annotated[int, Ge(64), MultipleOf(8)] | None = None
    """The side of a square picture; null takes the training's."""

    seed: Annotated[int, Ge(-1)] | None = None
    """The seed of prompts without their own; null takes the training's, -1 draws another one each time."""

    cfgs: Annotated[tuple[Annotated[float, Ge(1)], ...], MinLen(1)] = (7.0, 4.0, 1.01)
    """Guidance scales, one column of the grid each; 1 is without guidance."""

    batch_size: Annotated[int, Ge(1)] | None = None
    """How many pictures are drawn at a time; null takes half the training's batch size."""

    scheduler: Scheduler = "ddim"
    """The sampler."""

    num_inference_steps: Annotated[int, Ge(1), Le(1000)] = 30
    """The sampler's steps."""

    show_progress_bars: bool = False
    """Show a bar for every batch of pictures, in a terminal."""

    generate_pretrain_samples: bool = True
    """Also draw before the first step, to compare with."""

    generate_samples_every_n_steps: Annotated[int, Ge(1)] | None = None
    """Draw every n optimizer steps; null takes sample_steps of the training."""

    samples: tuple[SamplePrompt, ...] | None = None
    """What to draw; null or an empty list takes four captions of the data."""


@dataclass(frozen=True)
class Samples:
    """The pictures of one step."""

    grid: Image.Image
    """All of them, with their captions."""

    rows: tuple[tuple[str, Image.Image], ...]
    """By TensorBoard tag, the pictures of each prompt."""

    problems: tuple[str, ...]
    """What went wrong, one sentence each; the grid shows the reason in the place of the picture."""

    def save(self, folder: Path, step: int, suffix: str = "") -> Path:
        """Write the grid as `gs00100.png`, or `gs00100-suffix.png`, into `folder`, which is made if missing, and return its path."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"gs{step:05d}{'-' * bool(suffix)}{suffix}.png"
        self.grid.save(path)
        return path


class Sampler:
    """Draw the same prompts from the same noise again and again, to watch a model learn.

    Every picture has its own generator on the CPU: no other random number of the run is used, so training is
    the same to the bit with and without samples, and a picture does not depend on what is drawn with it.

    Args:
        prompts: what to draw and how.
        resolution: the training's, for prompts that do not set it.
        seed: the run's.
        batch_size: the training's.
        captions: captions of the data, for random captions and where no prompts are given.
        clip_skip: as in training.
        pieces: windows of tokens that a prompt is encoded in, as in training.
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
        pieces: int = 1,
    ) -> None:
        self._options = prompts
        self._resolution = prompts.resolution or resolution
        self._run_seed = seed
        self._batch_size = prompts.batch_size or max(1, batch_size // 2)
        self._captions = tuple(captions)
        self._clip_skip = clip_skip
        self._pieces = pieces
        self.prompts: tuple[SamplePrompt, ...] = prompts.samples or tuple(
            SamplePrompt(prompt=text) for text in _four(self._captions)
        )
        self._cut_prompts: set[str] = set()

    def draw(
        self,
        unet: UNet2DConditionModel,
        text_encoder: CLIPTextModel,
        vae: AutoencoderKL,
        tokenizer: CLIPTokenizer,
        scheduler_config: Mapping[str, Any],
        *,
        step: int,
        device: torch.device,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        check: Callable[[], None] = lambda: None,
    ) -> Samples:
        """Draw all prompts with the networks as they are now.

        Args:
            unet: not wrapped for several processes; like the other networks on `device`, and left in the mode
            it is in.
            text_encoder: likewise.
            vae: likewise.
            tokenizer: of the text encoder.
            scheduler_config: the model's noise schedule and kind of prediction.
            step: shown on the grid; also picks random captions and seeds.
            device: where the networks are.
            autocast: the context in which the networks compute.
            check: called between the steps of a picture; raises, no Exception, to break off.
        """
        from trainer.evaluation.image_grid import labelled_row, tiled

        jobs, drawn, problems = self._draw(
            unet, text_encoder, vae, tokenizer, scheduler_config, step, device, autocast, check
        )
        several = len(self._options.cfgs) > 1
        labels = [f"cfg {cfg:g}" if several else "" for cfg in self._options.cfgs]
        rows = [
            labelled_row([drawn[job.place, cfg] for cfg in self._options.cfgs], labels, job.text)
            for job in jobs
        ]
        grid = tiled(rows, columns=1 if several else min(4, len(rows)), title=self._title(step))
        return Samples(
            grid, tuple((self._tag(job), row) for job, row in zip(jobs, rows, strict=True)), tuple(problems)
        )

    def pictures(
        self,
        unet: UNet2DConditionModel,
        text_encoder: CLIPTextModel,
        vae: AutoencoderKL,
        tokenizer: CLIPTokenizer,
        scheduler_config: Mapping[str, Any],
        *,
        device: torch.device,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> dict[tuple[int, float], Image.Image | str]:
        """Return what `draw` would put on a grid, by the prompt's place and the guidance scale; a reason in the place of a failed one."""
        return self._draw(
            unet, text_encoder, vae, tokenizer, scheduler_config, 0, device, autocast, lambda: None
        )[1]

    def largest(self) -> tuple[tuple[int, int], int]:
        """Return width and height of the largest pictures that are drawn together, and the rows of the UNet's batch for them."""
        batches = self._batches([self._job(place, prompt, 0) for place, prompt in enumerate(self.prompts)])
        batch = max(batches, key=lambda jobs: len(jobs) * jobs[0].width * jobs[0].height)
        return (batch[0].width, batch[0].height), len(batch) * (2 if max(self._options.cfgs) > 1 else 1)

    def _draw(
        self,
        unet: UNet2DConditionModel,
        text_encoder: CLIPTextModel,
        vae: AutoencoderKL,
        tokenizer: CLIPTokenizer,
        scheduler_config: Mapping[str, Any],
        step: int,
        device: torch.device,
        autocast: Callable[[], AbstractContextManager[Any]],
        check: Callable[[], None],
    ) -> tuple[list[_Job], dict[tuple[int, float], Image.Image | str], list[str]]:
        """Return what was asked for, the pictures of it by place and guidance scale, and what went wrong."""
        jobs = [self._job(place, prompt, step) for place, prompt in enumerate(self.prompts)]
        problems = self._cut(jobs, tokenizer)
        drawn: dict[tuple[int, float], Image.Image | str] = {}
        with _evaluating(unet, text_encoder, vae):
            pipeline = pipeline_of(
                unet, text_encoder, vae, tokenizer, self._options.scheduler, scheduler_config
            )
            # Without a terminal tqdm turns itself off where `disable` is None.
            pipeline.set_progress_bar_config(
                disable=None if self._options.show_progress_bars else True, leave=False
            )
            for cfg in self._options.cfgs:
                for batch in self._batches(jobs):
                    for job, picture in zip(
                        batch, self._survive(pipeline, batch, cfg, device, autocast, check), strict=True
                    ):
                        drawn[job.place, cfg] = picture
                        if isinstance(picture, str):
                            problems.append(
                                f"sample '{_short(job.text)}' at cfg {cfg:g} could not be drawn: {picture}"
                            )
        return jobs, drawn, problems

    def _job(self, place: int, prompt: SamplePrompt, step: int) -> _Job:
        from data.rng import stream

        text = prompt.prompt
        if prompt.random_caption and self._captions:
            text = self._captions[
                stream(self._run_seed, "sample caption", step, place).integers(len(self._captions))
            ]
        seeds = (prompt.seed, self._options.seed, self._run_seed)
        seed = next(seed for seed in seeds if seed is not None)
        if seed == -1:
            seed = int(stream(self._run_seed, "sample seed", step, place).integers(2**31))
        return _Job(
            place,
            text,
            prompt.negative_prompt,
            seed,
            *(prompt.size or _size(self._resolution, prompt.aspect_ratio)),
        )

    def _cut(self, jobs: Sequence[_Job], tokenizer: CLIPTokenizer) -> list[str]:
        """Say once of each prompt that is longer than the text encoder reads that its end is not seen."""
        from trainer.diffusion.conditioning import Tokenize

        tokenize = Tokenize(tokenizer, self._pieces)
        found = []
        for job in jobs:
            (tokens,) = tokenize.counts([job.text])
            if tokens > tokenize.limit and job.text not in self._cut_prompts:
                self._cut_prompts.add(job.text)
                found.append(
                    f"sample '{_short(job.text)}' has {tokens} tokens and the text encoder reads {tokenize.limit}: the rest is not drawn"
                )
        return found

    def _batches(self, jobs: Sequence[_Job]) -> Iterator[list[_Job]]:
        sizes: dict[tuple[int, int], list[_Job]] = {}
        for job in jobs:
            sizes.setdefault((job.width, job.height), []).append(job)
        for same in sizes.values():
            for start in range(0, len(same), self._batch_size):
                yield same[start : start + self._batch_size]

    def _survive(
        self,
        pipeline: StableDiffusionPipeline,
        batch: list[_Job],
        cfg: float,
        device: torch.device,
        autocast: Callable[[], Any],
        check: Callable[[], None],
    ) -> list[Image.Image | str]:
        """Draw a batch, and where that fails (most likely for memory) its pictures one by one; return a reason in a failed one's place."""
        import torch

        try:
            return self._pictures(pipeline, batch, cfg, device, autocast, check)
        except Exception as reason:  # whatever is wrong with a sample, hours of training are worth more
            sentence = " ".join(str(reason).split()) or type(reason).__name__
        if device.type == "cuda":
            torch.cuda.empty_cache()
        if len(batch) == 1:
            return [sentence]
        return [
            picture
            for job in batch
            for picture in self._survive(pipeline, [job], cfg, device, autocast, check)
        ]

    def _pictures(
        self,
        pipeline: StableDiffusionPipeline,
        batch: list[_Job],
        cfg: float,
        device: torch.device,
        autocast: Callable[[], Any],
        check: Callable[[], None],
    ) -> list[Image.Image | str]:
        import torch

        # Noise is drawn on the CPU whatever the device, so that a picture is the same everywhere.
        generators = [torch.Generator("cpu").manual_seed(job.seed) for job in batch]
        with torch.no_grad(), autocast():
            latents_BCHW = pipeline(
                prompt_embeds=self._context(pipeline, [job.text for job in batch], device),
                negative_prompt_embeds=self._context(pipeline, [job.negative for job in batch], device)
                if cfg > 1
                else None,
                width=batch[0].width,
                height=batch[0].height,
                guidance_scale=cfg,
                guidance_rescale=_GUIDANCE_RESCALE
                if pipeline.scheduler.config.get("rescale_betas_zero_snr")
                else 0.0,
                num_inference_steps=self._options.num_inference_steps,
                generator=generators,
                output_type="latent",
                return_dict=False,
                callback_on_step_end=lambda *_: check() or {},  # type: ignore[arg-type]  # it takes a dictionary back
            )[0]
            # One by one: decoding takes the most memory of all.
            return [_decode(pipeline.vae, latents_1CHW) for latents_1CHW in latents_BCHW.split(1)]

    def _context(self, pipeline: StableDiffusionPipeline, texts: list[str], device: torch.device) -> Tensor:
        from trainer.diffusion.conditioning import Tokenize, encode_text

        tokens_BT = Tokenize(pipeline.tokenizer, self._pieces)(texts)
        return encode_text(pipeline.text_encoder, tokens_BT.to(device), self._clip_skip)

    def _title(self, step: int) -> str:
        options = self._options
        cfg = f", cfg {options.cfgs[0]:g}" if len(options.cfgs) == 1 else ""
        return f"step {step} ({options.scheduler}, {options.num_inference_steps} steps{cfg})"

    def _tag(self, job: _Job) -> str:
        prompt = self.prompts[job.place]
        return f"sample_prompts/{job.place} {'random caption' if prompt.random_caption else _short(job.text)}"


@dataclass(frozen=True)
class _Job:
    """One picture to draw at each guidance scale."""

    place: int
    text: str
    negative: str
    seed: int
    width: int
    height: int


def _four(captions: Sequence[str]) -> list[str]:
    """Return up to four different captions, spread evenly; the empty prompt where there are none."""
    different = list(dict.fromkeys(caption for caption in captions if caption.strip()))
    count = min(4, len(different))
    return [different[place * len(different) // count] for place in range(count)] or [""]


def _size(resolution: int, aspect_ratio: float) -> tuple[int, int]:
    """Return width and height, multiples of 8, of about the area of the square."""
    width, height = resolution * math.sqrt(aspect_ratio), resolution / math.sqrt(aspect_ratio)
    return max(8, round(width / 8) * 8), max(8, round(height / 8) * 8)


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."


@contextmanager
def _evaluating(*networks: torch.nn.Module) -> Iterator[None]:
    """Put networks into evaluation mode and afterwards every one of their modules into the mode it was in."""
    modes = [(module, module.training) for network in networks for module in network.modules()]
    try:
        for network in networks:
            network.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


_GUIDANCE_RESCALE = 0.7
"""The share that arXiv 2305.08891 (section 3.4) uses: guidance overexposes where the first timestep is noise alone."""


def check_scheduler(prompts: SamplePrompts, scheduler_config: Mapping[str, Any]) -> None:
    """Refuse a sampler that does not know the model's noise schedule, or cannot be built from its settings.

    Raises:
        UserError: the schedule ends in noise alone, and the sampler would draw with another one; or the
        settings make no sense.
    """
    if scheduler_config.get("rescale_betas_zero_snr") and prompts.scheduler not in _rescaling():
        raise UserError(
            f"sample_prompts: scheduler {prompts.scheduler} does not know a noise schedule that ends in noise alone (zero-terminal SNR); "
            f"use one of {', '.join(_rescaling())}."
        )
    try:
        _sampler_of(prompts.scheduler, scheduler_config)
    except ImportError:  # scipy, which the file of prompts was already checked for
        return
    except Exception as error:  # diffusers raises what a wrong value happens to lead to
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"scheduler of the model: {prompts.scheduler} cannot sample with its settings ({reason}); download the model again, or name "
            "another scheduler in sample_prompts."
        ) from error


def _rescaling() -> list[str]:
    from diffusers import schedulers

    parameters = {
        name: inspect.signature(getattr(schedulers, kind).__init__).parameters
        for name, (kind, _) in _SCHEDULERS.items()
    }
    return [name for name, known in parameters.items() if "rescale_betas_zero_snr" in known]


_DPM, _KARRAS = "dpmsolver++", {"use_karras_sigmas": True}
_SCHEDULERS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "ddpm": ("DDPMScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "kdpm2": ("KDPM2DiscreteScheduler", {}),
    "dpm++": ("DPMSolverMultistepScheduler", {"algorithm_type": _DPM}),
    "dpm++_2s": ("DPMSolverSinglestepScheduler", {"algorithm_type": _DPM}),
    "dpm++_2m": ("DPMSolverMultistepScheduler", {"algorithm_type": _DPM}),
    "dpm++_sde": ("DPMSolverSinglestepScheduler", {"algorithm_type": f"sde-{_DPM}"}),
    "dpm++_2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": f"sde-{_DPM}"}),
    "dpm++_2s_k": ("DPMSolverSinglestepScheduler", {"algorithm_type": _DPM, **_KARRAS}),
    "dpm++_2m_k": ("DPMSolverMultistepScheduler", {"algorithm_type": _DPM, **_KARRAS}),
    "dpm++_sde_k": ("DPMSolverSinglestepScheduler", {"algorithm_type": f"sde-{_DPM}", **_KARRAS}),
    "dpm++_2m_sde_k": ("DPMSolverMultistepScheduler", {"algorithm_type": f"sde-{_DPM}", **_KARRAS}),
}
"""EveryDream2's names: diffusers' class and what it is given beside the model's own schedule."""


def pipeline_of(
    unet: Any, text_encoder: Any, vae: Any, tokenizer: Any, scheduler: Scheduler, config: Mapping[str, Any]
) -> StableDiffusionPipeline:
    """Return diffusers' pipeline of these networks with the sampler of that name; `config` is the model's own noise schedule."""
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=_sampler_of(scheduler, config),
        safety_checker=None,  # type: ignore[arg-type]
        feature_extractor=None,  # type: ignore[arg-type]
        requires_safety_checker=False,
    )


def _sampler_of(scheduler: Scheduler, config: Mapping[str, Any]) -> Any:
    from diffusers import schedulers

    kind, settings = _SCHEDULERS[scheduler]
    # Configurations written for PNDM lack clip_sample, and DDIM's default would clip latents, which reach far
    # beyond -1..1.
    settings = {"set_alpha_to_one": False, **config, "clip_sample": False, "thresholding": False, **settings}
    return getattr(schedulers, kind).from_config(settings)


def _decode(vae: Any, latents_1CHW: Tensor) -> Image.Image:
    from PIL import Image

    pixels_CHW = vae.decode(latents_1CHW.to(vae.dtype) / vae.config.scaling_factor, return_dict=False)[0][
        0
    ].float()
    if not pixels_CHW.isfinite().all():
        raise ArithmeticError("the picture holds values that are not finite (NaN)")
    bytes_HWC = ((pixels_CHW.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0)
    return Image.fromarray(bytes_HWC.cpu().numpy())
