"""One optimizer step: the same whatever the micro-batches, gated by the gradient, and nothing read back."""

import itertools
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from data.batch import Batch
from tests.tiny import tiny_models
from trainer.config.schema import optimizer_classes
from trainer.diffusion.conditioning import encode_text
from trainer.diffusion.moments import encode_pixels
from trainer.diffusion.noise import ADDED, gaussian
from trainer.diffusion.objective import Inputs, Networks, Objective
from trainer.diffusion.options import ObjectiveOptions
from trainer.diffusion.schedule import NoiseSchedule, with_zero_terminal_snr
from trainer.diffusion.weighting import min_snr_weights
from trainer.models.ema import Ema
from trainer.models.lora import attach
from trainer.models.options import FreezingOptions, LoraOptions, TrainableOptions
from trainer.models.trainable import apply_freezing
from trainer.optim import AdamW8bitOptions, AdamWOptions, OptimizerOptions
from trainer.optim.optimizer_set import OptimizerSet
from trainer.planning.memory_ledger import AsOnDevice, Ledger
from trainer.reporting.metrics import Meter
from trainer.state_file import read_state, write_state
from trainer.training.precision import Precision
from trainer.training.step import train_step

SETTINGS = {  # where 25 steps at the method's own rate and no decay would show nothing
    "lion": {"lr": 2e-4},
    "lion8bit": {"lr": 2e-4},
    "prodigy": {"d0": 1e-4},
    **{name: {"weight_decay": 0.1} for name in ("dadapt_adam", "dadapt_adam8bit", "dadapt_adam_reference")},
}
OPTIONS: dict[str, OptimizerOptions] = {
    name: options(**{"lr": 1.0 if options.adapts else 1e-3, **SETTINGS.get(name, {})})
    for name, options in optimizer_classes().items()
}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "plain": {"min_snr_gamma": None, "zero_frequency_noise_ratio": 0.0},
    "huber": {"loss_type": "huber"},
    "mse_huber": {"loss_type": "mse_huber"},
    "huber_mse": {"loss_type": "huber_mse"},
    "offset noise": {"zero_frequency_noise_ratio": 0.1},
    "pyramid noise": {"pyramid_noise_discount": 0.5},
    "perturbed captions": {"embedding_perturbation": 1.0},
    "perturbed inputs": {"input_perturbation": 0.1},
    "clip skip": {"clip_skip": 2},
    "a range of timesteps": {"timestep_start": 400, "timestep_end": 500},
    "v-prediction": {"prediction": "v_prediction"},
    "v-prediction, unweighted": {"prediction": "v_prediction", "min_snr_gamma": None},
    "zero-terminal SNR": {"prediction": "v_prediction", "enable_zero_terminal_snr": True},
    "zero-terminal SNR at its end": {
        "prediction": "v_prediction",
        "enable_zero_terminal_snr": True,
        "timestep_start": 999,
    },
}
"""Every option of noise, prediction and loss away from its default."""
OPTIONS |= {
    f"{name} fused": replace(OPTIONS[name], fused_backward=True)
    for name in ("dadapt_adam", "dadapt_adam8bit")
}
BF16 = Precision(torch.device("cpu"), torch.bfloat16, None, torch.bfloat16)


def _batch(positions, epoch=0):
    pixels = torch.stack(
        [torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(position)) for position in positions]
    )
    tokens = torch.stack(
        [
            torch.randint(0, 50, (77,), generator=torch.Generator().manual_seed(position))
            for position in positions
        ]
    )
    names = tuple(f"{position}.png" for position in positions)
    return Batch(
        pixels_BCHW=pixels.clamp(-1, 1),
        tokens_BT=tokens,
        loss_scale_B=torch.tensor([2.0 if position == 1 else 1.0 for position in positions]),
        epoch=epoch,
        positions=tuple(positions),
        records=tuple(positions),
        names=names,
        captions=names,
    )


