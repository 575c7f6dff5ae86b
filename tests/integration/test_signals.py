"""A run that is asked to end keeps every step, says how to go on, and goes on as if it had not been asked."""

import os
import signal
import time

import psutil
import pytest

import train
from scripts.torture import started, torture
from tests.runs import COMMAND, DADAPT, run_of, same_run, scalars, unbroken, uncut, write
from trainer.checkpoints.format import resume_problem
from trainer.checkpoints.listing import checkpoints
from trainer.reporting.console import Console
from trainer.training.signals import TOGETHER, Interrupted, StopSignals

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows cannot send itself these signals")

SETTINGS = {"max_epochs": 2, "sample_steps": 4, "fixed_loss_images": 1, "save_every_n_epochs": 1}


@pytest.fixture(scope="module", autouse=True)
def signals_are_heard():
    """Let signals have their meaning: nohup and background shells ignore some, which runs pass on."""
    handlers = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: signal.SIG_DFL,
        signal.SIGHUP: signal.SIG_DFL,
    }
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def curves(run):
    return {tag: steps for tag, steps in scalars(run).items() if not tag.startswith("performance/")}


def at_call(monkeypatch, place, number, count):
    """Send this process a signal when `place`, a function's dotted name, is called for the count-th time."""
    import importlib

    owner, _, name = place.rpartition(".")
    module, _, kind = owner.partition(":")
    home = importlib.import_module(module)
    home = getattr(home, kind) if kind else home
    real, calls = getattr(home, name), []

    def called(*arguments, **keywords):
        calls.append(1)
        if len(calls) == count:
            os.kill(os.getpid(), number)
        return real(*arguments, **keywords)

    monkeypatch.setattr(home, name, called)


@pytest.mark.parametrize(
    ("number", "code", "place", "count", "checkpoint"),
    [
        (signal.SIGTERM, 143, "trainer.training.loop.train_step", 4, "interrupted-tiny-ep02-gs00004"),
        (
            signal.SIGINT,
            130,
            "trainer.evaluation.fixed_noise:FixedLoss.measure",
            3,
            "interrupted-tiny-ep02-gs00006",
        ),
        (
            signal.SIGTERM,
            143,
            "trainer.evaluation.sampling:Drawing.images",
            2,
            "interrupted-tiny-ep02-gs00004",
        ),
        (signal.SIGINT, 130, "trainer.checkpoints.artifact.save_diffusers", 1, "tiny-ep01-gs00003"),
        (signal.SIGHUP, 129, "data.loader:StepLoader.steps", 2, "interrupted-tiny-ep02-gs00004"),
    ],
    ids=["step", "fixed loss", "samples", "saving", "reading"],
)
def test_the_first_signal_saves_and_the_run_goes_on_to_the_bit(
    workplace, monkeypatch, capsys, number, code, place, count, checkpoint
):
    write(workplace, DADAPT, **SETTINGS)
    with monkeypatch.context() as patch:
        at_call(patch, place, number, count)
        assert train.main([]) == code
    told = capsys.readouterr()
    run = run_of(workplace)
    assert checkpoints(run)[0].name == checkpoint and resume_problem(checkpoints(run)[0]) is None
    assert (run / "ckpts" / f"{checkpoint}.safetensors").is_file()
    assert f"Resume with: {COMMAND} --resume_ckpt logs/{run.name}" in unbroken(told.out)
    assert f"Stopped by {number.name}." in told.err

    assert train.main(["--resume_ckpt", str(run)]) == 0
    whole = uncut(workplace)
    same_run(*(each / "ckpts" / "last-tiny-ep02-gs00006" for each in (whole, run)))
    assert curves(whole) == curves(run)
    pictures = [sorted(path.name for path in (each / "samples").iterdir()) for each in (whole, run)]
    assert pictures[0] == pictures[1], "samples that a signal broke off are drawn when the run goes on"


@pytest.mark.parametrize(
    "place",
    [
        "trainer.models.load._base",
        "trainer.training.latent_cache._encode",
        "trainer.run.saved.OptimizerSet",
        "trainer.run.announce.show_data",
        "trainer.evaluation.fixed_noise:FixedLoss.measure",
        "trainer.evaluation.sampling:Drawing.images",
    ],
)
def test_a_signal_before_the_first_step_leaves_nothing(workplace, monkeypatch, capfd, place):
    write(workplace, DADAPT, **SETTINGS)
    at_call(monkeypatch, place, signal.SIGTERM, 1)
    assert train.main([]) == 143
    told = capfd.readouterr()
    assert "Stopped by SIGTERM." in told.err and "saving a checkpoint" not in told.err
    assert not list((workplace / "logs").glob("tiny*"))
    assert "logs/tiny" not in told.out.replace("logs/tiny-<time>", "") and "Run folder:" not in told.out, (
        "no path that is not there"
    )


