"""Errors that say that memory has run out, whichever library raises them."""

import errno

import pytest
import torch

from trainer.run.out_of_memory import is_out_of_memory


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: "
            "you tried to allocate 1 bytes."
        ),
        RuntimeError(
            "could not create a primitive"
        ),  # what a convolution of oneDNN raises under a limit of memory
        RuntimeError("could not execute a primitive"),
        RuntimeError("std::bad_alloc"),
    ],
)
def test_memory_has_run_out(error):
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError(
            "could not create a primitive descriptor for the matmul primitive. Run workload with "
            "ONEDNN_VERBOSE=all"
        ),
        ValueError("could not create a primitive"),
    ],
)
def test_other_errors_are_not_taken_for_it(error):
    assert not is_out_of_memory(error)
