"""The forward process, targets, losses and weights, against diffusers and against values computed by hand."""

import math

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from trainer.diffusion.conditioning import encode_text
from trainer.diffusion.loss import image_losses
from trainer.diffusion.noise import gaussian, offset
from trainer.diffusion.schedule import NoiseSchedule
from trainer.diffusion.weighting import min_snr_weights
from trainer.errors import UserError

SD15 = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def _tensors(count=6):
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, count, 4, 8, 8, generator=generator)
    return latents, noise, torch.tensor([0, 1, 250, 500, 900, 999])


def test_forward_process_is_the_closed_form_of_scaled_linear_betas():
    latents, noise, t = _tensors()
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    abar = torch.cumprod(1 - betas, 0)[t].view(-1, 1, 1, 1)
    expected = abar.sqrt() * latents + (1 - abar).sqrt() * noise
    torch.testing.assert_close(NoiseSchedule(SD15).noisy(latents, noise, t), expected.float(), rtol=1e-5, atol=1e-5)


def test_v_prediction_target_inverts_to_latents_and_noise():
    latents, noise, t = _tensors()
    schedule = NoiseSchedule({**SD15, "prediction_type": "v_prediction"})
    abar = DDPMScheduler(**SD15).alphas_cumprod[t].view(-1, 1, 1, 1)
    noisy, v = schedule.noisy(latents, noise, t), schedule.target(latents, noise, t)
    torch.testing.assert_close(abar.sqrt() * noisy - (1 - abar).sqrt() * v, latents, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close((1 - abar).sqrt() * noisy + abar.sqrt() * v, noise, rtol=1e-4, atol=1e-4)


def test_epsilon_target_is_the_noise():
    latents, noise, t = _tensors()
    assert NoiseSchedule(SD15).target(latents, noise, t) is noise


def test_snr_is_that_of_diffusers():
    t = torch.arange(1000)
    torch.testing.assert_close(NoiseSchedule(SD15).snr(t), compute_snr(DDPMScheduler(**SD15), t), rtol=1e-4, atol=0)


def test_another_prediction_kind_is_refused():
    with pytest.raises(UserError, match="'sample'; accepted are epsilon and v_prediction"):
        NoiseSchedule({**SD15, "prediction_type": "sample"})


def test_min_snr_weights_by_hand():
    snr = torch.tensor([0.0, 1.0, 5.0, 20.0])
    assert min_snr_weights(snr, 5.0, "epsilon").tolist() == pytest.approx([1.0, 1.0, 1.0, 0.25])
    assert min_snr_weights(snr, 5.0, "v_prediction").tolist() == pytest.approx([0.0, 0.5, 5 / 6, 5 / 21])


def test_losses_by_hand():
    prediction, target = torch.zeros(2, 1, 1, 2), torch.tensor([[[[0.5, 3.0]]], [[[1.0, 1.0]]]])
    t = torch.tensor([250, 1000])
    mse, huber = [(0.25 + 9) / 2, 1.0], [(0.125 + 2.5) / 2, 0.5]
    expected = {
        "mse": mse,
        "huber": huber,
        "mse_huber": [0.25 * mse[0] + 0.75 * huber[0], mse[1]],
        "huber_mse": [0.25 * huber[0] + 0.75 * mse[0], huber[1]],
    }
    for kind, values in expected.items():
        assert image_losses(prediction, target, t, kind).tolist() == pytest.approx(values), kind


def test_noise_depends_on_its_place_alone_and_has_unit_variance():
    shape = (4, 64, 64)
    first = gaussian(shape, 1, 0, 7)
    assert (first == gaussian(shape, 1, 0, 7)).all()
    for other in (gaussian(shape, 2, 0, 7), gaussian(shape, 1, 1, 7), gaussian(shape, 1, 0, 8)):
        assert abs((first * other).mean()) < 0.05
    assert first.std() == pytest.approx(1, abs=0.02) and first.mean() == pytest.approx(0, abs=0.03)


def test_offset_noise_is_constant_over_a_channel_with_the_asked_deviation():
    drawn = torch.tensor([offset((4, 8, 8), 0.1, 1, 0, place).reshape(-1).tolist() for place in range(2000)])
    assert drawn.shape == (2000, 4)
    assert drawn.std().item() == pytest.approx(0.1, rel=0.05)


def test_clip_skip_takes_the_hidden_state_before_through_the_final_norm():
    from tests.tiny import tiny_models

    encoder = tiny_models().text_encoder
    tokens = torch.randint(0, 50, (2, 77), generator=torch.Generator().manual_seed(0))
    plain = getattr(encoder, "text_model", encoder)
    with torch.no_grad():
        states = encoder(tokens, output_hidden_states=True).hidden_states
        torch.testing.assert_close(encode_text(encoder, tokens), plain.final_layer_norm(states[-1]))
        torch.testing.assert_close(encode_text(encoder, tokens, 2), plain.final_layer_norm(states[-3]))
    assert math.isfinite(states[-1].sum().item())
