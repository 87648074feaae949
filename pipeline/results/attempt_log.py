"""The attempt log: which calls were in flight, so that a crash leaves no doubt about what may have been billed.

Each call is logged on the disk before it is made; a second line cancels the entry if the call was not billed. Result
lines settle the others. So after a crash the calls of unknown outcome are those that were sent, were not reported as
unbilled, and belong to a request without a result line of that run: calls in flight, and earlier calls of the same
requests that timed out. They may have been billed without a response. They stay in the log for good, because no other
file records them; everything else is dropped whenever the file has grown, so its size does not depend on the input.

    {"run":"run-…"}                                                      the run that writes
    {"sent":"q-1","digest":"…","attempt":1,"run":"run-…", …}             about to be sent
    {"unbilled":"q-1","digest":"…","attempt":1,"run":"run-…"}            came back without being billed
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import orjson

from pipeline.core import files
from pipeline.core.errors import StorageError
from pipeline.core.types import Request

SUFFIX = ".attempts.jsonl"
_MAX_BYTES = 8 * 1024 * 1024
_HEADER = b'{"run":'


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggedCall:
    """A call that was about to be made: when (UTC, ISO 8601), for which request (its custom_id), what it may use.

    `input_tokens` is an estimate, `max_output_tokens` the upper bound of the answer where the request names one.
    `told` is true once the summary of a run has listed it.
    """

    sent: str
    digest: str
    attempt: int
    run: str
    provider: str
    model: str
    at: str
    input_tokens: int
    max_output_tokens: int | None
    told: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Return what a summary shows of it."""
        values = asdict(self)
        del values["told"]
        return {"custom_id": values.pop("sent"), **values}


