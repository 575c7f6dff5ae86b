from collections import Counter
from itertools import pairwise
from math import ceil, floor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.buckets import buckets, nearest
from data.captions import Caption
from data.index import Index, Record
from data.plan import plan_epoch, slice_step, steps_before, steps_per_epoch

RESOLUTION = 128


def record(number, width=100, height=100, multiply=1.0, batch_id=""):
    name = f"{number}.png"
    return Record(
        folder=Path(), file=name, name=name, width=width, height=height, caption=Caption("x"), multiply=multiply, batch_id=batch_id
    )


def index_of(records):
    return Index(tuple(records), (), (Path(),))


sides = st.sampled_from([100, 150, 220, 400])
multiplies = st.one_of(st.just(1.0), st.sampled_from([0.0, 0.1, 0.5, 1.5, 2.0, 3.0]), st.floats(0, 4))
indices = st.lists(st.tuples(sides, sides, multiplies, st.sampled_from(["", "", "cats"])), min_size=1, max_size=40).map(
    lambda rows: index_of(record(number, *row) for number, row in enumerate(rows))
)
places = st.fixed_dictionaries(
    {"resolution": st.just(RESOLUTION), "seed": st.integers(0, 5), "epoch": st.integers(0, 30), "images_per_step": st.integers(1, 9)}
)


@given(indices, places)
def test_every_image_comes_its_number_of_times(index, place):
    seen = Counter(identity for step in plan_epoch(index, **place) for identity in step.images)
    for identity, each in enumerate(index.records):
        assert floor(each.multiply) <= seen[identity] <= ceil(each.multiply)


@given(indices, places)
def test_a_batch_has_one_bucket_one_batch_id_and_no_more_than_its_size(index, place):
    table = buckets(RESOLUTION)
    short = Counter()
    for step in plan_epoch(index, **place):
        images = [index.records[identity] for identity in step.images]
        assert 1 <= len(images) <= place["images_per_step"]
        assert {nearest(image.width, image.height, table) for image in images} == {step.bucket}
        assert len({image.batch_id for image in images}) == 1
        short[step.bucket, images[0].batch_id] += len(images) < place["images_per_step"]
    assert all(count <= 1 for count in short.values())


@given(indices, places)
def test_positions_count_through_the_epoch(index, place):
    first = 0
    for step in plan_epoch(index, **place):
        assert step.first == first
        first += len(step.images)


@given(indices, places)
def test_steps_are_counted_without_planning(index, place):
    assert steps_per_epoch(index, **place) == len(plan_epoch(index, **place))
    earlier = [len(plan_epoch(index, **{**place, "epoch": epoch})) for epoch in range(place["epoch"] % 4)]
    assert steps_before(index, **{**place, "epoch": len(earlier)}) == sum(earlier)


@given(indices, places)
def test_the_plan_is_a_pure_function(index, place):
    assert plan_epoch(index, **place) == plan_epoch(index_of(index.records), **place)


@given(indices, places, st.integers(1, 5), st.integers(1, 4))
def test_slices_together_are_the_step(index, place, world, batch_size):
    for step in plan_epoch(index, **place):
        parts = [slice_step(step, batch_size, rank, world) for rank in range(world)]
        assert all(parts), "a process without a micro-batch would hang the others"
        real = [micro for part in parts for micro in part if not micro.filler]
        assert all(len(micro.records) <= batch_size and micro.bucket == step.bucket for micro in real)
        assert tuple(identity for micro in real for identity in micro.records) == step.images
        assert [position for micro in real for position in micro.positions] == list(range(step.first, step.first + len(step.images)))
        sizes = [sum(len(micro.records) for micro in part if not micro.filler) for part in parts]
        assert max(sizes) - min(sizes) <= 1
        for part in parts:
            fillers = [micro for micro in part if micro.filler]
            assert fillers == [] or (part == fillers and len(fillers) == 1 and fillers[0].records == step.images[:1])


def test_one_process_has_no_filler():
    step = plan_epoch(index_of([record(0)]), resolution=128, seed=0, epoch=0, images_per_step=8)[0]
    assert [micro.filler for micro in slice_step(step, 8)] == [False]


def test_epochs_and_seeds_differ():
    index = index_of(record(number) for number in range(20))
    orders = {
        tuple(step.images for step in plan_epoch(index, resolution=128, seed=seed, epoch=epoch, images_per_step=4))
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len(orders) == 4


def test_buckets_alternate_within_an_epoch():
    index = index_of([record(number) for number in range(40)] + [record(number, width=400) for number in range(40, 80)])
    plan = plan_epoch(index, resolution=128, seed=0, epoch=0, images_per_step=4)
    changes = sum(before.bucket != after.bucket for before, after in pairwise(plan))
    assert changes > 4


@pytest.mark.parametrize("fraction", [0.1, 0.25, 1 / 3, 0.5, 0.9])
def test_a_fraction_is_kept_for_each_image_and_in_each_epoch(fraction):
    index = index_of(record(number, multiply=2 + fraction) for number in range(30))
    total = Counter()
    for epoch in range(60):
        seen = Counter(
            identity for step in plan_epoch(index, resolution=128, seed=3, epoch=epoch, images_per_step=4) for identity in step.images
        )
        assert abs(seen.total() - 30 * (2 + fraction)) <= 2
        total += seen
    for identity in range(30):
        assert abs(total[identity] - 60 * (2 + fraction)) <= 1


def test_multiply_zero_excludes():
    index = index_of([record(0), record(1, multiply=0)])
    assert [step.images for step in plan_epoch(index, resolution=128, seed=0, epoch=0, images_per_step=4)] == [(0,)]


def test_copies_of_an_image_rarely_share_a_batch():
    index = index_of(record(number, multiply=3) for number in range(40))
    plan = plan_epoch(index, resolution=128, seed=0, epoch=0, images_per_step=4)
    assert sum(len(set(step.images)) < len(step.images) for step in plan) <= 2


def test_the_plan_never_changes_between_versions():
    """A run that is resumed with a later version must go on with the same images."""
    index = index_of([record(number, multiply=1.5 if number % 2 else 1) for number in range(6)] + [record(6, width=400)])
    plan = plan_epoch(index, resolution=128, seed=555, epoch=1, images_per_step=3)
    assert [(step.bucket, step.images, step.first) for step in plan] == [
        ((128, 128), (0, 5, 1), 0),
        ((128, 128), (2, 3, 4), 3),
        ((256, 64), (6,), 6),
    ]
