"""A run that was stopped and continued is the run that was not: weights, state and curves to the bit."""

import json
import re
import shutil

import pytest

import train
from data.atomic import WINDOWS
from tests.runs import ADAMW, COMMAND, DADAPT, run_of, same_run, scalars, unbroken, uncut, write
from tests.unit.trainer.checkpoints.test_lock import held
from trainer.checkpoints.listing import checkpoints, single_files
from trainer.checkpoints.lock import LOCK
from trainer.checkpoints.run_folder import MARKER
from trainer.config import load_config
from trainer.config.schema import optimizer_classes
from trainer.planning.resume import joined, resume_words

LAST = "last-tiny-ep02-gs00006"
SHORT = {
    "max_epochs": 2,
    "fixed_loss_images": 1,
    "first_samples": False,
    "save_every_n_epochs": None,
    "save_format": "diffusers",
}
ROWS = [
    ("dadapt_adam", 1, {"num_workers": 2, "mixed_precision": "bf16", "cache_latents": "no"}),
    (
        "dadapt_adam8bit",
        2,
        {"num_workers": 0, "grad_accum": 2, "batch_size": 1, "cache_latents": "disk", "cache_dir": "kept"},
    ),
    ("adamw8bit", 3, {"num_workers": 2, "channels_last": True, "mixed_precision": "bf16"}),
    (
        "adamw",
        4,
        {
            "num_workers": 0,
            "gradient_checkpointing": True,
            "clip_grad_norm": 0.5,
            "cache_latents": "no",
            "tag_dropout": 0.5,
        },
    ),
]
"""Optimizer, last step before the stop, settings. Epochs have three steps, one of a single image."""


def curves(run):
    return {tag: steps for tag, steps in scalars(run).items() if not tag.startswith("performance/")}


def stopped_and_whole(workplace, stops, workers=None):
    """Run once without and once with stops; assert that both runs are the same, and return their folders."""
    for place, stop in enumerate([*stops, None]):
        resume = ["--resume_ckpt", "findlast"] if place else []
        processes = ["--num_workers", str(workers[place])] if workers else []
        assert train.main([*resume, *processes, *(["--stop_after_steps", str(stop)] if stop else [])]) == 0
    whole, stopped = uncut(workplace), run_of(workplace)
    assert len(list((workplace / "logs").iterdir())) == 1, "a continued run stays in its folder"
    assert curves(whole) == curves(stopped)
    name = checkpoints(whole)[0].name
    same_run(*(run / "ckpts" / name for run in (whole, stopped)))
    return whole, stopped


def test_a_run_with_everything_continues_to_the_bit(workplace):
    write(workplace, DADAPT, log_step=2, sample_steps=4)
    _, stopped = stopped_and_whole(workplace, [4, 6, 8])
    found = curves(stopped)
    assert list(found["loss/log_step"]) == [1, 2, 4, 6, 8, 9] and list(found["loss/epoch"]) == [3, 6, 9]
    assert list(found["loss/stabilize-train"]) == [0, 3, 6, 9]


@pytest.mark.parametrize(("optimizer", "stop", "settings"), ROWS, ids=[row[0] for row in ROWS])
def test_optimizers_places_and_settings_continue_to_the_bit(workplace, optimizer, stop, settings):
    write(
        workplace,
        {"base": {"optimizer": optimizer, "lr_scheduler": "cosine", "lr_warmup_steps": 2}},
        **SHORT,
        **settings,
    )
    stopped_and_whole(workplace, [stop])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("latents", "workers"),
    [("no", [0, 2, 0, 2]), ("memory", [2, 0, 2, 0])],
    ids=["encoded in each step", "kept"],
)
@pytest.mark.parametrize("optimizer", optimizer_classes())
def test_every_optimizer_continues_to_the_bit_from_everywhere(workplace, optimizer, latents, workers):
    """At an epoch's end, in the middle of one and before its last step, which has one image: with either way
    of coming by latents, and each of these with and without workers before and after."""
    write(workplace, {"base": {"optimizer": optimizer}}, **SHORT, num_workers=0, cache_latents=latents)
    stopped_and_whole(workplace, [3, 4, 5], workers)


