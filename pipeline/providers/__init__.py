"""Providers: codecs of their endpoints and batch APIs, and facts about models by name."""

from __future__ import annotations

from fnmatch import fnmatchcase

from pipeline.core.config import Config
from pipeline.core.types import Protocol
from pipeline.providers.base import USER_AGENT, Codec
from pipeline.providers.batch import BatchCodec
from pipeline.providers.deprecations import retirement
from pipeline.providers.registry import batch_codec, codec
from pipeline.providers.tokens import estimate_input_tokens

__all__ = [
    "USER_AGENT",
    "BatchCodec",
    "Codec",
    "batch_codec",
    "codec",
    "estimate_input_tokens",
    "provider_of",
    "retirement",
]

_BUILT_IN = tuple(Protocol)


def provider_of(model: str, config: Config) -> str | None:
    """Return the provider whose `models` patterns match the name of a model. None if none does.

    The user's own providers come before the built-in ones (`anthropic`, `openai`), in the order of the file.
    """
    own_first = sorted(config.providers, key=lambda name: name in _BUILT_IN)
    for name in own_first:
        if any(fnmatchcase(model, pattern) for pattern in config.providers[name].models):
            return name
    return None