def _objective(models, prediction="epsilon", **options):
    scheduler = {**models.scheduler_config, "prediction_type": prediction}
    return Objective(
        ObjectiveOptions(**{"zero_frequency_noise_ratio": 0.05, "min_snr_gamma": 5.0, **options}),
        NoiseSchedule(
            with_zero_terminal_snr(scheduler, "tiny")
            if options.get("enable_zero_terminal_snr")
            else scheduler
        ),
        seed=3,
        latent_channels=4,
        latent_factor=8,
        scaling_factor=models.vae.config.scaling_factor,
        context_width=models.text_encoder.config.hidden_size,
        train_text_encoder=True,
    )


def _setup(name="adamw", dtype=torch.float32, channels_last=False, **options):
    models = tiny_models(0)
    for module in (models.unet, models.text_encoder, models.vae):
        module.to(dtype)
    if channels_last:
        models.unet.to(memory_format=torch.channels_last)
    models.vae.requires_grad_(False)
    networks = Networks(models.unet, models.text_encoder, models.vae)
    parameters = {
        "unet": list(models.unet.parameters()),
        "text encoder": list(models.text_encoder.parameters()),
    }
    optimizers = OptimizerSet(dict.fromkeys(parameters, OPTIONS[name]), parameters, total_steps=10)
    return networks, _objective(models, **options), optimizers


def _weights(networks):
    return torch.cat([_flat(module) for module in (networks.unet, networks.text_encoder)])


def _flat(module):
    return torch.cat([p.detach().reshape(-1) for p in module.parameters()])


def _pair(unet, text):
    """Return two one-weight networks, a function that trains both by their optimizers, and these."""
    networks = Networks(
        torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False), torch.nn.Identity()
    )
    for module, weight in ((networks.unet, 1.0), (networks.text_encoder, 2.0)):
        torch.nn.init.constant_(module.weight, weight)
    parameters = {
        "unet": list(networks.unet.parameters()),
        "text encoder": list(networks.text_encoder.parameters()),
    }
    optimizers = OptimizerSet(
        {"unet": OPTIONS[unet], "text encoder": OPTIONS[text]}, parameters, total_steps=10
    )

    def train(step, loss=1.0, unet_gradient=1.0):
        def losses(networks, inputs, autocast):
            predicted = networks.unet(torch.ones(2, 1))
            predicted.register_hook(lambda gradient: gradient * unet_gradient)
            return ((predicted + networks.text_encoder(torch.ones(2, 1))) ** 2).mean(1) * loss

        inputs: Any = SimpleNamespace(scale_B=torch.ones(2))
        objective: Any = SimpleNamespace(losses=losses)
        return train_step([inputs], networks, objective, optimizers, step=step, images=2)

    return networks, train, optimizers


def _gradients_of(cut):
    """Return the gradient of the 8-image step, cut into micro-batches of the given sizes."""
    networks, objective, optimizers = _setup()
    gradients = {}

    def keep(found_inf):
        for network, parameters in optimizers.parameters.items():
            gradients[network] = torch.cat([p.grad.reshape(-1) for p in parameters if p.grad is not None])

    optimizers.step = keep  # type: ignore[method-assign]
    edges = [sum(cut[:number]) for number in range(len(cut) + 1)]
    inputs = [objective.draw(_batch(range(start, end))) for start, end in itertools.pairwise(edges)]
    result = train_step(inputs, networks, objective, optimizers, step=0, images=8)
    return result.loss, gradients


def test_added_noise_of_no_strength_changes_no_bit():
    _, objective, _ = _setup(**dict.fromkeys(ADDED, 0))
    drawn = objective.draw(_batch(range(2))).noise_BCHW.numpy()
    plain = [gaussian(drawn.shape[1:], objective.seed, 0, position) for position in range(2)]
    assert np.array_equal(drawn, plain)


