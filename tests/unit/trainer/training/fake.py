"""A run without networks: the parts that health, due work and reports touch, which record calls."""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import torch

from trainer.checkpoints.format import TrainState
from trainer.evaluation.fixed_noise import Measured
from trainer.reporting.metrics import Meter
from trainer.reporting.tags import LOSS
from trainer.training.cadence import Cadence
from trainer.training.ranks import Processes
from trainer.training.run import Evaluation, Health, Run

DEVICE = torch.device("cpu")


class Losses:
    """Losses that are measured as they are listed, one for each call."""

    def __init__(self, *values):
        self.values = list(values)

    def measure(self, *_):
        return Measured(self.values.pop(0), 0.5)


def fake_run(measures=None, *, fixed=None, validation=(), fused=False, watch=None, **changes):
    """Return a run of 24 steps in epochs of 4 with `done`, a list of what was shown, logged and saved."""
    done = []
    networks = measures if measures is not None else {"unet": {"rate": 1e-4}}

    @contextmanager
    def paused():
        yield

    meter = Meter(epoch_tags={})
    meter.paused = paused
    cadence = Cadence(
        log_step=5, sample_steps=10, save_every_n_epochs=2, save_ckpts_from_n_epochs=0, total_steps=24
    )
    loss_watch = SimpleNamespace(
        overfitting_since=None,
        best=None,
        update=lambda **_: [],
        trained=lambda loss: done.append(("trained", loss)),
    )
    evaluation = Evaluation(
        fixed_loss=fixed,
        validation=SimpleNamespace(
            losses=dict(validation), due=lambda before, after, last: bool(validation) and last
        ),
        loss_watch=watch or loss_watch,
        stop_on_overfit=True,
        sample_first=False,
        sample=lambda step: done.append(("samples", step)),
    )
    records = SimpleNamespace(
        console=SimpleNamespace(
            event=lambda text: done.append(("event", text)),
            report=lambda shown: done.append(("report", shown)),
        ),
        loggers=SimpleNamespace(scalars=lambda values, step: done.append(("scalars", values, step))),
        meter=meter,
        watch=SimpleNamespace(networks=(), update=lambda *_, **__: []),
        log_grad_norm=True,
    )
    learner = SimpleNamespace(
        networks=SimpleNamespace(plain=None),
        objective=SimpleNamespace(options=SimpleNamespace(is_plain=True)),
        optimizers=SimpleNamespace(
            measures=lambda: networks, parameters=networks, fused=fused, updating=False
        ),
        precision=SimpleNamespace(device=DEVICE, autocast=nullcontext, scaler=None),
    )
    saver = SimpleNamespace(save=lambda kind="": done.append(("save", kind)), keeps_best=True)
    run = Run(
        folder=None,
        state=TrainState(step=5, epoch=1, step_in_epoch=1),
        learner=learner,
        evaluation=evaluation,
        records=records,
        loader=SimpleNamespace(bad=(), leave_out=lambda files: None),
        cadence=cadence,
        epochs=6,
        steps_in=lambda epoch: 4,
        saver=saver,
        signals=SimpleNamespace(check=lambda: None),
        processes=Processes(),
        health=Health(),
    )
    for name, value in changes.items():
        setattr(run, name, value)
    run.done = done
    return run


def add_loss(run, value=1.0):
    run.records.meter.add({LOSS: torch.tensor(value)}, images=2)
