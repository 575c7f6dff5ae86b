"""What only a CUDA device can show; on the CPU the same tests run as far as they go there."""

import pytest
import torch
from PIL import Image

import train
from data.index import build_index
from data.options import DataOptions
from tests.runs import DADAPT, run_of, write
from tests.tiny import tiny_models
from tests.unit.trainer.training.test_step import OPTIONS, _batch, _objective
from trainer.diffusion.objective import Networks
from trainer.optim.optimizer_set import OptimizerSet
from trainer.training.latent_cache import encode_images, plan_latents
from trainer.training.options import CacheOptions, PrecisionOptions
from trainer.training.precision import resolve_precision
from trainer.training.step import train_step
from trainer.transfer import visiting

CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
DEVICES = ["cpu", CUDA]
COMPILED = "sd2"
"""A shape of 9 million parameters: from one million on, an optimizer with state in 8 bits is compiled."""


def _on(kind, name="adamw", shape="small"):
    device = torch.device(kind, 0) if kind == "cuda" else torch.device(kind)
    models = tiny_models(0, shape)
    for module in (models.unet, models.text_encoder, models.vae):
        module.to(device)
    models.vae.requires_grad_(False)
    networks = Networks(models.unet, models.text_encoder, models.vae)
    parameters = {
        "unet": list(models.unet.parameters()),
        "text encoder": list(models.text_encoder.parameters()),
    }
    optimizers = OptimizerSet(dict.fromkeys(parameters, OPTIONS[name]), parameters, total_steps=10)
    objective = _objective(models)
    objective.schedule.to(device)
    return networks, objective, optimizers, device


def _cases(names, kinds, shapes=("small",)):
    """Return device, optimizer, precision and shape of every case that a configuration may ask for."""
    for name in names:
        for kind in kinds:
            for shape in shapes:
                if kind == "fp16" and "fused" in name:
                    continue  # refused: whether a scaled gradient has overflowed is known too late
                yield pytest.param("cuda", name, kind, shape, marks=pytest.mark.gpu)
                if kind == "bf16":
                    yield pytest.param(
                        "cpu", name, kind, shape, marks=[pytest.mark.slow] if shape == COMPILED else []
                    )


@pytest.mark.parametrize(
    ("kind", "name", "precision", "shape"),
    [
        *_cases(["adamw", "dadapt_adam", "dadapt_adam8bit"], ["bf16", "fp16"]),
        *_cases(["dadapt_adam fused", "dadapt_adam8bit fused"], ["bf16"]),
        *_cases(["dadapt_adam8bit", "dadapt_adam8bit fused"], ["bf16"], [COMPILED]),
    ],
)
def test_a_step_does_not_wait_for_the_device(kind, name, precision, shape):
    """But in steps of powers of two: the first allocate and tune, and D-Adaptation may look at parameters."""
    networks, objective, optimizers, device = _on(kind, name, shape)
    chosen = resolve_precision(PrecisionOptions(mixed_precision=precision), device)
    passes, clip = (1, None) if "fused" in name else (2, 1.0)
    waiting = torch.cuda.set_sync_debug_mode if kind == "cuda" else lambda mode: None
    for step in range(7):
        inputs = objective.draw(_batch(range(2), step)).to(device)
        waiting("error" if (step + 1) & step else "default")
        try:
            chosen.pace(step)
            options = {"autocast": chosen.autocast, "scaler": chosen.scaler, "clip": clip}
            result = train_step(
                [inputs] * passes, networks, objective, optimizers, step=step, images=2 * passes, **options
            )
        finally:
            waiting("default")
    assert result.loss.isfinite()


@pytest.mark.parametrize(("kind", "name", "precision", "shape"), _cases(OPTIONS, ["no", "bf16", "fp16"]))
def test_training_lowers_the_loss_in_every_precision(kind, name, precision, shape):
    networks, objective, optimizers, device = _on(kind, name, shape)
    chosen = resolve_precision(PrecisionOptions(mixed_precision=precision), device)
    options = {"autocast": chosen.autocast, "scaler": chosen.scaler}
    inputs = objective.draw(_batch(range(4))).to(device)
    losses = []
    for step in range(40 if kind == "cuda" else 3):
        chosen.pace(step)
        losses.append(
            float(train_step([inputs], networks, objective, optimizers, step=step, images=4, **options).loss)
        )
    assert losses[-1] < 0.9 * losses[0] if kind == "cuda" else losses[-1] != losses[0]


@pytest.mark.parametrize("kind", DEVICES)
def test_a_vae_whose_latents_are_kept_leaves_the_device_but_for_samples(kind, tmp_path):
    device = torch.device("cuda", 0) if kind == "cuda" else torch.device(kind)
    precision = resolve_precision(PrecisionOptions(mixed_precision="bf16"), device)
    models = tiny_models(0)
    models.vae.to(device)
    Image.effect_noise((64, 64), 50).convert("RGB").save(tmp_path / "a.png")
    data = DataOptions(data_root=str(tmp_path), resolution=64, num_workers=0)
    index = build_index(data)
    plan = plan_latents(CacheOptions(cache_latents="memory"), data, index, models.vae.config, epochs=1)
    latents = encode_images(plan, index, data, models.vae, precision, folder=tmp_path, report=print)
    assert latents is not None and latents.read(plan.entries[0]).device.type == "cpu"
    models.vae.to("cpu")
    with visiting([models.vae], device):
        assert {parameter.device for parameter in models.vae.parameters()} == {device}
    assert {parameter.device.type for parameter in models.vae.parameters()} == {"cpu"}


@pytest.mark.parametrize("kind", DEVICES)
def test_a_run_on_a_gpu_begins_with_the_memory_that_it_will_take(kind, workplace):
    write(workplace, DADAPT)
    assert train.main(["--stop_after_steps", "1"]) == 0
    log = (run_of(workplace) / "run.log").read_text()
    before = log[: log.index("epoch 1/")]
    assert ("memory, " in before and "peak: " in before.partition("memory, ")[2]) == (kind == "cuda")
