"""Peak memory of a run, traced by running its step, losses and samples on tensors without data.

The networks, the objective and `train_step` are the run's own, on torch's meta device. Two differences of
CUDA are added: autocast's casts, and attention without a matrix of weights. Optimizers of other libraries
read numbers back, so a small real one is measured instead.

torch.distributed._tools.MemTracker counts in the same way and agrees where it works: it fails on frozen
weights, and distinguishes neither networks nor copies of weights from activations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from trainer.checkpoints.artifact import artifact_of
from trainer.config.schema import TrainConfig
from trainer.diffusion.moments import encode_pixels
from trainer.diffusion.objective import Inputs, Networks, make_objective
from trainer.models.networks import empty_text_encoder, empty_unet, empty_vae
from trainer.models.pipeline import Models
from trainer.models.placement import place
from trainer.models.trainable import apply_freezing
from trainer.networks import TEXT_ENCODER, by_network
from trainer.optim import OptimizerOptions
from trainer.optim.optimizer_set import OptimizerSet
from trainer.planning.memory_ledger import EMA, META, STATE, VAE, WEIGHTS, AsOnDevice, Kind, Ledger
from trainer.planning.memory_stand_ins import compiles, stand_in, traceable
from trainer.training.precision import Precision
from trainer.training.step import train_step


@dataclass(frozen=True, kw_only=True)
class Work:
    """Sizes and batches of a run, as far as the configuration does not say."""

    size: tuple[int, int]
    """Width and height of the largest trained bucket."""
    images: int
    """Images of the largest batch."""
    latents_kept: bool = False
    contexts_kept: bool = False
    """Captions are encoded once, before training."""
    evaluated: int = 0
    """Rows of a batch of the fixed-noise or validation loss; 0 without."""
    sample: tuple[int, int] | None = None
    """Width and height of the largest sample; None without."""
    sampled: int = 0
    """Rows of a sampling batch, doubled by guidance."""


@dataclass(frozen=True)
class Phase:
    """One phase of a run at its peak."""

    name: str
    bytes_by_kind: Mapping[Kind, int]

    @property
    def total(self) -> int:
        """Bytes of all tensors."""
        return sum(self.bytes_by_kind.values())

    def of(self, kind: str, network: str) -> int:
        """Return the bytes of one kind for one network."""
        return self.bytes_by_kind.get((kind, network), 0)


def trace_memory(config: TrainConfig, models: Models, precision: Precision, work: Work) -> list[Phase]:
    """Return the phases of a run, each at its peak of tensor bytes on the training device.

    Of `models` only configurations are used; the precision's device need not exist.
    """
    return _Trace(config, models, precision, work).phases()


class _Trace:
    def __init__(self, config: TrainConfig, models: Models, precision: Precision, work: Work) -> None:
        self._config, self._precision, self._work = config, precision, work
        self._on_cuda = precision.device.type == "cuda"
        self._ledger = Ledger(META, on_cpu=not self._on_cuda)
        self._device = AsOnDevice(self._ledger, precision)
        self._models = meta_copies(models)
        self._parts = apply_freezing(self._models, config.parts, config.optimizers.freezing)
        place(self._models, META, channels_last=config.precision.channels_last, weights=precision.weights)
        artifact = artifact_of(config.parts, self._models)
        artifact.take(self._parts, None)
        artifact.begin(0)
        self._networks: dict[str, Any] = {**by_network(self._models), VAE: self._models.vae}
        for name, network in by_network(self._models).items():
            self._ledger.follow(network, name)
        for part in (self._models.vae.encoder, self._models.vae.decoder):
            self._ledger.follow(part, VAE)
        for name, network in self._networks.items():
            self._ledger.put(_tensors(network), (WEIGHTS, name))
            for parameter in network.parameters():
                if parameter.requires_grad:  # before a fused optimizer's own hook, which drops the gradient
                    parameter.register_post_accumulate_grad_hook(self._ledger.mark_gradient(name))

    def phases(self) -> list[Phase]:
        work = self._work
        found = []
        waiting = [
            name
            for name, kept in ((VAE, work.latents_kept), (TEXT_ENCODER, work.contexts_kept))
            if kept and self._on_cuda
        ]
        with self._ledger, self._device:
            if work.latents_kept:
                found.append(self._phase("encoding latents", lambda: self._encode()))
            for name in waiting:
                self._ledger.set_aside(_tensors(self._networks[name]))
            optimizers = self._optimizers()
            self._keep_averages()
            found.append(self._phase("training step", lambda: self._step(optimizers)))
            if work.evaluated:
                found.append(self._phase("fixed-noise loss", self._evaluate))
            for name in waiting:
                self._ledger.bring_back(_tensors(self._networks[name]))
            if work.sample:
                found.append(self._phase("samples", self._draw))
        return found

    def _phase(self, name: str, run: Callable[[], object]) -> Phase:
        self._ledger.begin()
        run()
        return Phase(name, dict(self._ledger.at_peak))

    def _encode(self) -> None:
        width, height = self._work.size
        encode_pixels(self._models.vae, torch.empty(1, 3, height, width, device=META), self._device.autocast)

    def _optimizers(self) -> Any:
        """Return the run's optimizers with their state; stand-ins for those of libraries."""
        chosen: dict[str, OptimizerOptions] = by_network(self._config.optimizers)
        options: dict[str, Any] = {
            name: option if traceable(option) else stand_in(option, self._precision)
            for name, option in chosen.items()
        }
        parameters = {
            name: [parameter for _, parameter in named] for name, named in self._parts.parameters.items()
        }
        optimizers = OptimizerSet(options, parameters, total_steps=1)
        for member in optimizers.members:
            if traceable(chosen[member.network]) and self._on_cuda and not compiles():
                member.optimizer.compile = False  # type: ignore[attr-defined]
            member.optimizer.state_dict()  # makes the state
            kept = tree_leaves([dict(state) for state in member.optimizer.state.values()])
            self._ledger.put(
                [tensor for tensor in kept if isinstance(tensor, Tensor)], (STATE, member.network)
            )
        return optimizers

    def _keep_averages(self) -> None:
        if not self._config.ema.active or (self._on_cuda and self._config.ema.ema_device == "cpu"):
            return
        self._averages = {
            name: [torch.empty(parameter.shape, device=META) for _, parameter in named]
            for name, named in self._parts.parameters.items()
        }
        for name, tensors in self._averages.items():
            self._ledger.put(tensors, (EMA, name))

    def _step(self, optimizers: Any) -> None:
        passes = min(2, self._config.loop.grad_accum)  # a third adds nothing
        train_step(
            [self._inputs(self._work.images) for _ in range(passes)],
            Networks(self._models.unet, self._models.text_encoder, self._models.vae),
            self._objective(),
            optimizers,
            step=0,
            images=self._work.images,
            autocast=self._device.autocast,
            clip=self._config.gradients.clip_grad_norm,
        )

    def _evaluate(self) -> None:
        with torch.no_grad():
            if not self._work.latents_kept:
                self._encode()  # once for all timesteps
            networks = Networks(self._models.unet, self._models.text_encoder, self._models.vae)
            self._objective().losses(
                networks, self._inputs(self._work.evaluated, encoded=True), self._device.autocast
            )

    def _draw(self) -> None:
        assert self._work.sample is not None
        width, height = (side // 8 for side in self._work.sample)
        rows = self._work.sampled
        vae: Any = self._models.vae
        with torch.no_grad(), self._device.autocast():
            self._models.unet(
                torch.empty(rows, 4, height, width, device=META),
                torch.zeros((), device=META),
                self._context(rows),
            )
            vae.decode(torch.empty(1, 4, height, width, device=META), return_dict=False)

    def _objective(self) -> Any:
        return make_objective(
            self._config.objective,
            self._models,
            seed=self._config.loop.seed,
            train_text_encoder=TEXT_ENCODER in self._parts.parameters,
        )

    def _inputs(self, images: int, encoded: bool = False) -> Any:
        work = self._work
        width, height = work.size
        latents = (images, 4, height // 8, width // 8)
        kept = work.latents_kept or encoded
        return Inputs(
            pixels_BCHW=None if kept else torch.empty(images, 3, height, width, device=META),
            tokens_BT=torch.zeros(images, self._tokens(), dtype=torch.int64, device=META),
            scale_B=torch.empty(images, device=META),
            posterior_BCHW=torch.empty(latents, device=META),
            noise_BCHW=torch.empty(latents, device=META),
            t_B=torch.zeros(images, dtype=torch.int64, device=META),
            moments_BCHW=torch.empty(images, 8, *latents[2:], device=META) if kept else None,
            context_BTD=self._context(images) if work.contexts_kept else None,
        )

    def _tokens(self) -> int:
        window: int = self._models.text_encoder.config.max_position_embeddings
        return self._config.data.max_tokens // 75 * window

    def _context(self, rows: int) -> Tensor:
        return torch.empty(rows, self._tokens(), self._models.text_encoder.config.hidden_size, device=META)


def meta_copies(models: Models) -> Models:
    """Return new networks of the same configurations on the meta device."""
    networks: tuple[Any, ...] = (models.unet, models.vae, models.text_encoder)
    unet, vae, text_encoder = (network.config for network in networks)
    return replace(
        models,
        unet=empty_unet(unet),
        vae=empty_vae(vae),
        text_encoder=empty_text_encoder(text_encoder.to_dict()),
    )


def _tensors(network: nn.Module) -> list[Tensor]:
    return [*network.parameters(), *network.buffers()]
