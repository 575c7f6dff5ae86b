"""The validation file, what it holds out, and losses that can be compared over time."""

import json
import shutil
from dataclasses import replace
from typing import cast

import pytest
import torch
from PIL import Image

from data.dataset import Images
from data.errors import DataError
from data.index import build_index
from data.options import DataOptions
from tests.tiny import tiny_models
from trainer.config.report import Report
from trainer.config.validation_file import load_validation, read_validation
from trainer.diffusion.conditioning import Tokenize
from trainer.diffusion.moments import encode_pixels
from trainer.diffusion.objective import Networks, Objective
from trainer.diffusion.options import ObjectiveOptions
from trainer.diffusion.schedule import NoiseSchedule
from trainer.errors import UserError
from trainer.evaluation.fixed_noise import FixedLoss, Validation, held_out_batches
from trainer.evaluation.options import ValidationFile
from trainer.evaluation.validation import split_images
from trainer.training.precision import Precision

SHIPPED = {
    "documentation": {"batch_size": "text"},
    "batch_size": 4,
    "every_n_epochs": 1,
    "seed": 555,
    "validate_training": True,
    "val_split_mode": "automatic",
    "auto_split_proportion": 0.15,
    "manual_data_root": None,
    "extra_manual_datasets": {},
    "stabilize_training_loss": False,
    "stabilize_split_proportion": 0.15,
    "use_relative_loss": False,
}
"""Every key of EveryDream2's validation file at its default."""


def write(folder, **keys):
    (folder / "validation.json").write_text(json.dumps(keys, indent=1))
    return folder / "validation.json"


def read(folder, **keys):
    """Return the file, its problems and its notes."""
    report = Report()
    return read_validation(write(folder, **keys), report), list(report.errors), list(report.notes)


def pictures(folder, count, first=0):
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(first, first + count):
        Image.new("RGB", (70 if number % 3 else 100, 70), (number, 100, 200)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a red circle {number}")
    return folder


# The file


def test_everydream2s_keys_at_their_defaults_are_the_defaults(tmp_path):
    file, errors, notes = read(tmp_path, **SHIPPED)
    assert file == ValidationFile(batch_size=4, extra_manual_datasets={}) and (errors, notes) == ([], [])
    assert load_validation(write(tmp_path, **dict.fromkeys(SHIPPED))) == ValidationFile()


def test_no_file_holds_nothing_out():
    assert load_validation(None).validate_training is False


def test_every_key_away_from_its_default_is_read(tmp_path):
    own, other = pictures(tmp_path / "own", 1), pictures(tmp_path / "other", 1)
    keys = {
        "batch_size": 8,
        "every_n_epochs": 0.25,
        "seed": 1,
        "validate_training": True,
        "val_split_mode": "manual",
        "manual_data_root": "own",
        "extra_manual_datasets": {"other": "other"},
        "stabilize_training_loss": True,
        "stabilize_split_proportion": 0.5,
    }
    file, errors, notes = read(tmp_path, **keys)
    assert (errors, notes) == ([], [])
    assert file == ValidationFile(
        **{**keys, "manual_data_root": str(own), "extra_manual_datasets": {"other": str(other)}}
    )


def test_earlier_names_are_understood(tmp_path):
    pictures(tmp_path / "own", 1)
    file, errors, _ = read(tmp_path, val_split_mode="manual", val_data_root="own", val_split_proportion=0.3)
    assert errors == [] and file is not None
    assert (file.manual_data_root, file.auto_split_proportion) == (str(tmp_path / "own"), 0.3)


def test_what_has_no_effect_is_a_note(tmp_path):
    pictures(tmp_path / "own", 1)
    _, errors, notes = read(tmp_path, use_relative_loss=True, manual_data_root="own")
    assert errors == []
    assert [note.partition(":")[2].partition(" ")[2] for note in notes] == [
        "use_relative_loss: has no effect; EveryDream2 reads it and never uses it",
        "manual_data_root: has no effect: val_split_mode is automatic",
    ]
    _, _, [note] = read(tmp_path, validate_training=False)
    assert "asks for no validation" in note


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"every_n_epochs": 0}, "2: every_n_epochs: must be greater than 0, got 0"),
        ({"auto_split_proportion": 1}, "2: auto_split_proportion: must be less than 1, got 1"),
        ({"val_split_mode": "manul"}, "2: val_split_mode: unknown value 'manul'; did you mean 'manual'?"),
        ({"val_split_mode": "manual"}, "2: val_split_mode: manual needs manual_data_root"),
        (
            {"val_split_mode": "manual", "manual_data_root": "nowhere"},
            "3: manual_data_root: folder not found: nowhere",
        ),
        (
            {"extra_manual_datasets": {"a": "nowhere"}},
            "2: extra_manual_datasets.a: folder not found: nowhere",
        ),
        ({"extra_manual_datasets": ["a"]}, "2: extra_manual_datasets: must be an object"),
        ({"evry_n_epochs": 1}, "2: evry_n_epochs: unknown key; did you mean 'every_n_epochs'?"),
        (
            {"auto_split_proportion": 0.1, "val_split_proportion": 0.2},
            "3: val_split_proportion: duplicates auto_split_proportion",
        ),
    ],
)
def test_mistakes_are_named_with_their_line(tmp_path, keys, words):
    with pytest.raises(UserError) as raised:
        load_validation(write(tmp_path, **keys))
    assert f"validation.json:{words}" in str(raised.value)


