"""The registry answers for every protocol, endpoint and format that the program knows."""

from __future__ import annotations

import pytest

from pipeline.core.protocols import PROTOCOLS, foreign_settings
from pipeline.core.types import CHAT, OutputFormat, Protocol
from pipeline.providers import registry


@pytest.mark.parametrize("protocol", Protocol)
def test_every_protocol_is_complete(protocol: Protocol) -> None:
    """Each protocol has facts, a codec for conversations that knows its own key, and a batch codec."""
    codec = registry.codec(protocol)

    assert (codec.protocol, codec.endpoint) == (protocol, CHAT)
    assert registry.batch_codec(protocol).max_requests > 0
    assert PROTOCOLS[protocol].built_in["protocol"] == protocol.value


@pytest.mark.parametrize("form", OutputFormat)
def test_every_format_has_its_dialect(form: OutputFormat) -> None:
    """Each format of result lines except the native one is that of one dialect."""
    dialect = registry.line_dialect(form)

    if form is OutputFormat.NATIVE:
        assert dialect is None
    else:
        assert dialect is not None
        assert dialect.format is form


def test_dialects_have_distinct_keys() -> None:
    """No two dialects share the key of an input line's body, and each accepts that key."""
    keys = [dialect.body_key for dialect in registry.LINE_DIALECTS]

    assert len(set(keys)) == len(keys)
    assert all(dialect.body_key in dialect.known_keys for dialect in registry.LINE_DIALECTS)


def test_settings_of_one_protocol_are_foreign_to_the_others() -> None:
    """A protocol's own settings are refused by every other one, and by none of its own."""
    for protocol, facts in PROTOCOLS.items():
        assert not set(facts.own_settings) & set(foreign_settings(protocol))
        others = [other for other in PROTOCOLS if other is not protocol]
        assert all(set(facts.own_settings) <= set(foreign_settings(other)) for other in others)
