"""How a request is refused, and the checks that every endpoint begins with."""

from collections.abc import Callable

import orjson

from pipeline.simulator.options import Options
from pipeline.simulator.types import Body, HeaderMap, Headers, Problem, Provider, Reply


class Refused(Exception):
    """Raised to end a request with an error; carries it, and headers beside the usual ones."""

    def __init__(self, problem: Problem, headers: Headers = ()) -> None:
        super().__init__(problem, headers)
        self.problem = problem
        self.headers = headers


def authenticate(provider: Provider, headers: HeaderMap, options: Options) -> str:
    """Return the API key, or raise `Refused`."""
    key = provider.key(headers)
    if key is None or (options.keys is not None and key not in options.keys):
        raise Refused(provider.unauthorized(key))
    return key


def decode(provider: Provider, raw: bytes | None, check: Callable[[object], Problem | None]) -> Body:
    """Return the JSON object in a body, or raise `Refused`; `raw` None is a body too large."""
    if raw is None:
        raise Refused(provider.problem(413))
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError as exc:
        raise Refused(provider.UNREADABLE) from exc
    problem = check(body)
    if problem:
        raise Refused(problem)
    checked: Body = body
    return checked


def decode_object(unreadable: Problem, raw: bytes) -> Body:
    """Return the JSON object in a body, or raise `Refused`."""
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError as exc:
        raise Refused(unreadable) from exc
    if not isinstance(body, dict):
        raise Refused(unreadable)
    return body


def refusal(provider: Provider, refused: Refused, request_id: str, options: Options) -> Reply:
    """Encode a refusal as the provider does."""
    problem = refused.problem
    headers = ((provider.REQUEST_ID, request_id.encode()), *refused.headers)
    if problem.retry_after is not None and options.retry_after:
        headers = (*headers, (b"retry-after", b"%d" % problem.retry_after))
    return Reply(status=problem.status, body=provider.error_body(problem, request_id), headers=headers)
