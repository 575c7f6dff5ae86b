"""Checkpoints are whole or absent, found by step, and rotated without harm."""

import errno
import json
import shutil

import pytest
import torch

from data.atomic import REPLACED
from trainer.checkpoints.format import (
    BRANCH,
    RUN,
    STEP,
    TrainState,
    model_problem,
    read_resume,
    resume_problem,
    save_checkpoint,
)
from trainer.checkpoints.listing import (
    branch_from,
    checkpoints,
    find_last,
    newest_of,
    require_resumable,
    rotate,
    single_files,
)
from trainer.checkpoints.options import SaveOptions
from trainer.errors import UserError
from trainer.models.tensor_file import write_tensors


def _save(run, step, *, project="demo", resume=True, branch=0):
    folder = run / "ckpts" / f"{project}-ep01-gs{step:05d}"

    def write_model(path):
        (path / "unet").mkdir()
        (path / "unet" / "weights.bin").write_bytes(b"w" * step)

    def write_resume(path):
        (path / "optimizers.json").write_text(str(step))

    save_checkpoint(
        folder,
        write_model=write_model,
        write_resume=write_resume if resume else None,
        state=TrainState(step=step, epoch=1),
        about={"project": project, "same": {"seed": 1}, "config": {}, "total_steps": 9},
        branch=branch,
    )
    return folder


def test_round_trip(tmp_path):
    folder = _save(tmp_path / "demo-20260101-000000", 7)
    state, about = read_resume(folder)
    assert (state.step, state.epoch, about["project"]) == (7, 1, "demo")
    assert resume_problem(folder) is None


def test_a_run_that_went_back_is_ordered_by_its_branches(tmp_path):
    run = tmp_path / "demo-20260101-000000"
    steps = [_save(run, step) for step in (3, 6, 9)]
    assert [branch_from(folder, run) for folder in steps] == [(1, steps[2]), (1, steps[2]), (0, None)]
    assert "branch" not in json.loads((steps[0] / "manifest.json").read_text()), "as ever without branches"
    back = _save(run, 4, branch=1)
    assert checkpoints(run) == [back, *reversed(steps)]
    assert find_last(tmp_path, "demo")[0] == newest_of(run)[0] == back
    assert branch_from(back, run) == (1, None) and branch_from(steps[2], run) == (2, back)
    rotate(run, SaveOptions(keep_resume_n=1, keep_last_n=2), run / "ckpts")
    assert checkpoints(run) == [back, steps[2]] and (back / "resume").is_dir()


@pytest.mark.parametrize("state", [None, [], "x", {"step": None}])
def test_counters_that_are_none_are_refused(tmp_path, state):
    folder = _save(tmp_path / "demo-20260101-000000", 7)
    path = folder / "resume" / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "state": state}))
    with pytest.raises(UserError, match="the state of the run cannot be read"):
        read_resume(folder)


@pytest.mark.parametrize("place", ['"step": 1e999', '"step": 6, "branch": "x"', '"step": 6, "branch": []'])
def test_a_manifest_with_an_odd_place_leaves_the_step_in_the_name(tmp_path, place):
    run = tmp_path / "demo-20260101-000000"
    odd, whole = _save(run, 8), _save(run, 3)
    (odd / "manifest.json").write_text(f'{{"format": 2, "project": "demo", {place}, "files": {{}}}}')
    assert checkpoints(run) == [odd, whole]


def test_a_failed_write_leaves_nothing_and_keeps_the_last_good_one(tmp_path):
    run = tmp_path / "demo-20260101-000000"
    folder = _save(run, 7)

    def fail(path):
        (path / "half").write_text("half")
        raise OSError(28, "No space left on device")

    for target in (folder, run / "ckpts" / "demo-ep02-gs00009"):
        with pytest.raises(OSError, match="No space"):
            save_checkpoint(target, write_model=fail, write_resume=None, state=TrainState(step=9), about={})
    assert [path.name for path in (run / "ckpts").iterdir()] == [folder.name]
    assert resume_problem(folder) is None


def test_the_same_step_saved_again_replaces_the_folder(tmp_path):
    run = tmp_path / "demo-20260101-000000"
    folder = _save(run, 7)
    _save(run, 7)
    assert resume_problem(folder) is None
    assert [path.name for path in (run / "ckpts").iterdir()] == [folder.name]


