"""A ledger of tensors by kind and network, and CUDA's casts and attention played on the meta device."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from trainer.networks import NETWORKS, TEXT_ENCODER, UNET
from trainer.training.precision import Precision

VAE = "vae"
COLUMNS = (*NETWORKS, VAE)
WEIGHTS, GRADIENTS, STATE, EMA, ACTIVATIONS, COPIES = KINDS = (
    "weights",
    "gradients",
    "optimizer state",
    "ema",
    "activations and work",
    "autocast copies",
)
Kind = tuple[str, str]
"""One of `KINDS`, and a network."""

META = torch.device("meta")
GRAIN = 512
"""Bytes that torch's CUDA allocator rounds up to."""


_WEIGHT_COPIES = {
    torch.ops.aten.convolution.default: (1, 1),
    torch.ops.aten.convolution_backward.default: (2, 2),
}
"""Place of the weights among the arguments, and copies of them that oneDNN makes in its own layout: of the
weights, and in the backward pass of their gradient. Measured with fp32 and bf16, channels last."""


class Ledger(TorchDispatchMode):
    """Counts the bytes of all living storages on one kind of device, by kind and network.

    With `on_cpu`, convolutions also take the copies of their weights that a CPU's library makes.
    """

    def __init__(self, device: torch.device, *, on_cpu: bool = False) -> None:
        super().__init__()
        self._kind = device.type
        self._copies = _WEIGHT_COPIES if on_cpu else {}
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
        if func in self._copies:
            place, count = self._copies[func]
            self._pass_through(count * self._size(args[place].untyped_storage()))
        return found

    def put(self, tensors: Iterable[Tensor], kind: Kind) -> None:
        """Count tensors under a kind, whether or not they are counted under another one."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage._cdata in self._entries:
                self._leave(storage._cdata)
                self._count(storage._cdata, kind, self._size(storage))
            else:
                self._enter(storage, kind)

    def set_aside(self, tensors: Iterable[Tensor]) -> None:
        """Stop counting tensors that were moved off the device."""
        for tensor in tensors:
            key = tensor.untyped_storage()._cdata
            kind, size = self._entries[key]
            self._count(key, kind, -size)
            self._entries[key] = kind, 0

    def bring_back(self, tensors: Iterable[Tensor]) -> None:
        """Count moved tensors again."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            kind, _ = self._entries[storage._cdata]
            self._count(storage._cdata, kind, self._size(storage))

    def mark_gradient(self, network: str) -> Callable[[Tensor], None]:
        """Return a hook that counts a parameter's gradient."""

        def mark(parameter: Tensor) -> None:
            if parameter.grad is not None:
                self.put([parameter.grad], (GRADIENTS, network))

        return mark

    def follow(self, network: nn.Module, name: str) -> None:
        """Count tensors made while a network runs, forwards or backwards, as the network's."""

        def enter(*_: Any) -> None:
            self.network = name

        def leave(module: nn.Module, _: Any, output: Any) -> None:
            for tensor in tree_leaves(tuple(output.values())):
                if isinstance(tensor, Tensor) and tensor.requires_grad:
                    tensor.register_hook(enter)  # the gradient has come through the UNet

        network.register_forward_pre_hook(enter)
        if name == TEXT_ENCODER:
            network.register_forward_hook(leave)

    def _enter(self, storage: torch.UntypedStorage, kind: Kind) -> None:
        weakref.finalize(storage, self._leave, storage._cdata).atexit = False
        self._count(storage._cdata, kind, self._size(storage))

    def _pass_through(self, size: int) -> None:
        """Count bytes that are taken and given back at once."""
        kind = ACTIVATIONS, self.network
        for change in (size, -size):
            self._now[kind] += change
            self._total += change
            self._look()

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
        # A gradient was counted as an activation before: at an equal sum, the latest kinds are right.
        if self._total >= self._peak:
            self._peak = self._total
            self.at_peak = dict(self._now)

    def _size(self, storage: torch.UntypedStorage) -> int:
        return -(-storage.nbytes() // GRAIN) * GRAIN


_LOWERED = {
    *(F.linear, F.conv2d, F.scaled_dot_product_attention),
    *(torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, torch.baddbmm),
}
"""Functions of these networks that autocast computes in 16 bits."""

_RAISED_ON_CUDA = {F.group_norm, F.layer_norm, F.softmax, torch.softmax, Tensor.softmax}
"""Those that it computes in fp32, on CUDA alone."""


class AsOnDevice(TorchFunctionMode):
    """Makes the meta device cast and attend as the training device does."""

    def __init__(self, ledger: Ledger, precision: Precision) -> None:
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
        """Run backward with this mode on, for recomputed passes; torch turns it off inside its functions."""
        engine: Any = torch.autograd.graph._engine_run_backward  # pyright: ignore[reportPrivateUsage]
        with self, self.autocast():
            engine((loss,), (torch.ones_like(loss),), False, False, (), True, True)

    def _cast(self, values: Any, dtype: torch.dtype | None) -> Any:
        def cast(value: Any) -> Any:
            if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype == dtype:
                return value
            made = value.to(dtype)
            if isinstance(value, nn.Parameter):
                self._ledger.put([made], (COPIES, self._ledger.network))
            return made

        return tree_map(cast, values)
