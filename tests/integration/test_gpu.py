"""What only a CUDA device can show."""

import pytest
import torch
from PIL import Image

import train
from data.dataset import DataOptions
from data.index import build_index
from tests.integration.test_step import OPTIONS, _batch, _objective
from tests.runs import DADAPT, run_of, write
from tests.tiny import tiny_models
from trainer.cache import CacheOptions, encode_images, plan_latents
from trainer.diffusion.objective import Networks
from trainer.optim.optimizer_set import OptimizerSet
from trainer.precision import PrecisionOptions, resolve_precision
from trainer.step import train_step
from trainer.transfer import visiting

pytestmark = pytest.mark.gpu


def _on_cuda(name="adamw"):
    device = torch.device("cuda", 0)
    models = tiny_models(0)
    for module in (models.unet, models.text_encoder, models.vae):
        module.to(device)
    models.vae.requires_grad_(False)
    networks = Networks(models.unet, models.text_encoder, models.vae)
    parameters = {"unet": list(models.unet.parameters()), "text encoder": list(models.text_encoder.parameters())}
    optimizers = OptimizerSet(dict.fromkeys(parameters, OPTIONS[name]), parameters, total_steps=10)
    objective = _objective(models)
    objective.schedule.to(device)
    return networks, objective, optimizers, device


@pytest.mark.parametrize(
    ("name", "kind"),
    [("adamw", "bf16"), ("dadapt_adam", "bf16"), ("dadapt_adam", "fp16"), ("dadapt_adam8bit", "bf16"), ("dadapt_adam8bit fused", "bf16")],
)
def test_a_step_does_not_wait_for_the_device(name, kind):
    networks, objective, optimizers, device = _on_cuda(name)
    precision = resolve_precision(PrecisionOptions(mixed_precision=kind), device)
    passes, clip = (1, None) if "fused" in name else (2, 1.0)
    for step in range(3):
        inputs = objective.draw(_batch(range(2), step)).to(device)
        torch.cuda.set_sync_debug_mode("error" if step else "default")  # the first step allocates and tunes
        try:
            precision.pace(step)
            options = {"autocast": precision.autocast, "scaler": precision.scaler, "clip": clip}
            train_step([inputs] * passes, networks, objective, optimizers, step=step, images=2 * passes, **options)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("kind", ["no", "bf16", "fp16"])
def test_training_lowers_the_loss_in_every_precision(name, kind):
    networks, objective, optimizers, device = _on_cuda(name)
    precision = resolve_precision(PrecisionOptions(mixed_precision=kind), device)
    inputs = objective.draw(_batch(range(4))).to(device)
    losses = []
    for step in range(40):
        result = train_step(
            [inputs], networks, objective, optimizers, step=step, images=4, autocast=precision.autocast, scaler=precision.scaler
        )
        losses.append(float(result.loss))
    assert losses[-1] < 0.9 * losses[0]


def test_a_vae_whose_latents_are_kept_leaves_the_device_but_for_samples(tmp_path):
    device = torch.device("cuda", 0)
    precision = resolve_precision(PrecisionOptions(mixed_precision="bf16"), device)
    models = tiny_models(0)
    models.vae.to(device)
    Image.effect_noise((64, 64), 50).convert("RGB").save(tmp_path / "a.png")
    data = DataOptions(data_root=str(tmp_path), resolution=64, num_workers=0)
    index = build_index(data)
    plan = plan_latents(CacheOptions(cache_latents="memory"), data, index, models.vae.config, epochs=1)
    latents = encode_images(plan, index, data, models.vae, precision, folder=tmp_path, tell=print)
    assert latents is not None and latents.read(plan.entries[0]).device.type == "cpu"
    models.vae.to("cpu")
    with visiting([models.vae], device):
        assert {parameter.device for parameter in models.vae.parameters()} == {device}
    assert {parameter.device.type for parameter in models.vae.parameters()} == {"cpu"}


def test_a_run_begins_with_the_memory_that_it_will_take(workplace):
    write(workplace, DADAPT)
    assert train.main(["--stop_after_steps", "1"]) == 0
    log = (run_of(workplace) / "run.log").read_text()
    assert 0 < log.index("memory, ") < log.index("peak: ") < log.index("epoch 1/")
