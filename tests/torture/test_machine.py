"""What lies between the program and the provider: names, trust, open files, memory."""

from __future__ import annotations

import gc
import socket
import ssl
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.tools import needs
from tests.torture import certificates, chaos, trial
from tests.torture.certificates import Authority
from tests.torture.chaos import Plan, Server
from tests.torture.faults import BOMBS, PROTOCOLS
from tests.torture.trial import Record, Trial

CAP = 32 * 1024 * 1024
HOST = f"IP:{chaos.HOST}"
IMPATIENT = {"timeout": 0.5, "connect_timeout": 0.3, "max_retry_after": 0.5, "stall_timeout": 1.0}
pytestmark = pytest.mark.timeout(trial.HANG_SECONDS + 20)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with chaos.serving(tmp_path / "journal.jsonl", Plan()) as running:
        yield running


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return certificates.authority(tmp_path_factory.mktemp("ca"))


def run(folder: Path, server: Server, url: str, protocol: str, **sending: Any) -> Trial:
    records = [Record(id=f"r{n}", lane="one", protocol=protocol) for n in range(5)]
    settings = {"providers": {"one": trial.endpoint(url, protocol)}, "sending": {**trial.SENDING, **sending}}
    return trial.run(folder, server.journal, records, settings)


# ── trust ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@needs("openssl")
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_certificate_of_the_own_authority_is_trusted(
    tmp_path: Path, server: Server, authority: Authority, protocol: str
) -> None:
    """With `ca_file` a server that nobody else vouches for is spoken to."""
    url = server.open(tls=authority.context("good", HOST, "20200101", "21200101"))
    done = run(tmp_path, server, url, protocol, ca_file=str(authority.file))

    assert done.verdict.answered == 5
    assert done.verdict.faults == {}


@needs("openssl")
@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("kind", ["unknown authority", "self-signed", "expired", "not yet valid", "other host"])
def test_a_certificate_that_is_not_trusted_stops_the_run(
    tmp_path: Path, server: Server, authority: Authority, kind: str, protocol: str
) -> None:
    """Where the server cannot prove who it is, the run stops with exit 3 before a byte of any request was sent."""
    trusted: dict[str, Any] = {} if kind == "unknown authority" else {"ca_file": str(authority.file)}
    if kind == "self-signed":
        context = authority.self_signed("self", HOST)
    else:
        name, start, end = {
            "unknown authority": (HOST, "20200101", "21200101"),
            "expired": (HOST, "20200101", "20200201"),
            "not yet valid": (HOST, "21100101", "21200101"),
            "other host": ("DNS:other.example", "20200101", "21200101"),
        }[kind]
        context = authority.context("untrusted", name, start, end)
    done = run(tmp_path, server, server.open(tls=context), protocol, **trusted)

    assert done.summary is not None
    assert (done.summary.exit_code, done.summary.pending, done.summary.attempts.unknown) == (3, 5, 0)
    assert "certificate" in (done.summary.stop_reason or "")
    assert done.calls == []
    assert done.summary.attempts.total <= 2


@needs("openssl")
def test_a_server_ends_with_a_handshake_under_way(
    tmp_path: Path, authority: Authority, recwarn: pytest.WarningsRecorder
) -> None:
    """Nothing of it stays open, which would be a warning, and so fail whatever test comes next."""
    hello = ssl.MemoryBIO()
    with suppress(ssl.SSLWantReadError):
        ssl.create_default_context().wrap_bio(ssl.MemoryBIO(), hello, server_hostname=chaos.HOST).do_handshake()
    with chaos.serving(tmp_path / "journal.jsonl", Plan()) as server:
        port = urlsplit(server.open(tls=authority.context("begun", HOST, "20200101", "21200101"))).port
        client = socket.create_connection((chaos.HOST, port or 0))
        client.sendall(hello.read())
        assert client.recv(1)
    client.close()
    gc.collect()

    assert recwarn.list == []


# ── out of reach ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("kind", ["no such name", "refused", "handshake cut", "no TLS"])
def test_a_provider_out_of_reach_is_an_outage(tmp_path: Path, server: Server, kind: str, protocol: str) -> None:
    """Without a name, a listener or a handshake nothing is sent; the run gives up with exit 75 and fails no line."""
    with chaos.bound() as silent:
        url = {
            "no such name": "https://nowhere.invalid",
            "refused": f"http://{chaos.HOST}:{silent.getsockname()[1]}",
            "handshake cut": server.open(door="fin_on_accept", times=1_000).replace("http:", "https:"),
            "no TLS": server.open().replace("http:", "https:"),
        }[kind]
        done = run(tmp_path, server, url, protocol, **IMPATIENT)

    assert done.summary is not None
    assert (done.summary.exit_code, done.summary.pending, done.summary.attempts.unknown) == (75, 5, 0)
    assert done.results == {}
    assert done.calls == []


# ── open files ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_few_open_files_mean_fewer_calls_at_a_time(tmp_path: Path, server: Server) -> None:
    """With 64 files and 500 calls wanted at once, the run says that it makes fewer, and answers everything."""
    records = [Record(id=f"r{n}", lane="one", protocol=PROTOCOLS[0]) for n in range(200)]
    prefix = ["sh", "-c", 'ulimit -n 64 && exec "$@"', "sh"]
    ended = trial.process(tmp_path, records, trial.settings(server, records, concurrency=500), prefix=prefix)
    done = Trial.of_files(tmp_path, server.journal, records)

    assert ended.returncode == 0
    assert b"instead of 500: no more files may be open" in ended.stderr
    assert done.verdict.answered == 200
    assert done.verdict.faults == {}


# ── memory ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def peak(folder: Path, faults: list[str]) -> int:
    """Return the peak of memory of a run in which five records meet a fault each, one call at a time."""
    folder.mkdir()
    records = [
        Record(id=f"{fault or 'none'}.{n}", lane="one", protocol=PROTOCOLS[0], faults=[fault] if fault else [])
        for n in range(5)
        for fault in faults
    ]
    with chaos.serving(folder / "journal.jsonl", Plan(script=trial.script(records))) as server:
        settings = trial.settings(server, records, concurrency=1, max_response_bytes=CAP)
        ended = trial.process(folder, records, settings, module="tests.torture.peak")
        done = Trial.of_files(folder, server.journal, records)

    assert ended.returncode == 0, ended.stderr
    assert done.verdict.faults == {}
    assert sum(call["fault"] is not None for call in done.calls) == sum(bool(record.faults) for record in records)
    return int(ended.stderr.splitlines()[-1])


@pytest.mark.parametrize("fault", BOMBS)
def test_memory_is_bounded_whatever_comes(tmp_path: Path, fault: str) -> None:
    """Bodies of 50 MB, and of 200 MB unpacked, cost at most twice the largest answer that is allowed."""
    idle = peak(tmp_path / "idle", [""])

    assert peak(tmp_path / "bombed", [fault]) - idle < 2 * CAP
