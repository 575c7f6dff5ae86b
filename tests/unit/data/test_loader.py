import multiprocessing
import os
import signal
import time

import numpy as np
import pytest
import torch
from PIL import Image

from data import loader as loader_module
from data.batch import Batch, to_pixels
from data.errors import DataError
from data.index import build_index
from data.loader import StepLoader, worker_count
from data.options import DataOptions
from data.plan import plan_epoch


def tokenize(captions):
    return torch.tensor([[len(caption), sum(map(ord, caption)), 7] for caption in captions])


@pytest.fixture
def folder(tmp_path):
    """Eleven images, eight square and three wide, with grey levels and captions of their own."""
    for number in range(11):
        wide = number >= 8
        ramp = np.tile(np.linspace(0, 20 * number, 128 if wide else 64), (64 if not wide else 32, 1)).astype(
            np.uint8
        )
        Image.fromarray(ramp).convert("RGB").resize((256, 64) if wide else (128, 128)).save(
            tmp_path / f"{number}.png"
        )
        (tmp_path / f"{number}.txt").write_text(f"image {number}, a, b, c, d")
    return tmp_path


def options_of(folder, **changes):
    varied = {"flip_p": 0.5, "cond_dropout": 0.2, "shuffle_tags": True}
    return DataOptions(
        **{
            "data_root": str(folder),
            "resolution": 128,
            "batch_size": 2,
            "num_workers": 0,
            **varied,
            **changes,
        }
    )


def loader_of(folder, *, images_per_step=4, rank=0, world=1, start_method=None, **changes):
    options = options_of(folder, **changes)
    return StepLoader(
        build_index(options),
        options,
        tokenize=tokenize,
        seed=1,
        images_per_step=images_per_step,
        rank=rank,
        world=world,
        start_method=start_method,
    )


def contents(steps):
    """All that is in batches, comparable."""
    return [
        [
            {
                name: value.tolist() if isinstance(value, torch.Tensor) else value
                for name, value in vars(batch).items()
            }
            for batch in step
        ]
        for step in steps
    ]


def images(steps):
    """Each image by itself, whatever the cut into micro-batches."""
    return [
        (
            batch.pixels_BCHW[place].numpy().tobytes(),
            batch.positions[place],
            batch.names[place],
            batch.captions[place],
        )
        for step in steps
        for batch in step
        for place in range(len(batch))
        if not batch.filler
    ]


def test_batches_follow_the_plan(folder):
    loader = loader_of(folder)
    plan = plan_epoch(build_index(options_of(folder)), resolution=128, seed=1, epoch=2, images_per_step=4)
    steps = list(loader.steps(2))
    assert loader.steps_in(2) == len(steps) == len(plan) and loader.steps_before(3) == 3 * len(plan)
    for step, planned in zip(steps, plan, strict=True):
        assert tuple(record for batch in step for record in batch.records) == planned.images
        for batch in step:
            assert 1 <= len(batch) <= 2 and batch.epoch == 2 and not batch.filler
            assert batch.pixels_BCHW.shape == (len(batch), 3, planned.bucket[1], planned.bucket[0])
            assert batch.pixels_BCHW.dtype == torch.float32 and batch.pixels_BCHW.is_contiguous()
            assert batch.pixels_BCHW.min() >= -1 and batch.pixels_BCHW.max() <= 1
            assert (
                torch.equal(batch.tokens_BT, tokenize(list(batch.captions)))
                and batch.tokens_BT.dtype == torch.int64
            )
            assert batch.loss_scale_B.tolist() == [1.0] * len(batch)
    assert sorted(name for step in steps for batch in step for name in batch.names) == sorted(
        f"{n}.png" for n in range(11)
    )


def test_pixels_span_minus_one_to_one():
    batch = to_pixels([np.array([[[0, 255, 51]]], np.uint8)])
    assert batch.shape == (1, 3, 1, 1) and torch.allclose(batch.flatten(), torch.tensor([-1.0, 1.0, -0.6]))


def test_workers_change_nothing(folder):
    alone, helped = loader_of(folder), loader_of(folder, num_workers=2)
    for epoch in (0, 1):
        assert contents(alone.steps(epoch)) == contents(helped.steps(epoch))


def test_spawned_workers_change_nothing(folder):
    spawned = loader_of(folder, num_workers=1, start_method="spawn")
    assert contents(loader_of(folder).steps(0)) == contents(spawned.steps(0))


def test_workers_live_from_epoch_to_epoch(folder):
    loader = loader_of(folder, num_workers=1)
    list(loader.steps(0))
    workers = multiprocessing.active_children()
    list(loader.steps(1))
    assert multiprocessing.active_children() == workers != []


def test_a_worker_that_finds_no_shared_memory_says_so_instead_of_leaving_the_trainer_waiting(
    folder, monkeypatch
):
    def full(_):
        raise RuntimeError(
            "unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)"
        )

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    loader = loader_of(folder, num_workers=1, start_method="fork")
    with pytest.raises(RuntimeError, match="unable to allocate shared memory"):
        next(loader.steps(0))
    loader.close()