def test_an_error_before_the_first_step_leaves_nothing(workplace, monkeypatch, capsys):
    write(workplace, DADAPT, **SETTINGS)

    def train_step(*arguments, **keywords):
        raise RuntimeError("a bug")

    monkeypatch.setattr("trainer.training.loop.train_step", train_step)
    with pytest.raises(RuntimeError, match="a bug"):
        train.main([])
    assert not list((workplace / "logs").glob("tiny*")) and "Run folder:" not in capsys.readouterr().out


def test_a_signal_before_the_first_step_of_a_continued_run_changes_nothing(workplace, monkeypatch, capsys):
    write(workplace, DADAPT, **SETTINGS)
    assert train.main(["--stop_after_steps", "2"]) == 0
    before = sorted(run_of(workplace).glob("ckpts/*"))
    at_call(monkeypatch, "trainer.training.loop.make_steps", signal.SIGINT, 1)
    assert train.main(["--resume_ckpt", "findlast"]) == 130
    assert sorted(run_of(workplace).glob("ckpts/*")) == before
    assert "Traceback" not in capsys.readouterr().err


def test_handlers_are_given_back(workplace, no_estimate):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    assert train.main(["--check"]) == 0
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before


def test_ctrl_break_of_windows_is_met_like_ctrl_c(monkeypatch, capfd):
    """Another signal plays SIGBREAK, which only Windows has."""
    monkeypatch.setattr(signal, "SIGBREAK", signal.SIGUSR1, raising=False)
    before = signal.getsignal(signal.SIGUSR1)
    with StopSignals() as signals, pytest.raises(Interrupted) as stopped, signals.deferred():
        os.kill(os.getpid(), signal.SIGUSR1)
        assert signals.requested == signal.SIGUSR1, "it is noted, and nothing more"
        signals.check()
    assert stopped.value.exit_code == 128 + signal.SIGUSR1
    assert "SIGUSR1: stopping after this step and saving a checkpoint" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGUSR1) == before


def wait_for(words, output, seconds=120):
    end = time.monotonic() + seconds
    while not output.exists() or words not in output.read_text():
        assert time.monotonic() < end, (
            f"{words} did not appear: {output.read_text() if output.exists() else ''}"
        )
        time.sleep(0.01)


def test_the_second_signal_ends_it_at_once(workplace):
    (workplace / "pictures" / "multiply.txt").write_text("40")  # one step an epoch, of two hundred passes
    write(
        workplace,
        DADAPT,
        **SETTINGS | {"max_epochs": 3, "log_step": 1, "sample_steps": 100},
        batch_size=1,
        grad_accum=200,
    )
    output = workplace / "out.txt"
    process = started([], output)
    wait_for("step 1: saved", output)
    time.sleep(0.2)
    os.kill(process.pid, signal.SIGINT)
    wait_for("SIGINT: stopping after this step", output)
    os.kill(process.pid, signal.SIGINT)  # as a launcher and the terminal send it together
    time.sleep(TOGETHER + 0.1)
    assert process.is_alive(), "the first one waits for the step, and two at once are one"
    os.kill(process.pid, signal.SIGINT)
    process.join(30)
    assert process.exitcode == 130 and "step 2/3" not in output.read_text()
    found = checkpoints(run_of(workplace))
    assert [path.name for path in found] == ["tiny-ep01-gs00001"] and resume_problem(found[0]) is None
    assert "Stopped at once" in output.read_text()


def test_a_signal_to_every_process_does_not_cost_the_workers(workplace):
    write(
        workplace, DADAPT, **SETTINGS | {"max_epochs": 200, "log_step": 1}, num_workers=2, cache_latents="no"
    )
    output = workplace / "out.txt"
    process = started([], output)
    wait_for("step 2/", output)
    workers = psutil.Process(process.pid).children()
    assert len(workers) >= 2
    for each in (*workers, process):  # as a scheduler or a service manager does
        os.kill(each.pid, signal.SIGTERM)
    process.join(60)
    assert process.exitcode == 143, output.read_text()
    assert "Traceback" not in output.read_text()
    assert checkpoints(run_of(workplace))[0].name.startswith("interrupted-tiny")
    assert not psutil.wait_procs(workers, timeout=10)[1], "no worker outlives the run"


def test_five_kills_at_random_moments_lose_nothing(workplace):
    """scripts/torture.py in small; its two hundred are in docs/evidence.md."""
    write(workplace, DADAPT, **SETTINGS | {"max_epochs": 3, "sample_steps": 100}, keep_last_n=2)
    tally = torture([], workplace / "torture", kills=5, seed=1)
    print(tally)
    assert tally.kills == 5 and tally.while_saving >= 1 and tally.runs >= 1


def test_a_closed_terminal_does_not_end_the_training(tmp_path):
    reading, writing = os.pipe()
    with os.fdopen(writing, "w") as stream:
        console = Console(stream=stream)
        console.record_to(tmp_path / "run.log")
        console.event("seen")
        assert os.read(reading, 100) == b"seen\n"
        os.close(reading)
        for number in range(3):
            console.event(f"unseen {number}")
    assert (tmp_path / "run.log").read_text().count("seen") == 4
