"""Contenders of the optimizer benchmarks, and the parameters that they update."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from typing import TYPE_CHECKING, Any

from scripts.full_size import BUNDLED

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.optim import Optimizer

Build = Callable[["list[nn.Parameter]"], "Optimizer"]

BASE = "adamw"
NETWORKS = ("unet", "text_encoder", "both", "mini", "lora")
"""Stable Diffusion 1.5's UNet, text encoder and both; the bundled UNet, and a LoRA of rank 16 for it."""


def shapes(network: str) -> list[torch.Size]:
    """Return the shapes of all trained parameters, in order, without weights."""
    import torch

    from trainer.models.family import SD1
    from trainer.models.load import describe
    from trainer.models.lora import attach
    from trainer.models.networks import empty_text_encoder, empty_unet
    from trainer.models.options import LoraOptions, ModelOptions

    if network in ("mini", "lora"):
        unet = describe(ModelOptions(resume_ckpt=str(BUNDLED))).unet
        if network == "lora":
            attach(unet, LoraOptions(rank=16))
        return [parameter.shape for parameter in unet.parameters() if parameter.requires_grad]
    with torch.device("meta"):
        networks = [empty_unet(SD1.default.unet)] if network != "text_encoder" else []
        networks += [empty_text_encoder(SD1.default.text_encoder)] if network != "unet" else []
    return [parameter.shape for each in networks for parameter in each.parameters()]


def _adamw(params: list[nn.Parameter]) -> Optimizer:
    from torch.optim import AdamW

    return AdamW(params, lr=1e-6, weight_decay=0.01, fused=True)


def _adamw8bit(params: list[nn.Parameter]) -> Optimizer:
    from bitsandbytes.optim.adamw import AdamW8bit

    return AdamW8bit(params, lr=1e-6, weight_decay=0.01)


def _library(params: list[nn.Parameter]) -> Optimizer:
    from dadaptation import DAdaptAdam

    return DAdaptAdam(params, weight_decay=0.01, decouple=True)  # type: ignore[arg-type]


def _prodigy(params: list[nn.Parameter]) -> Optimizer:
    from prodigyopt import Prodigy

    return Prodigy(params, weight_decay=0.01)  # type: ignore[arg-type]


def prodigy_adv(state: str) -> Build:
    """Return adv-optm's Prodigy with int8_sr or factored state."""

    def build(params: list[nn.Parameter]) -> Optimizer:
        from adv_optm import Prodigy_adv

        return Prodigy_adv(params, weight_decay=0.01, state_precision=state)

    return build


def _dadapt(**options: Any) -> Build:
    def build(params: list[nn.Parameter]) -> Optimizer:
        from trainer.optim.dadapt.optimizer import DAdaptAdam

        return DAdaptAdam(params, weight_decay=0.01, decouple=True, **options)

    return build


def _tiled_adamw(**options: Any) -> Build:
    def build(params: list[nn.Parameter]) -> Optimizer:
        from trainer.optim.dadapt.optimizer import TiledAdamW

        return TiledAdamW(params, lr=1e-6, weight_decay=0.01, **options)

    return build


CONTENDERS: dict[str, Build] = {
    BASE: _adamw,
    "adamw8bit": _adamw8bit,
    "dadapt_adam_reference": _library,
    "prodigy": _prodigy,
    "prodigy_adv int8": prodigy_adv("int8_sr"),
    "prodigy_adv factored": prodigy_adv("factored"),
    "dadapt_adam": _dadapt(),
    "dadapt_adam+fused": _dadapt(fused_backward=True),
    "dadapt_adam8bit": _dadapt(state_bits=8),
    "dadapt_adam8bit+fused": _dadapt(state_bits=8, fused_backward=True),
    "dadapt_adam8bit, every s": _dadapt(state_bits=8, every=1),
    "adamw8bit_fused": _tiled_adamw(),
    "adamw8bit_fused+fused": _tiled_adamw(fused_backward=True),
    "dadapt_adam, eager": _dadapt(compile=False),
    "dadapt_adam8bit, eager": _dadapt(state_bits=8, compile=False),
}
"""Builders by name: this program's names, their libraries', and variants of ours."""

CONTIGUOUS_ONLY = ("prodigy_adv int8", "prodigy_adv factored")
"""Contenders whose views of gradients fail for channels_last."""


def random_gradients(
    sizes: Sequence[torch.Size], device: str, dtype: torch.dtype, *, contiguous: bool = False
) -> list[torch.Tensor]:
    """Return random gradients, those of convolutions in channels_last unless `contiguous`."""
    import torch

    made = (1e-3 * torch.randn(size, device=device, dtype=torch.float32).to(dtype) for size in sizes)
    return [
        each if contiguous or each.ndim != 4 else each.to(memory_format=torch.channels_last) for each in made
    ]


def prepared(name: str, gradients: list[torch.Tensor]) -> tuple[Optimizer, Callable[[], None]]:
    """Return a contender over random parameters of the gradients' shapes, and its step.

    Raises:
        ImportError: its library is not installed.
    """
    import torch

    if name in CONTIGUOUS_ONLY:
        gradients = [gradient.contiguous() for gradient in gradients]
    params = [torch.nn.Parameter(0.02 * torch.randn_like(gradient)) for gradient in gradients]
    with redirect_stdout(StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = CONTENDERS[name](params)
    if getattr(optimizer, "_step_supports_amp_scaling", False) and name != BASE:
        # The trainer sets this; without it the step would read every gradient once more.
        optimizer.found_inf = torch.zeros((), device=gradients[0].device)  # type: ignore[attr-defined]
    return optimizer, partial(_step, optimizer, params, gradients)


def _step(optimizer: Optimizer, params: list[nn.Parameter], gradients: list[torch.Tensor]) -> None:
    """Step as after a backward pass; with fused backward, pass the gradients as backward does."""
    fused = getattr(optimizer, "fused_backward", False)
    for parameter, gradient in zip(reversed(params), reversed(gradients), strict=True):
        parameter.grad = gradient
        if fused:
            for hook in (parameter._post_accumulate_grad_hooks or {}).values():  # type: ignore[attr-defined]
                hook(parameter)
    optimizer.step()


def state_bytes(optimizer: Optimizer) -> int:
    """Return the bytes of an optimizer's state, each storage counted once."""
    import torch

    storages: dict[int, int] = {}
    for entry in optimizer.state.values():
        for value in entry.values():
            if isinstance(value, torch.Tensor) and value.numel() > 1:
                storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
    return sum(storages.values())