def test_wildcards_continue_to_the_bit_and_measurements_take_the_first_alternative(workplace):
    for number in range(5):
        (workplace / f"pictures/{number}.txt").write_text("a {red|blue, big} circle, {x|y}")
    (workplace / "validation.json").write_text(json.dumps({"auto_split_proportion": 0.3}))
    frozen = {
        "disable_textenc_training": True,
        "cache_latents": "memory",
        "validation_config": "validation.json",
        "cache_dir": "kept",
    }
    write(workplace, ADAMW, **SHORT | {"fixed_loss_images": 2, "max_epochs": 4}, **frozen, wildcards=True)
    whole, _ = stopped_and_whole(workplace, [1, 3])
    drawn = scalars(whole)
    for number in range(5):
        (workplace / f"pictures/{number}.txt").write_text("a red circle, x")
    assert train.main(["--logdir", "first", "--wildcards", "false"]) == 0
    (plain,) = map(scalars, (workplace / "first").iterdir())
    for tag in ("loss/stabilize-train", "loss/val"):
        assert drawn[tag][0] == pytest.approx(plain[tag][0], rel=1e-5)
    assert drawn["loss/log_step"] != plain["loss/log_step"]


def test_one_step_is_the_same_however_it_is_cut(workplace, capsys):
    """8 images at once, 4 and 4, or 8 times one: the same losses but for the order of sums."""
    losses = []
    for batch_size, grad_accum in ((8, 1), (4, 2), (1, 8)):
        write(
            workplace,
            ADAMW,
            **SHORT | {"max_epochs": 4, "log_step": 1},
            batch_size=batch_size,
            grad_accum=grad_accum,
        )
        assert train.main(["--logdir", f"logs{batch_size}"]) == 0
        losses.append(scalars(next((workplace / f"logs{batch_size}").iterdir()))["loss/log_step"])
    assert len(losses[0]) == 4
    assert losses[1] == {step: pytest.approx(loss, rel=1e-5) for step, loss in losses[0].items()}
    assert losses[2] == {step: pytest.approx(loss, rel=1e-5) for step, loss in losses[0].items()}

    write(workplace, ADAMW, **SHORT | {"max_epochs": 4, "log_step": 1}, batch_size=4, grad_accum=2)
    assert train.main(["--stop_after_steps", "2"]) == 0
    assert train.main(["--resume_ckpt", "findlast", "--batch_size", "1", "--grad_accum", "8"]) == 0
    assert "Changed: batch_size: 4 -> 1" in capsys.readouterr().out
    assert scalars(run_of(workplace))["loss/log_step"] == {
        step: pytest.approx(loss, rel=1e-5) for step, loss in losses[0].items()
    }


def test_a_seed_that_was_drawn_is_kept(workplace, capsys):
    write(workplace, ADAMW, **SHORT)
    assert train.main(["--seed", "-1", "--stop_after_steps", "2"]) == 0
    drawn = json.loads((run_of(workplace) / "train.json").read_text())["seed"]
    assert train.main(["--seed", "-1", "--resume_ckpt", "findlast"]) == 0
    assert "Changed" not in capsys.readouterr().out
    assert json.loads((run_of(workplace) / "train.json").read_text())["seed"] == drawn != -1


def test_what_has_changed_is_told_and_the_configuration_counts(workplace, no_estimate, capsys):
    write(workplace, ADAMW, **SHORT)
    assert train.main(["--stop_after_steps", "4"]) == 0
    changed = {"base": {**ADAMW["base"], "weight_decay": 0.5}}
    write(workplace, changed, **SHORT | {"max_epochs": 3, "log_step": 1}, lr=2e-3)
    assert train.main(["--resume_ckpt", str(run_of(workplace)), "--check"]) == 0
    wanted = [
        "max_epochs: 2 -> 3",
        "log_step: 2 -> 1",
        "base.lr: 0.001 -> 0.002",
        "base.weight_decay: 0.01 -> 0.5",
    ]
    out = capsys.readouterr().out
    assert all(f"Changed: {change}" in out for change in wanted), out
    assert train.main(["--resume_ckpt", "findlast"]) == 0
    out = capsys.readouterr().out
    assert f"outputs      {run_of(workplace).relative_to(workplace)}\n" in out, (
        "the folder that is written to"
    )
    assert all(f"Changed: {change}" in out for change in wanted), out
    assert (
        "Changed: the run has 9 steps instead of 6, over which cosine stretches: "
        "the rate of the unet continues at" in out
    )
    assert "seed" not in out.partition("Going on")[2].partition("step 5")[0], (
        "what has not changed is not told"
    )
    assert checkpoints(run_of(workplace))[0].name == "last-tiny-ep03-gs00009"
    assert scalars(run_of(workplace))["lr/unet"][5] > 1e-3, "the new rate acts"
    saved = json.loads((run_of(workplace) / "optimizer.json").read_text())
    assert saved["base"]["weight_decay"] == 0.5


