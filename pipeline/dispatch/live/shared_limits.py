"""Shares a model's limits between processes that use one account.

Each process holds a lease on a share of a quota (endpoint, key, model). It renews the lease every quarter of a second
and learns its share. A process that is killed gives its lease back by no longer renewing it. Processes that wait for
the limit get equal parts of what the others leave; a process that does not wait keeps what it uses, and some room to
grow. A cooldown of one process holds for all.

On one machine a lease is a row in a small SQLite file. Times are those of the event loop's clock, which is the same
for all processes there. In a cluster an actor keeps the leases (`runner.cluster.quota`).
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import anyio
from anyio import to_thread

from pipeline.core import environment
from pipeline.core.clock import Clock
from pipeline.core.config import Config
from pipeline.core.hashing import checksum
from pipeline.dispatch.live.rate_limiter import Demand, RateLimiter

RENEWED_EVERY = 0.25
LEASE_SECONDS = 1.0
_ROOM_TO_GROW = 1.5
_SMALLEST_SHARE = 0.02
_SCHEMA = """
CREATE TABLE IF NOT EXISTS leases (
    quota TEXT NOT NULL, holder TEXT NOT NULL, used REAL NOT NULL, is_hungry INTEGER NOT NULL,
    closed_until REAL NOT NULL, expires REAL NOT NULL, PRIMARY KEY (quota, holder)
) WITHOUT ROWID
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """What a process may use until it renews: its share of the limits (0 to 1), and when the common cooldown ends."""

    share: float
    cooldown_until: float


def quota_name(url: str, key: str | None, model: str) -> str:
    """Return the name of a quota. It holds a hash of the key, not the key."""
    return checksum(url.encode(), b"\0", (key or "").encode(), b"\0", model.encode()).hex()


class LeaseBroker(Protocol):
    """Gives out leases, as seen by one process. Times are those of its event loop's clock."""

    async def renew(self, demands: Mapping[str, Demand], now: float) -> Mapping[str, Lease]:
        """Report what this process needs of each quota; return its leases. Raises `OSError` if there are none."""
        ...

    async def give_back(self) -> None:
        """Give all leases back."""
        ...


class SqliteBroker:
    """The broker on one machine: a file, used in threads."""

    def __init__(self, leases: LeaseTable) -> None:
        self._leases = leases

    async def renew(self, demands: Mapping[str, Demand], now: float) -> Mapping[str, Lease]:
        try:
            return await to_thread.run_sync(self._leases.renew, demands, now)
        except sqlite3.Error as exc:
            raise OSError(str(exc)) from exc

    async def give_back(self) -> None:
        await to_thread.run_sync(self._leases.give_back)


class LeaseTable:
    """The leases of one process, in a file that all processes share."""

    def __init__(self, path: Path, holder: str) -> None:
        self._path = path
        self._holder = holder

    def renew(self, demands: Mapping[str, Demand], now: float) -> dict[str, Lease]:
        """Report what this process needs of each quota; return its leases. Raises `sqlite3.Error` or `OSError`."""
        with closing(self._connect()) as file, file:
            file.execute("BEGIN IMMEDIATE")
            file.execute("DELETE FROM leases WHERE expires < ? OR expires > ?", (now, now + 10 * LEASE_SECONDS))
            leases: dict[str, Lease] = {}
            for quota, demand in demands.items():
                row = (quota, self._holder, demand.used, demand.is_waiting, demand.cooldown_until, now + LEASE_SECONDS)
                file.execute("INSERT OR REPLACE INTO leases VALUES (?, ?, ?, ?, ?, ?)", row)
                rows = file.execute(
                    "SELECT holder, used, is_hungry, closed_until FROM leases WHERE quota = ?", (quota,)
                )
                held = {
                    holder: Demand(used=used, is_waiting=bool(waiting), cooldown_until=end)
                    for holder, used, waiting, end in rows
                }
                cooldown_until = max(each.cooldown_until for each in held.values())
                leases[quota] = Lease(share=share_of(self._holder, held), cooldown_until=cooldown_until)
            return leases

    def give_back(self) -> None:
        """Give all leases back."""
        with suppress(sqlite3.Error, OSError), closing(self._connect()) as file, file:
            file.execute("DELETE FROM leases WHERE holder = ?", (self._holder,))

    def _connect(self) -> sqlite3.Connection:
        self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._path.touch(mode=0o600)
        file = sqlite3.connect(self._path, timeout=LEASE_SECONDS, isolation_level=None)
        # Leases live one second, so what a power cut takes is soon written again.
        file.execute("PRAGMA synchronous = OFF")
        file.execute(_SCHEMA)
        return file


def share_of(holder: str, held: Mapping[str, Demand]) -> float:
    """Return the share of one process among those that hold leases on a quota."""
    equal = 1.0 / len(held)
    kept = {name: min(equal, _ROOM_TO_GROW * demand.used + _SMALLEST_SHARE) for name, demand in held.items()}
    waiting = [name for name, demand in held.items() if demand.is_waiting]
    if holder not in waiting:
        return kept[holder] if waiting else equal
    return (1.0 - sum(kept[name] for name in held if name not in waiting)) / len(waiting)


class QuotaSync:
    """Renews the leases of a run. `rate_limiters` returns those of its shared limits, by quota name."""

    def __init__(
        self,
        broker: LeaseBroker,
        clock: Clock,
        *,
        rate_limiters: Callable[[], Mapping[str, RateLimiter]],
        notify: Callable[[str], None],
    ) -> None:
        self._broker = broker
        self._clock = clock
        self._rate_limiters = rate_limiters
        self._notify = notify

    async def keep(self) -> None:
        """Renew until cancelled. If leases become unavailable, say so once and use the whole limits."""
        try:
            while True:
                demands = {quota: rate_limiter.demand() for quota, rate_limiter in self._rate_limiters().items()}
                if demands:
                    self._take(await self._broker.renew(demands, self._clock.now()))
                await anyio.sleep(RENEWED_EVERY)
        except OSError as exc:
            self._notify(f"limits are not shared with other runs on this machine: {exc}")
            self._take({})
        finally:
            with anyio.CancelScope(shield=True):
                await self._broker.give_back()

    def _take(self, leases: Mapping[str, Lease]) -> None:
        """Apply the leases; a limit without one is used in full."""
        for quota, rate_limiter in self._rate_limiters().items():
            lease = leases.get(quota)
            lease = lease or Lease(share=1.0, cooldown_until=0.0)
            rate_limiter.take_share(lease.share, lease.cooldown_until)


def lease_broker(settings: Config, run_id: str) -> LeaseBroker:
    """Return the broker that shares limits with other runs on this machine. Its file lies beside the ledger."""
    return SqliteBroker(LeaseTable(environment.ledger_path(settings).with_name("limits.sqlite"), run_id))
