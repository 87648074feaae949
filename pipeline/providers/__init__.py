"""Providers: two codecs each for calls and batches, and what can be told from a model's name alone."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

from pipeline.core.config import Config
from pipeline.core.types import Protocol
from pipeline.providers.anthropic import AnthropicCodec
from pipeline.providers.anthropic_batch import AnthropicBatches
from pipeline.providers.base import USER_AGENT, Codec
from pipeline.providers.batch import BatchCodec
from pipeline.providers.deprecations import retirement
from pipeline.providers.openai import OpenAICodec
from pipeline.providers.openai_batch import OpenAIBatches
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

_CODECS: Mapping[Protocol, Codec] = {Protocol.ANTHROPIC: AnthropicCodec(), Protocol.OPENAI: OpenAICodec()}
_BATCHES: Mapping[Protocol, BatchCodec] = {Protocol.ANTHROPIC: AnthropicBatches(), Protocol.OPENAI: OpenAIBatches()}
_BUILT_IN = tuple(Protocol)


def codec(protocol: Protocol) -> Codec:
    """Return the codec of a protocol: stateless, one for all."""
    return _CODECS[protocol]


def batch_codec(protocol: Protocol) -> BatchCodec:
    """Return the codec of a protocol's batch API: stateless, one for all."""
    return _BATCHES[protocol]


def provider_of(model: str, config: Config) -> str | None:
    """Return the name of the provider whose `models` patterns match, None if none does.

    The user's own come before the built-in ones (`anthropic`, `openai`), in the order of the file.
    """
    own_first = sorted(config.providers, key=lambda name: name in _BUILT_IN)
    for name in own_first:
        if any(fnmatchcase(model, pattern) for pattern in config.providers[name].models):
            return name
    return None