def test_micro_batches_change_neither_loss_nor_gradient():
    loss, gradients = _gradients_of([8])
    for cut in ([4, 4], [1] * 8, [3, 3, 2]):
        other_loss, others = _gradients_of(cut)
        torch.testing.assert_close(other_loss, loss, rtol=1e-5, atol=0)
        for network, gradient in gradients.items():
            assert (others[network] - gradient).norm() < 1e-4 * gradient.norm(), (cut, network)


@pytest.mark.parametrize("scaled", [False, True], ids=["fp32", "loss scale"])
def test_an_image_of_a_short_step_counts_as_one_of_a_full_step(scaled):
    """A full step's gradients and losses are those of its images, each in a step of its own, summed."""
    norms, losses, gradients = [], [], []
    for positions in (range(4), [0], [1], [2], [3]):
        networks, objective, optimizers = _setup()
        kept = []
        optimizers.step = lambda found_inf, o=optimizers, k=kept: k.extend(  # type: ignore[method-assign]
            p.grad.reshape(-1) for p in o.parameters["unet"] if p.grad is not None
        )
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8) if scaled else None
        inputs = objective.draw(_batch(positions))
        result = train_step(
            [inputs], networks, objective, optimizers, step=0, images=len(positions), nominal=4, scaler=scaler
        )
        norms.append(result.norms["unet"])
        losses.append(result.loss)
        gradients.append(torch.cat(kept))
    whole, *parts = gradients
    torch.testing.assert_close(sum(parts), whole, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(torch.stack(losses[1:]).mean(), losses[0], rtol=1e-5, atol=0)
    assert all(norm < norms[0] for norm in norms[1:])


def test_draws_are_equal_whatever_the_cut():
    _, objective, _ = _setup()
    whole = objective.draw(_batch(range(4)))
    parts = [objective.draw(_batch([position])) for position in range(4)]
    for name, tensor in vars(Inputs.cat(parts)).items():
        assert (
            tensor is getattr(whole, name) if tensor is None else torch.equal(tensor, getattr(whole, name))
        ), name


def test_timesteps_stay_in_their_range():
    _, objective, _ = _setup(timestep_start=100, timestep_end=110)
    drawn = objective.draw(_batch(range(60))).t_B
    assert set(drawn.tolist()) == set(range(100, 110))


@pytest.mark.parametrize("name", OPTIONS)
def test_training_lowers_the_loss_of_fixed_inputs(name):
    networks, objective, optimizers = _setup(name)
    inputs = objective.draw(_batch(range(2)))
    losses = [
        float(train_step([inputs], networks, objective, optimizers, step=step, images=2).loss)
        for step in range(25)
    ]
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("name", [name for name, options in OPTIONS.items() if options.groups_decay])
def test_a_marked_weight_takes_no_weight_decay(name):
    """Of two weights with the same gradients, and one beside them that moves the estimate of d."""
    weights = [torch.nn.Parameter(torch.ones(1 << 12)) for _ in range(3)]
    weights[0].no_weight_decay = True  # type: ignore[attr-defined]
    options = replace(OPTIONS[name], weight_decay=0.5)
    optimizers = OptimizerSet({"unet": options}, {"unet": weights}, total_steps=10)
    for step in range(3):
        optimizers.set_rates(step)
        sum((weight * 1e-3).sum() for weight in weights[:2]).backward()
        optimizers.step(torch.tensor(0.0))
        optimizers.zero_grad()
    kept, shrunk = (float(weight.detach().mean()) for weight in weights[:2])
    assert shrunk < kept < 1
    state = optimizers.state_dict()["unet"]["state"]
    assert optimizers.parameters["unet"][2] is weights[0] and {0, 2} <= set(state)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_no_weight_and_no_state(name, poison):
    networks, objective, optimizers = _setup(name)
    inputs = objective.draw(_batch(range(2)))
    train_step([inputs], networks, objective, optimizers, step=0, images=2)
    before, state = _weights(networks), _copy(optimizers.state_dict())
    bad = replace(inputs, noise_BCHW=inputs.noise_BCHW.clone().index_fill_(0, torch.tensor([0]), poison))
    result = train_step([bad], networks, objective, optimizers, step=1, images=2)
    assert result.skipped.item() == 1.0
    assert torch.equal(_weights(networks), before)
    _assert_same(optimizers.state_dict(), state)
    assert train_step([inputs], networks, objective, optimizers, step=2, images=2).skipped.item() == 0.0
    assert not torch.equal(_weights(networks), before)


@pytest.mark.parametrize(("unet", "text"), itertools.product(OPTIONS, OPTIONS))
def test_any_two_optimizers_skip_a_step_together_and_go_on(unet, text):
    networks, train, optimizers = _pair(unet, text)
    train(0)
    before, state = _weights(networks), _copy(optimizers.state_dict())
    assert train(1, loss=float("nan")).skipped.item() == 1.0
    assert torch.equal(_weights(networks), before)
    _assert_same(optimizers.state_dict(), state)
    for step in (2, 3):
        earlier = [_flat(networks.unet), _flat(networks.text_encoder)]
        assert train(step).skipped.item() == 0.0
        assert not torch.equal(_flat(networks.unet), earlier[0]) and not torch.equal(
            _flat(networks.text_encoder), earlier[1]
        )
    assert not any(measures.get("not finite") for measures in optimizers.measures().values())


@pytest.mark.parametrize(("unet", "text"), itertools.product(OPTIONS, OPTIONS))
def test_a_gradient_of_one_network_that_is_not_finite_stops_both_or_is_reported(unet, text):
    """The other network moves only if it steps inside backward, which is counted and ends a run."""
    networks, train, optimizers = _pair(unet, text)
    train(0)
    before = [_flat(networks.unet), _flat(networks.text_encoder)]
    train(1, unet_gradient=float("inf"))
    assert torch.equal(_flat(networks.unet), before[0])
    together = torch.equal(_flat(networks.text_encoder), before[1])
    assert together or any("fused" in name for name in (unet, text))
    counted = {
        network: int(measures.get("not finite", 0)) for network, measures in optimizers.measures().items()
    }
    assert counted == ({"unet": 0, "text encoder": 0} if together else {"unet": 1, "text encoder": 0})


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("channels_last", [False, True])
def test_state_on_disk_continues_the_run_to_the_bit(name, channels_last, tmp_path):
    networks, objective, optimizers = _setup(name, channels_last=channels_last)
    for step in range(3):
        train_step(
            [objective.draw(_batch(range(2), step))], networks, objective, optimizers, step=step, images=2
        )
    write_state(optimizers.state_dict(), tmp_path / "optimizers")
    weights = {
        id: module.state_dict() for id, module in (("unet", networks.unet), ("text", networks.text_encoder))
    }
    weights = {
        name: {key: tensor.contiguous().clone() for key, tensor in module.items()}
        for name, module in weights.items()
    }
    for step in range(3, 6):
        train_step(
            [objective.draw(_batch(range(2), step))], networks, objective, optimizers, step=step, images=2
        )

    others, objective, continued = _setup(name, channels_last=channels_last)
    others.unet.load_state_dict(weights["unet"])
    others.text_encoder.load_state_dict(weights["text"])
    continued.load_state_dict(read_state(tmp_path / "optimizers"))
    for step in range(3, 6):
        train_step(
            [objective.draw(_batch(range(2), step))], others, objective, continued, step=step, images=2
        )
    assert torch.equal(_weights(others), _weights(networks))
    _assert_same(continued.state_dict(), optimizers.state_dict())


def test_a_checkpoint_never_overrides_the_configured_rate():
    _, _, optimizers = _setup("adamw")
    saved = optimizers.state_dict()
    models = tiny_models(0)
    other = OptimizerSet(
        {"unet": AdamWOptions(lr=5e-6, weight_decay=0.5)},
        {"unet": list(models.unet.parameters())},
        total_steps=10,
    )
    other.load_state_dict({"unet": saved["unet"]})
    group = other.optimizers[0].param_groups[0]
    assert (group["lr"], group["weight_decay"]) == (5e-6, 0.5)


def test_clipping_bounds_each_network_by_itself():
    networks, objective, optimizers = _setup()
    norms = {}

    def keep(found_inf):
        for network, parameters in optimizers.parameters.items():
            norms[network] = (
                torch.cat([p.grad.reshape(-1) for p in parameters if p.grad is not None]).norm().item()
            )

    optimizers.step = keep  # type: ignore[method-assign]
    result = train_step(
        [objective.draw(_batch(range(2)))], networks, objective, optimizers, step=0, images=2, clip=1e-3
    )
    assert result.norms["unet"].item() > 1e-3
    assert norms["unet"] == pytest.approx(1e-3, rel=1e-3)
    assert norms["text encoder"] == pytest.approx(min(1e-3, result.norms["text encoder"].item()), rel=1e-3)


@pytest.mark.parametrize("name", ["dadapt_adam", "dadapt_adam8bit"])
def test_a_fused_backward_changes_nothing_but_when(name):
    plain, objective, optimizers = _setup(name)
    fused, _, inside = _setup(f"{name} fused")
    for step in range(4):
        inputs = objective.draw(_batch(range(4), step))
        one = train_step([inputs], plain, objective, optimizers, step=step, images=4)
        other = train_step([inputs], fused, objective, inside, step=step, images=4)
        assert torch.equal(one.loss, other.loss)
        for network, norm in one.norms.items():
            torch.testing.assert_close(other.norms[network], norm, rtol=1e-5, atol=0)
        assert not any(p.grad is not None for p in fused.unet.parameters())
    assert torch.equal(_weights(plain), _weights(fused))


def test_one_network_may_step_inside_backward_and_the_other_after():
    networks, objective, _ = _setup()
    parameters = {
        "unet": list(networks.unet.parameters()),
        "text encoder": list(networks.text_encoder.parameters()),
    }
    options = {"unet": AdamW8bitOptions(lr=1e-3), "text encoder": OPTIONS["dadapt_adam8bit fused"]}
    optimizers = OptimizerSet(options, parameters, total_steps=10)
    inputs = objective.draw(_batch(range(2)))
    before = _weights(networks)
    results = [
        train_step([inputs], networks, objective, optimizers, step=step, images=2) for step in range(20)
    ]
    assert results[0].norms.keys() == {"unet", "text encoder"}
    assert results[-1].loss < 0.9 * results[0].loss
    changed = _weights(networks) != before
    sizes = [sum(p.numel() for p in module.parameters()) for module in (networks.unet, networks.text_encoder)]
    assert all(part.any() for part in changed.split(sizes))


@pytest.mark.parametrize("name", ["dadapt_adam", "dadapt_adam8bit", "dadapt_adam8bit fused"])
def test_bf16_weights_learn(name):
    networks, objective, _ = _setup()
    networks.unet.to(torch.bfloat16)
    networks.text_encoder.to(torch.bfloat16)
    parameters = {
        "unet": list(networks.unet.parameters()),
        "text encoder": list(networks.text_encoder.parameters()),
    }
    optimizers = OptimizerSet(dict.fromkeys(parameters, OPTIONS[name]), parameters, total_steps=10)
    inputs = objective.draw(_batch(range(2)))
    losses = [
        float(
            train_step(
                [inputs], networks, objective, optimizers, step=step, images=2, autocast=BF16.autocast
            ).loss
        )
        for step in range(20)
    ]
    assert losses[-1] < 0.9 * losses[0]
    assert {p.dtype for p in parameters["unet"]} == {torch.bfloat16}


def test_the_decay_so_far_is_what_weights_without_a_gradient_have_lost():
    networks, objective, optimizers = _setup("dadapt_adam")
    idle = torch.nn.Parameter(torch.ones(4))
    parameters = {
        "unet": [*networks.unet.parameters(), idle],
        "text encoder": list(networks.text_encoder.parameters()),
    }
    optimizers = OptimizerSet(dict.fromkeys(parameters, OPTIONS["dadapt_adam"]), parameters, total_steps=10)
    inputs = objective.draw(_batch(range(2)))
    for step in range(20):
        idle.grad = torch.zeros(4)
        train_step([inputs], networks, objective, optimizers, step=step, images=2)
    lost = optimizers.measures()["unet"]["decayed"]
    assert lost > 0
    torch.testing.assert_close(1 - idle.detach(), lost.float().expand(4), rtol=1e-2, atol=1e-7)


PRECISIONS: dict[str, dict[str, Any]] = {
    "bf16": {"dtype": torch.bfloat16},
    "bf16 weights": {"dtype": torch.bfloat16, "weights": torch.bfloat16},
    "fp16": {"dtype": torch.float16},
    "channels last": {"channels_last": True},
    "gradient checkpointing": {"parts": {"gradient_checkpointing": True}},
    "attention in slices": {"parts": {"attn_type": "slice"}},
    "text encoder frozen": {"parts": {"disable_textenc_training": True}},
    "unet frozen": {"parts": {"disable_unet_training": True}},
}
"""Every option of precision, memory layout and stored activations away from its default."""


@pytest.mark.parametrize("chosen", PRECISIONS)
def test_no_precision_reads_anything_back(chosen):
    options = PRECISIONS[chosen]
    networks, objective, optimizers = _setup("adamw", channels_last=options.get("channels_last", False))
    networks.unet.to(options.get("weights", torch.float32))
    networks.text_encoder.to(options.get("weights", torch.float32))
    models = replace(tiny_models(0), unet=networks.unet, text_encoder=networks.text_encoder)
    apply_freezing(models, TrainableOptions(**options.get("parts", {})), FreezingOptions())
    on_cuda = Precision(torch.device("cuda"), options.get("dtype"), None, torch.float32)
    meta_autocast = AsOnDevice(Ledger(torch.device("meta")), on_cuda)  # torch.autocast knows no meta device
    with meta_autocast:
        name = "dadapt_adam" if "weights" in options else "adamw"
        _step_on_meta(name, networks, objective, optimizers, autocast=meta_autocast.autocast)


def test_averages_and_measures_of_a_step_are_read_back_by_reports_alone():
    networks, objective, optimizers = _setup("adamw")
    meter = Meter(epoch_tags={"loss": "epoch"})
    optimizers, result = _step_on_meta("dadapt_adam", networks, objective, optimizers)
    ema = Ema(optimizers.parameters, decay=0.9, interval=1, device=torch.device("meta"))
    for step in (1, 2):
        meter.add({"loss": result.loss, **result.norms}, images=4, totals={"skipped": result.skipped})
        ema.after(step)
        optimizers.measures()
    with pytest.raises((NotImplementedError, RuntimeError)):
        meter.read()


def test_a_scaled_loss_gives_the_same_step():
    plain, objective, optimizers = _setup("dadapt_adam")
    scaled, _, others = _setup("dadapt_adam")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    precision = Precision(torch.device("cpu"), None, scaler, torch.float32)
    for step in range(3):
        inputs = objective.draw(_batch(range(2), step))
        precision.pace(step)
        one = train_step([inputs], plain, objective, optimizers, step=step, images=2)
        other = train_step([inputs], scaled, objective, others, step=step, images=2, scaler=scaler)
        assert torch.equal(one.loss, other.loss)  # a power of two changes no digit
    assert torch.equal(_weights(plain), _weights(scaled))
    scaler.load_state_dict({**scaler.state_dict(), "scale": 1e38})
    before = _weights(scaled)
    result = train_step([inputs], scaled, objective, others, step=3, images=2, scaler=scaler)
    assert result.skipped.item() == 1.0 and torch.equal(_weights(scaled), before)
    assert scaler.get_scale() == pytest.approx(5e37, rel=1e-3)


@pytest.mark.parametrize(
    "name", ["adamw", "dadapt_adam", "dadapt_adam8bit", "dadapt_adam fused", "dadapt_adam8bit fused"]
)
def test_the_step_reads_nothing_back(name):
    """On the meta device every read-back raises."""
    _step_on_meta(name, *_setup("adamw"), passes=1 if "fused" in name else 2)


@pytest.mark.parametrize("chosen", OBJECTIVES)
def test_no_objective_reads_anything_back(chosen):
    _step_on_meta("adamw", *_setup("adamw", **OBJECTIVES[chosen]))


@pytest.mark.parametrize("name", ["dadapt_adam", "dadapt_adam8bit fused"])
def test_a_lora_reads_nothing_back(name):
    networks, objective, optimizers = _setup("adamw")
    for network in (networks.unet, networks.text_encoder):
        attach(network, LoraOptions(rank=2, targets="all"))
    _step_on_meta(name, networks, objective, optimizers)


@pytest.mark.parametrize("chosen", OBJECTIVES)
def test_every_objective_learns_and_differs(chosen):
    networks, objective, optimizers = _setup("adamw", **OBJECTIVES[chosen])
    inputs = objective.draw(_batch(range(4)))
    losses = [train_step([inputs], networks, objective, optimizers, step=step, images=4) for step in range(4)]
    assert all(result.skipped.item() == 0.0 for result in losses)
    weighted = chosen != "zero-terminal SNR at its end"  # where min-SNR weights the only timestep by 0
    assert (losses[-1].loss < losses[0].loss) if weighted else losses[0].loss == 0
    networks, objective, _ = _setup("adamw")
    same = objective.losses(networks, objective.draw(_batch(range(4)))).mul(inputs.scale_B).mean()
    assert not torch.isclose(losses[0].loss, same.detach(), rtol=1e-6), "the option changes nothing"


@pytest.mark.parametrize("rest", [0.0, 0.25])
def test_a_mask_weights_the_latents_of_its_image_before_the_timestep_weights_it(rest):
    networks, objective, _ = _setup(unmasked_weight=rest)
    plain = _batch(range(2))
    masks = torch.full((2, 1, 64, 64), 1.0)
    masks[0, :, :, 32:] = -1  # black
    masks[1, :, :4] = -1  # half a latent
    batch = replace(plain, pixels_BCHW=torch.cat([plain.pixels_BCHW, masks], dim=1))
    inputs = objective.draw(batch)
    predicted = objective.predict(networks, inputs)
    weights = torch.ones(2, 1, 8, 8)
    weights[0, :, :, 4:] = rest
    weights[1, :, 0] = (1 + rest) / 2
    assert torch.allclose(predicted.weights_B1HW, weights)
    squared = (predicted.prediction_BCHW - predicted.target_BCHW) ** 2
    snr = min_snr_weights(objective.schedule.snr(inputs.t_B), 5.0, "epsilon")
    expected = (squared * weights).mean(dim=(1, 2, 3)) * snr
    assert torch.allclose(objective.losses(networks, inputs), expected)
    moments = encode_pixels(networks.vae, inputs.pixels_BCHW, nullcontext)
    cached = replace(inputs, pixels_BCHW=None, moments_BCHW=moments)
    assert torch.equal(objective.losses(networks, inputs), objective.losses(networks, cached))


def test_a_perturbation_of_the_captions_is_added_to_them():
    networks, objective, _ = _setup(embedding_perturbation=0.5)
    inputs = objective.draw(_batch(range(2)))
    context = encode_text(networks.text_encoder, inputs.tokens_BT)
    assert inputs.perturbation_BTD is not None and inputs.perturbation_BTD.shape == context.shape
    moved = replace(inputs, context_BTD=context + inputs.perturbation_BTD, perturbation_BTD=None)
    assert torch.equal(objective.losses(networks, inputs), objective.losses(networks, moved))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_perturbation_of_the_inputs_is_seen_and_not_predicted(prediction):
    """At alpha_bar = a, the UNet sees sqrt(a) x + sqrt(1 - a) (noise + gamma * xi); targets lack xi."""
    networks, objective, _ = _setup(prediction=prediction, input_perturbation=0.1)
    inputs = objective.draw(_batch(range(2)))
    moments = torch.cat([torch.full((2, 4, 8, 8), 0.5), torch.zeros(2, 4, 8, 8)], dim=1)
    inputs = replace(inputs, pixels_BCHW=None, moments_BCHW=moments, t_B=torch.tensor([100, 800]))
    seen = {}
    networks.unet.register_forward_pre_hook(lambda module, args: seen.update(noisy=args[0]))
    target = objective.predict(networks, inputs).target_BCHW

    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    a = torch.cumprod(1 - betas, 0)[[100, 800]].reshape(2, 1, 1, 1)
    x, noise = 0.5 * objective.scaling_factor, inputs.noise_BCHW.double()
    assert inputs.unseen_BCHW is not None and inputs.unseen_BCHW.std().item() == pytest.approx(0.1, rel=0.1)
    xi = inputs.unseen_BCHW.double() / 0.1
    torch.testing.assert_close(
        seen["noisy"].double(), a.sqrt() * x + (1 - a).sqrt() * (noise + 0.1 * xi), rtol=1e-4, atol=1e-5
    )
    expected = noise if prediction == "epsilon" else a.sqrt() * noise - (1 - a).sqrt() * x
    torch.testing.assert_close(target.double(), expected, rtol=1e-4, atol=1e-5)
    assert abs(float((xi * noise).mean())) < 0.2, "drawn by itself"


def _step_on_meta(name, networks, objective, optimizers, passes=1, **options):
    meta = torch.device("meta")
    inputs = objective.draw(_batch(range(2)))
    for module in (networks.unet, networks.text_encoder, networks.vae):
        module.to(meta)
    objective.schedule.to(meta)
    both = {"unet": networks.unet, "text encoder": networks.text_encoder}
    parameters = {
        name: [weight for weight in network.parameters() if weight.requires_grad]
        for name, network in both.items()
    }
    parameters = {name: weights for name, weights in parameters.items() if weights}
    optimizers = OptimizerSet(dict.fromkeys(parameters, OPTIONS[name]), parameters, total_steps=10)
    for member in (
        optimizers.members if name == "adamw" else ()
    ):  # torch's fused kernel does not run there; everything around it does
        member.optimizer.step = lambda: None  # type: ignore[method-assign]
    moved = inputs.to(meta)
    clip = None if "fused" in name else 1.0
    result = train_step(
        [moved] * passes, networks, objective, optimizers, step=0, images=2 * passes, clip=clip, **options
    )
    assert result.loss.device == meta and result.skipped.device == meta
    return optimizers, result


def _copy(value):
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list) else value


def _assert_same(found, expected, path="state"):
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected), path
    elif isinstance(expected, dict):
        assert list(found) == list(expected), path
        for key in expected.keys() - {
            "steps"
        }:  # the calls of step(), skipped ones too: they key the rounding and count on
            _assert_same(found[key], expected[key], f"{path}.{key}")
    elif isinstance(expected, list):
        for number, (left, right) in enumerate(zip(found, expected, strict=True)):
            _assert_same(left, right, f"{path}.{number}")
    else:
        assert found == expected, path
