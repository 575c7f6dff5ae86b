"""A training loop as one writes it with accelerate and diffusers, to compare with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from trainer.config import TrainConfig


class _Examples(torch.utils.data.Dataset[Any]):
    """Images and token ids, read as in diffusers' examples."""

    def __init__(self, folder: Path, side: int, tokenizer: Any) -> None:
        self.paths = sorted(path for path in folder.rglob("*") if path.suffix in (".png", ".jpg"))
        self.side = side
        self.tokenizer = tokenizer

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        import numpy as np
        from PIL import Image, ImageOps

        path = self.paths[number]
        with Image.open(path) as opened:
            image = ImageOps.fit(opened.convert("RGB"), (self.side, self.side), Image.Resampling.LANCZOS)
        pixels_CHW = torch.from_numpy(np.asarray(image, dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1
        caption = path.with_suffix(".txt").read_text()
        length = self.tokenizer.model_max_length
        tokens_T = self.tokenizer(
            caption, max_length=length, padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids[0]
        return {"pixels": pixels_CHW, "tokens": tokens_T}


def plain_loop(
    config: TrainConfig, build: Callable[[list[torch.nn.Parameter]], Optimizer]
) -> Callable[[], int]:
    """Return a function that trains an epoch and returns its images: no caption dropout, cache or log."""
    from accelerate import Accelerator
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
    from tqdm import tqdm

    from trainer.models.load import load_models
    from trainer.models.trainable import apply_freezing

    models = load_models(config.model)
    apply_freezing(models, config.parts, config.optimizers.freezing)
    networks: tuple[Any, Any] = (models.unet, models.text_encoder)
    trained = [each for network in networks for each in network.parameters() if each.requires_grad]
    folder, side = Path(str(config.data.data_root)), max(config.data.resolutions)
    examples = _Examples(folder, side, models.tokenizer)
    loader = torch.utils.data.DataLoader(examples, batch_size=config.data.batch_size, shuffle=True)
    accelerator = Accelerator(mixed_precision="no")
    unet, text_encoder, optimizer, loader = accelerator.prepare(*networks, build(trained), loader)
    vae: Any = models.vae
    vae.to(accelerator.device)
    scheduler: Any = DDPMScheduler.from_config(models.scheduler_config)

    def train() -> int:
        images = 0
        for batch in tqdm(loader, disable=True):
            with torch.no_grad():
                latents_BCHW = vae.encode(batch["pixels"]).latent_dist.sample() * vae.config.scaling_factor
            noise_BCHW, device = torch.randn_like(latents_BCHW), latents_BCHW.device
            t_B = torch.randint(0, scheduler.config.num_train_timesteps, (len(latents_BCHW),), device=device)
            noisy_BCHW = scheduler.add_noise(latents_BCHW, noise_BCHW, t_B)
            context_BTD = text_encoder(batch["tokens"])[0]
            prediction_BCHW = unet(noisy_BCHW, t_B, context_BTD).sample
            loss = torch.nn.functional.mse_loss(prediction_BCHW.float(), noise_BCHW.float())
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            accelerator.gather(loss.detach()).mean().item()  # type: ignore[union-attr]
            images += len(t_B)
        return images

    return train
