"""Bytes in and out: reads a request's body, sends a reply, and ends the connection as the reply says."""

from collections.abc import Callable
from contextlib import aclosing

import anyio
from starlette.types import Receive, Scope, Send

from pipeline.simulator.types import Ending, Reply

MAX_BODY_BYTES = 32 * 1024 * 1024
"""Anthropic's limit of a request."""

ABORT_EXTENSION = "simulator.abort"
"""The extension in the ASGI scope in which the server gives, as `abort`, what resets the connection."""

_SILENCE_SECONDS = 600


async def read_body(receive: Receive) -> bytes | None:
    """Return the whole request body; None when it is larger than `MAX_BODY_BYTES`."""
    message = await receive()
    body: bytes = message.get("body", b"")
    while message.get("more_body", False) and len(body) <= MAX_BODY_BYTES:
        message = await receive()
        body += message.get("body", b"")
    return body if len(body) <= MAX_BODY_BYTES else None


async def deliver(reply: Reply, scope: Scope, receive: Receive, send: Send) -> None:
    """Send a reply, or do not, as its ending says."""
    match reply.ending:
        case Ending.COMPLETE:
            await _send(reply, reply.size, send)
        case Ending.CUT:
            # A server closes the connection of an application that returns before its last body part.
            await _send(reply, int(reply.size * reply.kept), send)
        case Ending.SILENT:
            with anyio.move_on_after(_SILENCE_SECONDS):
                await _gone(receive)
                return
            await _reset(scope, receive)
        case Ending.RESET:
            await _reset(scope, receive)


async def _send(reply: Reply, kept: int, send: Send) -> None:
    """Promise the whole body and send the first `kept` bytes of it."""
    headers = [
        (b"content-type", reply.content_type),
        (b"content-length", b"%d" % reply.size),
        *reply.headers,
    ]
    is_whole = reply.ending is Ending.COMPLETE
    await send({"type": "http.response.start", "status": reply.status, "headers": headers})
    if reply.content is None:
        await send({"type": "http.response.body", "body": reply.body[:kept], "more_body": not is_whole})
        return
    async with aclosing(reply.content.pieces()) as pieces:
        async for piece in pieces:
            await send({"type": "http.response.body", "body": piece[:kept], "more_body": True})
            kept -= len(piece)
            if kept <= 0:
                break
    if is_whole:
        await send({"type": "http.response.body", "body": b""})


async def _gone(receive: Receive) -> None:
    """Wait until the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _reset(scope: Scope, receive: Receive) -> None:
    """Reset the connection; a client in the same process, which has none, gets the error itself."""
    extension: dict[str, Callable[[], None]] | None = scope.get("extensions", {}).get(ABORT_EXTENSION)
    if extension is None:
        raise ConnectionResetError("the simulator reset the connection")
    extension["abort"]()
    await _gone(receive)