class AttemptLog:
    """The attempt log of one results file; the holder of that file's lock owns it.

    First `read`, then `settle` for each result line, then `begin`. After that one thread notes (`log_attempt`,
    `log_not_billed`, `finished`) and hands over by `take` what another may `write`.
    """

    def __init__(self, results: Path, run_id: str, *, sync: bool) -> None:
        self._path = files.beside(results, SUFFIX)
        self._run_id = run_id
        self._sync = sync
        self._last_run: str | None = None
        self._file: files.Appender | None = None
        self._left: dict[tuple[str, str, str], dict[int, LoggedCall]] = {}
        self._open: dict[tuple[str, str], list[bytes]] = {}
        self._lines: list[bytes] = []
        self._size = 0

    # ── what earlier runs left ────────────────────────────────────────────────────────────────────────────────────

    def read(self) -> None:
        """Read the log as the last run left it; lines that a crash cut or damaged are ignored."""
        try:
            content = self._path.read_bytes()
        except FileNotFoundError:
            return
        except OSError as exc:
            raise StorageError(f"cannot read {str(self._path)!r}: {exc.strerror}") from exc
        for value in _values(content):
            if value.keys() == {"run"}:
                self._last_run = value["run"]
            elif "sent" in value:
                sent = LoggedCall(**value)
                self._left.setdefault((sent.run, sent.sent, sent.digest), {})[sent.attempt] = sent
            else:
                calls = self._left.get((value["run"], value["unbilled"], value["digest"]), {})
                calls.pop(value["attempt"], None)

    def settle(self, run: str | None, custom_id: str, digest: str) -> None:
        """Note that there is a result line for a request: it settles the calls of that run."""
        if run is not None and run == self._last_run:
            self._left.pop((run, custom_id, digest), None)

    def unsettled(self) -> tuple[str | None, list[tuple[str, str]]]:
        """Return the last run and the requests, custom_id and digest, of its calls that nothing tells of so far."""
        requests: list[tuple[str, str]] = []
        for (run, name, digest), calls in self._left.items():
            unlisted = [call for call in calls.values() if not call.told]
            if run == self._last_run and unlisted:
                requests.append((name, digest))
        return self._last_run, requests

    def begin(self) -> None:
        """Start the log of a run; calls of unknown outcome stay in it, even if the results are removed."""
        self._rewrite(self._snapshot())

    # ── noting ────────────────────────────────────────────────────────────────────────────────────────────────────

    def log_attempt(self, request: Request, attempt: int, at: str) -> None:
        """Note that a call is about to be made."""
        line = orjson.dumps(
            {
                "sent": request.custom_id,
                "digest": request.digest,
                "attempt": attempt,
                "run": self._run_id,
                "provider": request.provider,
                "model": request.model,
                "at": at,
                "input_tokens": request.estimated_input_tokens,
                "max_output_tokens": request.max_output_tokens,
            },
            option=orjson.OPT_APPEND_NEWLINE,
        )
        self._open.setdefault((request.custom_id, request.digest), []).append(line)
        self._lines.append(line)

    def log_not_billed(self, request: Request, attempt: int) -> None:
        """Note that the last call for a request came back and was not billed."""
        self._open[request.custom_id, request.digest].pop()
        line = {"unbilled": request.custom_id, "digest": request.digest, "attempt": attempt, "run": self._run_id}
        self._lines.append(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))

    def finished(self, custom_id: str, digest: str) -> None:
        """Note that a request's result line is on the disk: it settles all its calls."""
        self._open.pop((custom_id, digest), None)

    def import_attempts(self, calls: Iterable[LoggedCall]) -> None:
        """Add calls of unknown outcome from another log; they are written with the next group."""
        for sent in calls:
            self._left.setdefault((sent.run, sent.sent, sent.digest), {})[sent.attempt] = sent
            self._lines.append(_line(sent))

    def unknown(self) -> tuple[LoggedCall, ...]:
        """Return the calls that may be billed without an answer and that no summary has listed yet."""
        unlisted = [call for call in self._left_calls() if not call.told]
        in_flight = [LoggedCall(**orjson.loads(line)) for line in chain.from_iterable(self._open.values())]
        return (*unlisted, *in_flight)

    def _left_calls(self) -> Iterator[LoggedCall]:
        """Yield the calls of earlier runs, and of lost workers, whose outcome is unknown."""
        for calls in self._left.values():
            yield from calls.values()

    # ── writing ───────────────────────────────────────────────────────────────────────────────────────────────────

    def take(self) -> list[bytes]:
        """Return what is to be written: the lines that are new or, when the file has grown, all of a new one."""
        lines, self._lines = self._lines, []
        self._size += sum(map(len, lines))
        if self._size <= _MAX_BYTES:
            return lines
        self._size = 0
        return self._snapshot()

    def write(self, lines: list[bytes]) -> None:
        """Write what `take` returned. Raises `StorageError`."""
        if lines and lines[0].startswith(_HEADER):
            self._rewrite(lines)
        elif lines and self._file is not None:
            self._file.append(b"".join(lines))

    def finish(self) -> None:
        """Close the log of a run whose summary has listed what `unknown` returned."""
        told = [replace(sent, told=True) for sent in self.unknown()]
        for sent in told:
            self._left.setdefault((sent.run, sent.sent, sent.digest), {})[sent.attempt] = sent
        self._open.clear()
        self._rewrite(self._snapshot())
        self.close()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _snapshot(self) -> list[bytes]:
        """Return the lines of a new log: its header, calls of unknown outcome, and calls in flight."""
        header = orjson.dumps({"run": self._run_id}, option=orjson.OPT_APPEND_NEWLINE)
        left = [_line(call) for call in self._left_calls()]
        return [header, *left, *chain.from_iterable(self._open.values())]

    def _rewrite(self, lines: list[bytes]) -> None:
        try:
            fd = files.replace(self._path, lines)
        except OSError as exc:
            raise StorageError(f"cannot write {str(self._path)!r}: {exc.strerror}") from exc
        self.close()
        self._file = files.Appender(fd, self._path, sync=self._sync)


def _line(sent: LoggedCall) -> bytes:
    return orjson.dumps(sent, option=orjson.OPT_APPEND_NEWLINE)


def _values(content: bytes) -> Iterator[dict[str, Any]]:
    """Yield the values of the lines that are whole and ours."""
    for line in content.split(b"\n"):
        try:
            value = orjson.loads(line)
        except orjson.JSONDecodeError:
            continue
        if isinstance(value, dict) and _is_ours(value):
            yield value


def _is_ours(value: dict[str, Any]) -> bool:
    names = set(value)
    if "sent" in names:
        return names - {"told"} == set(LoggedCall.__slots__) - {"told"}
    return names in ({"run"}, {"unbilled", "digest", "attempt", "run"})
