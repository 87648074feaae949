"""A token bucket with continuous refill; time is given in, in seconds of any monotonic clock."""

import math

# Thousands of refills add up float errors of this order; without it a bucket that holds
# 0.9999999 of the one token asked for would refuse a client that waited exactly long enough.
_TOLERANCE = 1e-6


class Bucket:
    """Holds up to `capacity` tokens and gains `per_minute` of them each minute; starts full."""

    __slots__ = ("_level", "_rate", "_updated", "capacity", "per_minute")

    def __init__(self, *, per_minute: int, capacity: int | None = None) -> None:
        self.per_minute = per_minute
        self.capacity = per_minute if capacity is None else capacity
        self._rate = per_minute / 60
        self._level = float(self.capacity)
        self._updated = -math.inf

    def __repr__(self) -> str:
        return f"<Bucket {self._level:.1f} of {self.capacity}, {self.per_minute} a minute, at {self._updated}>"

    def level(self, now: float) -> float:
        """Return the tokens held; negative is debt."""
        return min(self.capacity, self._level + (now - self._updated) * self._rate)

    def remaining(self, now: float) -> int:
        """Return the whole tokens that can be taken."""
        return max(0, math.floor(self.level(now) + _TOLERANCE))

    def has(self, amount: float, now: float) -> bool:
        """Say whether `amount` tokens are there."""
        return self.level(now) + _TOLERANCE >= amount

    def take(self, amount: float, now: float) -> None:
        """Take tokens, into debt if need be; a negative amount gives them back."""
        self._level = min(self.capacity, self.level(now) - amount)
        self._updated = now

    def change(self, factor: float, now: float) -> None:
        """Multiply limit and capacity, as a provider does when an account's tier changes; the level goes along."""
        self._level = self.level(now) * factor
        self._updated = now
        self.per_minute = round(self.per_minute * factor)
        self.capacity = round(self.capacity * factor)
        self._rate = self.per_minute / 60

    def seconds_until(self, amount: float, now: float) -> float:
        """Return the wait until `amount` tokens are there, or until full if that is sooner."""
        return max(0.0, (min(amount, self.capacity) - self.level(now)) / self._rate)

    def seconds_until_full(self, now: float) -> float:
        """Return the wait until nothing is missing."""
        return self.seconds_until(self.capacity, now)


def bucket(per_minute: int | None, capacity: int | None = None) -> Bucket | None:
    """Make the bucket of a limit that may not be set."""
    return None if per_minute is None else Bucket(per_minute=per_minute, capacity=capacity)


def whole_seconds(wait: float) -> int:
    """Round a wait up for a `retry-after` header, which is never 0."""
    return max(1, math.ceil(wait - _TOLERANCE))