@pytest.mark.parametrize("damage", ["truncate", "flip", "delete", "manifest", "resume"])
def test_damage_is_found_and_named(tmp_path, damage):
    folder = _save(tmp_path / "demo-20260101-000000", 7)
    weights = folder / "unet" / "weights.bin"
    if damage == "truncate":
        weights.write_bytes(b"w")
    elif damage == "flip":
        weights.write_bytes(b"x" * 7)
    elif damage == "delete":
        weights.unlink()
    elif damage == "manifest":
        (folder / "manifest.json").write_text("{")
    else:
        (folder / "resume" / "optimizers.json").write_text("8")
    said = (
        "missing"
        if damage == "delete"
        else "cannot be read"
        if damage == "manifest"
        else "not what the checkpoint's manifest says"
    )
    assert said in (resume_problem(folder) or "")
    assert (model_problem(folder) is None) == (damage == "resume")
    with pytest.raises(UserError, match=said):
        newest_of(folder.parent.parent)


def test_a_file_that_cannot_be_read_is_damage_with_its_reason(tmp_path, monkeypatch):
    folder = _save(tmp_path / "demo-20260101-000000", 7)

    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("hashlib.file_digest", fail)
    assert "weights.bin: the file cannot be read (Input/output error)" in (resume_problem(folder) or "")


def test_state_that_is_whole_but_of_another_making_is_refused(tmp_path):
    folder = _save(tmp_path / "demo-20260101-000000", 7)
    (folder / "resume" / "state.json").write_text('{"state": {"stepp": 1}}')
    with pytest.raises(UserError, match="state of the run cannot be read"):
        read_resume(folder)


def test_findlast_takes_the_newest_runs_highest_whole_step(tmp_path):
    old, new = tmp_path / "demo-20260101-000000", tmp_path / "demo-20260102-000000"
    _save(old, 900)
    wanted = _save(new, 9)
    broken = _save(new, 100)
    (broken / "unet" / "weights.bin").unlink()
    _save(tmp_path / "other-20260103-000000", 5, project="other")
    _save(tmp_path / "demo-two-20260103-000000", 5, project="demo-two")
    (tmp_path / "demo-20260104-000000").mkdir()
    found, damaged = find_last(tmp_path, "demo")
    assert found == wanted and len(damaged) == 1 and str(broken / "unet" / "weights.bin") in damaged[0]


def test_findlast_without_a_checkpoint_says_what_it_looked_at(tmp_path):
    broken = _save(tmp_path / "demo-20260102-000000", 100)
    (broken / "unet" / "weights.bin").unlink()
    with pytest.raises(UserError) as error:
        find_last(tmp_path, "demo")
    assert "1 run looked at" in error.value.problems[0] and "weights.bin" in error.value.problems[1]
    assert len(error.value.problems) == 2, "there are no weights to offer"


def test_findlast_without_whole_state_offers_whole_weights(tmp_path):
    run = tmp_path / "demo-20260102-000000"
    offered = _save(run, 5, resume=False)
    broken = _save(run, 9)
    (broken / "unet" / "weights.bin").unlink()
    for find in (lambda: find_last(tmp_path, "demo"), lambda: newest_of(run)):
        with pytest.raises(UserError) as error:
            find()
        assert error.value.problems[-1].endswith(f"set --resume_ckpt {offered} --resume_weights_only.")


@pytest.mark.parametrize("name", ["manifest.json", "resume/manifest.json", "resume"])
def test_a_checkpoint_that_lost_part_of_itself_is_passed_over_by_name(tmp_path, name):
    run = tmp_path / "demo-20260102-000000"
    wanted, lost = _save(run, 5), _save(run, 9) / name
    shutil.rmtree(lost) if lost.is_dir() else lost.unlink()
    found, damaged = find_last(tmp_path, "demo")
    assert (
        found == wanted
        and len(damaged) == 1
        and damaged[0].startswith(str(run / "ckpts" / "demo-ep01-gs00009"))
    )


def test_a_checkpoint_without_resume_state_says_what_to_name_instead(tmp_path):
    run = tmp_path / "demo-20260102-000000"
    older, newer = _save(run, 5, resume=False), _save(run, 9)
    require_resumable(newer)
    with pytest.raises(UserError) as error:
        require_resumable(older)
    said = error.value.problems
    assert "holds no resume state" in said[0] and said[1].endswith(f"set --resume_ckpt {newer}.")
    assert said[2].endswith(f"set --resume_ckpt {older} --resume_weights_only.")
    copied = shutil.copytree(older, tmp_path / "copied")
    (copied / "unet" / "weights.bin").unlink()
    with pytest.raises(UserError) as error:
        require_resumable(copied)
    assert len(error.value.problems) == 1, "neither a run to look in nor whole weights"


def test_findlast_for_weights_alone_needs_no_resume_state(tmp_path):
    run = tmp_path / "demo-20260102-000000"
    _save(run, 5)
    newer = _save(run, 9, resume=False)
    assert find_last(tmp_path, "demo")[0].name.endswith("gs00005")
    assert find_last(tmp_path, "demo", weights_only=True) == (newer, []) == newest_of(run, weights_only=True)
    _save(tmp_path / "demo-two-20260103-000000", 50, project="demo-two", resume=False)
    assert find_last(tmp_path, "demo", weights_only=True)[0] == newer


