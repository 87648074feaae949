"""One account, several runs on a machine: together they are what one would be allowed to be."""

from __future__ import annotations

import stat
from pathlib import Path

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.clock import Clock
from pipeline.core.config import Limits
from pipeline.core.types import Limit
from pipeline.dispatch.live.rate_limiter import Demand, RateLimiter
from pipeline.dispatch.live.shared_limits import Lease, LeaseTable, QuotaSync, SqliteBroker, quota_name, share_of
from pipeline.simulator import Options, build_app
from tests.pace import MODELS, Run
from tests.virtual import virtual_time

CALL = {"requests": 1.0}
IDLE = Demand(used=0.0, is_waiting=False, cooldown_until=0.0)
HUNGRY = Demand(used=0.5, is_waiting=True, cooldown_until=0.0)
virtual = [*virtual_time, pytest.mark.usefixtures("no_threads")]
demands = st.builds(Demand, used=st.floats(0, 1), is_waiting=st.booleans(), cooldown_until=st.just(0.0))


# ── shares ────────────────────────────────────────────────────────────────────────────────────────────


@given(st.dictionaries(st.text(min_size=1, max_size=3), demands, min_size=1, max_size=8))
def test_shares_are_never_more_than_all(held: dict[str, Demand]) -> None:
    """Whatever the runs need, each has something, and all have no more than all there is."""
    shares = {name: share_of(name, held) for name in held}

    assert sum(shares.values()) <= 1 + 1e-9
    assert min(shares.values()) > 0


@given(st.dictionaries(st.text(min_size=1, max_size=3), demands, min_size=1, max_size=8))
def test_nothing_is_left_over_where_somebody_waits(held: dict[str, Demand]) -> None:
    """As soon as one run waits for the limit, all of it is given out."""
    held = {**held, "who waits": HUNGRY}

    assert sum(share_of(name, held) for name in held) == pytest.approx(1)


def test_who_waits_gets_what_others_leave() -> None:
    """A run that uses little keeps that and some room to grow; those that wait have the rest in equal parts."""
    held = {"small": Demand(used=0.1, is_waiting=False, cooldown_until=0.0), "a": HUNGRY, "b": HUNGRY}

    assert share_of("small", held) == pytest.approx(0.17)
    assert share_of("a", held) == share_of("b", held) == pytest.approx(0.415)
    assert share_of("alone", {"alone": HUNGRY}) == 1.0


# ── leases ────────────────────────────────────────────────────────────────────────────────────────────


def test_a_lease_is_given_back_by_not_renewing_it(tmp_path: Path) -> None:
    """Who holds one has a part; a run that was killed has none a second later; one that ends has none at once."""
    one, other = (LeaseTable(tmp_path / "limits.sqlite", name) for name in ("one", "other"))

    assert one.renew({"q": HUNGRY}, 100.0)["q"].share == 1.0
    assert other.renew({"q": HUNGRY}, 100.1)["q"].share == 0.5
    assert one.renew({"q": HUNGRY}, 100.2)["q"].share == 0.5
    assert one.renew({"q": HUNGRY}, 101.2)["q"].share == 1.0
    other.renew({"q": HUNGRY}, 101.3)
    other.give_back()
    assert one.renew({"q": HUNGRY}, 101.4)["q"].share == 1.0


def test_quotas_are_apart_and_a_cooldown_is_everybodys(tmp_path: Path) -> None:
    """Another model or key shares nothing; of one quota all learn until when it is closed."""
    one, other = (LeaseTable(tmp_path / "limits.sqlite", name) for name in ("one", "other"))
    closed = Demand(used=0.0, is_waiting=True, cooldown_until=130.0)

    one.renew({"q": closed, "r": HUNGRY}, 100.0)

    assert other.renew({"q": HUNGRY}, 100.0) == {"q": Lease(share=0.5, cooldown_until=130.0)}
    assert one.renew({"r": HUNGRY}, 100.0) == {"r": Lease(share=1.0, cooldown_until=0.0)}


def test_leases_from_before_a_reboot_count_for_nothing(tmp_path: Path) -> None:
    """The clock begins anew with the machine: a lease that ends far from now is one of another time."""
    one, other = (LeaseTable(tmp_path / "limits.sqlite", name) for name in ("one", "other"))
    one.renew({"q": HUNGRY}, 1_000_000.0)

    assert other.renew({"q": HUNGRY}, 5.0)["q"].share == 1.0


