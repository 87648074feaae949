"""A true S3 server for tests, moto's, on a free port: with a gate before it that refuses, waits and keeps a log."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from pipeline.core import object_store

HANG_SECONDS = 30  # nothing here takes a tenth of it
_REFUSAL = (
    b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message><AWSAccessKeyId>%b</AWSAccessKeyId></Error>"
)
KEY, SECRET = "AKIACANARY", "secret-canary"


def _nothing(method: str, key: str) -> bool:
    return False


@dataclass(slots=True)
class Gate:
    """What stands before the server; methods and keys are told as `PUT`, `bucket/folder/name`.

    `refuses` tells what gets a 403, `before` and `after` are called around what the server does; `log` is what it did.
    """

    app: Callable[..., Iterable[bytes]]
    refuses: Callable[[str, str], bool] = _nothing
    before: Callable[[str, str], object] = _nothing
    after: Callable[[str, str], object] = _nothing
    log: list[tuple[str, str]] = field(default_factory=list)

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        what = environ["REQUEST_METHOD"], environ["PATH_INFO"].removeprefix("/")
        if self.refuses(*what):
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start_response("403 Forbidden", [("Content-Type", "application/xml")])
            return [_REFUSAL % KEY.encode()]
        self.before(*what)
        answer = self.app(environ, start_response)
        self.log.append(what)
        self.after(*what)
        return answer

    def open(self) -> None:
        self.refuses = self.before = self.after = _nothing
        self.log.clear()


@dataclass(frozen=True, slots=True)
class Bucket:
    """An empty bucket; the variables of this process name the server and its key."""

    name: str
    gate: Gate
    environ: dict[str, str]

    @property
    def url(self) -> str:
        return f"s3://{self.name}/"

    def puts(self, suffix: str = "") -> list[str]:
        """Return the keys that were written, as they were."""
        keys = [key for method, key in self.gate.log if method == "PUT"]
        return [key.removeprefix(f"{self.name}/") for key in keys if key.endswith(suffix)]

    def names(self) -> list[str]:
        """Return the keys of all objects."""
        return [found.url.removeprefix(self.url) for found in object_store.listed_deep(self.url)]

    def content(self, key: str) -> bytes:
        return object_store.read(self.url + key)[0]


class Barrier:
    """Holds what comes to the gate until it is let go; the test waits until something came. Also a refusal, then."""

    def __init__(self, wanted: Callable[[str, str], bool]) -> None:
        self._wanted = wanted
        self._came = threading.Event()
        self._may_go = threading.Event()

    def __call__(self, method: str, key: str) -> bool:
        is_wanted = self._wanted(method, key)
        if is_wanted:
            self._came.set()
            self._may_go.wait(HANG_SECONDS)
        return is_wanted

    def wait(self) -> None:
        assert self._came.wait(HANG_SECONDS), "nothing came"

    def let_go(self) -> None:
        self._may_go.set()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[tuple[Gate, str]]:
    """One server for all tests: its start takes half a second."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    gate = Gate(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, gate, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield gate, f"http://127.0.0.1:{server.port}"
    server.shutdown()
    thread.join(HANG_SECONDS)
    server.server_close()


_numbers = itertools.count(1)


@pytest.fixture
def bucket(s3_server: tuple[Gate, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    """A bucket of its own for each test."""
    from urllib.request import Request, urlopen

    gate, url = s3_server
    gate.open()
    environ = {
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": url,
        "AWS_ALLOW_HTTP": "true",
    }
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    name = f"bucket-{next(_numbers)}"
    with urlopen(Request(f"{url}/{name}", method="PUT"), timeout=HANG_SECONDS):
        pass
    gate.log.clear()
    yield Bucket(name, gate, environ)
    gate.open()