def test_of_one_step_the_checkpoint_that_was_due_comes_first(tmp_path):
    run = tmp_path / "demo-20260101-000000"
    due = _save(run, 7)
    _save(run, 7, project="interrupted-demo").rename(due.with_name("interrupted-demo-ep01-gs00007"))
    assert [path.name for path in checkpoints(run)] == ["demo-ep01-gs00007", "interrupted-demo-ep01-gs00007"]


def test_a_checkpoint_that_was_being_replaced_when_the_process_died_comes_back(tmp_path):
    run = tmp_path / "demo-20260101-000000"
    folder = _save(run, 7)
    folder.rename(folder.with_name(REPLACED + folder.name))
    assert checkpoints(run) == [folder] and resume_problem(folder) is None
    (run / "ckpts" / (REPLACED + folder.name)).mkdir()  # and where the new one was in place already, it goes
    assert checkpoints(run) == [folder]
    assert [path.name for path in (run / "ckpts").iterdir()] == [folder.name]


def test_rotation_keeps_models_and_drops_old_resume_state(tmp_path):
    run = tmp_path / "demo-20260101-000000"
    folders = [_save(run, step) for step in (5, 10, 100)]
    rotate(run, SaveOptions(), run / "ckpts")
    assert [(folder / "resume").is_dir() for folder in folders] == [False, True, True]
    assert [folder.is_dir() for folder in folders] == [True, True, True]
    rotate(run, SaveOptions(save_optimizer=True), run / "ckpts")
    assert (folders[1] / "resume").is_dir()
    rotate(run, SaveOptions(save_format="single", keep_resume_n=1), run / "ckpts")
    assert [folder.is_dir() for folder in folders] == [True, False, True], (
        "a folder kept for resuming only goes with its state"
    )
    assert [path.name for path in checkpoints(run)] == ["demo-ep01-gs00100", "demo-ep01-gs00005"]
    assert not [path for path in (run / "ckpts").iterdir() if path.name.startswith(".")]


def test_keep_last_n_deletes_this_runs_older_models_and_nothing_else(tmp_path):
    run, shelf = tmp_path / "demo-20260101-000000", tmp_path / "shelf"
    shelf.mkdir()
    folders = [_save(run, step) for step in (5, 10, 100)]
    for step, owner in ((5, run.name), (10, run.name), (100, run.name), (1, "demo-20250101-000000")):
        header = {"sd_dadapt.run": owner, "sd_dadapt.step": str(step)}
        write_tensors(shelf / f"{owner}-{step}.safetensors", {"w": torch.ones(1)}, torch.float32, header)
    write_tensors(shelf / "foreign.safetensors", {"w": torch.ones(1)}, torch.float32, {"format": "pt"})
    (shelf / "broken.safetensors").write_bytes(b"no header")
    rotate(run, SaveOptions(keep_last_n=2), shelf)
    assert [folder.is_dir() for folder in folders] == [False, True, True]
    assert [(folder / "resume").is_dir() for folder in folders[1:]] == [True, True]
    kept = {path.name for path in shelf.iterdir()}
    assert kept == {
        f"{run.name}-10.safetensors",
        f"{run.name}-100.safetensors",
        "demo-20250101-000000-1.safetensors",
    } | {
        "foreign.safetensors",
        "broken.safetensors",
    }
    assert [path.name for path in single_files(shelf, run.name)] == [
        f"{run.name}-100.safetensors",
        f"{run.name}-10.safetensors",
    ]


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        ["x"],
        {RUN: 3},
        {RUN: "run", STEP: "²"},
        {RUN: "run", STEP: "9" * 5000},
        {RUN: "run", STEP: 7},
        {RUN: "run", STEP: "3", BRANCH: "-1"},
    ],
)
def test_odd_files_of_strangers_beside_the_single_files_are_passed_over(metadata, tmp_path):
    text = json.dumps({"__metadata__": metadata}).encode()
    (tmp_path / "odd.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    (tmp_path / "deep.safetensors").write_bytes((100_000).to_bytes(8, "little") + b"[" * 100_000)
    write_tensors(tmp_path / "own.safetensors", {"w": torch.ones(1)}, torch.float32, {RUN: "run", STEP: "3"})
    assert single_files(tmp_path, "run") == [tmp_path / "own.safetensors"]


def test_an_older_format_is_named(tmp_path):
    folder = _save(tmp_path / "demo-20260101-000000", 7)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))
    assert "format 99" in (resume_problem(folder) or "")
