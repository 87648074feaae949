"""Batch files and their journal, on the disk, so that no crash loses a batch or creates it twice.

    answers.batches/                     beside `answers.jsonl`, readable by its owner only
        journal.jsonl                    every step of every batch; the last line of each counts
        0a1b2c3d4e5f.jsonl               the requests of a batch, until all have their results
        0a1b2c3d4e5f.results             the results being downloaded
        0a1b2c3d4e5f.left                requests that its results leave to be sent again

A batch file is written first, then its record is saved, on the disk, before anything is sent. Each step is saved before
the next is taken, so after a crash the journal shows whether a batch may exist at the provider; then it is looked for
instead of being created again. The holder of the results file's lock owns all of this.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import Field, asdict, dataclass, fields, replace
from datetime import datetime
from enum import StrEnum
from hashlib import sha256
from pathlib import Path
from typing import IO, Any

import orjson

from pipeline.core import files, jsonl, money
from pipeline.core.errors import LineError, StorageError, UsageError
from pipeline.core.types import Attempt, Request
from pipeline.results import codec

SUFFIX = ".batches"
_JOURNAL = "journal.jsonl"
_DIRECTORY_MODE = 0o700
_BLOCK_BYTES = 1024 * 1024
_KEYS = {"local_id": "nonce"}  # fields that the journal knows by an older name
_OURS = re.compile(r"journal\.jsonl(\.tmp)?|[0-9a-f]{12}\.(jsonl|results|left)")
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
    """How far a batch has come. From `CREATING` on it may exist at the provider."""

    WRITTEN = "written"
    UPLOADED = "uploaded"
    CREATING = "creating"
    CREATED = "created"
    COLLECTED = "collected"
    DROPPED = "dropped"


_CLOSED = (Step.COLLECTED, Step.DROPPED)


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchRecord:
    """The requests of one batch and how far it has come.

    `local_id` names it; `size` and `sha256` are those of its file, `content` is the number of bytes that its requests
    measure on the wire. `model` is "" where a batch may hold several. `retries_failed` when it may hold requests that
    failed before. `deadline` is when its requests are sent live instead (UTC, ISO 8601). `batch_id` is the provider's;
    it is not `is_confirmed` while another batch may have been taken for ours, and `not_ours` are batches that turned
    out to be others'. `is_given_up` is true once we asked to cancel it. `status`, counts and times are the provider's
    last word; `cost_nano` is what its results cost.
    """

    run: str
    provider: str
    model: str
    at: str
    local_id: str = ""
    requests: int = 0
    size: int = 0
    content: int = 0
    sha256: str = ""
    input_tokens: int = 0
    simulated: bool = False
    retries_failed: bool = False
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
    def name(self) -> str:
        """The provider's id of its batch, else our name for it."""
        return self.batch_id or self.local_id

    @property
    def may_have_batch(self) -> bool:
        """Whether there may be a batch of it at the provider."""
        return self.step in (Step.CREATING, Step.CREATED)

    @property
    def is_open(self) -> bool:
        return self.step not in _CLOSED

    def as_dict(self) -> dict[str, Any]:
        """Return what a summary shows; `cost` is in dollars, None while it is unknown."""
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
class BatchItem:
    """A request of a batch and its `name` there; `attempts` failed before, `counted` of them count against it."""

    request: Request
    name: str = ""
    attempts: Sequence[Attempt] = ()
    counted: int = 0


class BatchItems:
    """A file of requests that is being written."""

    def __init__(self, path: Path) -> None:
        self.requests = 0
        self.size = 0
        self._path = path
        self._digest = sha256()
        self._lines: list[bytes] = []

    def add(self, item: BatchItem) -> None:
        """Add a request; `write` puts it into the file."""
        self.requests += 1
        self._lines.append(_encode(item))

    def take(self) -> list[bytes]:
        """Return what was added since the last time, for a thread to `write`."""
        lines, self._lines = self._lines, []
        return lines

    def write(self, lines: list[bytes], *, sync: bool = False) -> None:
        """Write what `take` returned, in the same order. Raises `StorageError`."""
        if not lines and not sync:
            return
        data = b"".join(lines)
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
            with open(os.open(self._path, flags, files.MODE), "wb") as file:
                file.write(data)
                file.flush()
                if sync:
                    os.fsync(file.fileno())
                    files.sync_directory(self._path.parent)
        except OSError as exc:
            raise StorageError(f"cannot write {str(self._path)!r}: {exc.strerror}") from exc
        self._digest.update(data)
        self.size += len(data)

    def read(self) -> Iterator[BatchItem]:
        """Yield what was written."""
        if self.requests:
            yield from (item for _, item in _items(self._path))

    def delete(self) -> None:
        """Delete the file."""
        self._path.unlink(missing_ok=True)


