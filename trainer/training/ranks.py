"""The ranks that train as one: where they wait for each other, and how all end when one does.

Launched by accelerate or torchrun, one process a device. Every rank runs the same program on the same plan;
trained networks are wrapped by torch's DistributedDataParallel, which averages gradients. Rank 0 alone writes
and prints. With one process everything here is the same without waiting.

Nothing waits for a device here: ranks exchange values through a group of their own on the CPU (gloo).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from trainer.environment import python_command
from trainer.errors import UserError
from trainer.output import say
from trainer.training.signals import Interrupted, StopSignals

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

T = TypeVar("T")


class ReportedElsewhere(Exception):
    """An end of this rank for a reason that rank 0 reports; `exit_code` is the status of all."""

    def __init__(self, exit_code: int) -> None:
        self.exit_code = exit_code
        super().__init__("another process reports the reason")


@dataclass(frozen=True)
class _Failure:
    """The reason why a rank ends, as it is sent to the others."""

    problems: tuple[str, ...]
    exit_code: int
    signal: int | None = None

    def error(self) -> BaseException:
        """Return the error to raise on the other ranks."""
        return (
            Interrupted(self.signal)
            if self.signal is not None
            else UserError(self.problems, exit_code=self.exit_code)
        )


class Processes:
    """One rank among those that train as one.

    Args:
        count: the world size.
        on_machine: ranks on this machine.
        notes: sentences about the launch.
        group: for exchanging values.
        owned: close the connection at the end.
    """

    def __init__(
        self,
        *,
        rank: int = 0,
        count: int = 1,
        on_machine: int = 1,
        device: torch.device | None = None,
        notes: Sequence[str] = (),
        group: Any = None,
        owned: bool = False,
        signals: StopSignals | None = None,
    ) -> None:
        self.rank = rank
        self.count = count
        self.on_machine = on_machine
        self.notes = tuple(notes)
        self._device = device
        self._group = group
        self._owned = owned
        self._signals = signals or StopSignals()
        self._reported = False
        self._disconnected = False

    @property
    def main(self) -> bool:
        """True on rank 0, which writes and prints."""
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        """The device of this rank."""
        assert self._device is not None, "connected"
        return self._device

    @property
    def launcher(self) -> list[str]:
        """The words before train.py that launch as many ranks; several machines need an address too."""
        machines = self.count // self.on_machine
        nodes = ["--nnodes", str(machines)] if machines > 1 else []
        return (
            [python_command()]
            if self.count == 1
            else ["torchrun", *nodes, "--nproc_per_node", str(self.on_machine)]
        )

    def gather(self, value: T) -> list[T]:
        """Return every rank's value. All wait here for all, and learn here that one has failed.

        Raises:
            Interrupted: a signal has asked one of them to end.
            UserError: one has failed, or is gone.
        """
        if self.count == 1:
            return [value]
        found = self._exchange(value)
        failures = [(rank, each) for rank, each in enumerate(found) if isinstance(each, _Failure)]
        if failures:
            self._reported = True
            raise failures[0][1].error()
        return found

    def first(self, do: Callable[[], T]) -> T:
        """Do something on rank 0 while the others wait, and return its result on all; as `gather`."""
        result: Any = do() if self.main else None
        if self.count == 1:
            return result
        self.gather(None)
        import torch.distributed as dist

        held = [result]
        with self._signals.held(), self.computing():
            dist.broadcast_object_list(held, src=0, group=self._group)
        return held[0]

    @contextmanager
    def first_before_others(self) -> Iterator[None]:
        """Run the block on rank 0, then on the others, which find its files on a shared disk."""
        if not self.main:
            self.gather(None)
        yield
        if self.main:
            self.gather(None)

    def mean_(self, value: Tensor) -> Tensor:
        """Average a tensor over all processes, in place, without waiting for the device."""
        if self.count > 1:
            import torch.distributed as dist

            dist.all_reduce(value)
            value /= self.count
        return value

    def wrap(self, network: nn.Module, unused: Sequence[str] = ()) -> nn.Module:
        """Wrap a trained network: its gradients are averaged over ranks, and its weights are rank 0's.

        The loss does not depend on the parameters named in `unused`. Raises as `gather`.
        """
        if self.count == 1:
            return network
        from torch.nn.parallel import DistributedDataParallel

        self.gather(None)  # where one has failed, the others would wait for it for ever below
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(network, list(unused))
        with self._signals.held(), self.computing():
            return DistributedDataParallel(
                network,
                device_ids=[self.device] if self.device.type == "cuda" else None,
                forward_sync_buffers=False,  # trained networks have none that change
                gradient_as_bucket_view=True,  # no second copy of the gradients
            )

    def difference(self, numbers: Mapping[str, Any]) -> str | None:
        """Return the first value that differs between ranks, in words; None if all are equal; as `gather`."""
        found = self.gather(dict(numbers))
        for name, value in found[0].items():
            for rank, other in enumerate(found):
                if repr(other.get(name)) != repr(value):
                    return f"{name} is {value!r} in process 0 and {other.get(name)!r} in process {rank}"
        return None

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Mark work in which ranks wait for each other's tensors: if one fails inside, all end."""
        try:
            yield
        except BaseException as error:
            self._disconnected = True
            if self.count > 1 and _is_of_connection(error):
                raise UserError(_gone(error), exit_code=1) from error
            raise

    @contextmanager
    def together(self) -> Iterator[None]:
        """Leave no rank waiting: if the block fails on one, it fails on all, and all leave it together.

        They have to: a launcher ends all ranks as soon as one is gone, and rank 0 may still be saving. Ranks
        other than 0 raise `ReportedElsewhere` instead of the error that rank 0 reports.
        """
        try:
            yield
            self.gather(None)
        except BaseException as error:
            if self.count > 1:
                self._leave(error)
            raise
        finally:
            if self._owned and not self._disconnected:
                import torch.distributed as dist

                dist.destroy_process_group()

    def _leave(self, error: BaseException) -> None:
        if not self._disconnected:
            self._signals.ignore()  # all is saved, and the launcher may be impatient
            with suppress(UserError):
                if not self._reported:
                    self._exchange(self._failure(error))
                self._exchange(None)
        elif not self.main and isinstance(error, UserError):
            say(*(f"Process {self.rank}: {problem}" for problem in error.problems), stream=sys.stderr)
        if not self.main and isinstance(error, (UserError, Interrupted)):
            raise ReportedElsewhere(error.exit_code) from error

    def _failure(self, error: BaseException) -> _Failure:
        if isinstance(error, Interrupted):
            return _Failure((), error.exit_code, error.exit_code - 128)
        if isinstance(error, UserError):
            problems = [f"process {self.rank}: {problem}" for problem in error.problems]
            return _Failure(tuple(problems), error.exit_code)
        return _Failure(
            (
                f"process {self.rank} has failed ({type(error).__name__}: {error}); "
                "its own output says where.",
            ),
            1,
        )

    def _exchange(self, value: Any) -> list[Any]:
        import torch.distributed as dist

        found: list[Any] = [None] * self.count
        with self._signals.held():
            try:
                dist.all_gather_object(found, value, group=self._group)
            except RuntimeError as error:
                self._disconnected = True
                raise UserError(_gone(error), exit_code=1) from error
        return found


def _is_of_connection(error: BaseException) -> bool:
    """Return whether an error is of the connection between ranks: gloo's have no type of their own."""
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _gone(error: BaseException) -> str:
    return (
        "another process has ended without a word, so this one ends too; look for its last lines above, "
        f"and whether the system was out of memory ({str(error).splitlines()[0]})."
    )
