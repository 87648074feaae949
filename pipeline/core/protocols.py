"""Facts about each wire protocol that the settings need: its built-in provider and the settings that only it has.

How a protocol looks on the wire is in `providers.registry`. This table has no code, so that reading settings loads no
codec.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.core.types import Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class ProtocolFacts:
    """Facts about one protocol. Its built-in provider has the protocol's name.

    `built_in` are the settings of that provider and `own_settings` the names of settings that no other protocol has.
    `base_url_variable` is the environment variable of the official SDK for another address, `key_source` the page with
    API keys. `half_price_in_batch` is True if the provider documents 50 % off in batches for every model.
    `simulated_path` is where the simulator has the API.
    """

    built_in: Mapping[str, Any]
    own_settings: tuple[str, ...]
    base_url_variable: str
    key_source: str
    half_price_in_batch: bool
    simulated_path: str = ""

    @property
    def default_path(self) -> str:
        """The path of the endpoint below a provider's `base_url`."""
        return str(self.built_in["path"])


PROTOCOLS: Mapping[Protocol, ProtocolFacts] = {
    Protocol.ANTHROPIC: ProtocolFacts(
        built_in={
            "protocol": "anthropic",
            "base_url": "https://api.anthropic.com",
            "path": "/v1/messages",
            "api_key_env": "ANTHROPIC_API_KEY",
            "model": "claude-haiku-5-5",
            "models": ["claude-*"],
            "version": "2023-06-01",
            "max_tokens": 4096,
        },
        own_settings=("version", "max_tokens"),
        base_url_variable="ANTHROPIC_BASE_URL",
        key_source="https://console.anthropic.com (Settings, API keys)",
        half_price_in_batch=True,
    ),
    Protocol.OPENAI: ProtocolFacts(
        built_in={
            "protocol": "openai",
            "base_url": "https://api.openai.com/v1",
            "path": "/chat/completions",
            "api_key_env": "OPENAI_API_KEY",
            "model": "gpt-6-luna",
            "models": ["gpt-*", "chatgpt-*", "o[0-9]*", "ft:*"],
            "max_tokens_field": "auto",
            "store": False,
        },
        own_settings=("organization", "project", "max_tokens_field", "store"),
        base_url_variable="OPENAI_BASE_URL",
        key_source="https://platform.openai.com/api-keys",
        half_price_in_batch=True,
        simulated_path="/v1",
    ),
}


def foreign_settings(protocol: str) -> tuple[str, ...]:
    """Return the settings of a provider that only other protocols have."""
    names: list[str] = []
    for other, facts in PROTOCOLS.items():
        if other != protocol:
            names.extend(facts.own_settings)
    return tuple(names)
