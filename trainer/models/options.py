"""The options of models and of what is trained of them; imports nothing slow."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Lt

BASE_FILE = "base.json"
"""Beside LoRA adapters in a checkpoint: the model that they belong to."""


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The model to train."""

    resume_ckpt: str
    """The model to start from: a diffusers folder, a hub id such as
    stable-diffusion-v1-5/stable-diffusion-v1-5, a .safetensors or .ckpt file in the original layout, a run
    folder or a checkpoint folder of this program, or findlast. base_model is another name of this key."""

    revision: str | None = None
    """Commit, tag or branch of a model on the hub; null is its main branch. A run records the commit and
    is resumed with it."""

    vae: str | None = None
    """A VAE to use instead of the model's own: a diffusers folder, a hub id or a .safetensors file."""

    vae_revision: str | None = None
    """The commit, tag or branch of a vae on the hub, recorded and resumed like revision."""


@dataclass(frozen=True, kw_only=True)
class LoraOptions:
    """Size and targets of LoRA adapters."""

    rank: Annotated[int, Ge(1)] = 16
    """Rank of the adapter weights."""

    alpha: Annotated[float, Gt(0)] | None = None
    """Adapters are scaled by alpha / rank; null is the rank, which leaves them unscaled."""

    targets: Literal["attention", "all"] = "attention"
    """Adapted layers: the four of each attention, or all linear layers and convolutions in the blocks of
    UNet and text encoder."""

    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Probability of dropping each input of an adapter in training, against overfitting. It is drawn for each
    batch, so unlike all else it depends on batch_size and the number of processes."""

    dora: bool = False
    """Train the length of each adapted weight beside its direction (DoRA): more time and memory a step. Needs
    save_format diffusers, since web UIs compute lengths in another way."""

    @property
    def strength(self) -> float:
        """Alpha, its default applied."""
        return float(self.rank if self.alpha is None else self.alpha)


@dataclass(frozen=True, kw_only=True)
class TrainableOptions:
    """Trained networks, and the memory of their passes."""

    disable_textenc_training: bool = False
    """Freeze the whole text encoder."""

    stop_textenc_after_n_epochs: Annotated[float, Gt(0)] | None = None
    """Freeze the text encoder after this many epochs, such as 2 or 0.5: it loses its optimizer, and captions
    are encoded once if latents are cached. null trains it to the end."""

    disable_unet_training: bool = False
    """Freeze the whole UNet."""

    lora: LoraOptions | None = None
    """Train a LoRA, adapter weights of the layers, and leave the model as it is; {} takes every default,
    null trains the model itself."""

    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: much less memory for one more forward pass a step."""

    attn_type: Literal["sdp", "slice", "xformers"] = "sdp"
    """Attention: sdp is torch's fused attention, slice computes it in slices with less memory; xformers
    is replaced by sdp."""

    compile: bool = False
    """Run the training passes of trained networks through torch.compile: faster steps for some minutes of
    compiling whenever a size of images or of a batch comes up for the first time. Samples and fixed-noise
    losses run without."""

    @property
    def trains_adapters(self) -> bool:
        """True if LoRA adapters are trained instead of the networks."""
        return self.lora is not None

    @property
    def adapter_dropout(self) -> float:
        """Dropout of the adapters' inputs; 0 without adapters."""
        return 0.0 if self.lora is None else self.lora.dropout

    def with_adapters(self) -> TrainableOptions:
        """Return these options with a LoRA of default size."""
        return replace(self, lora=LoraOptions())


@dataclass(frozen=True, kw_only=True)
class FreezingOptions:
    """Frozen layers of the text encoder (`text_encoder_freezing` of the optimizer file)."""

    freeze_front_n_layers: int | None = None
    """Freeze the first n layers; a negative -k trains only the last k."""

    unfreeze_last_n_layers: Annotated[int, Ge(0)] | None = None
    """Train only the last n layers; wins over freeze_front_n_layers."""

    freeze_embeddings: bool | None = None
    """Freeze the token and position embeddings; null follows the layers: frozen as soon as any layer is."""

    freeze_final_layer_norm: bool = False
    """Freeze the layer norm after the last layer."""


@dataclass(frozen=True, kw_only=True)
class EmaOptions:
    """EMA weights: the exponential moving average of trained weights."""

    ema_decay_rate: Annotated[float, Gt(0), Lt(1)] | None = None
    """Keep EMA weights, exported beside the trained ones with -ema in their name: the share of them that
    stays at every update; null keeps none."""

    ema_strength_target: Annotated[float, Gt(0), Lt(1)] | None = None
    """The same, with the decay chosen so that this share of the initial weights remains in the EMA weights at
    the run's end."""

    ema_update_interval: Annotated[int, Ge(1)] = 500
    """Optimizer steps between two updates of the EMA weights."""

    ema_device: Literal["cpu", "cuda"] = "cpu"
    """Device of the EMA weights, kept in fp32: main memory, or with cuda the training device."""

    ema_sample_ema_model: bool = False
    """Draw samples from the EMA weights instead of the trained ones."""

    ema_sample_nonema_model: bool = False
    """With ema_sample_ema_model, draw them from the trained weights too."""

    ema_resume_model: str | None = None
    """A model to start the EMA weights from instead of the one that is trained: a diffusers folder, a hub id
    or a single file. A resumed run brings its own."""

    ema_resume_revision: str | None = None
    """The commit, tag or branch of an ema_resume_model on the hub, recorded like revision."""

    @property
    def active(self) -> bool:
        """True if EMA weights are kept."""
        return self.ema_decay_rate is not None or self.ema_strength_target is not None
