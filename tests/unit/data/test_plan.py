from collections import Counter, defaultdict
from dataclasses import replace
from itertools import pairwise
from math import ceil, floor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.buckets import buckets, nearest
from data.captions.caption import Caption
from data.index import Index
from data.plan import plan_epoch, slice_step, steps_before, steps_per_epoch
from data.record import Record

RESOLUTIONS = (128, (128,), (192, 128), (64, 128, 256), (128, 128, 256))


def record(number, width=100, height=100, multiply=1.0, batch_id=""):
    name = f"{number}.png"
    return Record(
        folder=Path(),
        file=name,
        name=name,
        width=width,
        height=height,
        caption=Caption("x"),
        multiply=multiply,
        batch_id=batch_id,
    )


def index_of(records):
    return Index(tuple(records), (), (Path(),))


sides = st.sampled_from([100, 150, 220, 400])
multiplies = st.one_of(st.just(1.0), st.sampled_from([0.0, 0.1, 0.5, 1.5, 2.0, 3.0]), st.floats(0, 4))
indices = st.lists(
    st.tuples(sides, sides, multiplies, st.sampled_from(["", "", "cats"])), min_size=1, max_size=40
).map(lambda rows: index_of(record(number, *row) for number, row in enumerate(rows)))
places = st.fixed_dictionaries(
    {
        "resolution": st.sampled_from(RESOLUTIONS),
        "seed": st.integers(0, 5),
        "epoch": st.integers(0, 30),
        "images_per_step": st.integers(1, 9),
    }
)


def tables(resolution):
    return [buckets(each) for each in ((resolution,) if isinstance(resolution, int) else resolution)]


def shape(record, table):
    return nearest(record.width, record.height, table)


@given(indices, places)
def test_every_image_comes_its_number_of_times(index, place):
    seen = Counter(identity for step in plan_epoch(index, **place) for identity in step.images)
    for identity, each in enumerate(index.records):
        assert floor(each.multiply) <= seen[identity] <= ceil(each.multiply)


@given(indices, places)
def test_a_batch_has_one_bucket_one_batch_id_and_no_more_than_its_size(index, place):
    short = Counter()
    for step in plan_epoch(index, **place):
        images = [index.records[identity] for identity in step.images]
        assert 1 <= len(images) <= place["images_per_step"]
        assert all(
            step.bucket in {shape(image, table) for table in tables(place["resolution"])} for image in images
        )
        assert len({image.batch_id for image in images}) == 1
        short[step.bucket, images[0].batch_id] += len(images) < place["images_per_step"]
    assert all(count <= 1 for count in short.values())


@given(indices, places)
def test_no_image_fills_a_batch_that_is_not_due(index, place):
    """An epoch has as many images as all shares together, whatever the size of its batches."""
    count = sum(len(step.images) for step in plan_epoch(index, **place))
    assert count == sum(len(step.images) for step in plan_epoch(index, **{**place, "images_per_step": 1}))
    assert (
        sum(floor(each.multiply) for each in index.records)
        <= count
        <= sum(ceil(each.multiply) for each in index.records)
    )


@given(indices, places, st.integers(0, 12), st.integers(1, 4), st.integers(1, 3))
def test_going_on_at_a_step_in_other_processes_gives_the_same_images_in_the_same_order(
    index, place, made, world, batch_size
):
    plan = plan_epoch(index, **place)
    whole = [(step.bucket, identity) for step in plan for identity in step.images]
    resumed = [
        (micro.bucket, identity)
        for step in plan_epoch(index_of(index.records), **place)[made:]
        for rank in range(world)
        for micro in slice_step(step, batch_size, rank, world)
        if not micro.filler
        for identity in micro.records
    ]
    assert resumed == whole[sum(len(step.images) for step in plan[:made]) :]


@given(indices, st.sampled_from(RESOLUTIONS[2:]), st.integers(0, 5), st.integers(0, 6))
def test_each_image_takes_each_of_several_resolutions_in_turn(index, resolution, seed, epoch):
    choices = tables(resolution)
    seen = defaultdict(Counter)
    for later in range(epoch, epoch + len(choices)):
        for step in plan_epoch(index, resolution=resolution, seed=seed, epoch=later, images_per_step=4):
            for identity in step.images:
                seen[identity][step.bucket] += 1
    for identity, each in enumerate(index.records):
        if each.multiply % 1 == 0 and each.multiply:
            expected = Counter()
            for table in choices:
                expected[shape(each, table)] += int(each.multiply)
            assert seen[identity] == expected


@given(st.integers(1, 60), st.sampled_from(RESOLUTIONS[2:]), st.integers(0, 5), st.integers(0, 9))
def test_each_epoch_has_as_much_of_each_resolution(count, resolution, seed, epoch):
    index = index_of(record(number) for number in range(count))
    sizes = Counter()
    for step in plan_epoch(index, resolution=resolution, seed=seed, epoch=epoch, images_per_step=4):
        sizes[step.bucket] += len(step.images)
    for bucket in {shape(index.records[0], table) for table in tables(resolution)}:
        share = sum(shape(index.records[0], table) == bucket for table in tables(resolution)) / len(
            resolution
        )
        assert abs(sizes[bucket] - share * count) <= len(resolution)


