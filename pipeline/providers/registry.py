"""Which codec speaks which endpoint of which wire protocol.

A new endpoint of a known protocol needs its codec and a line here. A new protocol also needs a value in
`core.types.Protocol` (and `OutputFormat`, if its batch API has a line format), its facts in `core.protocols`, and its
batch codec and line dialect here. Everything else asks this registry.

Limit: a protocol has one batch codec, which sends every line to its chat endpoint. The planner does not look at the
endpoint of a line when it chooses the batch lane. Whoever adds a second endpoint must first look up batch codecs by
endpoint, too, or refuse the batch lane for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from pipeline.core.types import CHAT, OutputFormat, Protocol
from pipeline.providers.anthropic import AnthropicCodec
from pipeline.providers.anthropic_batch import AnthropicBatches, AnthropicLines
from pipeline.providers.base import Codec, LineDialect
from pipeline.providers.batch import BatchCodec
from pipeline.providers.openai import OpenAICodec
from pipeline.providers.openai_batch import OpenAIBatches, OpenAILines


def _by_endpoint(codecs: Iterable[Codec]) -> Mapping[tuple[Protocol, str], Codec]:
    return {(codec.protocol, codec.endpoint): codec for codec in codecs}


_CODECS = _by_endpoint((AnthropicCodec(), OpenAICodec()))
_BATCHES: Mapping[Protocol, BatchCodec] = {Protocol.ANTHROPIC: AnthropicBatches(), Protocol.OPENAI: OpenAIBatches()}


def _endpoints_by_url(protocol: Protocol) -> Mapping[str, str]:
    """Return the endpoints of a protocol by the `url` that its batch lines give them."""
    return {
        codec.line_url: endpoint
        for (spoken, endpoint), codec in _CODECS.items()
        if spoken is protocol and codec.line_url
    }


LINE_DIALECTS: tuple[LineDialect, ...] = (OpenAILines(_endpoints_by_url(Protocol.OPENAI)), AnthropicLines())
"""The formats of lines that batch APIs read and write, in the order in which a line is matched with them."""

_LINES_BY_FORMAT = {dialect.format: dialect for dialect in LINE_DIALECTS}


def codec(protocol: Protocol, endpoint: str = CHAT) -> Codec:
    """Return the codec of an endpoint. Codecs are stateless: there is one of each."""
    return _CODECS[protocol, endpoint]


def batch_codec(protocol: Protocol) -> BatchCodec:
    """Return the codec of a protocol's batch API, for chat requests only. It is stateless, too."""
    return _BATCHES[protocol]


def line_dialect(form: OutputFormat) -> LineDialect | None:
    """Return the dialect of result lines in a provider's batch format. None for the native format."""
    return _LINES_BY_FORMAT.get(form)
