"""Line -> Request: choose the provider and model of a line, and build its request body. No I/O.

A line's identity has two parts. `custom_id` is the line's own, else derived from its content, so it survives
reordering, inserting and deleting lines; equal lines without an id are numbered (`…-2`, `…-3`), because users repeat
lines to sample. `digest` identifies the body and its provider, so a line is sent again if its text, model or
parameters changed.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any
from urllib.parse import urlsplit

import orjson

from pipeline import providers
from pipeline.core import config, jsonl
from pipeline.core.clock import Clock
from pipeline.core.config import Config, Endpoint
from pipeline.core.errors import LineError, UsageError
from pipeline.core.hashing import FingerprintSet, fingerprint
from pipeline.core.types import CHAT, Failure, IdRange, Request, Result
from pipeline.inputs import dialects
from pipeline.inputs.dialects import Draft
from pipeline.inputs.reader import Line

_REMEMBERED_MODELS = 1_000
_MOST_TOKENS = 10**9  # more than any answer can have


@dataclass(frozen=True, slots=True, kw_only=True)
class Invalid:
    """A line that cannot become a request, with its identity and the reason."""

    custom_id: str
    digest: str
    line: Line
    failure: Failure


class Planner:
    """Turns lines into requests; remembers only which ids it has seen (10 bytes a line).

    `provider` and `model` are the command's options for lines that name none. Such a provider also takes precedence
    over the provider of a model's name if both use the same protocol (`gpt-oss-20b` on a vLLM server).
    `salt` goes into digests, so that simulated answers are never taken for real ones.
    """

    def __init__(
        self, settings: Config, *, provider: str | None = None, model: str | None = None, salt: str = ""
    ) -> None:
        if provider is not None and provider not in settings.providers:
            raise UsageError(f"provider {provider!r} is not one of {', '.join(sorted(settings.providers))}")
        self._config = settings
        self._protocols = {name: config.protocol(endpoint) for name, endpoint in settings.providers.items()}
        self._provider = provider
        self._model = model or settings.request.model
        self._salt = salt
        self.ids = FingerprintSet()
        self._repeats: dict[int, int] = {}
        self._claims = _NewClaims()
        self._providers_told: dict[str, str | None] = {}

    def basis(self) -> bytes:
        """Return everything that plans depend on, apart from the lines and their order.

        Ports of addresses are left out, because the simulator gets a new one at each start.
        """
        settings = self._config
        hosts = {name: urlsplit(each.base_url).hostname for name, each in settings.providers.items()}
        parts = {
            "providers": {
                name: each.model_dump() | {"base_url": hosts[name]} for name, each in settings.providers.items()
            },
            "request": settings.request.model_dump(),
            "max_line_bytes": settings.input.max_line_bytes,
            "defaults": [settings.provider, self._provider, self._model, self._salt],
        }
        return orjson.dumps(parts)

    def claim(self, claims: IdRange) -> bool:
        """Take over the ids of lines that an earlier run planned. If any is taken already, take none; return False."""
        if not self.ids.add_all(claims.marks):
            return False
        self._repeats.update(claims.repeats)
        return True

    def take_claims(self) -> IdRange:
        """Return the ids of the lines that were planned since the last call."""
        new, self._claims = self._claims, _NewClaims()
        return IdRange(marks=new.marks, repeats=new.repeats, is_alone=new.is_alone)

    def plan(self, line: Line) -> Request | Invalid:
        """Return the request of a line, or the reason why it cannot become one."""
        value: Any = None
        custom_id: str | None = None
        try:
            if line.problem:
                raise LineError(line.problem)
            value = jsonl.loads(line.data)
            draft = dialects.parse(value)
            custom_id = draft.custom_id or self._derive_id(jsonl.dumps(value))
            request = self._request(draft, custom_id, line)
            if draft.custom_id:
                self._require_new(custom_id)
        except LineError as exc:
            return self._invalid(line, custom_id, value, exc)
        return request

    def _request(self, draft: Draft, custom_id: str, line: Line) -> Request:
        name, model = self._destination(draft)
        endpoint, protocol = self._config.providers[name], self._protocols[name]
        codec = providers.codec(protocol, draft.endpoint)
        if draft.is_portable:
            body: Mapping[str, Any] = codec.body(draft.fields, endpoint, self._config.request, model)
        else:
            codec.check_body(draft.fields)
            body = draft.fields
        encoded = jsonl.dumps(body)
        return Request(
            custom_id=custom_id,
            digest=_digest(f"{self._salt}{_target(name, draft.endpoint)}\n".encode() + encoded),
            source=line.source,
            line=line.number,
            provider=name,
            model=model,
            body=encoded,
            max_output_tokens=_as_limit(codec.max_output_tokens(body)),
            estimated_input_tokens=providers.estimate_input_tokens(body, protocol, model),
            metadata=draft.metadata,
            endpoint=draft.endpoint,
        )

    def _destination(self, draft: Draft) -> tuple[str, str]:
        """Return the provider and model of a line: its own, else the command's, else the configuration's."""
        model = draft.model or (self._model if draft.is_portable else None)
        name = self._provider_of(draft, model)
        model = model or (self._config.providers[name].model if draft.is_portable else None)
        if not model:
            raise LineError(f"no model: the line names none and provider {name!r} has no default; add 'model'")
        return name, model

    def _provider_of(self, draft: Draft, model: str | None) -> str:
        endpoints = self._config.providers
        if draft.provider is not None:
            return _known(draft.provider, endpoints)
        named = self._provider
        told = self._told_by(model) if model else None
        default = named or self._config.provider
        if draft.protocol:
            candidates = [named, told, self._config.provider, draft.protocol.value]
            for name in candidates:
                if name in endpoints and endpoints[name].protocol == draft.protocol.value:
                    return name
            raise LineError(f"no provider for a body of the {draft.protocol.value} protocol; name one with --provider")
        if told and not (named and endpoints[named].protocol == endpoints[told].protocol):
            return told
        return default

    def _told_by(self, model: str) -> str | None:
        """Return the provider whose patterns match a model's name. There are few names, so each is matched once."""
        if model not in self._providers_told:
            if len(self._providers_told) >= _REMEMBERED_MODELS:
                self._providers_told.clear()
            self._providers_told[model] = providers.provider_of(model, self._config)
        return self._providers_told[model]

    def _derive_id(self, content: bytes) -> str:
        """Name a line after its content; equal lines are counted."""
        base = f"line-{blake2b(content, digest_size=8).hexdigest()}"
        mark = fingerprint(base)
        count = self._count(mark)
        if count == 1:
            return base
        while not self._add(fingerprint(f"{base}-{count}")):  # another line has this id as its own
            count = self._count(mark)
        return f"{base}-{count}"

    def _count(self, mark: int) -> int:
        """Count one more occurrence of a fingerprint and return the count."""
        if self._add(mark):
            return 1
        count = self._repeats[mark] = self._claims.repeats[mark] = self._repeats.get(mark, 1) + 1
        return count

    def _add(self, mark: int) -> bool:
        """Remember a fingerprint; return True if it is new."""
        if self.ids.add(mark):
            self._claims.marks.append(mark)
            return True
        self._claims.is_alone = self._claims.is_alone and mark in self._claims.marks
        return False

    def _require_new(self, custom_id: str) -> None:
        if not self._add(fingerprint(custom_id)):
            raise LineError(
                f"custom_id {custom_id!r} was used before; each line needs its own id", type="duplicate_custom_id"
            )

    def _invalid(self, line: Line, custom_id: str | None, value: Any, error: LineError) -> Invalid:
        """Return an invalid line with its identity: its own id if that could be read, else one from its content."""
        own = value.get("custom_id") if isinstance(value, Mapping) else None
        custom_id = custom_id or (own if isinstance(own, str) else None)
        if custom_id:
            self._add(fingerprint(custom_id))
        else:
            custom_id = self._derive_id(line.data.strip())
        failure = Failure(type=error.type, message=f"{line.source}:{line.number}: {error.message}")
        repeat = self._count(fingerprint(custom_id, "invalid", _digest(line.data)))
        digest = _digest(f"invalid {repeat}\n".encode() + line.data)
        return Invalid(custom_id=custom_id, digest=digest, line=line, failure=failure)