class OpenBatch(BatchItems):
    """A batch file being written, not in the journal yet; `content` is the size of its upload so far, in bytes."""

    def __init__(self, directory: Path) -> None:
        self.local_id = secrets.token_hex(6)
        super().__init__(directory / f"{self.local_id}.jsonl")
        self.content = 0
        self.input_tokens = 0

    def add_entry(self, item: BatchItem, content: int) -> None:
        """Add a request whose upload measures so many bytes."""
        self.add(item)
        self.content += content
        self.input_tokens += item.request.estimated_input_tokens

    def finish(self, lines: list[bytes], record: BatchRecord) -> BatchRecord:
        """Write the last lines, on the disk; return the record with what the file holds."""
        self.write(lines, sync=True)
        return replace(
            record,
            local_id=self.local_id,
            requests=self.requests,
            size=self.size,
            content=self.content,
            sha256=self._digest.hexdigest(),
            input_tokens=self.input_tokens,
        )


class BatchStore:
    """The batch records and files of one results file. Call `open` first; one thread at a time."""

    def __init__(self, results_file: Path) -> None:
        self.directory = files.beside(results_file, SUFFIX)
        self._all: dict[str, BatchRecord] = {}
        self._journal: files.Appender | None = None

    @property
    def all(self) -> Sequence[BatchRecord]:
        return tuple(self._all.values())

    @property
    def still_open(self) -> Sequence[BatchRecord]:
        return tuple(record for record in self._all.values() if record.is_open)

    def open(self) -> None:
        """Read the journal, and delete batch files of a crash that it does not name. Files that are not ours stay."""
        self._all = {record.local_id: record for record in read_records(self.directory)}
        if self._stranger():
            return
        for path in self.directory.iterdir() if self.directory.is_dir() else ():
            record = self._all.get(path.stem)
            if path.name != _JOURNAL and (record is None or not record.is_open):
                path.unlink(missing_ok=True)

    def is_damaged(self, record: BatchRecord) -> bool:
        """Return True if a batch file differs from what was written."""
        digest = sha256()
        try:
            with self.path(record).open("rb") as file:
                while block := file.read(_BLOCK_BYTES):
                    digest.update(block)
        except OSError:
            return True
        return digest.hexdigest() != record.sha256

    def begin(self) -> OpenBatch:
        """Open a new batch file."""
        self._make_directory()
        return OpenBatch(self.directory)

    def leftovers(self, record: BatchRecord) -> BatchItems:
        """Open a file for the requests that a batch leaves over. A crash loses it, and its requests stay pending."""
        path = self.directory / f"{record.local_id}.left"
        path.unlink(missing_ok=True)
        return BatchItems(path)

    def save(self, record: BatchRecord) -> None:
        """Save a record; return when it is on the disk. Raises `StorageError`."""
        if self._journal is None:
            self._make_directory()
        self._all[record.local_id] = record
        if self._journal is None:
            path = self.directory / _JOURNAL
            try:
                fd = files.replace(path, [_line(each) for each in self._all.values()])
            except OSError as exc:
                raise StorageError(f"cannot write {str(path)!r}: {exc.strerror}") from exc
            self._journal = files.Appender(fd, path, sync=True)
            return
        self._journal.append(_line(record))

    def close_record(self, record: BatchRecord, step: Step) -> None:
        """Save that a batch is done, and delete its requests."""
        self.save(replace(record, step=step))
        for path in (self.path(record), self.download_path(record)):
            path.unlink(missing_ok=True)

    def reread(self, record: BatchRecord) -> BatchRecord:
        """Return a record as it was saved last."""
        return self._all.get(record.local_id, record)

    def release(self) -> None:
        """Close the journal."""
        if self._journal is not None:
            self._journal.close()
            self._journal = None

    def items(self, record: BatchRecord) -> Iterator[tuple[int, BatchItem]]:
        """Yield the requests of a batch, each with its byte offset in the file."""
        yield from _items(self.path(record))

    def reader(self, record: BatchRecord) -> IO[bytes]:
        """Open a batch file, for `item_at`."""
        return self.path(record).open("rb")

    def content(
        self, record: BatchRecord, *, separator: bytes, entry: Callable[[str, bytes], bytes]
    ) -> Iterator[bytes]:
        """Yield what is uploaded, in blocks."""
        block = bytearray()
        for place, item in self.items(record):
            block += (separator if place else b"") + entry(item.name, item.request.body)
            if len(block) >= _BLOCK_BYTES:
                yield bytes(block)
                block.clear()
        yield bytes(block)

    def download_path(self, record: BatchRecord) -> Path:
        """Return the path of a batch's results while they are downloaded."""
        return self.directory / f"{record.local_id}.results"

    def path(self, record: BatchRecord) -> Path:
        """Return the path of a batch file."""
        return self.directory / f"{record.local_id}.jsonl"

    def _stranger(self) -> str | None:
        """Return the name of a file in the directory that is not ours, None if all are."""
        if not self.directory.is_dir() or self.directory.is_symlink():
            return self.directory.name if self.directory.exists() or self.directory.is_symlink() else None
        names = sorted(
            path.name for path in self.directory.iterdir() if path.is_dir() or not _OURS.fullmatch(path.name)
        )
        return names[0] if names else None

    def _make_directory(self) -> None:
        stranger = self._stranger()
        if stranger and (not self._all or stranger == self.directory.name):
            raise UsageError(
                f"{str(self.directory)!r} is where requests for batches would lie, and {stranger!r} there is not ours",
                hint="choose another -o, or move that away",
            )
        try:
            self.directory.mkdir(mode=_DIRECTORY_MODE, exist_ok=True)
            self.directory.chmod(_DIRECTORY_MODE)
            files.sync_directory(self.directory.parent)
        except OSError as exc:
            raise StorageError(f"cannot create {str(self.directory)!r}: {exc.strerror}") from exc


