"""The launch of this process: alone, or by accelerate or torchrun as one of several ranks."""

from __future__ import annotations

import os
import re
from datetime import timedelta
from typing import TYPE_CHECKING

from trainer.errors import UserError
from trainer.training.ranks import Processes
from trainer.training.signals import StopSignals

if TYPE_CHECKING:
    import torch

PATIENCE = timedelta(days=30)
"""Timeout between ranks: rank 0 may encode, sample or save for hours. A dead one is noticed at once."""

_SHARDING = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism configuration",
}


def launched() -> int:
    """Return the number of ranks that accelerate or torchrun launched."""
    return _number("WORLD_SIZE", 1) if "LOCAL_RANK" in os.environ else 1


def rank() -> int:
    """Return this process's rank."""
    return _number("RANK", 0) if launched() > 1 else 0


def rank_on_machine() -> int:
    """Return the rank on this machine; 0 reports what goes wrong before ranks are connected."""
    return _number("LOCAL_RANK", 0) if launched() > 1 else 0


def expected(gpuid: int) -> Processes:
    """Return the ranks that `connect` would connect, to plan with."""
    import torch

    _check_launcher()
    count, notes = launched(), _notes()
    if count == 1:
        return Processes(device=_own_device(gpuid, notes), notes=notes)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Processes(count=count, on_machine=_on_machine(count), device=device, notes=notes)


def connect(gpuid: int, signals: StopSignals) -> Processes:
    """Return this rank, connected with the others; one that trains alone takes the CUDA device `gpuid`.

    Raises:
        UserError: there are fewer devices than ranks or none of that number, or accelerate was asked to shard
            the model.
    """
    import torch
    from accelerate import PartialState

    _check_launcher()
    count, notes = launched(), _notes()
    if count == 1:
        return Processes(device=_own_device(gpuid, notes), notes=notes, signals=signals)
    on_machine = _on_machine(count)
    owned = not torch.distributed.is_initialized()
    state = PartialState(cpu=_flag("ACCELERATE_USE_CPU") or not torch.cuda.is_available())
    device = state.device
    assert device is not None, "accelerate has chosen one"
    device = torch.device("cpu") if device.type == "cpu" else device  # without its number
    if state.num_processes != count:
        raise UserError(
            f"{count} processes were launched, and devices of type {device.type} cannot train together; "
            "start one, with python train.py."
        )
    if gpuid and device.type == "cuda":
        of = "of several processes each takes the CUDA device of its number on its machine"
        notes.append(f"gpuid {gpuid} is not used: {of}")
    signals.quiet = state.process_index > 0
    return Processes(
        rank=state.process_index,
        count=count,
        on_machine=on_machine,
        device=device,
        notes=notes,
        group=torch.distributed.new_group(backend="gloo", timeout=PATIENCE),
        owned=owned,
        signals=signals,
    )


def _own_device(gpuid: int, notes: list[str]) -> torch.device:
    """Return the device of a single rank, and add to `notes` why it is not the requested one."""
    import torch

    count = torch.cuda.device_count()
    if count and gpuid >= count:
        raise UserError(
            f"gpuid: {gpuid} was asked for, and this machine has {count} CUDA device(s), numbered from 0; "
            "choose one of those."
        )
    if count and not _flag("ACCELERATE_USE_CPU"):
        torch.cuda.set_device(gpuid)
        return torch.device("cuda", gpuid)
    if gpuid:
        notes.append(f"gpuid {gpuid} is not used: torch has no CUDA device here, and cpu trains")
    return torch.device("cpu")


def _on_machine(count: int) -> int:
    import torch

    on_machine, devices = _number("LOCAL_WORLD_SIZE", count), torch.cuda.device_count()
    if devices and on_machine > devices and not _flag("ACCELERATE_USE_CPU"):
        raise UserError(
            f"{on_machine} processes were launched on this machine, and it has {devices} CUDA device(s), one "
            "for each process; launch at most that many, and raise grad_accum to keep the images of a step."
        )
    return on_machine


def _number(variable: str, default: int) -> int:
    """Return a launcher's number; the default for anything else, which `_check_launcher` refuses."""
    value = os.environ.get(variable, "")
    return int(value) if re.fullmatch("[0-9]{1,6}", value) else default


def _check_launcher() -> None:
    for variable, least in {"WORLD_SIZE": 1, "RANK": 0, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}.items():
        if variable in os.environ and _number(variable, -1) < least:
            raise UserError(
                f"the environment variable {variable} must be a whole number, at least {least}; "
                f"it is {os.environ[variable]!r}: unset it, or start with torchrun or accelerate launch."
            )
    for variable, name in _SHARDING.items():
        if _flag(variable):
            raise UserError(
                f"accelerate was asked for {name}, which splits a model over processes, and this program "
                "trains with a whole model in each (DDP); choose plain multi-GPU in accelerate config or "
                "with accelerate launch --multi_gpu, and for less memory see --check, dadapt_adam8bit and "
                "lora."
            )


def _notes() -> list[str]:
    import torch

    notes = []
    other = torch.accelerator.current_accelerator(check_available=True)
    if other is not None and other.type != "cuda":
        notes.append(
            f"this machine's GPU ({other.type}) is not used, and training runs on the CPU: "
            "only CUDA devices are supported; Apple's GPUs lack fp64, which D-Adaptation's sums need"
        )
    if _flag("ACCELERATE_USE_CPU") and "MASTER_ADDR" in os.environ and launched() == 1:
        notes.append(
            "accelerate launch starts one process on the CPU, however many are asked for, as it leaves that "
            "to MPI; torchrun --nproc_per_node 2 train.py starts two"
        )
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision != "no":
        notes.append(f"accelerate's mixed_precision {precision} is not used: that of train.json decides")
    if os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no":
        notes.append("accelerate's dynamo_backend is not used")
    return notes


def _flag(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true", "yes", "y", "on", "t")