# What is held out


def split(folder, file, root="pictures"):
    data = DataOptions(data_root=str(folder / root), resolution=64)
    return split_images(file, data, build_index(data), folder / "cache")


def names(index):
    return [record.name for record in index.records]


def test_an_automatic_split_follows_the_content_of_renamed_and_moved_files(tmp_path):
    pictures(tmp_path / "pictures", 30)
    before = split(tmp_path, ValidationFile())
    [held] = before.held_out
    assert (
        held.tag == "loss/val"
        and held.index.records
        and not set(names(before.train)) & set(names(held.index))
    )
    assert len(before.train.records) + len(held.index.records) == 30
    again = split(tmp_path, ValidationFile())
    assert again.train.fingerprint() == before.train.fingerprint()

    numbers = {int(name.removesuffix(".png")) for name in names(held.index)}
    for number in range(30):
        for ending in ("png", "txt"):
            (tmp_path / "pictures" / f"{number}.{ending}").rename(
                tmp_path / "pictures" / f"new {100 - number}.{ending}"
            )
    pictures(tmp_path / "pictures" / "below", 10, first=200)
    [after] = split(tmp_path, ValidationFile()).held_out
    moved = {100 - int(name[4:-4]) for name in names(after.index) if name.startswith("new")}
    assert moved == numbers
    assert set(held.keys) <= set(after.keys), "the noise of an image is its own"


def test_another_proportion_trains_other_data(tmp_path):
    pictures(tmp_path / "pictures", 30)
    assert (
        split(tmp_path, ValidationFile()).train.fingerprint()
        != split(tmp_path, ValidationFile(auto_split_proportion=0.6)).train.fingerprint()
    )


def test_manual_and_extra_folders_are_measured_and_never_trained(tmp_path):
    root = pictures(tmp_path / "pictures", 6)
    pictures(root / "held", 2, first=50)
    outside = pictures(tmp_path / "outside", 3, first=80)
    file = ValidationFile(
        val_split_mode="manual",
        manual_data_root=str(root / "held"),
        extra_manual_datasets={"more": str(outside)},
    )
    found = split(tmp_path, file)
    assert [(held.tag, len(held.index.records)) for held in found.held_out] == [
        ("loss/val", 2),
        ("loss/val more", 3),
    ]
    assert len(found.train.records) == 6 and not any(name.startswith("held/") for name in names(found.train))
    assert found.notes == ("2 images of data_root are not trained: they are validation images of loss/val",)
    only_extra = split(tmp_path, replace(file, validate_training=False))
    assert [held.tag for held in only_extra.held_out] == ["loss/val more"] and len(
        only_extra.train.records
    ) == 8


def test_no_split_holds_nothing_out(tmp_path):
    pictures(tmp_path / "pictures", 3)
    for file in (ValidationFile(val_split_mode="none"), ValidationFile(validate_training=False)):
        assert split(tmp_path, file).held_out == () and len(split(tmp_path, file).train.records) == 3


def test_what_leaves_nothing_to_train_or_to_measure_is_refused(tmp_path):
    root = pictures(tmp_path / "pictures", 3)
    with pytest.raises(DataError, match="every image of data_root is for validation"):
        split(tmp_path, ValidationFile(val_split_mode="none", extra_manual_datasets={"all": str(root)}))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"validation \(loss/val x\): no images in"):
        split(
            tmp_path,
            ValidationFile(val_split_mode="none", extra_manual_datasets={"x": str(tmp_path / "empty")}),
        )
    shutil.rmtree(root)
    pictures(root, 1)
    with pytest.raises(DataError, match="needs two different images"):
        split(tmp_path, ValidationFile())


# When, and how much