@pytest.mark.parametrize(("now", "changed"), [(2, False), (1, True)])
def test_a_clip_skip_of_an_earlier_version_keeps_its_meaning(
    workplace, monkeypatch, no_estimate, capsys, now, changed
):
    """Format 1 counted the penultimate layer as 1; its checkpoints are read as 2, others unchanged."""
    with monkeypatch.context() as earlier:
        for module in ("trainer.planning.resume", "trainer.config.resolved"):
            earlier.setattr(f"{module}.FORMAT", 1)
        write(workplace, ADAMW, **SHORT, clip_skip=1)
        assert train.main(["--stop_after_steps", "2"]) == 0
    written = run_of(workplace) / "train.json"
    old = {key: value for key, value in json.loads(written.read_text()).items() if key != "_format"}
    written.write_text(json.dumps(old))

    loaded = load_config(["--config", str(written), "--resume_ckpt", str(run_of(workplace))])
    assert loaded.config.objective.clip_skip == 2
    assert any("clip_skip: the 1 of an earlier version's run is read as 2" in note for note in loaded.notes)

    write(workplace, ADAMW, **SHORT, clip_skip=now)
    assert load_config([]).config.objective.clip_skip == now
    capsys.readouterr()
    assert train.main(["--resume_ckpt", "findlast", "--stop_after_steps", "4"]) == 0
    out = capsys.readouterr().out
    assert "clip_skip: the run started with 1, which is 2 now" in out
    assert ("Changed: clip_skip: 2 -> 1" in out) == changed
    assert load_config(["--config", str(written)]).config.objective.clip_skip == now, (
        "the run's file is of today's format"
    )
    assert train.main(["--resume_ckpt", "findlast", "--check"]) == 0
    assert "the run started with" not in capsys.readouterr().out


def test_continuing_with_other_data_or_another_optimizer_is_refused_and_weights_only_is_the_way_out(
    workplace, capsys
):
    write(workplace, DADAPT, **SHORT)
    assert train.main(["--stop_after_steps", "2"]) == 0
    first = run_of(workplace)
    before = {path: path.stat().st_mtime_ns for path in first.rglob("*") if path.is_file()}

    write(workplace, ADAMW | {"text_encoder_freezing": {"freeze_front_n_layers": 2}}, **SHORT)
    assert train.main(["--resume_ckpt", "findlast"]) == 2
    error = capsys.readouterr().err
    assert (
        "--resume_weights_only" in error
        and "the optimizer of the unet was dadapt_adam, and is adamw now" in error
    )
    write(workplace, {"base": DADAPT["base"]}, **SHORT)
    assert train.main(["--resume_ckpt", "findlast"]) == 2
    assert "what learns of the text encoder was" in capsys.readouterr().err
    write(workplace, DADAPT, **SHORT)
    (workplace / "pictures" / "4.txt").write_text("something else")
    for more in ([], ["--check"]):
        assert train.main(["--resume_ckpt", "findlast", "--seed", "8", *more]) == 2
        error = capsys.readouterr().err
        assert "the images or captions have changed" in error and "seed was 7, and is 8 now" in error
    assert before == {path: path.stat().st_mtime_ns for path in first.rglob("*") if path.is_file()}, (
        "a refusal changes nothing"
    )

    write(workplace, ADAMW, **SHORT)
    assert train.main(["--resume_ckpt", "findlast", "--resume_weights_only", "--seed", "8"]) == 0
    second = run_of(workplace)
    assert second != first and (second / "ckpts" / LAST).is_dir()
    assert json.loads((second / "train.json").read_text())["resume_ckpt"] == "findlast"
    assert before == {path: path.stat().st_mtime_ns for path in first.rglob("*") if path.is_file()}


