"""Images from a Stable Diffusion folder for the judge: DDIM, one seed an image."""

# The libraries' decorators and exports hide their types.
# pyright: reportPrivateImportUsage=false, reportAttributeAccessIssue=false, reportReturnType=false

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image

from .drawing import to_array


class Generator:
    """A pipeline as a function of prompts and a seed."""

    def __init__(
        self, model: Path | StableDiffusionPipeline, steps: int = 20, guidance: float = 3.0, batch: int = 20
    ) -> None:
        """Load a folder as float32 (offline), or take a loaded pipeline."""
        if isinstance(model, Path):
            options: dict[str, Any] = {"dtype": torch.float32, "local_files_only": True}
            model = StableDiffusionPipeline.from_pretrained(model, **options)
        self.pipeline = model
        self._schedule = DDIMScheduler.from_config(model.scheduler.config, clip_sample=False)
        self._steps, self._guidance, self._batch = steps, guidance, batch

    def __call__(self, prompts: list[str], seed: int = 0) -> list[Image.Image]:
        """Return one image a prompt; image i starts from the noise of seed `1000 * seed + i`."""
        images: list[Image.Image] = []
        kept, self.pipeline.scheduler = self.pipeline.scheduler, self._schedule
        self.pipeline.set_progress_bar_config(disable=True)
        for i in range(0, len(prompts), self._batch):
            part = prompts[i : i + self._batch]
            noise = [torch.Generator().manual_seed(1000 * seed + i + k) for k in range(len(part))]
            output = self.pipeline(
                part, num_inference_steps=self._steps, guidance_scale=self._guidance, generator=noise
            )
            images += output.images
        self.pipeline.scheduler = kept
        return images

    def reconstruct(self, images: list[Image.Image]) -> list[Image.Image]:
        """Return the images (64 x 64) after a pass through the pipeline's autoencoder."""
        with torch.no_grad():
            posterior = self.pipeline.vae.encode(torch.from_numpy(to_array(images))).latent_dist
            restored_BCHW = self.pipeline.vae.decode(posterior.mode()).sample
        return self.pipeline.image_processor.postprocess(restored_BCHW, output_type="pil")
