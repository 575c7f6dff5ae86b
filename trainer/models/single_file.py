"""The original (LDM) layout of a checkpoint: the tensors of the diffusers networks under other names.

In the original layout the UNet is one list of input blocks, a middle block and one list of output blocks, and
the position of an attention or an upsampler depends on what stands before it. The names are therefore derived
from the network's configuration (levels, layers per block, which levels have attention), so that any size
converts, not only SD 1.5's four levels of two.

    diffusers                                 original
    unet   down_blocks.1.resnets.0.conv1      model.diffusion_model.input_blocks.4.0.in_layers.2
    vae    decoder.up_blocks.0.resnets.1      first_stage_model.decoder.up.3.block.1
    text   encoder.layers.0.mlp.fc1           cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1
           of SD 2.x                          cond_stage_model.model.transformer.resblocks.0.mlp.c_fc

Nothing but names changes, and the shape of the VAE's attention weights: linear (o, i) here, 1x1 convolutions
(o, i, 1, 1) there. The text encoder of SD 2.x is OpenCLIP's, which has the projections to queries, keys and
values in one tensor, in this order.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from trainer.models.family import SD1, TextReader, family_of

if TYPE_CHECKING:
    from trainer.models.pipeline import Models

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."

POSITION_IDS = SD1.text.prefix + "embeddings.position_ids"
"""Not a weight, but part of every original file of SD 1.x: the numbers 0 to 76."""

NETWORKS = ("unet", "vae", "text_encoder")

Modules = dict[str, str]
"""A module's name in diffusers, and its name in the original layout."""

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_RESNET = {"conv_shortcut": "nin_shortcut"}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OPEN_CLIP = {
    "embeddings.token_embedding": "token_embedding",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm": "ln_final",
}
_OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_THIRDS = {"self_attn.q_proj": 0, "self_attn.k_proj": 1, "self_attn.v_proj": 2}


@dataclass(frozen=True)
class Place:
    """A tensor of the original layout, or a third of one."""

    name: str
    shape: tuple[int, ...]
    third: int | None = None
    """Third of the tensor's rows, from 0; None for all."""

    def take(self, tensor: Tensor) -> Tensor:
        """Return the tensor's part in fp32; a third is copied, so that the whole can be freed."""
        if self.third is None:
            return tensor.float()
        return tensor.chunk(3)[self.third].to(torch.float32, copy=True)


class Shaped(Protocol):
    """A tensor, or its shape before it is read."""

    @property
    def shape(self) -> Any:
        """The sizes."""


def to_original(models: Models) -> dict[str, Tensor]:
    """Return all weights under their original names; only tensors joined from thirds are copied."""
    return {name: join(parts) for name, parts in original_parts(models).items()}


