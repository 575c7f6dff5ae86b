"""What a run holds in memory, found by running its step, losses and samples on tensors without data.

The networks, the objective and `train_step` are the run's own, on torch's meta device, where every operation
makes its results with their sizes and nothing else. What CUDA does otherwise than the meta device is put in
its place: autocast's casts and attention that keeps no matrix of weights. Optimizers of other libraries read
numbers back, so of these a small real one is measured.

torch.distributed._tools.MemTracker counts in the same way, and comes to the same sum where it can: it fails
on weights that are frozen, and tells neither networks apart nor copies of weights from activations.
"""

from __future__ import annotations

import importlib.util
import os
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from trainer.models.lora import named
from trainer.models.trainable import TEXT_ENCODER, UNET
from trainer.optim.schedules import ScheduleOptions

if TYPE_CHECKING:
    from trainer.config.schema import TrainConfig
    from trainer.models.pipeline import Models
    from trainer.optim import OptimizerOptions
    from trainer.training.precision import Precision

VAE = "vae"
NETWORKS = (UNET, TEXT_ENCODER, VAE)
WEIGHTS, GRADIENTS, STATE, EMA, ACTIVATIONS, COPIES = KINDS = (
    "weights",
    "gradients",
    "optimizer state",
    "ema",
    "activations and work",
    "autocast copies",
)
Kind = tuple[str, str]
"""What of which network."""

_META = torch.device("meta")
_GRAIN = 512
"""Bytes that torch's CUDA allocator rounds up to."""

_MEASURED = 1 << 16
"""Elements of a weight on which optimizers of libraries are measured; larger ones are taken in proportion."""


_BITSANDBYTES = 20
"""Bytes that bitsandbytes' optimizers take on the CPU for each element of the weight that they step, as
torch.profiler saw it in version 0.50; on CUDA its kernels work in place."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a run does, as far as its memory depends on it and the configuration does not say."""

    size: tuple[int, int]
    """Width and height of the largest bucket that is trained."""
    images: int
    """The most images of one pass."""
    latents_kept: bool = False
    """Whether images are encoded once, before training."""
    contexts_kept: bool = False
    """Whether captions are too."""
    evaluated: int = 0
    """Rows of a pass of the fixed-noise or validation loss, 0 for neither."""
    sample: tuple[int, int] | None = None
    """Width and height of the largest picture that is drawn, None for none."""
    sampled: int = 0
    """Rows of a pass that draws: pictures, twice with guidance."""


@dataclass(frozen=True)
class Phase:
    """One thing that a run does, at the moment when it holds most."""

    name: str
    bytes_by_kind: Mapping[Kind, int]

    @property
    def total(self) -> int:
        """Bytes of all tensors."""
        return sum(self.bytes_by_kind.values())

    def of(self, kind: str, network: str) -> int:
        """Return the bytes of one kind for one network."""
        return self.bytes_by_kind.get((kind, network), 0)


def footprint(config: TrainConfig, models: Models, precision: Precision, work: Work) -> list[Phase]:
    """Return what a run does in turn, each at its peak: the most bytes that its tensors take on the device that trains.

    Args:
        config: the run's.
        models: the networks, of which the configurations alone are used.
        precision: the device's type, which need not be there, and number format.
        work: sizes and batches.

    Raises:
        UserError: an optimizer's library is not there.
    """
    return _Trace(config, models, precision, work).phases()


