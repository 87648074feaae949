"""Chunks: requests on their way to a batch API, on the disk, so that no crash loses a batch or makes it twice.

    answers.batches/                     beside `answers.jsonl`, readable by its owner only
        journal.jsonl                    every step of every chunk, the last line of each counts
        0a1b2c3d4e5f.jsonl               the requests of a chunk, until all have their results
        0a1b2c3d4e5f.results             what is being downloaded

A chunk is written first and known to the journal then, on the disk, before anything is sent. Each step is noted before
the next is taken; so whoever finds the journal after a crash knows whether a batch may have been made, and looks for it
instead of making another. Whoever holds the lock of the results owns all this.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from enum import StrEnum
from hashlib import sha256
from pathlib import Path
from typing import IO, Any

import orjson

from pipeline import disk, jsonl, money, results
from pipeline.errors import StorageError
from pipeline.types import Attempt, Request

SUFFIX = ".batches"
_JOURNAL = "journal.jsonl"
_DIRECTORY_MODE = 0o700
_BLOCK_BYTES = 1024 * 1024
_REQUEST_FIELDS = (
    "custom_id",
    "digest",
    "source",
    "line",
    "provider",
    "model",
    "max_output_tokens",
    "estimated_input_tokens",
    "metadata",
)


class Step(StrEnum):
    """How far a chunk has come. From `CREATING` on there may be a batch of it at the provider."""

    WRITTEN = "written"
    UPLOADED = "uploaded"
    CREATING = "creating"
    CREATED = "created"
    COLLECTED = "collected"
    DROPPED = "dropped"


_CLOSED = (Step.COLLECTED, Step.DROPPED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """The requests of one batch and how far it has come.

    `nonce` names it; `content` is the number of bytes and `sha256` the checksum of what is uploaded. `model` is ""
    where a batch may hold several. `worst_nano` is what is set aside for it. `deadline` is when its requests are sent
    live instead (UTC, ISO 8601). `batch_id` is the provider's; it is not `is_confirmed` while another batch may have
    been taken for ours. `not_ours` are batches that turned out to be others'. `is_given_up` is true once we asked to
    cancel it. `status`, counts and times are the provider's last word; `cost_nano` is what its results cost.
    """

    nonce: str
    run: str
    provider: str
    model: str
    requests: int
    content: int
    sha256: str
    input_tokens: int
    worst_nano: int
    at: str
    simulated: bool = False
    deadline: str | None = None
    step: Step = Step.WRITTEN
    file_id: str | None = None
    creating_at: str | None = None
    batch_id: str | None = None
    is_confirmed: bool = True
    not_ours: Sequence[str] = ()
    is_given_up: bool = False
    status: str | None = None
    succeeded: int | None = None
    failed: int | None = None
    created_at: str | None = None
    expires_at: str | None = None
    cost_nano: int = 0
    unpriced: int = 0

    @property
    def group(self) -> str:
        """Whose batch it is, for people: provider and, where it is for one, model."""
        return f"{self.provider}/{self.model}" if self.model else self.provider

    @property
    def is_open(self) -> bool:
        return self.step not in _CLOSED

    def as_dict(self) -> dict[str, Any]:
        """Return what a summary shows of it; `cost` is in dollars, None while nobody knows."""
        is_priced = self.step is Step.COLLECTED and not self.unpriced
        return {
            "id": self.batch_id,
            "provider": self.provider,
            "model": self.model or None,
            "status": self.status or self.step.value,
            "requests": self.requests,
            "succeeded": self.succeeded,
            "failed": self.failed,
            "created_at": self.created_at,
            "expires_at": self.expires_at,
            "collected": self.step is Step.COLLECTED,
            "cost": money.dollars(self.cost_nano) if is_priced else None,
            "run": self.run,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A request of a chunk, and under which `name`.

    `attempts` failed before, `counted` of them by the request's own fault; `worst_nano` is set aside for the next.
    """

    request: Request
    name: str = ""
    attempts: Sequence[Attempt] = ()
    counted: int = 0
    worst_nano: int = 0


