"""The families of models, Stable Diffusion 1.x and 2.x, as one record each.

Nothing outside `trainer/models` compares families: other modules read a field of `Models.family`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from trainer.models import sd2, sd15

OPENRAIL = "creativeml-openrail-m"
"""The hub's name of Stable Diffusion 1's licence."""

PARTS = {
    "unet": ("diffusers", "UNet2DConditionModel"),
    "vae": ("diffusers", "AutoencoderKL"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
}
"""Library and class of each part of a pipeline; the same in both families."""


@dataclass(frozen=True, kw_only=True)
class Configs:
    """Configurations of networks and noise schedule, as in the config.json files of a diffusers folder."""

    unet: Mapping[str, Any]
    text_encoder: Mapping[str, Any]
    vae: Mapping[str, Any]
    scheduler: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class TextReader:
    """A text encoder and its tokenizer."""

    width: int
    """Width of the hidden states, by which a model's family is known; other programs do the same."""
    prefix: str
    """Start of its tensors' names in a single file."""
    names: Literal["clip", "open_clip"]
    """The program that named its tensors in a single file."""
    pad: str
    """The tokenizer's padding."""
    lora_prefix: str = "lora_te"
    """Start of its layers' names in kohya's files."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family of models."""

    name: str
    text: TextReader
    prediction: str
    """The prediction type of a single file that names none."""
    ambiguous: bool = False
    """True if nothing in a file's tensors supports that assumption."""
    configs: Mapping[str, Configs]
    """Configurations, which a single file lacks, by prediction type."""
    architectures: Mapping[str, str]
    """The ModelSpec standard's names, by prediction type."""
    epsilon_steps: tuple[int, ...] = ()
    """Values of `global_step` in a .ckpt that is known to predict noise."""
    pipeline: str = "StableDiffusionPipeline"
    """The class of diffusers' pipeline."""
    parts: Mapping[str, tuple[str, str]] = field(default_factory=lambda: PARTS)
    kohya_version: str
    """kohya's name of the base model, without "_v" for v-prediction."""
    kohya_v2: bool
    licences: Mapping[str, str] = field(default_factory=dict)
    """Licences of well-known models, by hub id."""

    @property
    def default(self) -> Configs:
        """The configurations of a single file that names no prediction type."""
        return self.configs[self.prediction]


_SD15 = Configs(unet=sd15.UNET, text_encoder=sd15.TEXT_ENCODER, vae=sd15.VAE, scheduler=sd15.SCHEDULER)
_SD2 = Configs(unet=sd2.UNET, text_encoder=sd2.TEXT_ENCODER, vae=sd2.VAE, scheduler=sd2.SCHEDULER)

SD1 = Family(
    name="Stable Diffusion 1.x",
    text=TextReader(
        width=768, prefix="cond_stage_model.transformer.text_model.", names="clip", pad="<|endoftext|>"
    ),
    prediction="epsilon",
    configs={
        "epsilon": _SD15,
        "v_prediction": replace(_SD15, scheduler={**sd15.SCHEDULER, "prediction_type": "v_prediction"}),
    },
    architectures=dict.fromkeys(("epsilon", "v_prediction"), "stable-diffusion-v1"),
    kohya_version="sd_v1",
    kohya_v2=False,
    licences=dict.fromkeys(
        (
            "stable-diffusion-v1-5/stable-diffusion-v1-5",
            "runwayml/stable-diffusion-v1-5",
            "sd-legacy/stable-diffusion-v1-5",
            *(f"CompVis/stable-diffusion-v1-{version}" for version in (1, 2, 3, 4)),
        ),
        OPENRAIL,
    ),
)

SD2 = Family(
    name="Stable Diffusion 2.x",
    # Padded with entry 0, as OpenCLIP was trained.
    text=TextReader(width=1024, prefix="cond_stage_model.model.", names="open_clip", pad="!"),
    prediction="v_prediction",
    ambiguous=True,
    configs={
        "v_prediction": _SD2,
        "epsilon": replace(
            _SD2,
            unet={**sd2.UNET, "sample_size": 64},
            vae={**sd2.VAE, "sample_size": 512},
            scheduler=sd15.SCHEDULER,
        ),
    },
    architectures={"epsilon": "stable-diffusion-v2-512", "v_prediction": "stable-diffusion-v2-768-v"},
    epsilon_steps=(875_000,),  # SD 2.0 at 512 px; diffusers recognizes it in the same way
    kohya_version="sd_v2",
    kohya_v2=True,
)

FAMILIES = (SD1, SD2)


def family_of(text_width: object) -> Family:
    """Return the family whose text has this width; for other widths, as of the bundled model, the first."""
    return next((family for family in FAMILIES if family.text.width == text_width), FAMILIES[0])


def licence_of(hub_id: str) -> str | None:
    """Return the hub's name of a well-known model's licence, or None."""
    return next((family.licences[hub_id] for family in FAMILIES if hub_id in family.licences), None)