def test_a_finished_run_does_nothing_more_unless_epochs_are_added(workplace, capsys):
    write(workplace, DADAPT, **SHORT)
    assert train.main([]) == 0
    command = f"{COMMAND} --resume_ckpt logs/{run_of(workplace).name} --max_epochs 4 Rate:"
    assert f"To train on, raise max_epochs (it is 2): {command}" in unbroken(capsys.readouterr().out)
    saved = (run_of(workplace) / "ckpts" / LAST / "manifest.json").read_bytes()
    assert train.main(["--resume_ckpt", "findlast", "--max_epochs", "1"]) == 0
    assert "--max_epochs 4 Rate:" in unbroken(capsys.readouterr().out), "2 epochs have been trained already"
    assert train.main(["--resume_ckpt", "findlast"]) == 0
    assert "Done: 6 steps" in capsys.readouterr().out
    assert (run_of(workplace) / "ckpts" / LAST / "manifest.json").read_bytes() == saved
    assert train.main(["--resume_ckpt", "findlast", "--max_epochs", "3", "--stop_after_steps", "3"]) == 0
    assert "Stopped after step 6 of 9" in capsys.readouterr().out, (
        "a step that has been made is not made again"
    )


def test_a_run_that_is_out_of_time_saves_and_goes_on_to_the_bit(workplace, capsys):
    """The time counts over all starts: with the same limit the second one trains nothing."""
    write(workplace, ADAMW, **SHORT, log_step=2)
    for steps in (1, 1):
        capsys.readouterr()
        assert (
            train.main(
                [
                    "--max_train_time",
                    "1e-9",
                    *(["--resume_ckpt", "findlast"] if (workplace / "logs").exists() else []),
                ]
            )
            == 0
        )
        out = capsys.readouterr().out
        assert (
            f"Stopped after step {steps} of 6 by max_train_time: " in out
            and "--max_train_time" not in out.split("Resume with:")[1]
        )
    assert train.main(["--resume_ckpt", "findlast", "--max_train_time", "60"]) == 0
    assert "Changed: max_train_time" not in capsys.readouterr().out
    whole, stopped = uncut(workplace), run_of(workplace)
    assert curves(whole) == curves(stopped)
    same_run(*(run / "ckpts" / LAST for run in (whole, stopped)))


def test_a_damaged_checkpoint_is_passed_over_and_named(workplace, no_estimate, capsys):
    write(workplace, DADAPT, **SHORT | {"save_every_n_epochs": 1})
    assert train.main([]) == 0
    newest, older = checkpoints(run_of(workplace))
    weights = newest / "unet" / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    problem = "diffusion_pytorch_model.safetensors: the file is not what the checkpoint's manifest says"
    assert train.main(["--resume_ckpt", str(newest)]) == 2
    error = capsys.readouterr().err
    assert problem in error and f"To resume its run from {older}, set --resume_ckpt {older}." in error
    for more in (["--check"], ["--stop_after_steps", "4"]):
        assert train.main(["--resume_ckpt", "findlast", *more]) == 0
        out = capsys.readouterr().out
        assert re.search(f"Note: .*{re.escape(problem)}; {older.name} is used instead", out)
    assert f"Resuming after step 3 in logs/{older.parent.parent.name}." in out


def test_a_run_s_single_file_starts_a_new_run_and_a_note_says_how_to_resume(workplace, no_estimate, capsys):
    write(workplace, DADAPT, **SHORT | {"save_format": "both"})
    assert train.main(["--stop_after_steps", "1"]) == 0
    run = run_of(workplace)
    file = next((run / "ckpts").glob("*.safetensors"))
    for path in (file, shutil.copy(file, workplace)):
        capsys.readouterr()
        assert train.main(["--resume_ckpt", str(path), "--check"]) == 0
        place = run if path == file else run.relative_to(workplace)
        note = (
            f"Note: resume_ckpt: {file.name} starts a new run from these weights; to resume theirs, "
            f"name the run's folder, {place}\n"
        )
        assert note in capsys.readouterr().out
    assert train.main(["--resume_ckpt", str(file), "--check", "--resume_weights_only"]) == 0
    assert "starts a new run" not in capsys.readouterr().out