class _Trace:
    def __init__(self, config: TrainConfig, models: Models, precision: Precision, work: Work) -> None:
        from trainer.models.placement import place
        from trainer.models.trainable import apply_freezing

        self._config, self._precision, self._work = config, precision, work
        self._on_cuda = precision.device.type == "cuda"
        self._ledger = _Ledger(_META)
        self._device = _AsOnDevice(self._ledger, precision)
        self._models = _copies(models)
        self._parts = apply_freezing(self._models, config.parts, config.optimizers.freezing)
        place(self._models, _META, channels_last=config.precision.channels_last, weights=precision.weights)
        for matrix in named(self._parts).values() if config.parts.lora is not None else ():
            matrix.data = matrix.data.float()
        self._networks: dict[str, Any] = {
            UNET: self._models.unet,
            TEXT_ENCODER: self._models.text_encoder,
            VAE: self._models.vae,
        }
        for name, part in (
            (UNET, self._models.unet),
            (TEXT_ENCODER, self._models.text_encoder),
            (VAE, self._models.vae.encoder),
            (VAE, self._models.vae.decoder),
        ):
            self._ledger.follow(part, name)
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
        from trainer.diffusion.moments import encode_pixels

        width, height = self._work.size
        encode_pixels(self._models.vae, torch.empty(1, 3, height, width, device=_META), self._device.autocast)

    def _optimizers(self) -> Any:
        """Return the run's optimizers with their state, those of libraries replaced by what takes as much memory."""
        from trainer.optim.optimizer_set import OptimizerSet

        chosen: dict[str, OptimizerOptions] = {
            UNET: self._config.optimizers.unet,
            TEXT_ENCODER: self._config.optimizers.text_encoder,
        }
        options: dict[str, Any] = {
            name: option if _traceable(option) else _like(option, self._precision)
            for name, option in chosen.items()
        }
        parameters = {
            name: [parameter for _, parameter in named] for name, named in self._parts.parameters.items()
        }
        optimizers = OptimizerSet(options, parameters, total_steps=1)
        for member in optimizers.members:
            if _traceable(chosen[member.network]) and self._on_cuda and not _compiles():
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
            name: [torch.empty(parameter.shape, device=_META) for _, parameter in named]
            for name, named in self._parts.parameters.items()
        }
        for name, tensors in self._averages.items():
            self._ledger.put(tensors, (EMA, name))

    def _step(self, optimizers: Any) -> None:
        from trainer.diffusion.objective import Networks
        from trainer.training.step import train_step

        train_step(
            [
                self._inputs(self._work.images) for _ in range(min(2, self._config.loop.grad_accum))
            ],  # the third is as the second
            Networks(self._models.unet, self._models.text_encoder, self._models.vae),
            self._objective(),
            optimizers,
            step=0,
            images=self._work.images,
            autocast=self._device.autocast,
            clip=self._config.gradients.clip_grad_norm,
        )

    def _evaluate(self) -> None:
        from trainer.diffusion.objective import Networks

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
                torch.empty(rows, 4, height, width, device=_META),
                torch.zeros((), device=_META),
                self._context(rows),
            )
            vae.decode(torch.empty(1, 4, height, width, device=_META), return_dict=False)

    def _objective(self) -> Any:
        from trainer.diffusion.objective import make_objective

        return make_objective(
            self._config.objective,
            self._models,
            seed=self._config.loop.seed,
            train_text_encoder=TEXT_ENCODER in self._parts.parameters,
        )

    def _inputs(self, images: int, encoded: bool = False) -> Any:
        from trainer.diffusion.objective import Inputs

        work = self._work
        width, height = work.size
        latents = (images, 4, height // 8, width // 8)
        kept = work.latents_kept or encoded
        return Inputs(
            pixels_BCHW=None if kept else torch.empty(images, 3, height, width, device=_META),
            tokens_BT=torch.zeros(images, self._tokens(), dtype=torch.int64, device=_META),
            scale_B=torch.empty(images, device=_META),
            posterior_BCHW=torch.empty(latents, device=_META),
            noise_BCHW=torch.empty(latents, device=_META),
            t_B=torch.zeros(images, dtype=torch.int64, device=_META),
            moments_BCHW=torch.empty(images, 8, *latents[2:], device=_META) if kept else None,
            context_BTD=self._context(images) if work.contexts_kept else None,
        )

    def _tokens(self) -> int:
        window: int = self._models.text_encoder.config.max_position_embeddings
        return self._config.data.max_tokens // 75 * window

    def _context(self, rows: int) -> Tensor:
        return torch.empty(rows, self._tokens(), self._models.text_encoder.config.hidden_size, device=_META)


class _Ledger(TorchDispatchMode):
    """Counts the bytes of all storages on one kind of device while they live, by what they are and of which network."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._kind = device.type
        self._entries: dict[int, tuple[Kind, int]] = {}
        self._now: dict[Kind, int] = defaultdict(int)
        self._total = self._peak = 0
        self.network = UNET
        self.at_peak: dict[Kind, int] = {}

    def begin(self) -> None:
        """Forget the peak so far."""
        self._peak = 0
        self._look()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor) and tensor.device.type == self._kind:
                storage = tensor.untyped_storage()
                if storage._cdata not in self._entries:
                    self._enter(storage, (ACTIVATIONS, self.network))
        return found

    def put(self, tensors: Iterable[Tensor], kind: Kind) -> None:
        """Count tensors as something, which may be counted as something else already."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage._cdata in self._entries:
                self._leave(storage._cdata)
                self._count(storage._cdata, kind, self._size(storage))
            else:
                self._enter(storage, kind)

    def set_aside(self, tensors: Iterable[Tensor]) -> None:
        """Count tensors no longer, for they are elsewhere."""
        for tensor in tensors:
            key = tensor.untyped_storage()._cdata
            kind, size = self._entries[key]
            self._count(key, kind, -size)
            self._entries[key] = kind, 0

    def bring_back(self, tensors: Iterable[Tensor]) -> None:
        """Count tensors again."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            kind, _ = self._entries[storage._cdata]
            self._count(storage._cdata, kind, self._size(storage))

    def mark_gradient(self, network: str) -> Callable[[Tensor], None]:
        """Return a hook that counts a parameter's gradient as such."""

        def mark(parameter: Tensor) -> None:
            if parameter.grad is not None:
                self.put([parameter.grad], (GRADIENTS, network))

        return mark

    def follow(self, network: nn.Module, name: str) -> None:
        """Count what is made while a network runs, forwards or backwards, as its own."""

        def enter(*_: Any) -> None:
            self.network = name

        def leave(module: nn.Module, _: Any, output: Any) -> None:
            made = [
                tensor
                for tensor in tree_leaves(tuple(output.values()))
                if isinstance(tensor, Tensor) and tensor.requires_grad
            ]
            for tensor in made if name == TEXT_ENCODER else ():
                tensor.register_hook(enter)  # the gradient has come through the UNet

        network.register_forward_pre_hook(enter)
        if name == TEXT_ENCODER:
            network.register_forward_hook(leave)

    def _enter(self, storage: torch.UntypedStorage, kind: Kind) -> None:
        weakref.finalize(storage, self._leave, storage._cdata).atexit = False
        self._count(storage._cdata, kind, self._size(storage))

    def _count(self, key: int, kind: Kind, size: int) -> None:
        self._entries[key] = kind, size
        self._now[kind] += size
        self._total += size
        self._look()

    def _leave(self, key: int) -> None:
        kind, size = self._entries.pop(key)
        self._now[kind] -= size
        self._total -= size

    def _look(self) -> None:
        # What is marked as a gradient was counted as work before: at the same sum, what is known last is
        # right.
        if self._total >= self._peak:
            self._peak = self._total
            self.at_peak = dict(self._now)

    def _size(self, storage: torch.UntypedStorage) -> int:
        return -(-storage.nbytes() // _GRAIN) * _GRAIN


_LOWERED = {
    *(F.linear, F.conv2d, F.scaled_dot_product_attention),
    *(torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, torch.baddbmm),
}
"""What autocast computes in 16 bits, of what these networks call."""

_RAISED_ON_CUDA = {F.group_norm, F.layer_norm, F.softmax, torch.softmax, Tensor.softmax}
"""What it computes in fp32, on CUDA alone."""


class _AsOnDevice(TorchFunctionMode):
    """Has the meta device cast and attend as the device that trains does."""

    def __init__(self, ledger: _Ledger, precision: Precision) -> None:
        super().__init__()
        self._ledger, self._dtype = ledger, precision.dtype
        self._raised = _RAISED_ON_CUDA if precision.device.type == "cuda" else set()
        self._casting = False

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """Cast as torch.autocast does, without its cache of weights."""
        before, self._casting = self._casting, self._dtype is not None
        try:
            yield
        finally:
            self._casting = before

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.backward:
            self._backward(args[0])
            return None
        if self._casting and func in _LOWERED:
            args, kwargs = self._cast(args, self._dtype), self._cast(kwargs, self._dtype)
        elif self._casting and func in self._raised:
            args, kwargs = self._cast(args, torch.float32), self._cast(kwargs, torch.float32)
        if func is F.scaled_dot_product_attention:
            query, key, value = args[:3]
            return torch.ops.aten._scaled_dot_product_efficient_attention(
                query, key, value, None, query.requires_grad
            )[0]
        return func(*args, **kwargs)

    def _backward(self, loss: Tensor) -> None:
        """Go backwards with this mode on, for the passes that are computed again; torch turns it off inside its own functions."""
        engine: Any = torch.autograd.graph._engine_run_backward  # pyright: ignore[reportPrivateUsage]
        with self, self.autocast():
            engine(
                (loss,),
                (torch.ones_like(loss),),
                False,
                False,
                (),
                allow_unreachable=True,
                accumulate_grad=True,
            )

    def _cast(self, values: Any, dtype: torch.dtype | None) -> Any:
        def cast(value: Any) -> Any:
            if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype == dtype:
                return value
            made = value.to(dtype)
            if isinstance(value, nn.Parameter):
                self._ledger.put([made], (COPIES, self._ledger.network))
            return made

        return tree_map(cast, values)


@dataclass(frozen=True, kw_only=True)
class _Alike(ScheduleOptions):
    """Stands for an optimizer of a library: keeps as much state, and takes as much memory while it steps."""

    keeps: Callable[[int], int]
    """Bytes of state by elements of a weight."""
    takes: Callable[[int], int]
    """Bytes for a step by elements of a weight."""

    def build(self, params: Iterable[nn.Parameter], lr: float) -> Optimizer:
        return _Standing(params, self)


class _Standing(Optimizer):
    _step_supports_amp_scaling = True

    def __init__(self, params: Iterable[nn.Parameter], options: _Alike) -> None:
        super().__init__(params, {})
        self._options = options
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["state"] = torch.empty(
                    options.keeps(parameter.numel()), dtype=torch.uint8, device=_META
                )

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                torch.empty(self._options.takes(parameter.numel()), dtype=torch.uint8, device=_META)


def _traceable(options: OptimizerOptions) -> bool:
    return options.optimizer in ("dadapt_adam", "dadapt_adam8bit", "adamw8bit_fused")


def _like(options: OptimizerOptions, precision: Precision) -> _Alike:
    # What is written in Python does the same everywhere; inside the kernels of torch and bitsandbytes nothing
    # can be seen.
    by_kernel = {
        "adamw": 0,
        "adamw8bit": _BITSANDBYTES,
        "lion": _BITSANDBYTES,
        "lion8bit": _BITSANDBYTES,
    }.get(options.optimizer)
    if by_kernel and precision.device.type == "cuda":
        by_kernel = 0
    plain = replace(options, lr=1.0, lr_scheduler="constant")

    def of(elements: int, which: int) -> int:
        if elements <= _MEASURED:
            return _of_one_weight(plain, elements, precision.weights)[which]
        once, twice = (_of_one_weight(plain, times * _MEASURED, precision.weights)[which] for times in (1, 2))
        return twice + (twice - once) * (elements - 2 * _MEASURED) // _MEASURED

    return _Alike(
        lr=1.0,
        lr_scheduler="constant",
        keeps=lambda elements: of(elements, 0),
        takes=lambda elements: of(elements, 1) if by_kernel is None else by_kernel * elements,
    )


@cache
def _of_one_weight(options: OptimizerOptions, elements: int, dtype: torch.dtype) -> tuple[int, int]:
    """Return the bytes that a library's optimizer keeps and takes for one weight, of which the second step is measured."""
    parameter = nn.Parameter(torch.ones(elements, dtype=dtype))
    optimizer = options.build([parameter], 1.0)
    ledger = _Ledger(torch.device("cpu"))

    def step() -> int:
        parameter.grad = torch.full_like(parameter, 1e-3)
        with ledger:
            ledger.put([parameter, parameter.grad, *state()], (WEIGHTS, UNET))
            ledger.begin()
            before = sum(ledger.at_peak.values())
            optimizer.step()
        return sum(ledger.at_peak.values()) - before

    def state() -> list[Tensor]:
        found = [
            value
            for state in optimizer.state.values()
            for value in state.values()
            if isinstance(value, Tensor)
        ]
        return list({tensor.untyped_storage()._cdata: tensor for tensor in found}.values())

    step()
    taken = step()
    return sum(tensor.numel() * tensor.element_size() for tensor in state()), taken


def _copies(models: Models) -> Models:
    """Return new networks of the same configurations on the meta device."""
    from trainer.models.networks import empty_text_encoder, empty_unet, empty_vae

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


def _compiles() -> bool:
    """Return whether D-Adaptation's step will be compiled on CUDA, as far as can be told before; without a CUDA device it is assumed."""
    if os.environ.get("TORCH_COMPILE_DISABLE") == "1":
        return False
    return not torch.cuda.is_available() or importlib.util.find_spec("triton") is not None
