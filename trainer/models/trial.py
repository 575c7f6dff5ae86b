"""Try a model before training: networks, tokenizer and noise schedule against their configurations."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trainer.diffusion.conditioning import Tokenize
from trainer.diffusion.schedule import PREDICTION_KINDS, NoiseSchedule
from trainer.errors import UserError, first_line
from trainer.models.family import SD1

if TYPE_CHECKING:
    from trainer.models.pipeline import Models

_MOST_TIMESTEPS = 100_000
_ADVICE = "its configuration is damaged; download the model again"


def complete(models: Models, where: str) -> None:
    """Fill in the scheduler's class and the UNet's `sample_size` if a model omits them."""
    unet: Any = models.unet
    if models.scheduler_config.get("_class_name") is None:
        kind = models.scheduler_config["_class_name"] = SD1.default.scheduler["_class_name"]
        models.notes += (f"{where} names no scheduler class; {kind} is assumed, as of SD 1.5.",)
    size = unet.config["sample_size"]
    if size is None:
        usual = SD1.default.unet["sample_size"]
        unet.register_to_config(sample_size=usual)
        models.notes += (f"{where} names no sample_size; {usual} is assumed, as of SD 1.5.",)
    elif not all(
        type(side) is int and side > 0
        for side in (size if isinstance(size, (list, tuple)) and size else [size])
    ):
        raise UserError(f"{where}: the UNet's sample_size is {size!r}, not a number of latents; {_ADVICE}.")


def try_model(models: Models, where: str) -> None:
    """Run the networks on the meta device, tokenize a caption and build the noise schedule.

    Raises:
        UserError: something of it fails, or gives other shapes than Stable Diffusion's.
    """
    _attempt(f"{where}: the noise schedule cannot be built", lambda: _try_schedule(models))
    text: Any = models.text_encoder.config
    length, entries = text.max_position_embeddings, text.vocab_size
    if models.tokenizer.model_max_length != length:
        raise UserError(
            f"{where}: the tokenizer gives {models.tokenizer.model_max_length} tokens and the text encoder "
            f"takes {length}; the parts are of different models."
        )
    largest = max(models.tokenizer.get_vocab().values(), default=0)
    if largest >= entries:
        raise UserError(
            f"{where}: the tokenizer's numbers reach {largest} and the text encoder has {entries} entries; "
            f"{_ADVICE}."
        )
    _attempt(
        f"{where}: captions cannot be tokenized", lambda: Tokenize(models.tokenizer)(["a photo of a cat"])
    )
    unet: Any = models.unet.config
    context = (1, length, text.hidden_size)
    side = 2 ** (len(unet["block_out_channels"]) + 1)
    latents = (1, unet["in_channels"], side, side)
    _run(
        "text encoder",
        models.text_encoder,
        where,
        lambda run: run(_empty(1, length, kind=torch.int64)).last_hidden_state,
        context,
    )
    _run(
        "UNet",
        models.unet,
        where,
        lambda run: run(_empty(*latents), _empty(1, kind=torch.int64), _empty(*context)).sample,
        latents,
    )
    try_vae(models.vae, where)


def try_vae(vae: Any, where: str) -> None:
    """Run a VAE on the meta device, as `try_model`."""
    scale, factor = vae.config["scaling_factor"], 2 ** (len(vae.config["block_out_channels"]) - 1)
    if type(scale) not in (int, float) or not 0 < scale < 1e4:
        raise UserError(f"{where}: the VAE's scaling_factor is {scale!r}, not a positive number; {_ADVICE}.")
    images, latents = (1, 3, 4 * factor, 4 * factor), (1, vae.config["latent_channels"], 4, 4)
    _run(
        "VAE's encoder",
        _Call(vae, "encode"),
        where,
        lambda run: run(_empty(*images)).latent_dist.mode(),
        latents,
    )
    _run("VAE's decoder", _Call(vae, "decode"), where, lambda run: run(_empty(*latents)).sample, images)


_PASSED: set[tuple[str, str, tuple[int, ...]]] = set()
"""Networks that passed: a model is described before it is loaded, and a trial takes half a second."""


class _Call(nn.Module):
    """A method of a module as a module's forward pass."""

    def __init__(self, module: nn.Module, method: str) -> None:
        super().__init__()
        self.module, self.method, self.training = module, method, module.training

    def forward(self, *values: Tensor) -> Any:
        return getattr(self.module, self.method)(*values)


def _run(
    name: str,
    network: nn.Module,
    where: str,
    act: Callable[[Callable[..., Any]], Tensor],
    expected: tuple[int, ...],
) -> None:
    """Run a network in training mode on the meta device, wherever its weights are."""
    tried = (name, repr(getattr(network, "module", network).config), expected)
    if tried in _PASSED:
        return
    state = {
        key: tensor.to("meta") for key, tensor in (*network.named_parameters(), *network.named_buffers())
    }
    before = network.training

    def run(*values: Tensor) -> Any:
        return torch.func.functional_call(network, state, values)

    network.train()
    try:
        with torch.no_grad():
            found = _attempt(f"{where}: the {name} cannot be run", lambda: tuple(act(run).shape))
    finally:
        network.train(before)
    if found != expected:
        raise UserError(f"{where}: the {name} gives {found} instead of {expected}; {_ADVICE}.")
    _PASSED.add(tried)


def _try_schedule(models: Models) -> None:
    from diffusers import schedulers

    config = models.scheduler_config
    steps = config.get("num_train_timesteps", 1000)
    if type(steps) is not int or not 0 < steps <= _MOST_TIMESTEPS:
        raise ValueError(f"num_train_timesteps is {steps!r}; accepted are 1 to {_MOST_TIMESTEPS}")
    kind = config["_class_name"]
    if not isinstance(kind, str) or not kind.endswith("Scheduler") or not hasattr(schedulers, kind):
        raise ValueError(f"diffusers has no scheduler {kind!r}")
    predicts = config.get("prediction_type") or "epsilon"
    if predicts not in PREDICTION_KINDS:
        raise ValueError(f"prediction_type is {predicts!r}; accepted are {' and '.join(PREDICTION_KINDS)}")
    getattr(schedulers, kind).from_config(config)
    schedule = NoiseSchedule(config)
    kept = schedule.kept
    if len(kept) != schedule.timesteps or not bool(((kept >= 0) & (kept < 1)).all()):
        raise ValueError("its betas are not between 0 and 1, one for each timestep")


def _empty(*shape: int, kind: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=kind, device="meta")


def _attempt(problem: str, act: Callable[[], Any]) -> Any:
    try:
        return act()
    except UserError:
        raise
    except Exception as error:  # the libraries raise anything for a wrong value
        raise UserError(f"{problem} ({first_line(error)}); {_ADVICE}.") from error