def test_findlast_takes_the_work_that_went_on_from_an_older_checkpoint(workplace, capsys):
    settings = {"max_epochs": 3, "save_every_n_epochs": 1, "save_format": "both", "keep_last_n": 3}
    write(workplace, DADAPT, **SHORT | settings, keep_resume_n=3)
    assert train.main([]) == 0
    run = run_of(workplace)
    last, _, older = checkpoints(run)
    was = {path: path.read_bytes() for path in last.rglob("*.safetensors")}
    capsys.readouterr()

    again = ["--resume_ckpt", str(older), "--keep_resume_n", "1", "--keep_last_n", "2"]
    assert train.main([*again, "--stop_after_steps", "4"]) == 0
    out = capsys.readouterr().out
    assert f"Note: {last.name} is newer than {older.name} and stays; findlast takes it until" in unbroken(out)
    newest, second = checkpoints(run)
    assert newest.name == "tiny-ep02-gs00004" and (newest / "resume").is_dir(), "what was made last is kept"
    assert second == last and not (second / "resume").is_dir()
    assert [path.stem for path in single_files(run / "ckpts", run.name)] == [newest.name, last.name]

    assert train.main(["--resume_ckpt", "findlast"]) == 0
    out = capsys.readouterr().out
    assert f"Resuming after step 4 in logs/{run.name}." in out and "is newer than" not in out
    assert checkpoints(run)[0] == last, "the same settings make the same run again"
    assert was == {path: path.read_bytes() for path in last.rglob("*.safetensors")}


def test_an_older_checkpoint_starts_a_new_run_only_if_asked_to(workplace, capsys):
    write(workplace, DADAPT, **SHORT | {"save_every_n_epochs": 1, "keep_resume_n": 1})
    assert train.main([]) == 0
    newest, older = checkpoints(run_of(workplace))
    for more in ([], ["--check"]):
        assert train.main(["--resume_ckpt", str(older), *more]) == 2
        error = capsys.readouterr().err
        assert f"{older}: the checkpoint holds no resume state" in error
        assert (
            f"--resume_ckpt {newest}." in error and f"--resume_ckpt {older} --resume_weights_only." in error
        )
    assert len(list((workplace / "logs").glob("tiny-*"))) == 1
    assert train.main(["--resume_ckpt", str(older), "--resume_weights_only", "--stop_after_steps", "1"]) == 0
    assert len(list((workplace / "logs").glob("tiny-*"))) == 2


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("place", ["models/mycheckpoint", "ckpts/mycheckpoint", "mycheckpoint"])
def test_a_copied_checkpoint_is_resumed_in_a_new_run_and_overwrites_nothing(
    workplace, no_estimate, capsys, place
):
    """As in a checkpoint copied into a project that has files of the same names in its root."""
    write(workplace, ADAMW, **SHORT)
    assert train.main(["--stop_after_steps", "4"]) == 0
    shutil.copytree(checkpoints(run_of(workplace))[0], workplace / place)
    shutil.rmtree(workplace / "logs")
    (workplace / "metrics.jsonl").write_text('{"step": 5, "mine": 1}\n')
    before = files(workplace)
    capsys.readouterr()
    assert train.main(["--resume_ckpt", place, "--check"]) == 0
    sentence = (
        f"Note: {workplace / place} lies outside the folder of its run, "
        "so the resumed run gets a new one in logs\n"
    )
    assert sentence in capsys.readouterr().out and files(workplace) == before
    assert train.main(["--resume_ckpt", place]) == 0
    run = run_of(workplace)
    assert (
        sentence in (out := capsys.readouterr().out) and f"Resuming after step 4 in logs/{run.name}." in out
    )
    assert {path: content for path, content in files(workplace).items() if run not in path.parents} == before
    same_run(run / "ckpts" / LAST, uncut(workplace) / "ckpts" / LAST)


def test_a_run_from_before_the_marker_and_one_that_was_moved_are_resumed_in_their_folders(workplace, capsys):
    write(workplace, ADAMW, **SHORT)
    assert train.main(["--stop_after_steps", "2"]) == 0
    run = run_of(workplace)
    (run / MARKER).unlink()
    assert train.main(["--resume_ckpt", "findlast", "--stop_after_steps", "3"]) == 0
    assert (
        f"Resuming after step 2 in logs/{run.name}." in capsys.readouterr().out and (run / MARKER).is_file()
    )
    moved = run.rename(workplace / "my best run")
    assert train.main(["--resume_ckpt", "my best run", "--stop_after_steps", "4"]) == 0
    assert f"Resuming after step 3 in {moved.relative_to(workplace)}." in capsys.readouterr().out
    assert not list((workplace / "logs").iterdir())


