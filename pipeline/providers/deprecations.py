"""Models whose last day is known: a run that names one is warned before it starts.

Sources: the deprecation lists in anthropic 2.12.0 (`DEPRECATED_MODELS`) and openai 3.54.0
(`types/shared/chat_model.py`) and the providers' deprecation pages, read on 2026-11-22. A row holds for the
name itself and for its forms with a suffix after a hyphen: `gpt-4o` for `gpt-4o-2024-08-06`, not for
`gpt-4o1`. The longest row wins.
"""

from __future__ import annotations

from collections.abc import Mapping

from pipeline.core.types import Protocol

_LAST_DAYS: Mapping[Protocol, Mapping[str, str]] = {
    Protocol.ANTHROPIC: {
        "claude-1": "2024-11-06",
        "claude-1.3": "2024-11-06",
        "claude-instant": "2024-11-06",
        "claude-2.0": "2025-07-21",
        "claude-2.1": "2025-07-21",
        "claude-3-sonnet": "2025-07-21",
        "claude-3-opus": "2026-01-05",
        "claude-3-haiku": "2026-04-20",
        "claude-3-5-sonnet": "2025-10-28",
        "claude-3-5-haiku": "2026-02-19",
        "claude-3-7-sonnet": "2026-02-19",
        "claude-opus-4-0": "2026-06-15",
        "claude-opus-4-20250514": "2026-06-15",
        "claude-sonnet-4-0": "2026-06-15",
        "claude-sonnet-4-20250514": "2026-06-15",
        "claude-sonnet-4-5": "2026-11-30",
        "claude-mythos-preview": "2026-06-30",
    },
    Protocol.OPENAI: {
        "gpt-3.5-turbo": "2026-10-23",
        "gpt-4": "2026-10-23",
        "gpt-4-turbo": "2026-10-23",
        "gpt-4-turbo-preview": "2026-03-26",
        "gpt-4-0125-preview": "2026-03-26",
        "gpt-4-0314": "2026-03-26",
        "gpt-4-32k": "2025-06-06",
        "gpt-4-vision-preview": "2024-12-06",
        "gpt-4.1": "2027-01-14",
        "gpt-4.1-nano": "2026-10-23",
        "gpt-4o": "2027-01-14",
        "gpt-4o-2024-05-13": "2026-10-23",
        "gpt-4o-audio-preview": "2026-05-07",
        "gpt-4o-mini-audio-preview": "2026-05-07",
        "gpt-4o-search-preview": "2026-07-23",
        "gpt-4o-mini-search-preview": "2026-07-23",
        "chatgpt-4o-latest": "2026-02-17",
        "gpt-5": "2026-12-11",
        "gpt-5-chat-latest": "2026-07-23",
        "gpt-5.1": "2027-04-01",
        "gpt-5.1-chat-latest": "2026-07-23",
        "gpt-5.1-codex": "2026-07-23",
        "gpt-5.2-chat-latest": "2026-08-10",
        "gpt-5.3-chat-latest": "2026-08-10",
        "gpt-5.4-nano": "2027-04-01",
        "o1": "2026-10-23",
        "o1-mini": "2025-10-27",
        "o1-preview": "2025-07-28",
        "o3": "2026-12-11",
        "o3-mini": "2026-10-23",
        "o4-mini": "2026-10-23",
    },
}
_SUCCESSORS: Mapping[Protocol, str] = {
    Protocol.ANTHROPIC: "claude-haiku-5-5 or claude-sonnet-5-5",
    Protocol.OPENAI: "gpt-6-luna or gpt-6.1-sol",
}


def retirement(provider_protocol: Protocol, model: str) -> str | None:
    """Return a sentence about the model's last day at the provider itself, None for a model that has none."""
    known = _LAST_DAYS[provider_protocol]
    row = next((name for name in _names(model) if name in known), None)
    if row is None:
        return None
    return (
        f"model {model!r}: the provider shuts it down on {known[row]}, and from then on every request fails; "
        f"in use are e.g. {_SUCCESSORS[provider_protocol]}"
    )


def _names(model: str) -> list[str]:
    """Return the name and what is left of it when parts are cut off at its end: a-b-c, a-b, a."""
    parts = model.split("-")
    return ["-".join(parts[:end]) for end in range(len(parts), 0, -1)]
