"""Anthropic's rate limits: https://docs.claude.com/en/api/rate-limits (August 2026).

Requests, input and output tokens have a bucket each. Input is charged by an estimate at the start and
corrected afterwards, as reads from the cache are free. Output is charged as produced: a request only needs
a bucket that is not empty, and `max_tokens` is never reserved. A refused request costs nothing.
"""

from datetime import UTC, datetime, timedelta

from pipeline.simulator.anthropic.errors import rate_limited
from pipeline.simulator.buckets import Bucket, bucket, whole_seconds
from pipeline.simulator.options import Options
from pipeline.simulator.types import Headers, Problem, Prompt, Usage


class AnthropicLimits:
    """The three buckets of one key and model."""

    def __init__(self, options: Options) -> None:
        self._requests = bucket(options.rpm, options.burst)
        self._input = bucket(options.input_tpm)
        self._output = bucket(options.output_tpm)

    def admit(self, prompt: Prompt, now: float) -> Problem | None:
        """Charge one request and the estimated input, or none of it when a bucket is short."""
        needs = (
            (self._requests, 1, "requests"),
            (self._input, prompt.input_tokens, "input tokens"),
            (self._output, 1, "output tokens"),
        )
        short = [
            (held.seconds_until(need, now), held.per_minute, unit)
            for held, need, unit in needs
            if held and not held.has(need, now)
        ]
        if short:
            return _limited(*max(short))
        if self._requests:
            self._requests.take(1, now)
        if self._input:
            self._input.take(prompt.input_tokens, now)
        return None

    def settle(self, prompt: Prompt, usage: Usage, now: float) -> None:
        """Give back the input that was read from the cache or not used, and charge the output."""
        if self._input:
            charged = usage.input_tokens - usage.cache_read_tokens
            self._input.take(charged - prompt.input_tokens, now)
        if self._output:
            self._output.take(usage.output_tokens, now)

    def change(self, factor: float, now: float) -> None:
        """Multiply every limit."""
        for held in (self._requests, self._input, self._output):
            if held:
                held.change(factor, now)

    def headers(self, now: float, wall: float) -> Headers:
        """Tell limit, remaining and reset (when full again, RFC 3339) for each bucket."""
        parts: list[tuple[bytes, bytes]] = []
        if self._requests:
            parts += _family(b"requests", [self._requests], now, wall, step=1)
        if self._input:
            parts += _family(b"input-tokens", [self._input], now, wall, step=1_000)
        if self._output:
            parts += _family(b"output-tokens", [self._output], now, wall, step=1_000)
        if tokens := [held for held in (self._input, self._output) if held]:
            parts += _family(b"tokens", tokens, now, wall, step=1_000)
        return tuple(parts)


def _limited(wait: float, limit: int, unit: str) -> Problem:
    message = (
        f"This request would exceed your organization's rate limit of {limit:,} {unit} per minute. "
        "For details, refer to: https://docs.claude.com/en/api/rate-limits. You can see the response headers "
        "for current usage. Please reduce the prompt length or the maximum tokens requested, or try again "
        "later."
    )
    return rate_limited(message, retry_after=whole_seconds(wait))


def _family(name: bytes, buckets: list[Bucket], now: float, wall: float, step: int) -> Headers:
    """Encode the three headers of a family; `step` is what the remaining is rounded to."""
    limit = sum(held.per_minute for held in buckets)
    remaining = sum(held.remaining(now) for held in buckets)
    rounded = min(limit, (remaining + step // 2) // step * step)
    full = max(held.seconds_until_full(now) for held in buckets)
    prefix = b"anthropic-ratelimit-" + name
    return (
        (prefix + b"-limit", b"%d" % limit),
        (prefix + b"-remaining", b"%d" % rounded),
        (prefix + b"-reset", _rfc3339(wall + full)),
    )


def _rfc3339(wall: float) -> bytes:
    rounded_up = datetime.fromtimestamp(wall, UTC) + timedelta(microseconds=999_999)
    return rounded_up.strftime("%Y-%m-%dT%H:%M:%SZ").encode()
