"""Retired models: which names a row holds for, whose models they are, and what is said before and after the day."""

from __future__ import annotations

from datetime import date

import pytest

from pipeline import providers
from pipeline.core.config import Config, Endpoint

BUILT_IN = Config().providers


@pytest.mark.parametrize(
    ("provider", "model", "day", "advice"),
    [
        pytest.param("anthropic", "claude-3-5-sonnet-20241022", "2025-10-28", "claude-sonnet-5-5", id="seed's default"),
        pytest.param("anthropic", "claude-3-5-sonnet-latest", "2025-10-28", "claude-sonnet-5-5", id="alias"),
        pytest.param("anthropic", "claude-3-opus-20240229", "2026-01-05", "claude-opus-5-5", id="opus 3"),
        pytest.param("anthropic", "claude-3-haiku-20240307", "2026-04-20", "claude-haiku-5-5", id="haiku 3"),
        pytest.param("anthropic", "claude-sonnet-4-5-20250929", "2026-11-30", "claude-sonnet-5-5", id="sonnet 4.5"),
        pytest.param("anthropic", "claude-opus-4-5", "2027-01-22", "claude-opus-5-5", id="opus 4.5 is not opus 4"),
        pytest.param("openai", "gpt-4o", "2027-01-14", "gpt-6-luna", id="gpt-4o"),
        pytest.param("openai", "gpt-4o-mini-2024-07-18", "2027-01-14", "gpt-6-luna", id="dated"),
        pytest.param("openai", "gpt-4o-2024-05-13", "2026-10-23", "gpt-6-luna", id="the longest row counts"),
        pytest.param("openai", "gpt-4o-audio-preview-2024-10-01", "2025-10-10", "deprecations", id="no successor"),
        pytest.param("openai", "gpt-4.1-nano", "2026-10-23", "gpt-6-luna", id="nano before its family"),
        pytest.param("openai", "gpt-5-2025-08-07", "2026-12-11", "gpt-6.1-sol", id="gpt-5"),
        pytest.param("openai", "gpt-5-mini", "2026-12-11", "gpt-6.1-terra", id="gpt-5-mini"),
        pytest.param("openai", "gpt-5.5-cyber-preview", "2027-02-01", "deprecations", id="cyber preview"),
        pytest.param("openai", "gpt-audio-mini", "2027-01-20", "deprecations", id="audio mini"),
    ],
)
def test_a_known_day(provider: str, model: str, day: str, advice: str) -> None:
    """A row holds for the name, its aliases and its dated forms, and says what to use instead."""
    found = providers.retirement(provider, BUILT_IN[provider], model)

    assert found is not None
    assert (str(found.day), advice in found.advice) == (day, True)


@pytest.mark.parametrize(
    ("provider", "model"),
    [
        pytest.param("anthropic", "claude-haiku-5-5", id="current"),
        pytest.param("openai", "gpt-6-luna", id="current, OpenAI"),
        pytest.param("openai", "gpt-5.6-sol", id="gpt-5.6 is not gpt-5"),
        pytest.param("openai", "gpt-4o1", id="a suffix needs a hyphen"),
        pytest.param("openai", "claude-3-opus-20240229", id="another protocol"),
        pytest.param("openai", "openai/gpt-4o", id="a gateway's prefix"),
        pytest.param("openai", "", id="empty"),
    ],
)
def test_no_known_day(provider: str, model: str) -> None:
    """A name that only begins like a row's, or that a gateway made, is not guessed at."""
    assert providers.retirement(provider, BUILT_IN[provider], model) is None


@pytest.mark.parametrize(
    ("provider", "base_url", "is_reported"),
    [
        pytest.param("openai", "https://eu.api.openai.com/v1", True, id="a region"),
        pytest.param("second", "https://api.openai.com/v1", True, id="another account"),
        pytest.param("openai", "http://127.0.0.1:8000/v1", True, id="the simulator"),
        pytest.param("vllm", "http://127.0.0.1:8000/v1", False, id="own server here"),
        pytest.param("openai", "https://gateway.example/v1", False, id="gateway"),
        pytest.param("azure", "https://me.openai.azure.com/openai/v1", False, id="Azure"),
        pytest.param("openai", "https://api.openai.com.example/v1", False, id="a host that begins alike"),
    ],
)
def test_only_the_providers_own_hosts_count(provider: str, base_url: str, is_reported: bool) -> None:
    """Behind another address, gpt-4o is whatever its operator serves under that name, for as long as it likes."""
    endpoint = Endpoint.model_validate({"protocol": "openai", "base_url": base_url, "path": "/chat/completions"})

    assert (providers.retirement(provider, endpoint, "gpt-4o") is not None) is is_reported


@pytest.mark.parametrize(
    ("today", "text"),
    [
        pytest.param(date(2026, 11, 29), "will be retired on 2026-11-30", id="the day before"),
        pytest.param(date(2026, 11, 30), "was retired on 2026-11-30", id="on the day"),
        pytest.param(date(2027, 5, 1), "was retired on 2026-11-30", id="later"),
    ],
)
def test_words_fit_the_day(today: date, text: str) -> None:
    """From its day on a model counts as retired."""
    found = providers.retirement("anthropic", BUILT_IN["anthropic"], "claude-sonnet-4-5")

    assert found is not None
    assert text in found.describe(today)


def test_every_successor_is_current() -> None:
    """The advice never leads from one retired model to another."""
    names = ["claude-1", "claude-3-opus", "claude-3-sonnet", "claude-mythos-preview", "gpt-4", "gpt-4o", "gpt-4.1-mini"]
    for name in names:
        provider = "anthropic" if name.startswith("claude") else "openai"
        found = providers.retirement(provider, BUILT_IN[provider], name)
        assert found is not None
        successor = found.advice.split()[1]
        assert providers.retirement(provider, BUILT_IN[provider], successor) is None
