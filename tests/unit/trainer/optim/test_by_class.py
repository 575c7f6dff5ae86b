"""Optimizers by class path: from the file to steps, records and state, and what cannot be used."""

import json

import pytest
import torch

from tests.runs import model, scalars, workplace, write  # noqa: F401
from trainer.config import load_config
from trainer.config.resolved import documents
from trainer.environment import PROGRAM
from trainer.errors import UserError
from trainer.optim.by_class import by_class
from trainer.optim.optimizer_set import OptimizerSet
from trainer.state_file import read_state, write_state


class ScheduleFree(torch.optim.Adam):
    def train(self):
        """Give the weights to train."""

    def eval(self):
        """Give the weights to use."""


def configured(tmp_path, **base):
    path = tmp_path / "optimizer.json"
    path.write_text(json.dumps({"base": base}))
    bundled = str(PROGRAM.parent / "models/mini-sd")
    arguments = ["--resume_ckpt", bundled, "--data_root", str(tmp_path), "--optimizer_config", str(path)]
    (tmp_path / "train.json").write_text("{}")
    return load_config(["--config", str(tmp_path / "train.json"), *arguments]).config


def test_keyword_arguments_are_keys(tmp_path):
    config = configured(
        tmp_path, optimizer="torch.optim.NAdam", lr=1e-3, betas=[0.8, 0.9], momentum_decay=0.01, foreach=False
    )
    optimizer = config.optimizers.unet.build([torch.nn.Parameter(torch.ones(3))], 1e-3)
    assert type(optimizer) is torch.optim.NAdam
    group = optimizer.param_groups[0]
    assert (group["betas"], group["momentum_decay"], group["foreach"]) == ((0.8, 0.9), 0.01, False)
    assert config.optimizers.text_encoder == config.optimizers.unet
    again = json.loads(json.dumps(documents(config)["optimizer.json"]))["base"]
    assert configured(tmp_path, **again).optimizers.unet == config.optimizers.unet


@pytest.mark.parametrize(
    ("base", "sentence"),
    [
        (
            {"optimizer": "torch.optim.NAdam", "betaz": [0.9, 0.99]},
            "base.betaz: unknown key; did you mean 'betas'?",
        ),
        ({"optimizer": "torch.optim.NAdam", "momentum_decay": "x"}, "base.momentum_decay: must be a number"),
        (
            {"optimizer": "torch.optim.NAdam", "momentum_decay": -1},
            "base.optimizer: torch.optim.NAdam fails on a small weight",
        ),
        (
            {"optimizer": "adv_optm.Prodigy_adv", "state_precision": "factored"},
            "channels_last false may help",
        ),
        (
            {"optimizer": "torch.optim.Missing"},
            "torch.optim.Missing is not a torch.optim.Optimizer; or choose one of",
        ),
        (
            {"optimizer": "no_such_package.Adam"},
            "no_such_package does not load (No module named 'no_such_package')",
        ),
        ({"optimizer": "torch.optim.LBFGS"}, "steps several times a batch"),
        ({"optimizer": f"{__name__}.ScheduleFree"}, "other weights for samples and checkpoints"),
        ({"optimizer": "torch.nn.Linear"}, "is not a torch.optim.Optimizer"),
        ({"optimizer": "bitsandbytes.optim.optimizer.Optimizer8bit"}, "takes no lr"),
    ],
)
def test_what_cannot_be_used_is_a_config_error(tmp_path, base, sentence):
    with pytest.raises(UserError) as raised:
        configured(tmp_path, lr=1e-3, **base)
    assert any(sentence in problem for problem in raised.value.problems), raised.value.problems


def trained(options, weight, steps, saved=None):
    optimizers = OptimizerSet({"unet": options}, {"unet": [weight]}, total_steps=9)
    if saved is not None:
        optimizers.load_state_dict(saved)
    for step in steps:
        optimizers.set_rates(step)
        weight.grad = torch.linspace(-1, 1, 12).reshape(3, 4) * (step + 1) * weight.detach()
        optimizers.step(torch.tensor(0.0))
    return optimizers


@pytest.mark.parametrize("path", ["torch.optim.NAdam", "torch.optim.Adafactor", "adv_optm.Prodigy_adv"])
def test_a_saved_optimizer_goes_on_to_the_bit(tmp_path, path):
    options = by_class(path)(lr=0.1)
    whole, half = (torch.nn.Parameter(torch.ones(3, 4)) for _ in range(2))
    trained(options, whole, range(6))
    optimizers = trained(options, half, range(3))
    write_state(optimizers.state_dict(), tmp_path / "state")
    optimizers = trained(options, half, range(3, 6), read_state(tmp_path / "state"))
    assert torch.equal(whole, half)
    measured = optimizers.measures()["unet"]
    assert options.adapts == (path == "adv_optm.Prodigy_adv") == ("d" in measured)
    assert measured["rate"] == pytest.approx(0.1 * measured.get("d", 1.0))


def test_a_run_with_another_packages_optimizer(workplace):  # noqa: F811
    import train

    settings = {"base": {"optimizer": "adv_optm.Prodigy_adv", "lr": 1.0, "slice_p": 1}}
    write(workplace, settings, max_epochs=2, log_step=1)
    assert train.main([]) == 0
    (run,) = (workplace / "logs").iterdir()
    found = scalars(run)
    assert "optimizer/d unet" in found and "optimizer/d_hat unet" not in found
    assert found["lr/unet"] == found["optimizer/d unet"], "lr 1 times d"
    assert not (run / "optimizer.found.json").exists()
    assert train.main(["--resume_ckpt", "findlast", "--max_epochs", "3"]) == 0
