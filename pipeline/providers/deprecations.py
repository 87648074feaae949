"""Models that their provider has retired, or will retire on a known day, and what to use instead.

Sources, read on 2026-11-30: `DEPRECATED_MODELS` in anthropic 2.14.0, the list of deprecated values in openai 3.57.0
(`types/shared/chat_model.py`), and for older Claude models https://docs.anthropic.com/en/docs/resources/model-deprecations
as of 2026-11-22. OpenAI names the successors of gpt-4o, gpt-5 and gpt-5-mini; the others are the current models of the
same class.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from urllib.parse import urlsplit

from pipeline.core.config import Endpoint, is_loopback
from pipeline.core.types import Protocol

_LISTS: Mapping[Protocol, str] = {
    Protocol.ANTHROPIC: "https://docs.anthropic.com/en/docs/resources/model-deprecations",
    Protocol.OPENAI: "https://developers.openai.com/api/docs/deprecations",
}
_HOSTS: Mapping[Protocol, str] = {
    Protocol.ANTHROPIC: "api.anthropic.com",
    Protocol.OPENAI: "api.openai.com",
}
_HAIKU = "claude-haiku-5-5"
_SONNET = "claude-sonnet-5-5"
_OPUS = "claude-opus-5-5"
_LUNA = "gpt-6-luna"
_TERRA = "gpt-6.1-terra"
_SOL = "gpt-6.1-sol"

# Name: day of retirement, successor (None: no current model of that kind is known to us). A row also holds for the
# name with a suffix: `gpt-4o` for `gpt-4o-2024-08-06`, but not for `gpt-4o1`. The longest matching row counts.
_ROWS: Mapping[Protocol, Mapping[str, tuple[str, str | None]]] = {
    Protocol.ANTHROPIC: {
        "claude-1": ("2024-11-06", _HAIKU),
        "claude-1.3": ("2024-11-06", _HAIKU),
        "claude-instant": ("2024-11-06", _HAIKU),
        "claude-2.0": ("2025-07-21", _SONNET),
        "claude-2.1": ("2025-07-21", _SONNET),
        "claude-3-sonnet": ("2025-07-21", _SONNET),
        "claude-3-opus": ("2026-01-05", _OPUS),
        "claude-3-haiku": ("2026-04-20", _HAIKU),
        "claude-3-5-sonnet": ("2025-10-28", _SONNET),
        "claude-3-5-haiku": ("2026-02-19", _HAIKU),
        "claude-3-7-sonnet": ("2026-02-19", _SONNET),
        "claude-opus-4-0": ("2026-06-15", _OPUS),
        "claude-opus-4-20250514": ("2026-06-15", _OPUS),
        "claude-opus-4-5": ("2027-01-22", _OPUS),
        "claude-sonnet-4-0": ("2026-06-15", _SONNET),
        "claude-sonnet-4-20250514": ("2026-06-15", _SONNET),
        "claude-sonnet-4-5": ("2026-11-30", _SONNET),
        "claude-mythos-preview": ("2026-06-30", "claude-mythos-5-2"),
    },
    Protocol.OPENAI: {
        "gpt-3.5-turbo": ("2026-10-23", _LUNA),
        "gpt-3.5-turbo-0301": ("2024-09-13", _LUNA),
        "gpt-3.5-turbo-0613": ("2024-09-13", _LUNA),
        "gpt-3.5-turbo-1106": ("2026-09-28", _LUNA),
        "gpt-3.5-turbo-16k": ("2024-09-13", _LUNA),
        "gpt-4": ("2026-10-23", _SOL),
        "gpt-4-turbo": ("2026-10-23", _SOL),
        "gpt-4-turbo-preview": ("2026-03-26", _SOL),
        "gpt-4-0125-preview": ("2026-03-26", _SOL),
        "gpt-4-0314": ("2026-03-26", _SOL),
        "gpt-4-32k": ("2025-06-06", _SOL),
        "gpt-4-vision-preview": ("2024-12-06", _SOL),
        "gpt-4.1": ("2027-01-14", _SOL),
        "gpt-4.1-mini": ("2027-01-14", _TERRA),
        "gpt-4.1-nano": ("2026-10-23", _LUNA),
        "gpt-4o": ("2027-01-14", _LUNA),
        "gpt-4o-2024-05-13": ("2026-10-23", _LUNA),
        "gpt-4o-audio-preview": ("2026-05-07", None),
        "gpt-4o-audio-preview-2024-10-01": ("2025-10-10", None),
        "gpt-4o-mini-audio-preview": ("2026-05-07", None),
        "gpt-4o-search-preview": ("2026-07-23", None),
        "gpt-4o-mini-search-preview": ("2026-07-23", None),
        "gpt-audio-mini": ("2027-01-20", None),
        "chatgpt-4o-latest": ("2026-02-17", _SOL),
        "codex-mini-latest": ("2026-02-12", _TERRA),
        "gpt-5": ("2026-12-11", _SOL),
        "gpt-5-mini": ("2026-12-11", _TERRA),
        "gpt-5-nano": ("2026-12-11", _LUNA),
        "gpt-5-chat-latest": ("2026-07-23", _SOL),
        "gpt-5.1": ("2027-04-01", _SOL),
        "gpt-5.1-chat-latest": ("2026-07-23", _SOL),
        "gpt-5.1-codex": ("2026-07-23", _SOL),
        "gpt-5.2-chat-latest": ("2026-08-10", _SOL),
        "gpt-5.3-chat-latest": ("2026-08-10", _SOL),
        "gpt-5.4-nano": ("2027-04-01", _LUNA),
        "gpt-5.5-cyber-preview": ("2027-02-01", None),
        "o1": ("2026-10-23", _SOL),
        "o1-mini": ("2025-10-27", _TERRA),
        "o1-preview": ("2025-07-28", _SOL),
        "o3": ("2026-12-11", _SOL),
        "o3-mini": ("2026-10-23", _TERRA),
        "o4-mini": ("2026-10-23", _TERRA),
    },
}


@dataclass(frozen=True, slots=True)
class Retirement:
    """The day from which the provider refuses a model, and what to do about it, as a sentence."""

    day: date
    advice: str

    def describe(self, today: date) -> str:
        """Return what happens and when, as seen from a day (UTC)."""
        if self.day <= today:
            return f"was retired on {self.day}, so its requests fail; {self.advice}"
        return f"will be retired on {self.day}, and its requests fail from then on; {self.advice}"


def retirement(provider: str, endpoint: Endpoint, model: str) -> Retirement | None:
    """Return when the provider retires a model. None if no day is known.

    Only the providers' own hosts count, and the built-in providers if they point at this machine (the simulator). A
    gateway or the user's own server may serve a model named `gpt-4o` for as long as it likes.
    """
    protocol = Protocol(endpoint.protocol)
    if protocol not in _ROWS:
        return None
    if not _is_own_host(provider, endpoint, protocol):
        return None
    rows = _ROWS[protocol]
    for name in _prefixes(model):
        if name in rows:
            day, successor = rows[name]
            break
    else:
        return None
    advice = f"look for a successor at {_LISTS[protocol]}"
    if successor:
        advice = f"use {successor} instead"
    return Retirement(date.fromisoformat(day), advice)


def _is_own_host(provider: str, endpoint: Endpoint, protocol: Protocol) -> bool:
    host = urlsplit(endpoint.base_url).hostname or ""
    own = _HOSTS[protocol]
    if is_loopback(host):
        return provider == protocol.value
    # OpenAI's regions have subdomains: eu.api.openai.com.
    return host == own or host.endswith(f".{own}")


def _prefixes(model: str) -> list[str]:
    """Return the name, then the name without its last part, and so on: a-b-c, a-b, a."""
    parts = model.split("-")
    return ["-".join(parts[:end]) for end in range(len(parts), 0, -1)]