def test_an_epoch_that_is_left_in_the_middle_leaves_nothing_behind(folder):
    loader = loader_of(folder, num_workers=2)
    next(iter(loader.steps(0)))
    assert contents(loader.steps(1)) == contents(loader_of(folder).steps(1))


def test_ctrl_c_does_not_end_workers(folder):
    loader = loader_of(folder, num_workers=1)
    steps = loader.steps(0)
    seen = [next(steps)]
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, signal.SIGINT)
    time.sleep(0.1)
    assert contents(seen + list(steps)) == contents(loader_of(folder).steps(0))


def test_resuming_skips_steps_of_the_plan(folder):
    whole = contents(loader_of(folder).steps(3))
    assert contents(loader_of(folder).steps(3, first_step=2)) == whole[2:]
    assert contents(loader_of(folder).steps(3, first_step=len(whole))) == []


@pytest.mark.parametrize(("batch_size", "world"), [(4, 1), (1, 1), (1, 4), (2, 2), (1, 2), (2, 3)])
def test_micro_batches_and_processes_change_no_image(folder, batch_size, world):
    whole = [images([step]) for step in loader_of(folder, batch_size=4).steps(0)]
    ranks = [
        list(loader_of(folder, batch_size=batch_size, rank=rank, world=world).steps(0))
        for rank in range(world)
    ]
    assert {len(steps) for steps in ranks} == {len(whole)}
    for step, parts in zip(whole, zip(*ranks, strict=True), strict=True):
        assert [image for part in parts for image in images([part])] == step


def test_a_process_without_an_image_gets_one_of_weight_0(folder):
    ranks = [list(loader_of(folder, rank=rank, world=4, batch_size=1).steps(0)) for rank in range(4)]
    fillers = [batch for steps in ranks for step in steps for batch in step if batch.filler]
    assert len(fillers) == 1  # 11 images: steps of 4, 4 and, in the bucket of three, 3
    assert len(fillers[0]) == 1 and fillers[0].loss_scale_B.tolist() == [0.0]
    assert all(step for steps in ranks for step in steps)


def test_epochs_differ_in_order_flips_and_words(folder):
    loader = loader_of(folder)
    first, second = images(loader.steps(0)), images(loader.steps(1))
    assert [image[2] for image in first] != [image[2] for image in second]
    pixels = [{name: seen for seen, _, name, _ in epoch} for epoch in (first, second)]
    assert 0 < sum(pixels[0][name] != pixels[1][name] for name in pixels[0]) < 11
    captions = [{name: caption for _, _, name, caption in epoch} for epoch in (first, second)]
    assert sum(captions[0][name] != captions[1][name] for name in captions[0]) > 5


def test_crop_jitter_moves_the_crop_and_nothing_else(folder):
    still = images(loader_of(folder).steps(0))
    jittered = loader_of(folder, crop_jitter=1.0)
    moved = images(jittered.steps(0))
    # The square images fit their bucket, the wide ones are cropped in no direction either: their ratio is the
    # bucket's.
    assert still == moved
    for number in range(8):
        ramp = np.tile(np.linspace(0, 255, 200), (128, 1)).astype(np.uint8)
        Image.fromarray(ramp).convert("RGB").save(folder / f"{number}.png")
    plain, jittered = (loader_of(folder, flip_p=0, crop_jitter=jitter, num_workers=0) for jitter in (0, 1.0))
    first, second, third = images(plain.steps(0)), images(jittered.steps(0)), images(jittered.steps(1))
    assert [image[1:] for image in first] == [image[1:] for image in second]
    assert sum(one[0] != other[0] for one, other in zip(first, second, strict=True)) >= 7
    by_name = {image[2]: image[0] for image in second}
    assert sum(by_name[image[2]] != image[0] for image in third) >= 7
    for changes in ({"num_workers": 1}, {"batch_size": 1}, {"batch_size": 4}):
        assert images(loader_of(folder, flip_p=0, crop_jitter=1.0, **changes).steps(0)) == second


def test_crops_gather_around_the_middle(folder):
    near = loader_of(folder, crop_jitter=0.5).images
    places = np.array([near._crop(0, position) for position in range(400)])
    assert places.min() >= 0.25 and places.max() <= 0.75
    assert abs(places.mean() - 0.5) < 0.02 and abs(places.std() - 0.25 / np.sqrt(6)) < 0.01
    assert near._crop(0, 5) == near._crop(0, 5) != near._crop(1, 5)


