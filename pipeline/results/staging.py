"""Where the parts of a run on a cluster lie while they are worked on: a folder that all machines see.

It is beside the results, or in their folder at an object store.

On a file system each part is an ordinary results file with its journal, written and locked by one worker. Who died gave
his lock back, so the driver can take what is whole out of it, with what was in flight, and nothing of it is paid twice.
At an object store a part is a folder of objects (`parts`), fed by a spool on its worker's machine: of a machine that is
lost, what was not uploaded yet is lost, too.
"""

from __future__ import annotations

import secrets
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import anyio
from anyio import to_thread

from pipeline.core import files, object_store
from pipeline.core.errors import StorageError, TryLaterError, UsageError
from pipeline.core.files import beside
from pipeline.results import codec, object_store_writer
from pipeline.results.attempt_log import LoggedCall
from pipeline.results.codec import StoredResult
from pipeline.results.totals import Totals
from pipeline.results.writer import SIDE_FILES, Done, ResultWriter, key

Name = str | Path
"""A part: a file, or the URL of a folder."""

_TOKEN = "token"
_GROUP_LINES = 256
BEAT_SECONDS = 10.0
_LOCK_SECONDS = 0.5
_LOOKS = 40


class WorkerOutput:
    """The results of a part whose worker has ended or died, so that nothing writes them any more.

    `tells_calls` is True if an attempt log has the calls that have no result.
    """

    def __init__(
        self,
        path: Path,
        name: str,
        *,
        remove: Callable[[], None],
        forget: Callable[[], None] = lambda: None,
        tells_calls: bool,
    ) -> None:
        """Lock the file and repair its tail. Raises `TryLaterError` while somebody writes it.

        `remove` removes the part, `forget` what was made of it only to read it.
        """
        self.tells_calls = tells_calls
        self._forget = forget
        self._path = path
        self._name = name
        self._remove = remove
        self._writer = ResultWriter(path, run_id="", on_done=lambda result: None)
        try:
            self._writer.open()
            self._writer.done(Totals())
        except BaseException:
            self.close()
            raise

    def groups(self) -> Iterator[tuple[list[bytes], list[StoredResult]]]:
        """Yield its results, some at a time: the lines with their ends, and what they say."""
        lines: list[bytes] = []
        records: list[StoredResult] = []
        with self._path.open("rb") as file:
            for _, line, record in codec.read(file):
                if record:
                    lines.append(line + b"\n")
                    records.append(record)
                if len(lines) >= _GROUP_LINES:
                    yield lines, records
                    lines, records = [], []
        yield lines, records

    def unknown(self) -> Sequence[LoggedCall]:
        """Return the calls that may be billed and that no result tells of.

        Their requests are answered in the same run, by other workers; so that this does not settle them, they are of
        a run of their own.
        """
        return [replace(call, run=f"{call.run}/{self._name}") for call in self._writer.unknown()]

    def remove(self) -> None:
        """Remove it, once all of it is safe elsewhere."""
        self._remove()
        self.close()

    def close(self) -> None:
        """Leave it for later."""
        self._writer.close()
        self._forget()


class Staging(Protocol):
    """The parts of one results file."""

    @property
    def place(self) -> Name:
        """The folder."""
        ...

    def open(self) -> str:
        """Make the place if need be, and put a token there by which a worker can tell that it sees the same one."""
        ...

    def beat(self) -> None:
        """Show that this run is alive; to be called every `BEAT_SECONDS`."""
        ...

    def require_unused(self) -> None:
        """Raise `TryLaterError` where a run is alive that uses it."""
        ...

    def new_part(self, number: int) -> Name:
        """Return a name that no other part has; `number` is the place of its lines in the input."""
        ...

    def parts(self) -> Sequence[Name]:
        """Return the parts that are there."""
        ...

    def taken_over(self, name: Name) -> WorkerOutput:
        """Take a part over; raises `TryLaterError` while somebody writes it."""
        ...

    def close(self) -> None:
        """Remove the place if no part is in it."""
        ...


def staging_of(output: Name) -> Staging:
    """Return the staging area of an output: a file, or the URL of a folder at an object store."""
    return StagingDir(output) if isinstance(output, Path) else RemoteStagingDir(output)


def check_visible(place: Name, token: str) -> None:
    """Make sure that a staging area is seen from here. Raises `UsageError`."""
    try:
        found = object_store.read(f"{place}{_TOKEN}")[0] if isinstance(place, str) else (place / _TOKEN).read_bytes()
    except (OSError, StorageError) as exc:
        reason: object = exc
    else:
        if found.split()[:1] == [token.encode()]:
            return
        reason = "another one is seen"
    raise UsageError(
        f"{str(place)!r} is not seen from all machines of the cluster: {reason}",
        hint="put the results (-o) where all machines see them: on a shared file system, or at an object store",
    )


@contextmanager
def taken_in(writer: ResultWriter, area: Staging) -> Iterator[Callable[[], None]]:
    """Take what the workers of a run that was killed have done into the results, before these are read.

    Yields what removes it, for when the journal of the results is begun. Raises `TryLaterError` where somebody writes
    a part for longer than a worker takes to notice that its driver is dead.
    """
    area.require_unused()
    with ExitStack() as held:
        staged: list[WorkerOutput] = []
        for name in area.parts():
            staged.append(_taken_over_soon(area, name))
            held.callback(staged[-1].close)
        done = writer.done(Totals()) if staged else Done()
        for part in staged:
            for lines, records in part.groups():
                pairs = zip(lines, records, strict=True)
                writer.import_lines([line for line, record in pairs if _is_new(record, done)])
            writer.import_lines([], part.unknown())

        def remove() -> None:
            for part in staged:
                part.remove()
            area.close()

        yield remove


