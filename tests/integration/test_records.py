"""Records of a whole run beside TensorBoard: metrics.jsonl and, offline, Weights & Biases."""

import json
import struct
from pathlib import Path

import pytest

import train
from tests.runs import DADAPT, run_of, scalars, write
from trainer.checkpoints.listing import checkpoints

wandb = pytest.importorskip("wandb")
wandb_internal_pb2 = pytest.importorskip("wandb.proto.wandb_internal_pb2")

QUICK = {
    "max_epochs": 2,
    "fixed_loss_images": 1,
    "save_every_n_epochs": None,
    "save_format": "diffusers",
    "log_step": 1,
}


def _lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def _steady(lines):
    """Leave out what depends on the machine's speed."""
    kept = [
        {tag: value for tag, value in line.items() if not tag.startswith("performance/")} for line in lines
    ]
    return [line for line in kept if len(line) > 1]


def _records(path):
    """Return the records of one of W&B's files: LevelDB's framing, blocks of 32 KiB with sized parts."""
    data, place, pieces = path.read_bytes(), 7, []
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        pieces.append(data[place + 7 : place + 7 + length])
        place += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            record = wandb_internal_pb2.Record()
            record.ParseFromString(b"".join(pieces))
            pieces = []
            yield record


def _key(item):
    return item.key or ".".join(item.nested_key)


@pytest.fixture
def offline(workplace, monkeypatch):
    wandb.teardown()  # it remembers the environment of whoever used it first
    monkeypatch.setenv("WANDB_MODE", "offline")
    write(workplace, DADAPT, wandb=True, **QUICK)
    yield workplace
    wandb.teardown()


def test_a_broken_off_run_is_recorded_once_and_as_one_run(offline):
    assert train.main(["--logdir", "whole", "--no-wandb"]) == 0
    assert train.main(["--stop_after_steps", "4"]) == 0
    stopped = run_of(offline)
    with (stopped / "metrics.jsonl").open("a") as file:  # as though it had gone on and been killed
        file.write('{"step": 5, "loss/log_step": 9.0}\n{"step": 6, "lo')
    assert train.main(["--resume_ckpt", "findlast"]) == 0
    whole = next((offline / "whole").iterdir())
    assert not (whole / "wandb").exists()

    lines = _lines(stopped)
    assert _steady(lines) == _steady(_lines(whole))
    recorded = {tag: curve for tag, curve in scalars(stopped).items() if "/log10 " not in tag}
    drawn = {tag: {} for tag in recorded}
    for line in lines:
        for tag, value in line.items():
            if tag != "step":
                assert line["step"] not in drawn[tag], "twice"
                drawn[tag][line["step"]] = pytest.approx(value, rel=1e-6)
    assert recorded == drawn, "the same numbers as in TensorBoard"

    files = sorted((stopped / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2 and len({path.stem for path in files}) == 1, "one run, in two parts"
    history, config, pictures = [], {}, []
    for path in files:
        for record in _records(path):
            match record.WhichOneof("record_type"):
                case "run":
                    assert (record.run.project, record.run.display_name) == ("tiny", stopped.name)
                case "history":
                    items = {_key(item): json.loads(item.value_json) for item in record.history.item}
                    history.append((record.history.step.num, items))
                case "config":
                    config |= {_key(item): json.loads(item.value_json) for item in record.config.update}
    found = {tag: {} for tag in drawn}
    for step, items in history:
        for tag, value in items.items():
            if tag in found:
                found[tag][step] = value
            elif not tag.startswith("_"):
                pictures.append((step, tag))
    assert found == drawn, "the same numbers on W&B"
    assert any(step == 0 for step, _ in pictures) and all("sample" in tag for _, tag in pictures)
    assert (
        config["config/train.json"]["max_epochs"] == 2
        and config["config/optimizer.json"]["base"]["optimizer"] == "dadapt_adam"
    )


def test_going_back_to_an_older_checkpoint_is_another_run_on_wandb(offline):
    """W&B drops steps that it has had, so the new course would not be seen in the same run."""
    write(offline, DADAPT, wandb=True, **QUICK | {"save_every_n_epochs": 1})
    assert train.main([]) == 0
    run = run_of(offline)
    back = ["--resume_ckpt", str(checkpoints(run)[-1]), "--stop_after_steps", "4"]
    for resume in (back, ["--resume_ckpt", "findlast"]):
        assert train.main(resume) == 0
    found = {}
    for path in sorted((run / "wandb").glob("offline-run-*/*.wandb")):
        records = list(_records(path))
        [name] = {record.run.display_name for record in records if record.WhichOneof("record_type") == "run"}
        steps = {record.history.step.num for record in records if len(record.history.item)}
        found.setdefault((name, path.stem), set()).update(steps)
    (whole, first), (branch, second) = found
    assert (whole, branch) == (run.name, f"{run.name}-branch1") and first != second
    assert list(found.values()) == [{0, 1, 2, 3, 4, 5, 6}, {4, 5, 6}]


def test_without_the_package_or_a_login_a_sentence_says_what_to_do(offline, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(offline / "none"))
    assert train.main([]) == 2
    error = capsys.readouterr().err
    assert (
        "wandb: no run can be started on Weights & Biases (" in error
        and "WANDB_MODE to offline" in error
        and "Traceback" not in error
    )
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert train.main([]) == 2
    assert "wandb: true needs the package wandb, which is not installed" in capsys.readouterr().err


def test_trouble_on_the_way_is_said_once_and_training_goes_on(tmp_path: Path, monkeypatch):
    from trainer.reporting.wandb import WandbLogger

    wandb.teardown()  # it remembers the environment of whoever used it first
    monkeypatch.setenv("WANDB_MODE", "offline")
    said = []
    logger = WandbLogger(tmp_path, project="tiny", warn=said.append)

    def fails(*args, **kwargs):
        raise OSError("gone")

    finish = logger._run.finish
    monkeypatch.setattr(logger._run, "log", fails)
    logger.scalars({"loss/val": 1.0}, 1)
    logger.scalars({"loss/val": 1.0}, 2)
    assert said == ["Weights & Biases has not taken everything (gone); training continues"]
    logger.close()
    logger.close()
    logger.text("a", "b", 3)
    finish()
    wandb.teardown()
    assert len(said) == 1