def _items(path: Path) -> Iterator[tuple[int, BatchItem]]:
    place = 0
    try:
        with path.open("rb") as file:
            for head in file:
                body = file.readline()
                yield place, _decode(head, body)
                place += len(head) + len(body)
    except OSError as exc:
        raise StorageError(f"cannot read {str(path)!r}: {exc.strerror}") from exc
    except (LineError, KeyError, TypeError) as exc:
        raise StorageError(f"{str(path)!r} is damaged at byte {place:,}") from exc


def parse_time(text: str) -> datetime:
    """Return a time of a record or of a provider (ISO 8601)."""
    return datetime.fromisoformat(text)


def item_at(file: IO[bytes], place: int) -> BatchItem:
    """Return the request at a byte offset of a batch file."""
    file.seek(place)
    return _decode(file.readline(), file.readline())


def read_records(directory: Path) -> list[BatchRecord]:
    """Return the records in a directory's journal, the oldest first. A line that a crash cut short is skipped."""
    try:
        content = (directory / _JOURNAL).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as exc:
        raise StorageError(f"cannot read {str(directory / _JOURNAL)!r}: {exc.strerror}") from exc
    store: dict[str, BatchRecord] = {}
    for line in content.split(b"\n"):
        if record := _record(line):
            store[record.local_id] = record
    return list(store.values())


# ── lines ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _line(record: BatchRecord) -> bytes:
    value = {_KEYS.get(name, name): each for name, each in asdict(record).items()}
    return orjson.dumps(value, option=orjson.OPT_APPEND_NEWLINE)


def _record(line: bytes) -> BatchRecord | None:
    """Return what a journal line says; None for a line that a crash cut short, or one that is not ours."""
    try:
        value: dict[str, Any] = orjson.loads(line)
        values = {field.name: value[_KEYS.get(field.name, field.name)] for field in _stored_fields(value)}
        values["step"] = Step(value["step"])
        values["not_ours"] = tuple(value.get("not_ours", ()))
        record = BatchRecord(**values)
    except (orjson.JSONDecodeError, TypeError, AttributeError, KeyError, ValueError):
        return None
    is_ours = isinstance(record.local_id, str) and _OURS.fullmatch(f"{record.local_id}.jsonl")
    return record if is_ours else None


def _stored_fields(value: Mapping[str, Any]) -> list[Field[Any]]:
    """Return the fields that a line holds; lines of older versions hold fewer."""
    return [field for field in fields(BatchRecord) if _KEYS.get(field.name, field.name) in value]


def _encode(item: BatchItem) -> bytes:
    """Return the two lines of a request: what is known of it, and its body, byte for byte."""
    request = item.request
    head: dict[str, Any] = {name: getattr(request, name) for name in _REQUEST_FIELDS}
    head["name"] = item.name
    if item.attempts:
        head["attempts"] = [codec.attempt_as_dict(attempt) for attempt in item.attempts]
    head["counted"] = item.counted
    return jsonl.dumps(head) + b"\n" + request.body + b"\n"


def _decode(head: bytes, body: bytes) -> BatchItem:
    value: Mapping[str, Any] = jsonl.loads(head)
    return BatchItem(
        request=Request(**{name: value[name] for name in _REQUEST_FIELDS}, body=body.rstrip(b"\n")),
        name=value["name"],
        attempts=tuple(codec.to_attempts(value.get("attempts"))),
        counted=value["counted"],
    )