@pytest.mark.parametrize("how", ["findlast", "run", "checkpoint"])
def test_a_run_that_another_process_writes_to_is_refused_and_not_touched(workplace, capsys, how):
    """Its draft and the checkpoint that it is replacing, above all; weights may be read."""
    write(workplace, ADAMW, **SHORT)
    assert train.main(["--stop_after_steps", "2"]) == 0
    run = run_of(workplace)
    checkpoint = checkpoints(run)[0]
    for name in (".draft-tiny-ep01-gs00003", ".replaced-tiny-ep01-gs00002"):
        (run / "ckpts" / name).mkdir()
    named = {"findlast": "findlast", "run": str(run), "checkpoint": str(checkpoint)}[how]
    with held(run) as process:
        before = files(workplace) | {path: b"" for path in run.rglob("*") if path.is_dir()}
        assert train.main(["--resume_ckpt", named]) == 2
        assert f"{run} is in use by process {process.pid} on " in capsys.readouterr().err
        assert files(workplace) | {path: b"" for path in run.rglob("*") if path.is_dir()} == before
        assert (
            train.main(
                [
                    "--resume_ckpt",
                    str(run),
                    "--resume_weights_only",
                    "--logdir",
                    "other",
                    "--stop_after_steps",
                    "1",
                ]
            )
            == 0
        )
    assert train.main(["--resume_ckpt", named]) == 0
    assert not list((run / "ckpts").glob(".*")) and not (run / LOCK).exists()


@pytest.mark.skipif(WINDOWS, reason="links need a privilege there")
@pytest.mark.parametrize("name", ["train.json", "samples", "ckpts/.draft-x", "base"])
def test_a_run_folder_with_a_link_that_leads_outside_is_not_written_to(workplace, capsys, name):
    write(workplace, ADAMW, **SHORT)
    assert train.main(["--stop_after_steps", "2"]) == 0
    run = run_of(workplace)
    shutil.rmtree(run / name) if (run / name).is_dir() else (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(workplace / "pictures")
    before = files(workplace)
    assert train.main(["--resume_ckpt", "findlast"]) == 2
    assert f"{name!r} leads outside the folder, to {workplace / 'pictures'}" in capsys.readouterr().err
    assert files(workplace) == before


@pytest.mark.parametrize(
    ("arguments", "changed", "command"),
    [
        ([], {}, "python train.py --resume_ckpt logs/x"),
        (
            ["--config", "a b.json", "--lr", "-1"],
            {},
            "python train.py --config 'a b.json' --lr -1 --resume_ckpt logs/x",
        ),
        (["--resume-ckpt", "old", "--seed", "3"], {}, "python train.py --seed 3 --resume_ckpt logs/x"),
        (["--resume_ckpt=old", "--check"], {}, "python train.py --check --resume_ckpt logs/x"),
        (
            ["--stop_after_steps", "4", "--resume_weights_only"],
            {"stop_after_steps": "null"},
            "python train.py --resume_ckpt logs/x",
        ),
        (["--resume_weights_only", "true", "--no-amp"], {}, "python train.py --no-amp --resume_ckpt logs/x"),
        ([], {"stop_after_steps": "null"}, "python train.py --resume_ckpt logs/x --stop_after_steps null"),
        (["--max_train_time", "9"], {}, "python train.py --max_train_time 9 --resume_ckpt logs/x"),
        (["--base_model", "m", "--lowvram"], {}, "python train.py --lowvram --resume_ckpt logs/x"),
        (
            ["--max_epochs", "9", "--seed", "3"],
            {"max_epochs": "18"},
            "python train.py --seed 3 --resume_ckpt logs/x --max_epochs 18",
        ),
        (
            ["--stop_after_steps=2"],
            {"max_train_time": "null"},
            "python train.py --stop_after_steps=2 --resume_ckpt logs/x --max_train_time null",
        ),
    ],
)
def test_the_command_that_goes_on_is_the_one_that_began(tmp_path, arguments, changed, command):
    from pathlib import Path

    assert joined(resume_words(arguments, Path("logs/x"), changed=changed)) == command