class Spool:
    """A chunk that is being written, not known to the journal yet."""

    def __init__(self, directory: Path, *, separator: bytes, entry: Callable[[str, bytes], bytes]) -> None:
        self.nonce = secrets.token_hex(6)
        self.requests = 0
        self.content = 0
        self.input_tokens = 0
        self.worst_nano = 0
        self._path = directory / f"{self.nonce}.jsonl"
        self._separator = separator
        self._entry = entry
        self._digest = sha256()
        self._lines: list[bytes] = []

    def add(self, member: Member) -> None:
        """Add a request; `write` puts it into the file."""
        entry = self._entry(member.name, member.request.body)
        if self.requests:
            entry = self._separator + entry
        self._digest.update(entry)
        self.requests += 1
        self.content += len(entry)
        self.input_tokens += member.request.estimated_input_tokens
        self.worst_nano += member.worst_nano
        self._lines.append(_encode(member))

    def size_with(self, member: Member) -> int:
        """Return how many bytes would be uploaded if a request were added."""
        return self.content + len(self._separator) + len(self._entry(member.name, member.request.body))

    def take(self) -> list[bytes]:
        """Return what was added since the last time, for a thread to `write`."""
        lines, self._lines = self._lines, []
        return lines

    def write(self, lines: list[bytes], *, sync: bool = False) -> None:
        """Write what `take` returned, in the same order. Raises `StorageError`."""
        if not lines and not sync:
            return
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
            with open(os.open(self._path, flags, disk.MODE), "wb") as file:
                file.writelines(lines)
                file.flush()
                if sync:
                    os.fsync(file.fileno())
                    disk.sync_directory(self._path.parent)
        except OSError as exc:
            raise StorageError(f"cannot write {str(self._path)!r}: {exc.strerror}") from exc

    def members(self) -> Iterator[Member]:
        """Yield what was written."""
        if self.requests:
            yield from (member for _, member in _members(self._path))

    def delete(self) -> None:
        """Delete the file."""
        self._path.unlink(missing_ok=True)

    def seal(
        self, lines: list[bytes], *, run: str, provider: str, model: str, at: str, deadline: str | None, simulated: bool
    ) -> Chunk:
        """Write the last lines and return the chunk that the file holds, on the disk."""
        self.write(lines, sync=True)
        return Chunk(
            nonce=self.nonce,
            run=run,
            provider=provider,
            model=model,
            requests=self.requests,
            content=self.content,
            sha256=self._digest.hexdigest(),
            input_tokens=self.input_tokens,
            worst_nano=self.worst_nano,
            at=at,
            deadline=deadline,
            simulated=simulated,
        )