@pytest.mark.parametrize(
    ("every", "expected"),
    [(1, [5, 10, 15, 20]), (2, [10, 20]), (0.5, [3, 5, 8, 10, 13, 15, 18, 20]), (1.5, [8, 15])],
)
def test_measurements_fall_due_by_epochs_and_their_fractions(every, expected):
    validation = Validation({"loss/val": cast(FixedLoss, None)}, every)
    position = [step // 5 + (step % 5) / 5 for step in range(21)]
    assert [step for step in range(1, 21) if validation.due(position[step - 1], position[step])] == expected
    assert validation.due(0.1, 0.2, last=True)
    assert not any(Validation({}, every).due(0.9, 5.0, last=last) for last in (False, True)), (
        "nothing is held out"
    )


CPU = Precision(torch.device("cpu"), None, None, torch.float32)


@pytest.fixture(scope="module")
def models():
    return tiny_models()


def objective_of(models, **options):
    return Objective(
        ObjectiveOptions(**options),
        NoiseSchedule(models.scheduler_config),
        seed=1,
        latent_channels=4,
        latent_factor=8,
        scaling_factor=0.18215,
        context_width=16,
        train_text_encoder=True,
    )


def measured(models, folder, size=1, record=None, **options):
    """Return the losses of the images in a folder, `size` at a time, and their batches."""
    data = DataOptions(data_root=str(folder), resolution=64)
    index = build_index(data)
    images = Images(index, data, tokenize=Tokenize(models.tokenizer), seed=1)

    def encode(batch):
        return replace(
            batch, pixels_BCHW=None, moments_BCHW=encode_pixels(models.vae, batch.pixels_BCHW, CPU.autocast)
        )

    batches = held_out_batches(images, len(index.records), size, encode)
    objective = objective_of(models, **options)
    if record is not None:
        predict = objective.predict
        objective.predict = lambda networks, inputs, autocast: (
            record.append(inputs) or predict(networks, inputs, autocast)
        )  # type: ignore[method-assign]
    keys = [(555, int(name.removesuffix(".png"))) for name in names(index)]
    loss = FixedLoss(batches, objective, keys)
    return loss.measure(
        Networks(models.unet, models.text_encoder, models.vae), CPU.autocast, CPU.device
    ), batches


def test_a_loss_is_the_same_again_whatever_the_batches(models, tmp_path):
    folder = pictures(tmp_path / "pictures", 5)
    one, batches = measured(models, folder)
    assert measured(models, folder)[0] == one and len(batches) == 5
    together, batches = measured(models, folder, size=3)
    assert sorted(len(batch) for batch in batches) == [2, 3], "two sizes of latents"
    assert together.loss == pytest.approx(one.loss, rel=1e-5)


def test_an_image_is_encoded_once_and_alone_whatever_is_measured(models, tmp_path, monkeypatch):
    folder = pictures(tmp_path / "pictures", 3)
    expected, _ = measured(models, folder)
    encode, rows = models.vae.encode, []
    monkeypatch.setattr(models.vae, "encode", lambda pixels: rows.append(len(pixels)) or encode(pixels))
    data = DataOptions(data_root=str(folder), resolution=64)
    index = build_index(data)
    images = Images(index, data, tokenize=Tokenize(models.tokenizer), seed=1)
    loss = FixedLoss(
        images.plain(range(3)),
        objective_of(models),
        [(555, int(name.removesuffix(".png"))) for name in names(index)],
    )
    networks = Networks(models.unet, models.text_encoder, models.vae)
    assert [loss.measure(networks, CPU.autocast, CPU.device) for _ in range(2)] == [expected] * 2
    assert rows == [1, 1, 1]


def test_an_images_noise_and_timesteps_are_its_own(models, tmp_path):
    alone, all_of_them = [], []
    measured(models, pictures(tmp_path / "pictures", 3), record=all_of_them)
    measured(models, pictures(tmp_path / "one", 1, first=2), record=alone)
    [single] = alone
    assert single.t_B.tolist() == [125, 375, 625, 875]
    assert any(torch.equal(single.noise_BCHW, inputs.noise_BCHW) for inputs in all_of_them)
    assert all(len(set(map(str, inputs.noise_BCHW[:, 0, 0, 0].tolist()))) == 4 for inputs in all_of_them)


def test_both_definitions_come_from_one_pass(models, tmp_path):
    folder = pictures(tmp_path / "pictures", 3)
    plain, _ = measured(models, folder)
    assert plain.loss == plain.mse
    weighted, _ = measured(models, folder, min_snr_gamma=5.0, loss_type="huber")
    assert weighted.mse == pytest.approx(plain.mse, rel=1e-6) and weighted.loss < 0.9 * weighted.mse
    assert (
        ObjectiveOptions().is_plain
        and not ObjectiveOptions(min_snr_gamma=5.0).is_plain
        and not ObjectiveOptions(loss_type="huber").is_plain
    )