def join(parts: list[Tensor]) -> Tensor:
    """Return a tensor of the original layout, copied only if it has several parts."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def original_parts(models: Models) -> dict[str, list[Tensor]]:
    """Return the parts, mostly one, that each original tensor is joined from. No weight is copied."""
    found: dict[str, dict[int, Tensor]] = {}
    for network in NETWORKS:
        weights = _weights(getattr(models, network))
        places = layout(network, getattr(models, network).config, weights)
        for key, tensor in weights.items():
            place = places[key]
            whole = tensor.detach() if place.third is not None else tensor.detach().reshape(place.shape)
            found.setdefault(place.name, {})[place.third or 0] = whole
    parts = {name: [thirds[third] for third in sorted(thirds)] for name, thirds in found.items()}
    if any(name.startswith(SD1.text.prefix) for name in parts):
        parts[POSITION_IDS] = [torch.arange(models.text_encoder.config.max_position_embeddings).unsqueeze(0)]
    return parts


def from_original(
    tensors: Mapping[str, Tensor],
    network: str,
    empty: Any,
    prefix: str | None = None,
    reader: TextReader | None = None,
) -> dict[str, Tensor]:
    """Return one network's weights in fp32 under their diffusers names; no other tensor is read.

    `tensors` may be a lazy mapping over a file, which then holds one tensor at a time; `empty` may be on the
    meta device; `prefix` and `reader` are as in `layout`.
    """
    shapes = _weights(empty)
    return {
        key: place.take(tensors[place.name]).reshape(shapes[key].shape)
        for key, place in layout(network, empty.config, shapes, prefix=prefix, reader=reader).items()
    }


def layout(
    network: str,
    config: Any,
    weights: Mapping[str, Shaped],
    *,
    prefix: str | None = None,
    reader: TextReader | None = None,
) -> dict[str, Place]:
    """Return where each of a network's tensors stands in the original layout, by diffusers names.

    `prefix` of UNet or VAE, and the names of the text encoder's `reader`, replace the original layout's.

    Raises:
        ValueError: the network has a part that the original layout has no name for.
    """
    if network == "text_encoder":
        reader = reader or family_of(config.hidden_size).text
        named = _TEXT_NAMES[reader.names]
        return {
            key: named(reader.prefix, key.removeprefix("text_model."), tuple(tensor.shape))
            for key, tensor in weights.items()
        }
    modules = unet_modules(config) if network == "unet" else vae_modules(config)
    start = {"unet": UNET_PREFIX, "vae": VAE_PREFIX}[network] if prefix is None else prefix
    places = {}
    for key, tensor in weights.items():
        shape = tuple(tensor.shape)
        convolution = network == "vae" and ".attentions." in key and len(shape) == 2
        places[key] = Place(start + _renamed(key, modules), (*shape, 1, 1) if convolution else shape)
    return places


def unet_modules(config: Any) -> Modules:
    """Return the original name of each module of a UNet2DConditionModel."""
    down, up = config["down_block_types"], config["up_block_types"]
    levels = len(down)
    layers = config["layers_per_block"]
    layers = [layers] * levels if isinstance(layers, int) else list(layers)
    names = {
        "conv_in": "input_blocks.0.0",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
        "mid_block.attentions.0": "middle_block.1",
        **_resnet("mid_block.resnets.0", "middle_block.0"),
        **_resnet("mid_block.resnets.1", "middle_block.2"),
    }
    block = 1
    for level in range(levels):
        for layer in range(layers[level]):
            names |= _resnet(f"down_blocks.{level}.resnets.{layer}", f"input_blocks.{block}.0")
            names[f"down_blocks.{level}.attentions.{layer}"] = f"input_blocks.{block}.1"
            block += 1
        if level < levels - 1:
            names[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{block}.0.op"
            block += 1
    block = 0
    for level in range(levels):
        attention = up[level].startswith("CrossAttn")
        for layer in range(layers[levels - 1 - level] + 1):
            names |= _resnet(f"up_blocks.{level}.resnets.{layer}", f"output_blocks.{block}.0")
            names[f"up_blocks.{level}.attentions.{layer}"] = f"output_blocks.{block}.1"
            block += 1
        if level < levels - 1:  # the upsampler comes last in the level's last block, after any attention
            original = f"output_blocks.{block - 1}.{2 if attention else 1}.conv"
            names[f"up_blocks.{level}.upsamplers.0.conv"] = original
    return names


def vae_modules(config: Any) -> Modules:
    """Map each module of an AutoencoderKL to its LDM name; LDM counts decoder levels from the fine end."""
    levels = len(config["block_out_channels"])
    layers = config["layers_per_block"]
    names = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    for half in ("encoder", "decoder"):
        names |= {
            f"{half}.conv_in": f"{half}.conv_in",
            f"{half}.conv_norm_out": f"{half}.norm_out",
            f"{half}.conv_out": f"{half}.conv_out",
            **_vae_resnet(f"{half}.mid_block.resnets.0", f"{half}.mid.block_1"),
            **_vae_resnet(f"{half}.mid_block.resnets.1", f"{half}.mid.block_2"),
        }
        for ours, theirs in _VAE_ATTENTION.items():
            names[f"{half}.mid_block.attentions.0.{ours}"] = f"{half}.mid.attn_1.{theirs}"
    for level in range(levels):
        ours, fine = f"blocks.{level}", levels - 1 - level
        for layer in range(layers):
            names |= _vae_resnet(
                f"encoder.down_{ours}.resnets.{layer}", f"encoder.down.{level}.block.{layer}"
            )
        for layer in range(layers + 1):
            names |= _vae_resnet(f"decoder.up_{ours}.resnets.{layer}", f"decoder.up.{fine}.block.{layer}")
        names[f"encoder.down_{ours}.downsamplers.0.conv"] = f"encoder.down.{level}.downsample.conv"
        names[f"decoder.up_{ours}.upsamplers.0.conv"] = f"decoder.up.{fine}.upsample.conv"
    return names


def _open_clip(prefix: str, key: str, shape: tuple[int, ...]) -> Place:
    """Return the place of a text encoder's tensor among OpenCLIP's."""
    match = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", key)
    if match is None:
        return Place(prefix + _renamed(key, _OPEN_CLIP), shape)
    number, module, kind = match.groups()
    start = f"{prefix}transformer.resblocks.{number}."
    if module in _THIRDS:
        return Place(f"{start}attn.in_proj_{kind}", (3 * shape[0], *shape[1:]), _THIRDS[module])
    return Place(f"{start}{_renamed(module, _OPEN_CLIP_LAYER)}.{kind}", shape)


_TEXT_NAMES: Mapping[str, Callable[[str, str, tuple[int, ...]], Place]] = {
    "clip": lambda prefix, key, shape: Place(prefix + key, shape),
    "open_clip": _open_clip,
}


def _resnet(ours: str, theirs: str) -> Modules:
    return {f"{ours}.{inner}": f"{theirs}.{name}" for inner, name in _RESNET.items()}


def _vae_resnet(ours: str, theirs: str) -> Modules:
    return {ours: theirs, **{f"{ours}.{inner}": f"{theirs}.{name}" for inner, name in _VAE_RESNET.items()}}


def _renamed(key: str, modules: Modules) -> str:
    """Replace the longest part of `key`, counted in whole words from the left, that names a module."""
    words = key.split(".")
    for count in range(len(words), 0, -1):
        name = modules.get(".".join(words[:count]))
        if name is not None:
            return ".".join([name, *words[count:]])
    raise ValueError(f"the original Stable Diffusion layout has no name for {key}")


def _weights(network: nn.Module) -> dict[str, Tensor]:
    """Return the saved tensors of a network, without the position ids that older transformers save."""
    return {key: tensor for key, tensor in network.state_dict().items() if not key.endswith("position_ids")}
