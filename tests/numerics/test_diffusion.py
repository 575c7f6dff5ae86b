"""The forward process, targets, losses and weights, against diffusers and against values computed by hand."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data.rng import stream
from tests.tiny import tiny_models, tiny_tokenizer
from trainer.diffusion import conditioning
from trainer.diffusion.conditioning import Tokenize, encode_text
from trainer.diffusion.loss import image_losses
from trainer.diffusion.noise import ADDED, gaussian, offset, perturbation, pyramid
from trainer.diffusion.schedule import NoiseSchedule, with_zero_terminal_snr
from trainer.diffusion.weighting import min_snr_weights
from trainer.errors import UserError
from trainer.models.placement import skipped_layers
from trainer.models.tokenizer import clip_tokenizer

SD15 = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}


def _tensors(count=6):
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, count, 4, 8, 8, generator=generator)
    return latents, noise, torch.tensor([0, 1, 250, 500, 900, 999])


def test_forward_process_is_the_closed_form_of_scaled_linear_betas():
    latents, noise, t = _tensors()
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    abar = torch.cumprod(1 - betas, 0)[t].view(-1, 1, 1, 1)
    expected = abar.sqrt() * latents + (1 - abar).sqrt() * noise
    torch.testing.assert_close(
        NoiseSchedule(SD15).noisy(latents, noise, t), expected.float(), rtol=1e-5, atol=1e-5
    )


def test_noisy_latents_and_velocities_are_those_of_diffusers():
    latents, noise, t = _tensors()
    schedule, reference = NoiseSchedule({**SD15, "prediction_type": "v_prediction"}), DDPMScheduler(**SD15)
    torch.testing.assert_close(
        schedule.noisy(latents, noise, t), reference.add_noise(latents, noise, t), rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(
        schedule.target(latents, noise, t), reference.get_velocity(latents, noise, t), rtol=1e-5, atol=1e-6
    )


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
    torch.testing.assert_close(
        NoiseSchedule(SD15).snr(t), compute_snr(DDPMScheduler(**SD15), t), rtol=1e-4, atol=0
    )


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


def test_a_weight_of_each_latent_scales_its_loss_and_not_the_number_of_latents():
    prediction, target = torch.zeros(1, 2, 1, 2), torch.tensor([[[[0.5, 3.0]], [[1.0, 1.0]]]])
    weights = torch.tensor([[[[1.0, 0.25]]]])
    t = torch.tensor([250])
    mse, huber = (0.25 + 9 / 4 + 1 + 1 / 4) / 4, (0.125 + 2.5 / 4 + 0.5 + 0.5 / 4) / 4
    for kind, value in {"mse": mse, "huber": huber, "mse_huber": 0.25 * mse + 0.75 * huber}.items():
        assert image_losses(prediction, target, t, kind, 1000, weights).item() == pytest.approx(value), kind


def test_noise_depends_on_its_place_alone_and_has_unit_variance():
    shape = (4, 64, 64)
    first = gaussian(shape, 1, 0, 7)
    assert (first == gaussian(shape, 1, 0, 7)).all()
    for other in (gaussian(shape, 2, 0, 7), gaussian(shape, 1, 1, 7), gaussian(shape, 1, 0, 8)):
        assert abs((first * other).mean()) < 0.05
    assert first.std() == pytest.approx(1, abs=0.02) and first.mean() == pytest.approx(0, abs=0.03)


ADDED_CASES = {  # of each added noise its strength, and the deviation of the sum
    "pyramid_noise_discount": (0.5, 1.0),
    "zero_frequency_noise_ratio": (0.5, 1.25**0.5),
}


@pytest.mark.parametrize("option", ADDED)
def test_added_noise_depends_on_its_place_alone_and_has_the_stated_deviation(option):
    strength, deviation = ADDED_CASES[option]
    plain = gaussian((4, 64, 64), 1, 0, 7)
    mixed = ADDED[option](plain, strength, 1, 0, 7)
    assert mixed.dtype == np.float32 and mixed.shape == plain.shape
    assert (plain == gaussian((4, 64, 64), 1, 0, 7)).all()
    assert (mixed == ADDED[option](plain, strength, 1, 0, 7)).all()
    for other in ((2, 0, 7), (1, 1, 7), (1, 0, 8)):
        assert not np.allclose(mixed, ADDED[option](plain, strength, *other))
    many = [ADDED[option](gaussian((4, 16, 16), 1, 0, i), strength, 1, 0, i) for i in range(400)]
    assert np.std(many) == pytest.approx(deviation, rel=0.03)


def test_offset_noise_is_constant_over_a_channel_with_the_asked_deviation():
    nothing = np.zeros((4, 8, 8), dtype=np.float32)
    drawn = np.stack([offset(nothing, 0.1, 1, 0, place) for place in range(2000)])
    assert (drawn == drawn[:, :, :1, :1]).all()
    assert drawn[:, :, 0, 0].std() == pytest.approx(0.1, rel=0.05)


@pytest.mark.parametrize("shape", [(4, 8, 8), (4, 64, 40)])
def test_pyramid_noise_adds_coarse_noise_and_keeps_the_deviation(shape):
    plain = gaussian(shape, 1, 0, 7)
    mixed = pyramid(plain, 0.5, 1, 0, 7)
    assert mixed.dtype == np.float32 and (plain == gaussian(shape, 1, 0, 7)).all()
    assert mixed.std() == pytest.approx(1, abs=1e-5)
    assert (mixed == pyramid(plain, 0.5, 1, 0, 7)).all()
    assert not np.allclose(mixed, pyramid(plain, 0.5, 1, 0, 8))

    def between_neighbours(noise):
        return float((noise[:, 1:] * noise[:, :-1]).mean())

    correlated = [between_neighbours(pyramid(gaussian(shape, 1, 0, i), 0.5, 1, 0, i)) for i in range(20)]
    weak = [between_neighbours(pyramid(gaussian(shape, 1, 0, i), 0.03, 1, 0, i)) for i in range(20)]
    assert np.mean(correlated) > 0.05 and abs(np.mean(weak)) < 0.02


@pytest.mark.parametrize(("discount", "rms"), [(0.8, 0.447), (0.4, 0.172), (0.03, 0.125)])
def test_pyramid_noise_moves_areas_as_much_as_in_other_trainers(discount, rms):
    """The rms of 8x8 blocks of 64x64 latents, by the published rule in torch: 12,000 images each."""
    mixed = torch.tensor(
        np.stack([pyramid(gaussian((4, 64, 64), 1, 0, i), discount, 1, 0, i) for i in range(400)])
    )
    assert torch.nn.functional.avg_pool2d(mixed, 8).square().mean().sqrt().item() == pytest.approx(
        rms, rel=0.03
    )


def test_the_first_level_of_the_pyramid_by_hand():
    """Two latents a side: one coarser level of a single value, which is added to all four."""
    plain = gaussian((1, 2, 2), 1, 0, 7)
    draws = stream(1, "pyramid noise", 0, 7)
    draws.uniform(2, 4)
    total = np.float32(2**0.5) * plain + np.float32(0.25) * draws.standard_normal((1, 1, 1), dtype=np.float32)
    np.testing.assert_allclose(pyramid(plain, 0.25, 1, 0, 7), total / total.std(), rtol=1e-6)


def test_a_perturbed_vector_is_moved_by_the_asked_length():
    moved = perturbation((77, 768), 0.3, 1, 0, 7)
    lengths = np.linalg.norm(moved, axis=1)
    assert moved.shape == (77, 768) and moved.dtype == np.float32
    assert lengths.mean() == pytest.approx(0.3, rel=0.01) and lengths.std() < 0.02


V = {**SD15, "prediction_type": "v_prediction"}


def test_zero_terminal_snr_is_that_of_diffusers():
    latents, noise, t = _tensors()
    schedule = NoiseSchedule(with_zero_terminal_snr(V, "model"))
    reference = DDPMScheduler(**V, rescale_betas_zero_snr=True)
    everywhere = torch.arange(1000)
    assert torch.equal(schedule.noisy(latents, noise, t), reference.add_noise(latents, noise, t))
    assert torch.equal(schedule.target(latents, noise, t), reference.get_velocity(latents, noise, t))
    torch.testing.assert_close(
        schedule.snr(everywhere), compute_snr(reference, everywhere), rtol=1e-4, atol=1e-12
    )
    assert schedule.snr(torch.tensor([999])).item() == 0
    last = torch.full((len(t),), 999)
    assert torch.equal(schedule.noisy(latents, noise, last), noise), "the last timestep is noise alone"
    assert torch.equal(schedule.target(latents, noise, last), -latents)


def test_zero_terminal_snr_keeps_the_first_timestep_and_rescales_the_root_by_hand():
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    root = torch.cumprod(1 - betas, 0).sqrt()
    rescaled = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    t = torch.tensor([0, 250, 900, 998])
    expected = rescaled[t] / (1 - rescaled[t])
    torch.testing.assert_close(
        NoiseSchedule(with_zero_terminal_snr(V, "model")).snr(t).double(), expected, rtol=2e-3, atol=1e-9
    )


def test_min_snr_is_finite_at_every_timestep_of_zero_terminal_snr():
    snr = NoiseSchedule(with_zero_terminal_snr(V, "model")).snr(torch.arange(1000))
    for kind in ("epsilon", "v_prediction"):
        weights = min_snr_weights(snr, 5.0, kind)
        assert weights.isfinite().all() and (weights >= 0).all() and weights.max() <= 1, kind


def test_zero_terminal_snr_says_how_to_sample_and_is_refused_for_epsilon():
    config = with_zero_terminal_snr({**V, "_class_name": "PNDMScheduler", "steps_offset": 1}, "model")
    assert (config["_class_name"], config["rescale_betas_zero_snr"], config["timestep_spacing"]) == (
        "DDIMScheduler",
        True,
        "trailing",
    )
    assert config["clip_sample"] is False and config["steps_offset"] == 1
    euler = with_zero_terminal_snr({**V, "_class_name": "EulerDiscreteScheduler"}, "model")
    assert euler["_class_name"] == "EulerDiscreteScheduler"
    for epsilon in (SD15, {**SD15, "prediction_type": "epsilon"}):
        with pytest.raises(UserError, match="some-model predicts epsilon"):
            with_zero_terminal_snr(epsilon, "some-model")


def test_clip_skip_counts_hidden_states_from_the_end_as_everydream2_does_through_the_final_norm():
    encoder = tiny_models().text_encoder
    tokens = torch.randint(0, 50, (2, 77), generator=torch.Generator().manual_seed(0))
    plain = getattr(encoder, "text_model", encoder)
    with torch.no_grad():
        states = encoder(tokens, output_hidden_states=True).hidden_states
        for clip_skip, from_the_end in ((0, 1), (1, 1), (2, 2), (3, 3)):
            expected = plain.final_layer_norm(states[-from_the_end])
            torch.testing.assert_close(encode_text(encoder, tokens, clip_skip), expected)
    assert math.isfinite(states[-1].sum().item())


@pytest.mark.parametrize("clip_skip", range(4))
def test_the_layers_that_clip_skip_leaves_out_are_those_without_a_gradient(clip_skip):
    models = tiny_models()
    encode_text(
        models.text_encoder, torch.zeros(1, 77, dtype=torch.int64), clip_skip
    ).square().sum().backward()
    without = [name for name, parameter in models.text_encoder.named_parameters() if parameter.grad is None]
    assert skipped_layers(models, clip_skip) == without


@pytest.fixture(scope="module")
def encoder():
    return tiny_models().text_encoder.eval()


@pytest.mark.parametrize("clip_skip", [0, 2])
def test_windows_of_tokens_are_encoded_by_themselves_and_stand_one_after_the_other(encoder, clip_skip):
    tokens = torch.randint(0, 500, (3, 2 * 77), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        both = encode_text(encoder, tokens, clip_skip)
        for number in range(2):
            part = slice(77 * number, 77 * (number + 1))
            torch.testing.assert_close(both[:, part], encode_text(encoder, tokens[:, part], clip_skip))
    assert both.shape == (3, 154, 16)


def test_tokens_of_one_window_are_those_of_the_library():
    for tokenizer in (tiny_tokenizer(), clip_tokenizer()):
        captions = ["", "a red circle", "a red circle, " * 60, "猫 <|endoftext|> x", "İstanbul " * 40]
        library = tokenizer(
            captions, padding="max_length", truncation=True, max_length=77, return_tensors="pt"
        ).input_ids
        assert torch.equal(Tokenize(tokenizer)(captions), library) and library.shape == (5, 77)


def test_a_long_caption_goes_on_in_the_next_window():
    tokenizer = clip_tokenizer()
    tokenize = Tokenize(tokenizer, 3)
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    words = " ".join(["cat"] * 80 + ["dog"] * 80 + ["owl"] * 80)
    cat, dog, owl = (tokenizer(word, add_special_tokens=False).input_ids[0] for word in ("cat", "dog", "owl"))
    (tokens,) = tokenize([words]).tolist()
    assert tokens[:77] == [start, *[cat] * 75, end]
    assert tokens[77:154] == [start, *[cat] * 5, *[dog] * 70, end]
    assert tokens[154:] == [start, *[dog] * 10, *[owl] * 65, end]
    assert (tokenize.counts([words, "cat"]), tokenize.limit) == ([240, 1], 225)


@settings(deadline=None)
@given(st.text(max_size=60) | st.text(alphabet="aé'’s \u0301ς1!猫<|>", max_size=40))
@example("<|endoftext|> don't ΟΔΟΣ Σ a\u0301 \u0301b 10,5 İI ﷺ")
def test_no_token_spans_white_space(text):
    """The check counts the tokens of each word once."""
    tokenize = Tokenize(clip_tokenizer())
    words = text.split()
    assert sum(tokenize.counts(words)) == tokenize.counts([" ".join(words)])[0]


def test_the_windows_of_a_short_caption_that_it_does_not_reach_are_the_empty_caption_s():
    tokenize = Tokenize(clip_tokenizer(), 2)
    short, empty = tokenize(["a cat", ""])
    assert torch.equal(short[77:], empty[77:]) and torch.equal(empty[:77], empty[77:])
    assert torch.equal(tokenize(["a cat", "a dog " * 60])[0], short), (
        "what a caption becomes must not depend on the others"
    )


def test_remembered_tokens_are_those_of_the_tokenizer(monkeypatch):
    monkeypatch.setattr(conditioning, "_CACHED", 2)
    captions = ["a cat", "a dog", "an owl", "a cat", "", "an owl"]
    tokenize = Tokenize(clip_tokenizer())
    for _ in range(2):
        assert torch.equal(
            tokenize(captions), torch.cat([Tokenize(clip_tokenizer())([caption]) for caption in captions])
        )
    assert list(tokenize.known) == ["a cat", "a dog"]
