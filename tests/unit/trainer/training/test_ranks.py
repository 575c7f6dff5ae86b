"""The environment of a launched process, and signals while ranks talk; no real processes."""

import os
import signal

import pytest
import torch
from accelerate import PartialState

from trainer.errors import UserError
from trainer.training.launch import connect, expected, launched, rank, rank_on_machine
from trainer.training.ranks import Processes
from trainer.training.signals import Interrupted, StopSignals


@pytest.fixture
def environment(monkeypatch):
    """Return a function that sets variables, in an environment without any of a launcher's."""
    for name in list(os.environ):
        if name.startswith(("ACCELERATE_", "LOCAL_", "WORLD_", "MASTER_")) or name == "RANK":
            monkeypatch.delenv(name)
    return lambda **variables: [monkeypatch.setenv(name, value) for name, value in variables.items()]


def test_a_process_alone_asks_nobody(environment):
    alone = connect(0, StopSignals())
    assert (alone.rank, alone.count, alone.main, alone.device, alone.notes) == (
        0,
        1,
        True,
        torch.device("cpu"),
        (),
    )
    assert (alone.gather(3), alone.first(lambda: 4), alone.difference({"d": 1.0}), alone.launcher) == (
        [3],
        4,
        None,
        ["python"],
    )
    network = torch.nn.Linear(1, 1)
    assert alone.wrap(network) is network
    assert alone.mean_(torch.tensor(2.0)) == 2
    with pytest.raises(UserError, match="mine"), alone.together():
        raise UserError("mine")


def test_a_gpu_that_is_asked_for_where_there_is_none_is_noted(environment):
    environment()
    for process in (connect(1, StopSignals()), expected(1)):
        assert process.device == torch.device("cpu")
        assert process.notes == ("gpuid 1 is not used: torch has no CUDA device here, and cpu trains",)


def test_a_plan_counts_what_was_launched_and_connects_nobody(environment):
    environment(WORLD_SIZE="8", RANK="5", LOCAL_RANK="1", LOCAL_WORLD_SIZE="4")
    plan = expected(0)
    assert (launched(), rank(), rank_on_machine()) == (8, 5, 1)
    assert (plan.count, plan.on_machine, plan.rank) == (8, 4, 0) and not torch.distributed.is_initialized()
    assert plan.launcher == ["torchrun", "--nnodes", "2", "--nproc_per_node", "4"]


def test_the_world_of_a_cluster_is_no_launched_process(environment):
    environment(WORLD_SIZE="8", RANK="5")
    assert (launched(), rank(), rank_on_machine()) == (1, 0, 0)


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("WORLD_SIZE", "x"),
        ("WORLD_SIZE", "0"),
        ("RANK", "-1"),
        ("LOCAL_RANK", ""),
        ("LOCAL_WORLD_SIZE", "9" * 5000),
    ],
)
def test_what_no_launcher_sets_is_refused(environment, variable, value):
    environment(**{"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", variable: value})
    assert rank_on_machine() == 0, "whoever shows the error"
    for connects in (lambda: connect(0, StopSignals()), lambda: expected(0)):
        with pytest.raises(
            UserError, match=f"the environment variable {variable} must be a whole number, at least"
        ):
            connects()


@pytest.mark.parametrize(
    ("variable", "name"),
    [
        ("ACCELERATE_USE_FSDP", "FSDP"),
        ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"),
        ("ACCELERATE_USE_MEGATRON_LM", "M"),
    ],
)
def test_sharding_is_refused_before_anything_is_connected(environment, variable, name):
    environment(**{variable: "true"})
    for begin in (lambda: connect(0, StopSignals()), lambda: expected(0)):
        with pytest.raises(UserError, match=f"{name}.*--multi_gpu"):
            begin()
    environment(**{variable: "false"})
    assert expected(0).count == 1


def test_more_processes_than_devices_are_refused_by_all(environment, monkeypatch):
    environment(WORLD_SIZE="4", RANK="0", LOCAL_RANK="0", LOCAL_WORLD_SIZE="4")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match=r"4 processes .* 2 CUDA"):
        connect(0, StopSignals())


@pytest.mark.parametrize("kind", ["mps", "xpu"])
def test_what_is_no_cuda_device_is_named_and_left_for_the_cpu(environment, monkeypatch, kind):
    monkeypatch.setattr(
        torch.accelerator, "current_accelerator", lambda check_available=False: torch.device(kind)
    )
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: kind == "mps")
    monkeypatch.setattr(torch.backends.mps, "is_built", lambda: kind == "mps")
    PartialState._reset_state()  # accelerate remembers the device that it chose first
    for alone in (connect(0, StopSignals()), expected(0)):
        assert alone.device == torch.device("cpu")
        assert [
            note for note in alone.notes if f"GPU ({kind}) is not used, and training runs on the CPU" in note
        ]


def test_settings_of_accelerate_that_do_nothing_are_named(environment):
    environment(ACCELERATE_MIXED_PRECISION="bf16", ACCELERATE_DYNAMO_BACKEND="INDUCTOR")
    assert [note.split(" is not used")[0] for note in connect(0, StopSignals()).notes] == [
        "accelerate's mixed_precision bf16",
        "accelerate's dynamo_backend",
    ]
    environment(
        ACCELERATE_MIXED_PRECISION="no",
        ACCELERATE_DYNAMO_BACKEND="NO",
        ACCELERATE_USE_CPU="True",
        MASTER_ADDR="127.0.0.1",
    )
    assert "torchrun" in connect(0, StopSignals()).notes[0]


def test_the_first_difference_is_named(monkeypatch):
    processes = Processes(count=2)
    others = [
        {"the step": 3, "d": 1e-6, "rate": float("nan")},
        {"the step": 3, "d": 2e-6, "rate": float("nan")},
    ]
    monkeypatch.setattr(processes, "gather", lambda value: [value, others[1]])
    assert processes.difference(others[0]) == "d is 1e-06 in process 0 and 2e-06 in process 1"
    assert processes.difference(others[1]) is None


@pytest.mark.skipif(os.name == "nt", reason="Windows cannot send itself these signals")
def test_a_signal_in_the_middle_of_a_talk_is_raised_after_it():
    done = []
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    with StopSignals() as signals:
        with pytest.raises(Interrupted), signals.held():
            os.kill(os.getpid(), signal.SIGTERM)
            done.append("said")
        with signals.held():
            done.append("said once more, of the end")
        signals.ignore()
        os.kill(os.getpid(), signal.SIGTERM)
    assert done == ["said", "said once more, of the end"]
    for number, handler in before.items():
        signal.signal(number, handler)
