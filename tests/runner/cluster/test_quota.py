"""Leases in one place: shares, and what happens when the place is made anew."""

from __future__ import annotations

import pytest

from pipeline.dispatch.live.rate_limiter import Demand
from pipeline.runner.cluster.quota import Quota

HUNGRY = Demand(used=0.5, is_waiting=True, cooldown_until=0.0, share=0.25)


def _grown() -> Quota:
    """Return a quota that is no longer new."""
    quota = Quota()
    quota.renew("a", {}, 90.0)
    return quota


def test_who_waits_gets_equal_parts_and_who_is_gone_none() -> None:
    """As between the processes of one host."""
    quota = _grown()

    assert quota.renew("a", {"q": HUNGRY}, 100.0)["q"].share == 1.0
    assert quota.renew("b", {"q": HUNGRY}, 100.1)["q"].share == 0.5
    assert quota.renew("a", {"q": HUNGRY, "r": HUNGRY}, 100.2)["r"].share == 1.0
    assert quota.renew("b", {"q": HUNGRY}, 101.3)["q"].share == 1.0


def test_in_the_beginning_everyone_keeps_what_he_has() -> None:
    """One that was killed and is there again knows nobody: the first to call must not be given all."""
    quota = Quota()

    assert [quota.renew(name, {"q": HUNGRY}, 100.0)["q"].share for name in "abc"] == [0.25] * 3
    assert quota.renew("a", {"q": HUNGRY}, 100.9)["q"].share == 0.25
    assert quota.renew("a", {"q": HUNGRY}, 101.1)["q"].share == pytest.approx(1.0)


def test_a_cooldown_is_everybodys_whatever_his_clock_says() -> None:
    """Times are told as seconds from now: machines have clocks of their own."""
    quota = _grown()
    quota.renew("a", {"q": Demand(used=0.0, is_waiting=True, cooldown_until=30.0)}, 100.0)

    assert quota.renew("b", {"q": HUNGRY}, 100.5)["q"].cooldown_until == pytest.approx(29.5)