def test_a_record_overrides_the_options(folder):
    from dataclasses import replace

    from data.index import Index

    options = options_of(folder, cond_dropout=1.0, flip_p=1.0, shuffle_tags=True)
    index = build_index(options)
    own = {"cond_dropout": 0.0, "flip_p": 0.0, "shuffle_tags": False, "loss_scale": 0.25}
    changed = Index(tuple(replace(record, **own) for record in index.records), (), index.roots)
    loader = StepLoader(changed, options, tokenize=tokenize, seed=1, images_per_step=4)
    plain = {batch.names[0]: batch.pixels_BCHW[0] for batch in loader.images.plain(range(11))}
    for step in loader.steps(0):
        for batch in step:
            assert batch.loss_scale_B.tolist() == [0.25] * len(batch)
            for place, name in enumerate(batch.names):
                assert batch.captions[place] == f"image {name.split('.')[0]}, a, b, c, d"
                assert torch.equal(batch.pixels_BCHW[place], plain[name])


def test_plain_images_never_vary(folder):
    loader = loader_of(folder, flip_p=1.0, cond_dropout=1.0)
    batches = loader.images.plain([9, 0])
    assert [batch.records for batch in batches] == [(9,), (0,)]
    assert [batch.captions for batch in batches] == [("image 9, a, b, c, d",), ("image 0, a, b, c, d",)]
    assert [tuple(batch.pixels_BCHW.shape) for batch in batches] == [(1, 3, 64, 256), (1, 3, 128, 128)]
    assert contents([batches]) == contents([loader_of(folder).images.plain([9, 0])])
    (folder / "9.png").write_bytes(b"")
    assert [batch.records for batch in loader.images.plain([9, 0])] == [(0,)]
    assert [str(file) for file in loader.bad] == ["9.png: it is empty (0 bytes)"]


@pytest.mark.parametrize("workers", [0, 1])
def test_files_that_go_bad_are_dropped_and_named_once(folder, workers):
    loader = loader_of(folder, num_workers=workers)
    (folder / "3.png").unlink()
    whole = (folder / "4.png").read_bytes()
    (folder / "4.png").write_bytes(whole[: len(whole) // 2])
    for epoch in (0, 1):
        steps = list(loader.steps(epoch))
        assert len(steps) == loader.steps_in(epoch)
        seen = {name for step in steps for batch in step for name in batch.names}
        assert seen == {f"{number}.png" for number in range(11)} - {"3.png", "4.png"}
    assert sorted(file.name for file in loader.bad) == ["3.png", "4.png"]
    reasons = {file.name: file.reason for file in loader.bad}
    assert "No such file" in reasons["3.png"] and "damaged" in reasons["4.png"]


def test_the_other_images_of_a_bad_file_s_batch_stay_as_they_were(folder):
    before = images(loader_of(folder).steps(0))
    loader = loader_of(folder)
    (folder / "3.png").unlink()
    assert images(loader.steps(0)) == [image for image in before if image[2] != "3.png"]


def test_a_step_of_which_nothing_can_be_read_is_a_filler(folder):
    loader = loader_of(folder)
    for number in (8, 9, 10):
        (folder / f"{number}.png").unlink()
    steps = list(loader.steps(0))
    fillers = [step for step in steps if step[0].filler]
    assert len(steps) == 3 and len(fillers) == 1
    (batch,) = fillers[0]
    assert batch.loss_scale_B.tolist() == [0.0] and batch.pixels_BCHW.shape == (1, 3, 64, 256)
    assert len(loader.bad) == 3


def test_an_epoch_without_a_readable_image_is_an_error(folder):
    loader = loader_of(folder)
    for number in range(11):
        (folder / f"{number}.png").unlink()
    list(loader.steps(0, first_step=2))  # the rest of a resumed epoch says nothing about the other images
    with pytest.raises(DataError) as caught:
        list(loader.steps(0))
    assert (
        caught.value.problems[0] == "none of the images can be read any more"
        and "No such file" in caught.value.problems[1]
    )


def test_the_loader_leaves_the_global_generators_alone(folder):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    list(loader_of(folder, num_workers=1).steps(0))
    assert torch.equal(torch.get_rng_state(), state)


def test_pinning_moves_every_tensor(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self + 1)
    zeros = Batch(torch.zeros(1, 3, 2, 2), torch.zeros(1, 4), torch.zeros(1), 0, (5,), (6,), ("a",), ("b",))
    pinned = zeros.pin_memory()
    assert pinned.pixels_BCHW.min() == pinned.tokens_BT.min() == pinned.loss_scale_B.min() == 1
    assert (pinned.positions, pinned.names, len(pinned)) == ((5,), ("a",), 1)


def test_how_many_workers(folder, monkeypatch):
    monkeypatch.setattr(loader_module.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    small = options_of(folder, num_workers=None)
    assert worker_count(build_index(small), small) == 0
    assert worker_count(build_index(small), options_of(folder, num_workers=3)) == 3
    Image.new("RGB", (4000, 3000)).save(folder / "big.png")
    assert worker_count(build_index(small), small) == 4
    monkeypatch.setattr(loader_module.os, "sched_getaffinity", lambda _: {0})
    assert worker_count(build_index(small), small) == 0
