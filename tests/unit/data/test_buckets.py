import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.buckets import LONGEST, buckets, nearest

resolutions = st.integers(1, 32).map(lambda n: 64 * n)


@given(resolutions)
def test_buckets_keep_their_promises(resolution):
    table = buckets(resolution)
    assert (resolution, resolution) in table
    assert len(set(table)) == len(table)
    assert {(height, width) for width, height in table} == set(table)
    for width, height in table:
        assert width % 64 == 0 and height % 64 == 0
        assert width * height <= resolution**2
        assert max(width, height) <= LONGEST * min(width, height)
    ratios = [width / height for width, height in table]
    assert ratios == sorted(ratios) and len(set(ratios)) == len(ratios)


@given(resolutions)
def test_no_bucket_could_be_larger_at_its_width(resolution):
    for width, height in buckets(resolution):
        if width >= height:
            assert width * (height + 64) > resolution**2


def test_the_table_of_512():
    wide = [bucket for bucket in buckets(512) if bucket[0] >= bucket[1]]
    assert wide == [
        (512, 512),
        (576, 448),
        (640, 384),
        (704, 320),
        (768, 320),
        (832, 256),
        (896, 256),
        (960, 256),
        (1024, 256),
    ]


def test_64_has_only_the_square():
    assert buckets(64) == ((64, 64),)
    assert nearest(4000, 10, buckets(64)) == (64, 64)


@given(resolutions, st.integers(1, 20000), st.integers(1, 20000))
def test_nearest_is_nearest_by_log_ratio(resolution, width, height):
    table = buckets(resolution)
    found = nearest(width, height, table)

    def distance(bucket):
        return abs(math.log(bucket[0] / bucket[1]) - math.log(width / height))

    assert distance(found) <= min(map(distance, table)) + 1e-12


@pytest.mark.parametrize(
    ("size", "bucket"),
    [
        ((4000, 3000), (576, 448)),
        ((3000, 4000), (448, 576)),
        ((1920, 1080), (640, 384)),
        ((10000, 100), (1024, 256)),
        ((7, 7), (512, 512)),
    ],
)
def test_nearest_by_example(size, bucket):
    assert nearest(*size, buckets(512)) == bucket