def _is_new(record: StoredResult, done: Done) -> bool:
    """Return True if a result adds to what is known of its request: an answer outranks a failure."""
    outcome = done.outcome(key(record.custom_id, record.digest))
    return outcome is None or (outcome is False and record.success)


def _taken_over_soon(area: Staging, name: Name) -> WorkerOutput:
    for _ in range(_LOOKS):
        with suppress(TryLaterError):
            return area.taken_over(name)
        threading.Event().wait(_LOCK_SECONDS)
    raise TryLaterError(
        f"workers of another run are still writing {str(name)!r}", hint="wait until they have ended, then repeat"
    )


async def taken_over(area: Staging, name: Name, patience: Callable[[], float]) -> WorkerOutput:
    """Take over a part as soon as its worker no longer writes it.

    Raises `TryLaterError` if that takes longer than `patience()` seconds. `patience` is called again at every try.
    """
    began = anyio.current_time()
    while True:
        try:
            return await to_thread.run_sync(area.taken_over, name)
        except TryLaterError:
            if anyio.current_time() - began >= patience():
                raise
        await anyio.sleep(_LOCK_SECONDS)


class StagingDir:
    """A staging area on a file system: `answers.parts/` beside `answers.jsonl`."""

    def __init__(self, output: Path) -> None:
        self.place = beside(output, ".parts")
        self._count = 0

    def open(self) -> str:
        token = secrets.token_hex(8)
        try:
            self.place.mkdir(mode=0o700, exist_ok=True)
        except OSError as exc:
            raise StorageError(f"cannot create the folder {str(self.place)!r}: {exc.strerror}") from exc
        files.write_file(self.place / _TOKEN, token.encode())
        return token

    def beat(self) -> None:
        """Locks tell it."""

    def require_unused(self) -> None:
        """The lock of the results tells it, and those of the parts."""

    def new_part(self, number: int) -> Path:
        self._count += 1
        return self.place / f"part-{number:05}-{self._count:05}.jsonl"

    def parts(self) -> list[Path]:
        return sorted(path for path in self.place.glob("part-*.jsonl") if not path.name.endswith(SIDE_FILES))

    def taken_over(self, name: Name) -> WorkerOutput:
        path = Path(name)

        def remove() -> None:
            for each in self.place.glob(f"{path.stem}.*"):
                each.unlink(missing_ok=True)

        return WorkerOutput(path, path.stem, remove=remove, tells_calls=True)

    def close(self) -> None:
        if self.place.is_dir() and not self.parts():
            shutil.rmtree(self.place, ignore_errors=True)


class RemoteStagingDir:
    """A staging area at an object store: `answers/work/` in the folder of the results.

    No name is used twice, by any run: on a machine of the cluster there may be a spool of it. Nothing is locked there,
    so a run shows that it is alive, and one that finds a token looks twice.
    """

    def __init__(self, output: str) -> None:
        self.place = f"{output}work/"
        self._token = secrets.token_hex(8)
        self._beats = 0
        self._has_token = False
        self._count = 0

    def open(self) -> str:
        self.beat()
        return self._token

    def beat(self) -> None:
        self._beats += 1
        self._has_token = True
        with suppress(StorageError):  # then another run may think that this one is dead, which it finds out
            object_store.put(self.place + _TOKEN, f"{self._token} {self._beats}".encode())

    def require_unused(self) -> None:
        with object_store.before_sending():
            if object_store.head(self.place + _TOKEN) is None:
                return
            self._has_token = True
            before = object_store.read(self.place + _TOKEN)
            threading.Event().wait(2.5 * BEAT_SECONDS)
            if object_store.head(self.place + _TOKEN) and object_store.read(self.place + _TOKEN) != before:
                raise TryLaterError(
                    f"another run on a cluster is writing {self.place!r}", hint="wait until it has ended, then repeat"
                )

    def new_part(self, number: int) -> str:
        self._count += 1
        return f"{self.place}part-{number:05}-{self._count:05}-{self._token}/"

    def parts(self) -> list[str]:
        found = (each.url[len(self.place) :].partition("/") for each in object_store.listed_deep(self.place))
        return sorted({f"{self.place}{name}/" for name, slash, _ in found if slash})

    def taken_over(self, name: Name) -> WorkerOutput:
        url = str(name)
        copy = Path(tempfile.mkdtemp(prefix="pipeline-"))

        def remove() -> None:
            for found in object_store.listed_deep(url):
                object_store.delete(found.url)

        def forget() -> None:
            shutil.rmtree(copy, ignore_errors=True)

        try:
            path = object_store_writer.fetch(url, copy)
        except BaseException:
            forget()
            raise
        return WorkerOutput(path, url.split("/")[-2], remove=remove, forget=forget, tells_calls=False)

    def close(self) -> None:
        with suppress(StorageError):
            if self._has_token and not self.parts():
                object_store.delete(self.place + _TOKEN)
                self._has_token = False