class Chunks:
    """The chunks of one results file. `open` first; one thread at a time."""

    def __init__(self, results_file: Path) -> None:
        self.directory = disk.beside(results_file, SUFFIX)
        self._all: dict[str, Chunk] = {}
        self._journal: disk.Appender | None = None

    @property
    def all(self) -> Sequence[Chunk]:
        return tuple(self._all.values())

    @property
    def still_open(self) -> Sequence[Chunk]:
        return tuple(chunk for chunk in self._all.values() if chunk.is_open)

    def open(self) -> None:
        """Read the journal, and delete what a crash left of chunks that it does not know."""
        self._all = {chunk.nonce: chunk for chunk in read(self.directory)}
        if self.directory.is_dir():
            for path in self.directory.iterdir():
                chunk = self._all.get(path.stem)
                if path.name != _JOURNAL and (chunk is None or not chunk.is_open):
                    path.unlink(missing_ok=True)

    def spool(self, *, separator: bytes, entry: Callable[[str, bytes], bytes]) -> Spool:
        """Begin a chunk."""
        self._make_directory()
        return Spool(self.directory, separator=separator, entry=entry)

    def note(self, chunk: Chunk) -> None:
        """Note how far a chunk has come; returns when that is on the disk. Raises `StorageError`."""
        self._all[chunk.nonce] = chunk
        if self._journal is None:
            self._make_directory()
            path = self.directory / _JOURNAL
            try:
                fd = disk.replace(path, [_line(each) for each in self._all.values()])
            except OSError as exc:
                raise StorageError(f"cannot write {str(path)!r}: {exc.strerror}") from exc
            self._journal = disk.Appender(fd, path, sync=True)
            return
        self._journal.append(_line(chunk))

    def close_chunk(self, chunk: Chunk, step: Step) -> None:
        """Note that nothing is left to be done for a chunk, and delete its requests."""
        self.note(replace(chunk, step=step))
        for path in (self._path(chunk), self.download_path(chunk)):
            path.unlink(missing_ok=True)

    def release(self) -> None:
        """Close the journal."""
        if self._journal is not None:
            self._journal.close()
            self._journal = None

    def members(self, chunk: Chunk) -> Iterator[tuple[int, Member]]:
        """Yield the requests of a chunk, each with its place in the file."""
        yield from _members(self._path(chunk))

    def reader(self, chunk: Chunk) -> IO[bytes]:
        """Open the file of a chunk, for `member_at`."""
        return self._path(chunk).open("rb")

    def content(self, chunk: Chunk, *, separator: bytes, entry: Callable[[str, bytes], bytes]) -> Iterator[bytes]:
        """Yield what is uploaded, in blocks."""
        block = bytearray()
        for place, member in self.members(chunk):
            block += (separator if place else b"") + entry(member.name, member.request.body)
            if len(block) >= _BLOCK_BYTES:
                yield bytes(block)
                block.clear()
        yield bytes(block)

    def download_path(self, chunk: Chunk) -> Path:
        """Return where the results of a chunk are put while they are fetched."""
        return self.directory / f"{chunk.nonce}.results"

    def _path(self, chunk: Chunk) -> Path:
        return self.directory / f"{chunk.nonce}.jsonl"

    def _make_directory(self) -> None:
        if self.directory.is_dir():
            return
        try:
            self.directory.mkdir(mode=_DIRECTORY_MODE)
            disk.sync_directory(self.directory.parent)
        except OSError as exc:
            raise StorageError(f"cannot make {str(self.directory)!r}: {exc.strerror}") from exc


def _members(path: Path) -> Iterator[tuple[int, Member]]:
    place = 0
    with path.open("rb") as file:
        for head in file:
            body = file.readline()
            yield place, _decode(head, body)
            place += len(head) + len(body)


def member_at(file: IO[bytes], place: int) -> Member:
    """Return the request whose lines begin at a place in a chunk's file."""
    file.seek(place)
    return _decode(file.readline(), file.readline())


def read(directory: Path) -> list[Chunk]:
    """Return the chunks that a directory tells of, the oldest first; a line that a crash cut tells nothing."""
    try:
        content = (directory / _JOURNAL).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as exc:
        raise StorageError(f"cannot read {str(directory / _JOURNAL)!r}: {exc.strerror}") from exc
    chunks: dict[str, Chunk] = {}
    for line in content.split(b"\n"):
        if chunk := _chunk(line):
            chunks[chunk.nonce] = chunk
    return list(chunks.values())


# ── lines ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _line(chunk: Chunk) -> bytes:
    return orjson.dumps(asdict(chunk), option=orjson.OPT_APPEND_NEWLINE)


def _chunk(line: bytes) -> Chunk | None:
    try:
        value: dict[str, Any] = orjson.loads(line)
        known = {field.name for field in fields(Chunk)}
        return Chunk(**{name: each for name, each in value.items() if name in known} | {"step": Step(value["step"])})
    except (orjson.JSONDecodeError, TypeError, AttributeError, KeyError, ValueError):
        return None


def _encode(member: Member) -> bytes:
    """Return the two lines of a request: what is known of it, and its body, byte for byte."""
    request = member.request
    head: dict[str, Any] = {name: getattr(request, name) for name in _REQUEST_FIELDS}
    head["name"] = member.name
    if member.attempts:
        head["attempts"] = [results.attempt_as_dict(attempt) for attempt in member.attempts]
    head |= {"counted": member.counted, "worst_nano": member.worst_nano}
    return jsonl.dumps(head) + b"\n" + request.body + b"\n"


def _decode(head: bytes, body: bytes) -> Member:
    value: Mapping[str, Any] = jsonl.loads(head)
    return Member(
        request=Request(**{name: value[name] for name in _REQUEST_FIELDS}, body=body.rstrip(b"\n")),
        name=value["name"],
        attempts=tuple(results.to_attempts(value.get("attempts"))),
        counted=value["counted"],
        worst_nano=value["worst_nano"],
    )
