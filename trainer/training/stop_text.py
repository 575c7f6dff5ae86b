"""The end of the text encoder's training in the middle of a run."""

from __future__ import annotations

from dataclasses import replace

from trainer.models.compiled import uncompile
from trainer.networks import TEXT_ENCODER
from trainer.training.run import Run


def stop_text_encoder(run: Run) -> None:
    """Freeze the text encoder once it has made its last step; nothing happens before and after."""
    stop, learner = run.text_stop, run.learner
    if stop is None or run.state.step < stop.step or not learner.objective.train_text_encoder:
        return
    network = learner.networks.plain.text_encoder
    learner.optimizers.stop(TEXT_ENCODER, run.state.step)
    network.requires_grad_(False).eval()
    uncompile(network)
    run.learner = replace(learner, networks=replace(learner.networks, text_encoder=network))
    learner.objective.train_text_encoder = False
    with run.records.meter.paused():
        learner.objective.contexts = stop.encode()
    if learner.objective.contexts is not None:
        network.to("cpu")
        stop.waiting.append(network)
    last = learner.optimizers.stopped[TEXT_ENCODER].step
    cached = "" if learner.objective.contexts is None else ", its captions encoded once"
    run.records.console.event(f"The text encoder is frozen after step {last}{cached}.")
