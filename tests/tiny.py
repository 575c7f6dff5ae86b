"""Stable Diffusion models of a few ten thousand parameters, built in code from SD 1.5's own classes.

`tiny_models()` returns them in memory; `write_tiny_folder(path)` writes them as a diffusers folder with
diffusers' own writer, so that loading is tested against something this project did not write. Both depend on
the seed alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from trainer.models.family import SD2
from trainer.models.pipeline import Models
from trainer.models.quiet import quiet_libraries

quiet_libraries()

from diffusers import StableDiffusionPipeline  # noqa: E402
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL  # noqa: E402
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel  # noqa: E402
from diffusers.schedulers.scheduling_pndm import PNDMScheduler  # noqa: E402

Shape = Literal["small", "mini", "sd15", "sd2"]
"""small: two levels of one layer, the lower without attention; mini: two levels of one layer, both with
attention (the bundled model's arrangement); sd15: four levels of two layers, the lowest without attention
(SD 1.5's arrangement); sd2: the same with what is SD 2.x's: linear projections, a number of heads for each
level, a GELU in the text encoder, v-prediction and text 1024 wide, by which a file of it is known: hence 9
million parameters."""

CONTEXT_WIDTH = 16
TEXT_LAYERS = 4

_WORDS = ("a", "an", "the", "red", "blue", "circle", "square", "photo", "of", "on", "background")


def tiny_models(seed: int = 0, shape: Shape = "small") -> Models:
    """Return untrained fp32 networks: 64 px images, latents (B, 4, 8, 8), context (B, 77, 16), 4 layers.

    The shape "sd2" has context (B, 77, 1024) and 2 text layers.
    """
    tokenizer = tiny_tokenizer()
    velocity: dict[str, Any] = {"prediction_type": "v_prediction"} if shape == "sd2" else {}
    if shape == "sd2":
        tokenizer.pad_token = "!"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Models(
            unet=_unet(shape),
            text_encoder=_text_encoder(tokenizer, shape),
            vae=_vae(2 if shape in ("sd15", "sd2") else 1),
            tokenizer=tokenizer,
            scheduler_config={"_class_name": "PNDMScheduler", **tiny_scheduler().config, **velocity},
            source=f"tiny ({shape}, seed {seed})",
        )


def write_tiny_folder(
    path: Path,
    seed: int = 0,
    shape: Shape = "small",
    dtype: torch.dtype = torch.float32,
    variant: str | None = None,
) -> Path:
    """Write `tiny_models(seed, shape)` as a diffusers folder in `dtype` and return the folder."""
    models = tiny_models(seed, shape)
    parts: dict[str, Any] = {
        "unet": torch.nn.Module.to(models.unet, dtype),
        "text_encoder": torch.nn.Module.to(models.text_encoder, dtype),
        "vae": torch.nn.Module.to(models.vae, dtype),
        "tokenizer": models.tokenizer,
        "scheduler": PNDMScheduler.from_config(models.scheduler_config),
        "safety_checker": None,
        "feature_extractor": None,
    }
    pipeline = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    pipeline.save_pretrained(path, variant=variant)
    return path


def write_parts_beside(folder: Path) -> torch.nn.Module:
    """Give a pipeline's folder a safety checker, its image processor and a part foreign to SD 1.x."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    size = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "projection_dim": 8,
    }
    config = CLIPConfig(
        vision_config={**size, "image_size": 32, "patch_size": 32}, text_config=size, projection_dim=8
    )
    checker = StableDiffusionSafetyChecker(config)
    checker.save_pretrained(folder / "safety_checker")
    torch.save(
        checker.state_dict(), folder / "safety_checker" / "pytorch_model.bin"
    )  # the same again, in the older form
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder / "feature_extractor")
    (folder / "watermark").mkdir()
    (folder / "watermark" / "mark.txt").write_text("someone's")
    index = json.loads((folder / "model_index.json").read_text())
    index |= {
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "feature_extractor": ["transformers", "CLIPFeatureExtractor"],
        "watermark": ["someone", "Watermark"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return checker


def tiny_tokenizer() -> CLIPTokenizer:
    """Return a CLIP tokenizer of all bytes and the whole words `_WORDS`; every text can be tokenized."""
    alphabet = sorted(ByteLevel.alphabet())
    merges: list[tuple[str, str]] = []
    for word in _WORDS:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            pair = (pieces[0], pieces[1])
            if pair not in merges:
                merges.append(pair)
            pieces[:2] = ["".join(pair)]
    pieces = [*alphabet, *(c + "</w>" for c in alphabet), *dict.fromkeys("".join(pair) for pair in merges)]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    arguments: dict[str, Any] = {"vocab": {piece: i for i, piece in enumerate(pieces)}, "merges": merges}
    return CLIPTokenizer(**arguments, model_max_length=77)


def tiny_scheduler() -> PNDMScheduler:
    """Return SD 1.5's scheduler."""
    return PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        num_train_timesteps=1000,
        prediction_type="epsilon",
        skip_prk_steps=True,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def _unet(shape: Shape) -> UNet2DConditionModel:
    arrangement: dict[str, Any] = {
        "small": {
            "block_out_channels": (8, 16),
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "layers_per_block": 1,
        },
        "mini": {
            "block_out_channels": (8, 16),
            "down_block_types": ("CrossAttnDownBlock2D",) * 2,
            "up_block_types": ("CrossAttnUpBlock2D",) * 2,
            "layers_per_block": 1,
        },
        "sd15": {
            "block_out_channels": (4, 8, 8, 8),
            "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
            "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
            "layers_per_block": 2,
        },
    }["sd15" if shape == "sd2" else shape]
    if shape == "sd2":
        arrangement |= {
            "cross_attention_dim": SD2.text.width,
            "attention_head_dim": (1, 2, 4, 4),
            "use_linear_projection": True,
        }
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        norm_num_groups=2,
        **{"cross_attention_dim": CONTEXT_WIDTH, "attention_head_dim": 2, **arrangement},
    )


def _text_encoder(tokenizer: CLIPTokenizer, shape: Shape) -> CLIPTextModel:
    config: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": CONTEXT_WIDTH,
        "intermediate_size": 2 * CONTEXT_WIDTH,
        "projection_dim": CONTEXT_WIDTH,
        "num_hidden_layers": TEXT_LAYERS,
        "num_attention_heads": 2,
        "max_position_embeddings": 77,
        "hidden_act": "quick_gelu",
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if shape == "sd2":
        config |= {
            "hidden_size": SD2.text.width,
            "intermediate_size": 8,
            "num_hidden_layers": 2,
            "hidden_act": "gelu",
        }
    return CLIPTextModel(CLIPTextConfig(**config))


def _vae(layers_per_block: int) -> AutoencoderKL:
    config: dict[str, Any] = {
        "block_out_channels": (4, 4, 8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": layers_per_block,
        "latent_channels": 4,
        "norm_num_groups": 2,
        "sample_size": 64,
        "scaling_factor": 0.18215,
    }
    return AutoencoderKL(**config)