def test_the_file_is_its_owners_and_tells_no_key(tmp_path: Path) -> None:
    """The name of a quota does not hold the key, and nobody else can read the file."""
    key = "sk-canary-0123456789abcdef"
    name = quota_name("https://api.openai.com/v1/chat/completions", key, "gpt-6-luna")
    LeaseTable(tmp_path / "limits.sqlite", "one").renew({name: HUNGRY}, 1.0)

    assert key.encode() not in (tmp_path / "limits.sqlite").read_bytes()
    assert stat.S_IMODE((tmp_path / "limits.sqlite").stat().st_mode) == 0o600
    assert len({name, quota_name("https://a", key, "m"), quota_name("https://a", "other", "m")}) == 3


@pytest.mark.usefixtures("no_threads")
async def test_without_the_file_each_goes_by_itself(tmp_path: Path) -> None:
    """A file that cannot be used is told once, and costs no run its work."""
    (tmp_path / "limits.sqlite").write_text("this is no data base, and longer than a header would be" * 20)
    said: list[str] = []
    rate_limiter = RateLimiter(Limits())
    rate_limiter.take_share(0.5, 0.0)
    leases = LeaseTable(tmp_path / "limits.sqlite", "one")

    with anyio.fail_after(10):
        await QuotaSync(
            SqliteBroker(leases), Clock(), rate_limiters=lambda: {"q": rate_limiter}, notify=said.append
        ).keep()

    assert (len(said), rate_limiter.share) == (1, 1.0)
    assert "not shared" in said[0]


# ── the gate ──────────────────────────────────────────────────────────────────────────────────────────


async def test_a_gate_keeps_to_its_share() -> None:
    """What the provider tells is cut to the share, how full it is stays, and a larger share opens it again."""
    rate_limiter = RateLimiter(Limits())
    rate_limiter.update_from_headers([Limit(kind="requests", per_minute=100, remaining=40)])

    rate_limiter.take_share(0.25, 0.0)
    passed = [permit for _ in range(60) if (permit := rate_limiter.try_acquire(CALL))]
    rate_limiter.update_from_headers([Limit(kind="requests", per_minute=100, remaining=100)])

    assert len(passed) == 10
    (allowance,) = rate_limiter.statistics().allowances
    assert allowance.per_minute == pytest.approx(25)
    rate_limiter.take_share(1.0, 0.0)
    assert rate_limiter.statistics().allowances[0].per_minute == pytest.approx(100)


async def test_what_fits_the_limit_fits_a_share_of_it() -> None:
    """A request larger than the share waits longer; it is not refused, as alone it would pass."""
    rate_limiter = RateLimiter(Limits(input_tpm=600))
    rate_limiter.update_from_headers([Limit(kind="tokens", per_minute=1_000, remaining=1_000)])
    rate_limiter.take_share(0.1, 0.0)

    assert rate_limiter.never_fits({"tokens": 900.0, "input_tokens": 500.0}) is None
    assert rate_limiter.never_fits({"tokens": 1_100.0}) is not None
    assert rate_limiter.never_fits({"input_tokens": 700.0}) is not None


# ── together ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
@pytest.mark.parametrize("provider", list(MODELS))
class TestFourRuns:
    pytestmark = virtual

    async def test_together_they_use_the_limit_and_pass_it_not(self, provider: str, tmp_path: Path) -> None:
        """Four runs before one bucket: 95 % of it is used at least, and half a percent refused at most."""
        options = Options(rpm=1_000, latency=1.5)
        app = build_app(options)
        runs = [Run(provider, options, app=app, leases=LeaseTable(tmp_path / "l", str(n))) for n in range(4)]

        async with anyio.create_task_group() as tasks:
            for run in runs:
                tasks.start_soon(run.go, 150.0)
                await anyio.sleep(1)

        counts = app.state.simulator.statistics.snapshot()
        answers = [at for run in runs for at in run.answers if at >= 90]
        assert len(answers) / 60 >= 0.95 * 1_000 / 60
        assert counts["rejected"] <= 0.005 * counts["answered"]
        each = [sum(at >= 90 for at in run.answers) for run in runs]
        assert min(each) >= 0.8 * max(each)

    async def test_the_share_of_one_that_is_killed_is_used_within_two_seconds(
        self, provider: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A run that is gone without a word leaves its part to the others."""
        monkeypatch.setattr(LeaseTable, "give_back", lambda self: None)
        options = Options(rpm=1_000, latency=1.5)
        app = build_app(options)
        runs = [Run(provider, options, app=app, leases=LeaseTable(tmp_path / "l", str(n))) for n in range(4)]

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(runs[0].go, 90.0)
            for run in runs[1:]:
                tasks.start_soon(run.go, 150.0)

        latency = 4.0  # for what was sent before to come back
        after = sum(90 + 2 + latency <= at for run in runs[1:] for at in run.answers)
        assert after / (60 - 2 - latency) >= 0.95 * 1_000 / 60
