"""Who may use which share of a limit, in a cluster: the leases of all workers, kept in one place.

It holds nothing but leases of a second, so a restart loses nothing: in the first second of its life it hears who is
there, and everyone keeps the share that he had, so that together they are never more than before. Times that cross
machines are seconds from now.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from pipeline.dispatch.live.rate_limiter import Demand
from pipeline.dispatch.live.shared_limits import LEASE_SECONDS, Lease, share_of


class Quota:
    """The leases of all workers. `now` are seconds of a clock that never runs backwards."""

    def __init__(self) -> None:
        self._began: float | None = None
        self._held: dict[str, dict[str, tuple[Demand, float]]] = {}

    def __repr__(self) -> str:
        return f"pipeline budget: {len(self._held):,} limits shared"

    def renew(self, holder: str, demands: Mapping[str, Demand], now: float) -> dict[str, Lease]:
        """Tell what one needs of each quota; return its leases. `closed_until` is in seconds from now, both ways."""
        self._began = now if self._began is None else self._began
        is_new = now < self._began + LEASE_SECONDS
        leases: dict[str, Lease] = {}
        for quota, demand in demands.items():
            held = self._held.setdefault(quota, {})
            held[holder] = (replace(demand, cooldown_until=now + demand.cooldown_until), now + LEASE_SECONDS)
            for name in [name for name, (_, expires) in held.items() if expires < now]:
                del held[name]
            known = {name: each for name, (each, _) in held.items()}
            cooldown_until = max(each.cooldown_until for each in known.values())
            share = demand.share if is_new else share_of(holder, known)
            leases[quota] = Lease(share=share, cooldown_until=max(0.0, cooldown_until - now))
        return leases