@given(indices, places)
def test_a_batch_id_keeps_its_images_together(index, place):
    """Images of a name share batches with each other alone, and with all of them that are of their shape."""
    steps = [
        (step, {index.records[identity].batch_id for identity in step.images})
        for step in plan_epoch(index, **place)
    ]
    assert all(len(names) == 1 for _, names in steps)
    named = Counter()
    batches = Counter()
    for step, (name,) in steps:
        named[step.bucket, name] += len(step.images)
        batches[step.bucket, name] += 1
    assert all(batches[group] == ceil(named[group] / place["images_per_step"]) for group in named)


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
def test_the_steps_of_long_runs_repeat(index, place):
    whole = index_of(replace(each, multiply=float(round(each.multiply))) for each in index.records)
    for epochs in (0, 1, 5, 7):
        each = [steps_per_epoch(whole, **{**place, "epoch": epoch}) for epoch in range(epochs)]
        assert steps_before(whole, **{**place, "epoch": epochs}) == sum(each)


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
        assert [position for micro in real for position in micro.positions] == list(
            range(step.first, step.first + len(step.images))
        )
        sizes = [sum(len(micro.records) for micro in part if not micro.filler) for part in parts]
        assert max(sizes) - min(sizes) <= 1
        for part in parts:
            fillers = [micro for micro in part if micro.filler]
            assert fillers == [] or (
                part == fillers and len(fillers) == 1 and fillers[0].records == step.images[:1]
            )


def test_one_process_has_no_filler():
    step = plan_epoch(index_of([record(0)]), resolution=128, seed=0, epoch=0, images_per_step=8)[0]
    assert [micro.filler for micro in slice_step(step, 8)] == [False]


def test_epochs_and_seeds_differ():
    index = index_of(record(number) for number in range(20))
    orders = {
        tuple(
            step.images
            for step in plan_epoch(index, resolution=128, seed=seed, epoch=epoch, images_per_step=4)
        )
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len(orders) == 4


def test_buckets_alternate_within_an_epoch():
    index = index_of(
        [record(number) for number in range(40)] + [record(number, width=400) for number in range(40, 80)]
    )
    plan = plan_epoch(index, resolution=128, seed=0, epoch=0, images_per_step=4)
    changes = sum(before.bucket != after.bucket for before, after in pairwise(plan))
    assert changes > 4


@pytest.mark.parametrize("fraction", [0.1, 0.25, 1 / 3, 0.5, 0.9])
def test_a_fraction_is_kept_for_each_image_and_in_each_epoch(fraction):
    index = index_of(record(number, multiply=2 + fraction) for number in range(30))
    total = Counter()
    for epoch in range(60):
        seen = Counter(
            identity
            for step in plan_epoch(index, resolution=128, seed=3, epoch=epoch, images_per_step=4)
            for identity in step.images
        )
        assert abs(seen.total() - 30 * (2 + fraction)) <= 2
        total += seen
    for identity in range(30):
        assert abs(total[identity] - 60 * (2 + fraction)) <= 1


def test_multiply_zero_excludes():
    index = index_of([record(0), record(1, multiply=0)])
    assert [
        step.images for step in plan_epoch(index, resolution=128, seed=0, epoch=0, images_per_step=4)
    ] == [(0,)]


def test_copies_of_an_image_rarely_share_a_batch():
    index = index_of(record(number, multiply=3) for number in range(40))
    plan = plan_epoch(index, resolution=128, seed=0, epoch=0, images_per_step=4)
    assert sum(len(set(step.images)) < len(step.images) for step in plan) <= 2


def test_the_plan_never_changes_between_versions():
    """A run that is resumed with a later version must go on with the same images."""
    index = index_of(
        [record(number, multiply=1.5 if number % 2 else 1) for number in range(6)] + [record(6, width=400)]
    )
    plan = plan_epoch(index, resolution=128, seed=555, epoch=1, images_per_step=3)
    assert [(step.bucket, step.images, step.first) for step in plan] == [
        ((128, 128), (0, 5, 1), 0),
        ((128, 128), (2, 3, 4), 3),
        ((256, 64), (6,), 6),
    ]


def test_the_plan_of_several_resolutions_never_changes_between_versions():
    index = index_of([record(number, multiply=1.5 if number % 2 else 1) for number in range(4)])
    plan = plan_epoch(index, resolution=(128, 192), seed=555, epoch=1, images_per_step=3)
    assert [(step.bucket, step.images) for step in plan] == [
        ((128, 128), (2, 3, 0)),
        ((192, 192), (1, 3)),
        ((128, 128), (1,)),
    ]
