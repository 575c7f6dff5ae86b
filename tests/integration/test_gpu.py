"""What only a CUDA device can show."""

import pytest
import torch

from tests.integration.test_step import OPTIONS, _batch, _objective
from tests.tiny import tiny_models
from trainer.diffusion.objective import Networks
from trainer.optim.optimizer_set import OptimizerSet
from trainer.precision import PrecisionOptions, resolve_precision
from trainer.step import train_step

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


def test_a_step_does_not_wait_for_the_device():
    networks, objective, optimizers, device = _on_cuda("adamw")
    precision = resolve_precision(PrecisionOptions(mixed_precision="bf16"), device)
    for step in range(3):
        inputs = objective.draw(_batch(range(2), step)).to(device)
        torch.cuda.set_sync_debug_mode("error" if step else "default")  # the first step allocates and tunes
        try:
            train_step([inputs, inputs], networks, objective, optimizers, step=step, images=4, autocast=precision.autocast, clip=1.0)
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
