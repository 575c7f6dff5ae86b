"""The machines that trained the runs of a comparison, recorded by each run's processes."""

from __future__ import annotations

from pathlib import Path

_START = "started"


def note_start(record: Path) -> None:
    """Append to a run's record that a process starts to train it."""
    with record.open("a", encoding="utf-8") as file:
        file.write(f"{_START}\n")


def note_machine(record: Path) -> None:
    """Append the device of this process; after training, since naming a GPU earlier would initialize CUDA."""
    with record.open("a", encoding="utf-8") as file:
        file.write(f"{_device_words()}\n")


def read_machines(record: Path) -> list[str | None]:
    """Return the device of each process of a run; None for one that was killed, or of an older version."""
    found: list[str | None] = []
    if record.exists():
        for line in record.read_text(encoding="utf-8").splitlines():
            if line == _START:
                found.append(None)
            else:
                found[-1] = line
    return found


def _device_words() -> str:
    """Return the GPU that this process has used, or else the processor and its threads."""
    import torch

    from trainer.optim.dadapt.choice import cpu_model

    if torch.cuda.is_initialized():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    threads = torch.get_num_threads()
    return f"CPU ({cpu_model()}, {threads} thread{'s' * (threads > 1)}), torch {torch.__version__}"
