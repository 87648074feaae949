"""The ASGI application: which path is answered by what."""

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from pipeline.simulator import anthropic, openai
from pipeline.simulator.anthropic import AnthropicLimits
from pipeline.simulator.anthropic.batches import AnthropicBatches
from pipeline.simulator.completions import Completions
from pipeline.simulator.connection import read_body
from pipeline.simulator.faults import Operation
from pipeline.simulator.openai import OpenAILimits
from pipeline.simulator.openai.batches import OpenAIBatches
from pipeline.simulator.operations import Act, Endpoint
from pipeline.simulator.options import Options
from pipeline.simulator.refusals import Refused, authenticate, decode, refusal
from pipeline.simulator.state import State
from pipeline.simulator.types import HeaderMap, Provider

_JSON = "application/json"


def build_app(options: Options) -> Starlette:
    """Return a simulator with full buckets and empty statistics; `app.state.simulator` holds them."""
    state = State(options)
    messages = Completions(anthropic, AnthropicLimits, state)
    chat = Completions(openai, OpenAILimits, state)
    app = Starlette(
        routes=[
            Route("/v1/messages", messages, methods=["POST"]),
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/anthropic/v1/messages", messages, methods=["POST"]),
            Route("/openai/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/messages/count_tokens", _count_tokens, methods=["POST"]),
            Route("/anthropic/v1/messages/count_tokens", _count_tokens, methods=["POST"]),
            *_batch_routes(state),
            Route("/v1/models", _models),
            Route("/anthropic/v1/models", _models),
            Route("/openai/v1/models", _models),
            Route("/simulator/statistics", _statistics),
            Route("/simulator/journal", _journal),
        ],
        exception_handlers={HTTPException: _unknown_path, Refused: _refused},
    )
    # The providers answer 404 to a path with a slash too many; Starlette would redirect.
    app.router.redirect_slashes = False
    app.state.simulator = state
    return app


def _batch_routes(state: State) -> list[Route]:
    """Make the routes of both providers' batches; each is there with the provider's prefix and without."""
    claude, gpt = AnthropicBatches(state), OpenAIBatches(state)
    rows: list[tuple[Provider, str, str, Act, Operation | None]] = [
        (anthropic, "POST", "/v1/messages/batches", claude.create, "create"),
        (anthropic, "GET", "/v1/messages/batches", claude.list, "list"),
        (anthropic, "GET", "/v1/messages/batches/{id}", claude.poll, "poll"),
        (anthropic, "DELETE", "/v1/messages/batches/{id}", claude.delete, None),
        (anthropic, "GET", "/v1/messages/batches/{id}/results", claude.results, "results"),
        (anthropic, "POST", "/v1/messages/batches/{id}/cancel", claude.cancel, "cancel"),
        (openai, "POST", "/v1/files", gpt.files.upload, "upload"),
        (openai, "GET", "/v1/files", gpt.files.list, None),
        (openai, "GET", "/v1/files/{id}", gpt.files.get, None),
        (openai, "DELETE", "/v1/files/{id}", gpt.files.delete, None),
        (openai, "GET", "/v1/files/{id}/content", gpt.files.content, "results"),
        (openai, "POST", "/v1/batches", gpt.create, "create"),
        (openai, "GET", "/v1/batches", gpt.list, "list"),
        (openai, "GET", "/v1/batches/{id}", gpt.poll, "poll"),
        (openai, "POST", "/v1/batches/{id}/cancel", gpt.cancel, "cancel"),
    ]
    routes = []
    for provider, method, path, act, operation in rows:
        endpoint = Endpoint(provider, state, act, operation)
        # Each path also exists below the name of its provider.
        own_prefix = "/anthropic" if provider is anthropic else "/openai"
        routes.append(Route(path, endpoint, methods=[method]))
        routes.append(Route(own_prefix + path, endpoint, methods=[method]))
    return routes


def _state(request: Request) -> State:
    state: State = request.app.state.simulator
    return state


def _headers(request: Request) -> HeaderMap:
    return dict(request.headers.raw)


def _provider(request: Request) -> Provider:
    """Tell the protocol by the path, or where both have it by the version header, which Anthropic demands."""
    path = request.url.path
    if path.startswith(("/anthropic/", "/v1/messages")) or "anthropic-version" in request.headers:
        return anthropic
    return openai


async def _count_tokens(request: Request) -> Response:
    headers = _headers(request)
    authenticate(anthropic, headers, _state(request).options)
    raw = await read_body(request.receive)
    body = decode(anthropic, raw, lambda decoded: anthropic.check_count(headers, decoded))
    return _json(request, anthropic, anthropic.count_body(anthropic.prompt(body)))


async def _models(request: Request) -> Response:
    provider = _provider(request)
    authenticate(provider, _headers(request), _state(request).options)
    return _json(request, provider, provider.models_body())


def _json(request: Request, provider: Provider, body: bytes) -> Response:
    headers = {provider.REQUEST_ID.decode(): _state(request).request_id()}
    return Response(body, media_type=_JSON, headers=headers)


async def _unknown_path(request: Request, error: Exception) -> Response:
    """Answer 404 and 405 with the body of the provider that was probably meant."""
    assert isinstance(error, HTTPException)
    return await _refused(request, Refused(_provider(request).problem(error.status_code)))


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    state = _state(request)
    reply = refusal(_provider(request), error, state.request_id(), state.options)
    headers = {name.decode(): value.decode() for name, value in reply.headers}
    return Response(reply.body, reply.status, headers, media_type=_JSON)


async def _statistics(request: Request) -> Response:
    await _state(request).advance()
    return JSONResponse(_state(request).statistics.snapshot())


async def _journal(request: Request) -> Response:
    await _state(request).advance()
    return Response(_state(request).statistics.journal(), media_type="application/x-ndjson")
