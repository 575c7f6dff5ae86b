"""Which images are held out: by content alone."""

from pathlib import Path

import pytest

from data.captions.caption import Caption
from data.errors import DataError
from data.index import Index
from data.record import Record
from data.split import hold_out, take_out


def index_of(contents, multiply=1.0):
    records = tuple(
        Record(
            folder=Path("x"),
            file=f"{i}.png",
            name=f"{i}.png",
            width=64,
            height=64,
            caption=Caption("a", (), "x"),
            multiply=multiply,
        )
        for i, _ in enumerate(contents)
    )
    return Index(records, (), (Path("x"),))


def sides(contents, proportion=0.15, seed=555):
    """Return the contents that are trained and those that are held out."""
    index = index_of(contents)
    train, held = hold_out(index, dict(enumerate(contents)), proportion=proportion, seed=seed)
    by_name = {record.name: content for record, content in zip(index.records, contents, strict=True)}
    return [by_name[record.name] for record in train.records], [
        by_name[record.name] for record in held.records
    ]


CONTENTS = [f"content {number}" for number in range(400)]


def test_about_the_asked_share_is_held_out_and_nothing_is_lost():
    train, held = sides(CONTENTS)
    assert sorted(train + held) == sorted(CONTENTS)
    assert 35 <= len(held) <= 85  # 60 expected, four standard deviations of 7


def test_order_and_neighbours_do_not_move_an_image():
    _, held = sides(CONTENTS)
    _, reordered = sides(CONTENTS[::-1])
    assert sorted(reordered) == sorted(held)
    _, fewer = sides(CONTENTS[:200])
    assert sorted(fewer) == sorted(set(held) & set(CONTENTS[:200]))


def test_another_seed_is_another_split_and_a_larger_share_contains_the_smaller():
    _, held = sides(CONTENTS)
    assert set(sides(CONTENTS, seed=1)[1]) != set(held)
    assert set(held) < set(sides(CONTENTS, proportion=0.5)[1])


def test_equal_files_are_on_one_side():
    train, held = sides([f"content {number // 2}" for number in range(400)])
    assert not set(train) & set(held)


@pytest.mark.parametrize("proportion", [0.001, 0.999])
def test_neither_side_is_ever_empty(proportion):
    for seed in range(20):
        train, held = sides(["a", "b", "c"], proportion, seed)
        assert train and held


def test_images_that_are_never_shown_or_cannot_be_read_are_not_held_out():
    index = index_of("abcd")
    _, held = hold_out(index, {0: "a", 1: "b"}, proportion=0.9, seed=1)
    assert {record.name for record in held.records} <= {"0.png", "1.png"}
    with pytest.raises(DataError, match="needs two different images that can be read, and there are none"):
        hold_out(index_of("ab", multiply=0.0), {0: "a", 1: "b"}, proportion=0.5, seed=1)


def test_two_equal_images_cannot_be_split():
    with pytest.raises(DataError, match="there is one"):
        sides(["a", "a"])


def test_the_fingerprint_of_what_is_trained_changes_with_what_is_held_out():
    index = index_of("abc")
    train, held = take_out(index, {1})
    assert [record.name for record in train.records] == ["0.png", "2.png"] and [
        record.name for record in held.records
    ] == ["1.png"]
    assert len({index.fingerprint(), train.fingerprint(), held.fingerprint()}) == 3
