"""Where parts lie while they are worked on: a folder beside the results that all machines see.

Each part is an ordinary results file with its journal, written and locked by one worker. Whoever died gave his lock
back, so the driver can take what is whole out of it, with what was in flight, and nothing of it is paid twice.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import anyio
from anyio import to_thread

from pipeline import disk, results
from pipeline.disk import beside
from pipeline.errors import StorageError, TryLaterError, UsageError
from pipeline.journal import Sent
from pipeline.record import SIDE_FILES, Recorder
from pipeline.results import Record
from pipeline.totals import Totals

SUFFIX = ".parts"
_TOKEN = "workshop"
_GROUP_LINES = 256
_LOCK_SECONDS = 0.5


class Workshop:
    """The folder of the parts of one results file."""

    def __init__(self, output: Path) -> None:
        self.folder = beside(output, SUFFIX)
        self._count = 0

    def open(self) -> str:
        """Make the folder if need be, and put a token there by which a worker can tell that it sees the same one."""
        token = secrets.token_hex(8)
        try:
            self.folder.mkdir(mode=0o700, exist_ok=True)
        except OSError as exc:
            raise StorageError(f"cannot make the folder {str(self.folder)!r}: {exc.strerror}") from exc
        disk.write_file(self.folder / _TOKEN, token.encode())
        return token

    def new_part(self, number: int) -> Path:
        """Return a name that no part had; `number` is the place of its lines in the input."""
        self._count += 1
        return self.folder / f"part-{number:05}-{self._count:05}.jsonl"

    def parts(self) -> list[Path]:
        """Return the parts that are there."""
        return sorted(path for path in self.folder.glob("part-*.jsonl") if not path.name.endswith(SIDE_FILES))

    def close(self) -> None:
        """Remove the folder if no part is in it."""
        with suppress(OSError):
            if not self.parts():
                (self.folder / _TOKEN).unlink(missing_ok=True)
                self.folder.rmdir()


def see(folder: Path, token: str) -> None:
    """Make sure that the workshop is seen from here. Raises `UsageError`."""
    try:
        is_same = (folder / _TOKEN).read_text() == token
    except OSError:
        is_same = False
    if not is_same:
        raise UsageError(
            f"the folder {str(folder)!r} is not seen from all machines of the cluster",
            hint="put the results (-o) on a file system that all share",
        )


class Part:
    """A part whose worker has ended or died, taken over: nobody else writes it any more."""

    def __init__(self, path: Path) -> None:
        """Lock it and repair its tail. Raises `TryLaterError` while somebody writes it."""
        self._path = path
        self._recorder = Recorder(path, run_id="", on_done=lambda result: None)
        try:
            self._recorder.open()
            self._recorder.done(Totals())
        except BaseException:
            self._recorder.release()
            raise

    @classmethod
    async def take_over(cls, path: Path, patience: float) -> Part:
        """Take a part over as soon as its lock is free; raises `TryLaterError` when it is not after so many seconds."""
        last = anyio.current_time() + patience
        while True:
            try:
                return await to_thread.run_sync(cls, path)
            except TryLaterError:
                if anyio.current_time() >= last:
                    raise
            await anyio.sleep(_LOCK_SECONDS)

    def groups(self) -> Iterator[tuple[list[bytes], list[Record]]]:
        """Yield its results, some at a time: the lines with their ends, and what they say."""
        lines: list[bytes] = []
        records: list[Record] = []
        with self._path.open("rb") as file:
            for _, line, record in results.read(file):
                if record:
                    lines.append(line + b"\n")
                    records.append(record)
                if len(lines) >= _GROUP_LINES:
                    yield lines, records
                    lines, records = [], []
        yield lines, records

    def unknown(self) -> Sequence[Sent]:
        """Return the calls that may be billed and that no result tells of.

        Their requests are answered in the same run, by other workers; so that this does not settle them, they are of
        a run of their own.
        """
        return [replace(call, run=f"{call.run}/{self._path.stem}") for call in self._recorder.unknown()]

    def remove(self) -> None:
        """Remove it, once all of it is safe elsewhere."""
        for suffix in SIDE_FILES:
            beside(self._path, suffix).unlink(missing_ok=True)
        self._path.unlink(missing_ok=True)
        self._recorder.release()

    def release(self) -> None:
        """Leave it for later."""
        self._recorder.release()
