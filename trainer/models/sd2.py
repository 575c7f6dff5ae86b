"""Stable Diffusion 2.x's configurations, as published with SD 2.1; a single file lacks them.

They are those of the model of 768 px, which predicts velocity. The VAE is that of SD 1.5.
"""

from __future__ import annotations

from typing import Any

from trainer.models import sd15

UNET: dict[str, Any] = {
    **sd15.UNET,
    "sample_size": 96,
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
    "upcast_attention": True,
}

VAE: dict[str, Any] = {**sd15.VAE, "sample_size": 768}

TEXT_ENCODER: dict[str, Any] = {
    **sd15.TEXT_ENCODER,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "projection_dim": 512,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
}
"""OpenCLIP's ViT-H without its last layer, which SD 2.x does not use."""

SCHEDULER: dict[str, Any] = {
    **{name: value for name, value in sd15.SCHEDULER.items() if name != "skip_prk_steps"},
    "_class_name": "DDIMScheduler",
    "prediction_type": "v_prediction",
}

PARAMETERS = {"unet": 865_910_724, "text_encoder": 340_387_840, "vae": 83_653_863}
"""Parameters of each network, for checking."""
