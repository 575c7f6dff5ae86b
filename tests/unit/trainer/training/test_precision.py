"""Which number format a run computes in, on cards that are not here."""

import pytest
import torch

from trainer.errors import UserError
from trainer.training.options import PrecisionOptions
from trainer.training.precision import Precision, resolve_precision

CUDA = torch.device("cuda")


@pytest.fixture
def card(monkeypatch):
    """Return a function that pretends a GPU with or without native bf16; torch always emulates it."""

    def pretend(native):
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation=True: native or including_emulation
        )
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")

    before = torch.get_float32_matmul_precision()
    yield pretend
    torch.set_float32_matmul_precision(before)


@pytest.mark.filterwarnings("ignore:.*GradScaler is enabled, but CUDA is not available")
def test_auto_takes_fp16_with_a_scaler_where_bf16_is_only_emulated(card):
    card(native=False)
    precision = resolve_precision(PrecisionOptions(), CUDA)
    assert precision.dtype is torch.float16 and precision.scaler is not None and precision.name == "fp16"


def test_auto_takes_bf16_without_a_scaler_where_it_is_native(card):
    card(native=True)
    precision = resolve_precision(PrecisionOptions(), CUDA)
    assert precision.dtype is torch.bfloat16 and precision.scaler is None
    assert torch.get_float32_matmul_precision() == "high", "what stays in fp32 uses TF32"


def test_emulated_bf16_is_refused_when_asked_for(card):
    card(native=False)
    with pytest.raises(UserError, match="Tesla T4 does not compute bf16 natively; use auto or fp16"):
        resolve_precision(PrecisionOptions(mixed_precision="bf16"), CUDA)


def test_the_cpu_computes_in_fp32_unless_asked():
    cpu = torch.device("cpu")
    assert resolve_precision(PrecisionOptions(), cpu).name == "fp32"
    assert resolve_precision(PrecisionOptions(mixed_precision="bf16"), cpu).name == "bf16"
    assert resolve_precision(PrecisionOptions(mixed_precision="bf16", disable_amp=True), cpu).dtype is None
    with pytest.raises(UserError, match="fp16 needs a CUDA device"):
        resolve_precision(PrecisionOptions(mixed_precision="fp16"), cpu)


@pytest.mark.filterwarnings("ignore:.*GradScaler is enabled, but CUDA is not available")
def test_the_loss_scale_changes_ever_more_gently_unless_that_is_turned_off():
    for paced, course in (
        (True, [(2.0, 25), (1.8, 100), (1.6, 200), (1.3, 500), (1.15, 2000)]),
        (False, [(2.0, 2000)] * 5),
    ):
        scaler = torch.amp.GradScaler("cpu")
        precision = Precision(CUDA, torch.float16, scaler, torch.float32, paced)
        for step, expected in zip((0, 500, 1000, 2000, 4000), course, strict=True):
            for place in (max(step, 1), step + 499):
                precision.pace(place)
                assert (scaler.get_growth_factor(), scaler.get_growth_interval()) == expected
                assert scaler.get_backoff_factor() == pytest.approx(1 / expected[0])
    Precision(CUDA, torch.bfloat16, None, torch.float32).pace(0)


def test_autocast_reaches_the_networks():
    precision = resolve_precision(PrecisionOptions(mixed_precision="bf16"), torch.device("cpu"))
    layer = torch.nn.Linear(4, 4)
    with precision.autocast():
        assert layer(torch.zeros(1, 4)).dtype is torch.bfloat16
    assert layer(torch.zeros(1, 4)).dtype is torch.float32
