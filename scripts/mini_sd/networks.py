"""The three networks and the schedule, in SD 1.5's own classes."""

# The libraries' decorators and exports hide their types.
# pyright: reportPrivateImportUsage=false, reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

from diffusers import AutoencoderKL, DDPMScheduler, PNDMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

WIDTH = 64
"""Width of the text encoder and of the UNet's cross-attention."""

LATENT_SIDE = 8

_SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "steps_offset": 1,
    "clip_sample": False,
}


def new_vae() -> AutoencoderKL:
    """Return an untrained autoencoder: (B, 3, 64, 64) in -1..1 to latents (B, 4, 8, 8)."""
    return AutoencoderKL(
        block_out_channels=(16, 16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=64,
        scaling_factor=1.0,
    )


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Return an untrained 12-layer text encoder; its token embeddings have deviation 0.1."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=12,
        num_attention_heads=4,
        max_position_embeddings=77,
        hidden_act="quick_gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = CLIPTextModel(config)
    model.get_input_embeddings().weight.data.normal_(std=0.1)
    return model


def new_unet() -> UNet2DConditionModel:
    """Return an untrained UNet over latents (B, 4, 8, 8) and context (B, tokens, 64)."""
    return UNet2DConditionModel(
        sample_size=LATENT_SIDE,
        in_channels=4,
        out_channels=4,
        block_out_channels=(64, 128),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def training_schedule() -> DDPMScheduler:
    """Return the noise schedule for training."""
    return DDPMScheduler(**_SCHEDULE)


def sampling_schedule() -> PNDMScheduler:
    """Return the folder's scheduler."""
    settings = {k: v for k, v in _SCHEDULE.items() if k != "clip_sample"}
    return PNDMScheduler(**settings, skip_prk_steps=True, set_alpha_to_one=False)
