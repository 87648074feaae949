"""OpenAI's rate limits: https://platform.openai.com/docs/guides/rate-limits (July 2026).

There is a bucket of requests and one of tokens. Each request is charged the larger of its `max_tokens` and
its estimated prompt, cached or not, and nothing is given back. A request refused for its tokens still counts
as a request. One refused for the number of requests takes nothing: were it to, clients that retry faster
than the bucket fills would keep it empty for ever.
"""

import math

from pipeline.simulator.buckets import Bucket, bucket, whole_seconds
from pipeline.simulator.openai.errors import rate_limited
from pipeline.simulator.options import Options
from pipeline.simulator.types import Headers, Problem, Prompt, Usage


class OpenAILimits:
    """The two buckets of one key and model."""

    def __init__(self, options: Options) -> None:
        self._requests = bucket(options.rpm, options.burst)
        self._tokens = bucket(options.input_tpm)

    def admit(self, prompt: Prompt, now: float) -> Problem | None:
        """Charge one request and its tokens, or say which of them must wait."""
        if self._requests:
            if not self._requests.has(1, now):
                return _limited(prompt.model, "requests", self._requests, 1, now)
            self._requests.take(1, now)
        if self._tokens:
            need = max(prompt.max_tokens or 0, prompt.input_tokens)
            if need > self._tokens.capacity:
                return _too_large(prompt.model, need, self._tokens.capacity)
            if not self._tokens.has(need, now):
                return _limited(prompt.model, "tokens", self._tokens, need, now)
            self._tokens.take(need, now)
        return None

    def settle(self, prompt: Prompt, usage: Usage, now: float) -> None:
        """Leave the charge as it is: what was reserved counts, not what was used."""

    def change(self, factor: float, now: float) -> None:
        """Multiply every limit."""
        for held in (self._requests, self._tokens):
            if held:
                held.change(factor, now)

    def headers(self, now: float, wall: float) -> Headers:
        """Return limit, remaining and reset (time until full, as a Go duration) of each bucket."""
        headers: list[tuple[bytes, bytes]] = []
        for name, held in ((b"requests", self._requests), (b"tokens", self._tokens)):
            if held:
                headers.extend(_family(name, held, now))
        return tuple(headers)


def _limited(model: str, kind: str, held: Bucket, need: int, now: float) -> Problem:
    wait = held.seconds_until(need, now)
    metric = "RPM" if kind == "requests" else "TPM"
    used = max(0, held.per_minute - held.remaining(now))
    message = (
        f"Rate limit reached for {model} in organization org-simulator on {kind} per min ({metric}): "
        f"Limit {held.per_minute}, Used {used}, Requested {need}. Please try again in {go_duration(wait)}. "
        "Visit https://platform.openai.com/account/rate-limits to learn more."
    )
    return rate_limited(message, kind=kind, retry_after=whole_seconds(wait))


def _too_large(model: str, need: int, limit: int) -> Problem:
    message = (
        f"Request too large for {model} in organization org-simulator on tokens per min (TPM): "
        f"Limit {limit}, Requested {need}. The input or output tokens must be reduced "
        "in order to run successfully. Visit https://platform.openai.com/account/rate-limits to learn more."
    )
    return rate_limited(message, kind="tokens", retry_after=None)


def _family(name: bytes, held: Bucket, now: float) -> Headers:
    return (
        (b"x-ratelimit-limit-" + name, b"%d" % held.per_minute),
        (b"x-ratelimit-remaining-" + name, b"%d" % held.remaining(now)),
        (b"x-ratelimit-reset-" + name, go_duration(held.seconds_until_full(now)).encode()),
    )


def go_duration(seconds: float) -> str:
    """Format seconds as Go does, rounded up to milliseconds: `20ms`, `8.64s`, `6m0s`, `1h23m31s`."""
    milliseconds = math.ceil(seconds * 1_000 - 1e-6)
    if 0 < milliseconds < 1_000:
        return f"{milliseconds}ms"
    minutes, rest = divmod(milliseconds, 60_000)
    hours, minutes = divmod(minutes, 60)
    text = f"{rest / 1_000:g}s"
    if hours:
        return f"{hours}h{minutes}m{text}"
    return f"{minutes}m{text}" if minutes else text
