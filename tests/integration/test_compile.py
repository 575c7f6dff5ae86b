"""Networks through torch.compile: the same training and files, and a sentence without a compiler.

Tracing the tiny UNet takes most of a minute, and compiling it with C++ a quarter of an hour, so all but a
slow test trace the text encoder alone; and all but another run the traced graphs uncompiled.
"""

import pytest
import torch
import torch._dynamo
from safetensors import safe_open
from torch._dynamo.backends.debugging import aot_eager

import train
from tests.runs import DADAPT, run_of, same_run, scalars, write
from tests.unit.trainer.training.test_step import _batch, _setup
from trainer.errors import UserError
from trainer.models import compiled
from trainer.training.step import train_step

SHORT = {
    "max_epochs": 1,
    "fixed_loss_images": 1,
    "save_every_n_epochs": None,
    "save_format": "diffusers",
    "gradient_checkpointing": True,
}


@pytest.fixture
def graphs(monkeypatch):
    """Return the list of graphs that torch traces, none of which it compiles."""
    found, compile_ = [], torch.nn.Module.compile

    def backend(graph, inputs):
        found.append(graph)
        return aot_eager(graph, inputs)

    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda network, **options: compile_(network, backend=backend, **options)
    )
    monkeypatch.setattr("trainer.run.lifecycle.require_compiler", lambda device: None)
    torch._dynamo.reset()
    yield found
    torch._dynamo.reset()


@pytest.mark.slow
def test_a_compiled_run_goes_on_to_the_bit_and_its_checkpoints_are_as_ever(workplace, graphs):
    write(workplace, DADAPT, **SHORT)
    assert train.main(["--logdir", "eager"]) == 0 and not graphs
    assert train.main(["--logdir", "whole", "--compile"]) == 0
    traced = len(graphs)
    assert traced > 0
    assert train.main(["--compile", "--stop_after_steps", "2"]) == 0
    assert train.main(["--compile", "--resume_ckpt", "findlast"]) == 0
    eager, whole = (next((workplace / name).iterdir()) for name in ("eager", "whole"))
    stopped, last = run_of(workplace), "last-tiny-ep01-gs00003"
    same_run(*(run / "ckpts" / last for run in (whole, stopped)))
    for tag in ("loss/log_step", "loss/stabilize-train"):
        assert scalars(whole)[tag] == scalars(stopped)[tag] == pytest.approx(scalars(eager)[tag], rel=1e-4)
    for file in ("unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        names = [set(safe_open(run / "ckpts" / last / file, "pt").keys()) for run in (eager, whole)]
        assert names[0] == names[1] and not any("_orig_mod" in name for name in names[1])


def test_a_run_that_was_not_compiled_is_not_continued_by_one_that_is(workplace, graphs, capsys):
    write(workplace, DADAPT, **SHORT)
    assert train.main(["--stop_after_steps", "1"]) == 0
    assert train.main(["--compile", "--resume_ckpt", "findlast"]) == 2
    assert "compile was False, and is True now" in capsys.readouterr().err and not graphs


def test_each_shape_is_traced_by_itself_and_nothing_beside_training(graphs):
    networks, objective, optimizers = _setup("adamw")
    others, _, eager = _setup("adamw")
    for pair in (networks, others):
        pair.text_encoder.train()
        pair.text_encoder.activation_checkpointing_enable({"use_reentrant": False})
    names = list(networks.text_encoder.state_dict())
    compiled.compile_networks([networks.text_encoder])
    assert list(networks.text_encoder.state_dict()) == names
    counts = []
    for step, images in enumerate((2, 3, 2, 3)):
        inputs = objective.draw(_batch(range(images), step))
        loss = train_step([inputs], networks, objective, optimizers, step=step, images=images).loss
        torch.testing.assert_close(
            loss, train_step([inputs], others, objective, eager, step=step, images=images).loss
        )
        counts.append(len(graphs))
    assert 0 < counts[0] < counts[1] == counts[3], "once for each shape"
    with torch.no_grad(), compiled.uncompiled():
        objective.losses(networks, objective.draw(_batch(range(4))))
    assert len(graphs) == counts[-1]


def test_where_no_compiler_works_a_sentence_says_so(workplace, monkeypatch, capsys):
    write(workplace, DADAPT, **SHORT, compile=True)
    with torch._dynamo.config.patch(disable=True):
        assert train.main([]) == 2
    error = capsys.readouterr().err
    assert (
        "compile: torch.compile does not work here (TORCH_COMPILE_DISABLE is set); install a C++ compiler"
        in error
    )
    assert not (workplace / "logs").exists()

    def broken(*args, **kwargs):
        raise OSError("cl.exe is\nnot found")

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(UserError, match=r"does not work here \(cl.exe is not found\)"):
        compiled.require_compiler(torch.device("cpu"))


@pytest.mark.slow
def test_a_compiled_run_stops_its_text_encoder_to_the_bit(workplace, graphs):
    settings = {"stop_textenc_after_n_epochs": 0.5, "cond_dropout": 0, "shuffle_tags": True}
    write(workplace, DADAPT, **SHORT, **settings)
    for number in range(5):
        (workplace / f"pictures/{number}.txt").write_text("a red circle, one, two, three")
    assert train.main(["--logdir", "whole", "--compile"]) == 0
    assert train.main(["--compile", "--stop_after_steps", "2"]) == 0
    assert train.main(["--compile", "--resume_ckpt", "findlast"]) == 0
    whole, stopped = next((workplace / "whole").iterdir()), run_of(workplace)
    same_run(*(run / "ckpts/last-tiny-ep01-gs00003" for run in (whole, stopped)))


@pytest.mark.slow
def test_a_text_encoder_compiled_for_the_cpu_trains_the_same():
    compiled.require_compiler(torch.device("cpu"))
    losses = []
    for compiles in (True, False):
        networks, objective, optimizers = _setup("adamw")
        networks.text_encoder.train()
        if compiles:
            compiled.compile_networks([networks.text_encoder])
        for step in range(2):
            result = train_step(
                [objective.draw(_batch(range(2), step))], networks, objective, optimizers, step=step, images=2
            )
            losses.append([float(result.loss), *map(float, result.norms.values())])
    assert losses[:2] == [pytest.approx(numbers, rel=1e-4) for numbers in losses[2:]]
