"""Token buckets, with time as a plain number."""

import pytest

from pipeline.simulator.buckets import Bucket, whole_seconds


def test_starts_full() -> None:
    """A bucket holds its whole capacity before anything is taken."""
    assert Bucket(per_minute=60, capacity=20).remaining(1_000.0) == 20


def test_refills_continuously() -> None:
    """Tokens come back in proportion to the time passed, not in steps of a minute."""
    bucket = Bucket(per_minute=60)
    bucket.take(60, 0.0)
    assert [bucket.remaining(now) for now in (0.5, 1.0, 30.0, 60.0, 90.0)] == [0, 1, 30, 60, 60]


def test_debt() -> None:
    """Taking more than is there leaves a debt that the refill pays first."""
    bucket = Bucket(per_minute=60)
    bucket.take(90, 0.0)
    assert (bucket.remaining(30.0), bucket.has(1, 30.0), bucket.has(1, 31.0)) == (0, False, True)


def test_giving_back_does_not_overflow() -> None:
    """What is given back fills a bucket up to its capacity at most."""
    bucket = Bucket(per_minute=60)
    bucket.take(-10, 0.0)
    assert bucket.level(0.0) == 60


def test_waiting_as_told_is_enough() -> None:
    """After exactly the wait that a bucket tells, the tokens are there, however many refills lie between."""
    bucket = Bucket(per_minute=7)
    bucket.take(7, 0.0)
    now = 0.0
    for _ in range(10_000):
        now += bucket.seconds_until(1, now)
        assert bucket.has(1, now)
        bucket.take(1, now)


def test_wait_for_more_than_fits() -> None:
    """The wait for more than a bucket can ever hold is the wait until it is full."""
    bucket = Bucket(per_minute=60)
    bucket.take(30, 0.0)
    assert bucket.seconds_until(1_000, 0.0) == bucket.seconds_until_full(0.0) == 30.0


@pytest.mark.parametrize(("wait", "seconds"), [(0.0, 1), (0.2, 1), (1.0, 1), (1.01, 2), (59.5, 60)])
def test_whole_seconds(wait: float, seconds: int) -> None:
    """A wait is sent in whole seconds, rounded up, and is never 0."""
    assert whole_seconds(wait) == seconds