def _as_limit(tokens: int | None) -> int | None:
    """Return a usable bound: a body in its own dialect may have any value, which only its provider checks."""
    return min(tokens, _MOST_TOKENS) if tokens and tokens > 0 else None


class _NewClaims:
    """Claims while lines are being planned."""

    __slots__ = ("is_alone", "marks", "repeats")

    def __init__(self) -> None:
        self.marks = array("Q")
        self.repeats: dict[int, int] = {}
        self.is_alone = True


def _known(name: str, endpoints: Mapping[str, Endpoint]) -> str:
    if name not in endpoints:
        raise LineError(f"provider {name!r} is not configured; configured providers: {', '.join(sorted(endpoints))}")
    return name


def _target(provider: str, endpoint: str) -> str:
    """Return what a digest says of the destination. Digests of conversations say the provider only, as ever."""
    if endpoint == CHAT:
        return provider
    return f"{provider} {endpoint}"


def _digest(content: bytes) -> str:
    return blake2b(content, digest_size=16).hexdigest()


def invalid_result(item: Invalid, clock: Clock) -> Result:
    """Make the result of a line that cannot become a request."""
    return Result.of_invalid_line(
        custom_id=item.custom_id,
        digest=item.digest,
        source=item.line.source,
        line=item.line.number,
        failure=item.failure,
        completed_at=clock.utc(),
    )
