"""The simulator on a real socket, in a thread of this process or for a process of its own."""

import ipaddress
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from pipeline.simulator.app import build_app
from pipeline.simulator.connection import ABORT_EXTENSION
from pipeline.simulator.options import Options
from pipeline.simulator.state import State

_BACKLOG = 4_096
_KEEP_ALIVE_SECONDS = 300  # longer than any client keeps an idle connection
_GRACE_SECONDS = 1  # requests still in flight at exit are cancelled after this
_JOIN_SECONDS = 5


@dataclass(frozen=True, slots=True)
class Server:
    """A running simulator. `url` has no path: `http://127.0.0.1:43021`."""

    url: str
    _state: State = field(repr=False)

    def statistics(self) -> dict[str, Any]:
        """Return what `GET /simulator/statistics` returns."""
        self._state.advance_from_thread()
        return self._state.statistics.snapshot()


@contextmanager
def serving(options: Options, host: str = "127.0.0.1", port: int = 0) -> Iterator[Server]:
    """Serve from a thread until the block ends; port 0 is any free one.

    The socket listens before the block begins, so the first request may be sent at once. At the end requests
    in flight are dropped. ValueError when `host` is not a loopback address, OSError when the port is taken.
    """
    listener = _listen(host, port)
    app = build_app(options)
    server = uvicorn.Server(_config(app))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="simulator", daemon=True)
    thread.start()
    try:
        yield Server(_url(listener), app.state.simulator)
    finally:
        server.should_exit = server.force_exit = True
        thread.join(_JOIN_SECONDS)


def serve_forever(options: Options, host: str, port: int, announce: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM; `announce` is called with the URL once the socket listens.

    Call it from the main thread, which waits for the signals while another one serves.
    """
    with serving(options, host, port) as server, _interruption() as interrupted:
        announce(server.url)
        interrupted.wait()


@contextmanager
def _interruption() -> Iterator[threading.Event]:
    """Turn SIGINT and SIGTERM into an event while the block lasts."""
    event = threading.Event()

    def interrupt(number: int, frame: FrameType | None) -> None:
        event.set()

    previous = {each: signal.signal(each, interrupt) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for each, handler in previous.items():
            signal.signal(each, handler)


def _listen(host: str, port: int) -> socket.socket:
    try:
        address = ipaddress.ip_address("127.0.0.1" if host == "localhost" else host)
    except ValueError:
        address = None
    if address is None or not address.is_loopback:
        raise ValueError(f"the simulator serves this machine only, not {host!r}: give 127.0.0.1 or ::1")
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    return socket.create_server((str(address), port), family=family, backlog=_BACKLOG)


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _config(app: Any) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=_AbortableProtocol,
        ws="none",
        lifespan="off",
        backlog=_BACKLOG,
        log_config=None,
        log_level="critical",
        access_log=False,
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=_GRACE_SECONDS,
    )


class _AbortableProtocol(HttpToolsProtocol):
    """Lets the application reset a connection without an answer, for which ASGI has no message."""

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["extensions"] = {ABORT_EXTENSION: {"abort": self.transport.abort}}
