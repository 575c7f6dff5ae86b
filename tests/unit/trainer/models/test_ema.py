"""EMA weights: the recurrence, their device, and no effect on training."""

import pytest
import torch

from trainer.errors import UserError
from trainer.models.ema import Ema, decay_of, plan_ema
from trainer.models.options import EmaOptions
from trainer.state_file import read_state, write_state

CPU = torch.device("cpu")


def parameters(dtype=torch.float32, device=CPU):
    draws = torch.Generator().manual_seed(0)
    made = [
        torch.nn.Parameter(torch.randn(shape, generator=draws).to(device, dtype)) for shape in ((3, 4), (5,))
    ]
    return {"unet": made[:1], "text encoder": made[1:]}


def move(networks, step):
    draws = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for parameter in networks["unet"] + networks["text encoder"]:
            parameter += torch.randn(parameter.shape, generator=draws).to(parameter.dtype)


def averages(ema):
    return [tensor for network in ema.state_dict().values() for tensor in network["averages"]]


def test_an_update_is_the_recurrence_from_the_very_first_on():
    networks = parameters()
    ema = Ema(networks, decay=0.9, interval=2, device=CPU)
    expected = [parameter.detach().double() for parameter in (*networks["unet"], *networks["text encoder"])]
    for step in range(1, 8):
        move(networks, step)
        ema.after(step)
        if step % 2 == 0:
            now = [
                parameter.detach().double() for parameter in (*networks["unet"], *networks["text encoder"])
            ]
            expected = [0.9 * before + 0.1 * weight for before, weight in zip(expected, now, strict=True)]
        for found, value in zip(averages(ema), expected, strict=True):
            torch.testing.assert_close(found.double(), value, rtol=1e-5, atol=1e-6)
    assert {network["updates"] for network in ema.state_dict().values()} == {3}


def test_a_strength_is_the_share_of_the_start_that_is_left_at_the_end():
    options = EmaOptions(ema_strength_target=0.05, ema_update_interval=7)
    decay = decay_of(options, 100)
    networks = {"unet": [torch.nn.Parameter(torch.ones(1))]}
    ema = Ema(networks, decay=decay, interval=7, device=CPU)
    with torch.no_grad():
        networks["unet"][0].zero_()
    for step in range(1, 101):
        ema.after(step)
    assert averages(ema)[0].item() == pytest.approx(0.05, rel=1e-4)
    assert decay_of(EmaOptions(ema_decay_rate=0.99), 100) == 0.99
    with pytest.raises(UserError, match="never updated; lower ema_update_interval"):
        decay_of(options, 6)


def test_the_plan_in_words():
    assert plan_ema(EmaOptions(), 10) is None
    assert (
        plan_ema(EmaOptions(ema_decay_rate=0.9, ema_update_interval=3), 10)
        == "decay 0.9 every 3 steps (3 updates), kept on cpu"
    )
    assert "no update: the run is shorter" in str(plan_ema(EmaOptions(ema_decay_rate=0.9), 10))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fails", [False, True])
def test_applied_averages_give_the_weights_back_to_the_bit(dtype, fails):
    networks = parameters(dtype)
    ema = Ema(networks, decay=0.5, interval=1, device=CPU)
    move(networks, 1)
    ema.after(1)
    before = [parameter.detach().clone() for parameter in networks["unet"]]
    places = [parameter.data_ptr() for parameter in networks["unet"]]
    try:
        with ema.applied():
            assert torch.equal(networks["unet"][0], averages(ema)[0].to(dtype))
            assert not torch.equal(networks["unet"][0], before[0])
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert torch.equal(networks["unet"][0], before[0]) and [p.data_ptr() for p in networks["unet"]] == places


def test_small_steps_of_bf16_weights_are_not_lost():
    networks = {"unet": [torch.nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))]}
    ema = Ema(networks, decay=0.999, interval=1, device=CPU)
    with torch.no_grad():
        networks["unet"][0].fill_(1.0)
    for step in range(1, 2001):
        ema.after(step)
    assert averages(ema)[0].dtype == torch.float32
    assert averages(ema)[0].item() == pytest.approx(
        1 - 0.999**2000, rel=1e-3
    )  # in bf16 it would rest where a step is below the spacing


def test_the_state_on_disk_goes_on_to_the_bit(tmp_path):
    networks = parameters()
    ema = Ema(networks, decay=0.9, interval=1, device=CPU)
    for step in (1, 2, 3):
        move(networks, step)
        ema.after(step)
    write_state(ema.state_dict(), tmp_path / "ema")
    continued = Ema(networks, decay=0.9, interval=1, device=CPU)
    continued.load_state_dict(read_state(tmp_path / "ema"))
    move(networks, 4)
    for one in (ema, continued):
        one.after(4)
    assert all(
        torch.equal(left, right) for left, right in zip(averages(ema), averages(continued), strict=True)
    )
    with pytest.raises(
        UserError, match="holds EMA weights of unet and text encoder, and what is trained now is unet"
    ):
        Ema({"unet": networks["unet"]}, decay=0.9, interval=1, device=CPU).load_state_dict(ema.state_dict())


def test_an_update_reads_nothing_back():
    """On the meta device every read-back raises."""
    meta = torch.device("meta")
    ema = Ema(parameters(device=meta), decay=0.9, interval=1, device=meta)
    ema.after(1)
    assert all(tensor.device == meta for tensor in averages(ema))


def test_weights_elsewhere_are_brought_to_the_average(monkeypatch):
    """A detached copy would look frozen to EMAModel, which copies frozen weights without averaging."""
    networks = parameters()
    ema = Ema(networks, decay=0.9, interval=1, device=CPU)
    start = averages(ema)[0].clone()
    move(networks, 1)
    monkeypatch.setattr(ema, "_device", torch.device("cpu:0"))
    ema.after(1)
    torch.testing.assert_close(averages(ema)[0], 0.9 * start + 0.1 * networks["unet"][0].detach())
