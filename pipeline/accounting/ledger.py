"""The ledger: what every run did and cost, in one SQLite file that overlapping runs may write at the same time.

The journal is a rollback journal (TRUNCATE) with `synchronous=FULL`, never WAL: SQLite 3.7.0 to 3.51.2 can corrupt a
WAL database when two connections write at once (https://sqlite.org/wal.html#walresetbug), Debian and many Pythons ship
such a version, and overlapping cron jobs are exactly that case. With `synchronous=NORMAL` a power cut loses commits.
A run is one transaction, so the slower mode costs little: the file could take thousands of runs a minute.

Money is whole nano-dollars, so sums are exact. The result files stay the source of truth: `pipeline report --rebuild`
rebuilds the ledger from them.
"""

from __future__ import annotations

import json
import os
import re
import sqlite3
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, fields
from datetime import UTC, date, datetime, timedelta
from itertools import chain
from pathlib import Path
from typing import Any, Self

from pipeline.core.errors import StorageError
from pipeline.core.types import TokenCounts

_MODE = 0o600
_DIRECTORY_MODE = 0o700
_LOCK_SECONDS = 30.0
_APPLICATION_ID = 0x70697065  # "pipe"
# Columns that refuse other types, where SQLite knows them: since 3.37; RHEL 9 has 3.34.
_STRICT = "STRICT" if sqlite3.sqlite_version_info >= (3, 37) else ""

# What providers put after a model's name: gpt-4o-2024-08-06, claude-3-5-sonnet-20241022, gpt-4-0613.
_DATE = re.compile(r"-(\d{4}-\d\d-\d\d|\d{8}|\d{4})", re.ASCII)

# Each step brings the schema from one version to the next; a step that was released never changes.
MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        f"""
        CREATE TABLE runs (
            run_id TEXT NOT NULL PRIMARY KEY,
            started_at TEXT NOT NULL,     -- UTC, ISO 8601
            finished_at TEXT,
            status TEXT NOT NULL,
            exit_code INTEGER,
            stop_reason TEXT,
            simulated INTEGER NOT NULL,
            results_file TEXT,
            inputs TEXT NOT NULL,         -- JSON array
            tags TEXT NOT NULL,           -- JSON object
            price_source TEXT,
            total INTEGER NOT NULL,
            succeeded INTEGER NOT NULL,
            failed INTEGER NOT NULL,
            invalid INTEGER NOT NULL,
            pending INTEGER NOT NULL,
            reused INTEGER NOT NULL,
            wall_seconds REAL NOT NULL
        ) {_STRICT}
        """,
        f"""
        CREATE TABLE entries (
            run_id TEXT NOT NULL,
            day TEXT NOT NULL,            -- UTC
            provider TEXT NOT NULL,
            model TEXT NOT NULL,
            lane TEXT NOT NULL,
            requests INTEGER NOT NULL,
            succeeded INTEGER NOT NULL,
            failed INTEGER NOT NULL,
            attempts INTEGER NOT NULL,
            rate_limited INTEGER NOT NULL,
            failed_attempts INTEGER NOT NULL,
            unknown INTEGER NOT NULL,
            input_tokens INTEGER NOT NULL,
            output_tokens INTEGER NOT NULL,
            cache_read_tokens INTEGER NOT NULL,
            cache_write_tokens INTEGER NOT NULL,
            cache_write_1h_tokens INTEGER NOT NULL,
            reasoning_tokens INTEGER NOT NULL,
            cost_nano INTEGER NOT NULL,   -- 0.000000001 USD
            unpriced INTEGER NOT NULL,
            wasted_nano INTEGER NOT NULL,
            saved_nano INTEGER NOT NULL,
            PRIMARY KEY (run_id, day, provider, model, lane)
        ) {_STRICT}
        """,
        "CREATE INDEX entries_by_day ON entries (day)",
        "CREATE INDEX entries_by_model ON entries (provider, model)",
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRow:
    """One run: what it was and how it ended; the counts are input lines, as in `*.usage.json`."""

    run_id: str
    started_at: str
    finished_at: str | None = None
    status: str
    exit_code: int | None = None
    stop_reason: str | None = None
    simulated: bool = False
    results_file: str | None = None
    inputs: tuple[str, ...] = ()
    tags: Mapping[str, str] = field(default_factory=dict)
    price_source: str | None = None
    total: int = 0
    succeeded: int = 0
    failed: int = 0
    invalid: int = 0
    pending: int = 0
    reused: int = 0
    wall_seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts(TokenCounts):
    """Counts of requests, calls, tokens and nano-dollars.

    `requests` are those that ended, answered or failed. Of the calls (`attempts`), `rate_limited` were refused with
    429, `failed_attempts` failed otherwise, and `unknown` of all of them may be billed without an answer. `cost_nano`
    is the cost of the answers and `unpriced` counts answers whose price is unknown. `wasted_nano`, not part of it, is
    the known cost of calls whose answer could not be used. `saved_nano` is what reading from the cache saved.
    """

    requests: int = 0
    succeeded: int = 0
    failed: int = 0
    attempts: int = 0
    rate_limited: int = 0
    failed_attempts: int = 0
    unknown: int = 0
    cost_nano: int = 0
    unpriced: int = 0
    wasted_nano: int = 0
    saved_nano: int = 0


COUNT_FIELDS = tuple(each.name for each in fields(Counts))


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry(Counts):
    """What a run did with one model in one lane on one day (UTC, `2026-11-26`)."""

    day: str
    provider: str
    model: str
    lane: str = "live"


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """Past answers of one model: how many, and the mean tokens of each. `model` is its name in the ledger."""

    model: str
    answers: int
    mean_input_tokens: float
    mean_output_tokens: float


_RUN_COLUMNS = tuple(each.name for each in fields(RunRow))
_ENTRY_COLUMNS = tuple(each.name for each in fields(Entry))


class Ledger:
    """An open ledger; `with Ledger.open(path) as ledger:`. Belongs to the thread that opened it."""

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        self._connection = connection
        self._path = path

    def __repr__(self) -> str:
        return f"<Ledger {str(self._path)!r}>"

    @classmethod
    @contextmanager
    def open(cls, path: Path) -> Iterator[Self]:
        """Open the ledger, or make a new one; only this user can read it.

        Raises `StorageError` if it is damaged, was made by a newer version of this program, or cannot be opened.
        """
        _create_privately(path)
        with closing(_connect(path)) as connection:
            with _explaining(path):
                bring_up_to_date(connection, path)
            yield cls(connection, path)

    def record(self, run: RunRow, entries: Iterable[Entry]) -> None:
        """Write a run and its entries, replacing any earlier record of the run; all of it or nothing."""
        rows = [_entry_row(run.run_id, entry) for entry in entries]
        with _explaining(self._path), _transaction(self._connection):
            self._connection.execute("DELETE FROM entries WHERE run_id = ?", (_text(run.run_id),))
            self._connection.execute(_insert("INSERT OR REPLACE", "runs", _RUN_COLUMNS), _run_row(run))
            self._connection.executemany(_insert("INSERT", "entries", ("run_id", *_ENTRY_COLUMNS)), rows)

    def runs(
        self, *, include_simulated: bool = False, status: str | None = None, results_file: str | None = None
    ) -> list[RunRow]:
        """Return the runs, the oldest first; those of one status or one results file, where these are given."""
        sql = (
            f"SELECT {', '.join(_RUN_COLUMNS)} FROM runs WHERE simulated <= ? "
            "AND status = COALESCE(?, status) AND results_file IS COALESCE(?, results_file) "
            "ORDER BY started_at, run_id"
        )
        return [_to_run(row) for row in self._select(sql, (int(include_simulated), status, _text(results_file)))]

    def entries(
        self, *, since: date | None = None, until: date | None = None, include_simulated: bool = False
    ) -> dict[str, list[Entry]]:
        """Return the entries of each run id, by day; `since` is the first day and `until` the last, in UTC."""
        columns = ", ".join(f"entries.{name}" for name in _ENTRY_COLUMNS)
        sql = (
            f"SELECT run_id, {columns} FROM entries JOIN runs USING (run_id) "
            "WHERE simulated <= ? AND day BETWEEN ? AND ? ORDER BY day, run_id, provider, model, lane"
        )
        found: dict[str, list[Entry]] = {}
        for run_id, *values in self._select(sql, (int(include_simulated), _first(since), _last(until))):
            found.setdefault(run_id, []).append(Entry(**dict(zip(_ENTRY_COLUMNS, values, strict=True))))
        return found

    def spent(self, since: datetime, until: datetime | None = None) -> int:
        """Return the nano-dollars that real runs cost from `since` to before `until`, waste included.

        The ledger stores whole days (UTC). A day that is only partly in the period counts in full: a budget cap may
        stop a run too early, but never too late.
        """
        last_day = None
        if until is not None:
            # `until` is exclusive: a period that ends at midnight does not include the day that begins then.
            last_day = (until.astimezone(UTC) - timedelta(microseconds=1)).date()
        sql = (
            "SELECT COALESCE(SUM(cost_nano + wasted_nano), 0) FROM entries JOIN runs USING (run_id) "
            "WHERE simulated = 0 AND day BETWEEN ? AND ?"
        )
        first_day = since.astimezone(UTC).date()
        rows = self._select(sql, (_first(first_day), _last(last_day)))
        return int(rows[0][0])

    def history(self, provider: str, model: str) -> History | None:
        """Return the averages of a model's answers in real runs, or None if it has none.

        A request may name an alias, but its answer names the dated model. If the ledger does not have the name itself,
        its newest dated model is used. A common beginning is not enough: `gpt-4o-mini-2024-07-18` is not `gpt-4o`.
        """
        sql = (
            "SELECT model, SUM(entries.succeeded), SUM(input_tokens), SUM(output_tokens) "
            "FROM entries JOIN runs USING (run_id) WHERE simulated = 0 AND provider = ? "
            "GROUP BY model HAVING SUM(entries.succeeded) > 0"
        )
        known = {name: sums for name, *sums in self._select(sql, (_text(provider),))}
        asked = _text(model)
        alias = asked.removesuffix("-latest")
        dated = [name for name in known if name.startswith(alias) and _DATE.fullmatch(name, len(alias))]
        name = max(dated, default=None)
        if asked in known:
            name = asked
        if name is None:
            return None
        answers, input_tokens, output_tokens = known[name]
        return History(
            model=name,
            answers=answers,
            mean_input_tokens=input_tokens / answers,
            mean_output_tokens=output_tokens / answers,
        )

    def _select(self, sql: str, values: Sequence[Any]) -> list[tuple[Any, ...]]:
        with _explaining(self._path):
            return self._connection.execute(sql, values).fetchall()


# ── opening ───────────────────────────────────────────────────────────────────────────────────────────────────────


def bring_up_to_date(
    connection: sqlite3.Connection, path: Path, migrations: Sequence[Sequence[str]] = MIGRATIONS
) -> None:
    """Apply the migrations that a ledger lacks, in one transaction; a ledger with content is copied first."""
    if _version(connection, path) == len(migrations):
        return
    with _transaction(connection):
        version = _version(connection, path)  # again, under the lock: another process may have migrated it meanwhile
        if version > len(migrations):
            raise StorageError(
                f"the ledger {str(path)!r} was written by a newer version of this program (schema {version}, "
                f"known up to {len(migrations)})",
                hint="update this program, or name another ledger (--ledger, PIPELINE_LEDGER)",
            )
        if 0 < version < len(migrations):
            _back_up(path, version)
        for statement in chain.from_iterable(migrations[version:]):
            connection.execute(statement)
        connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {len(migrations)}")


def _connect(path: Path) -> sqlite3.Connection:
    with _explaining(path):
        connection = sqlite3.connect(path, timeout=_LOCK_SECONDS, isolation_level=None)
        try:
            connection.execute("PRAGMA journal_mode = TRUNCATE")
            connection.execute("PRAGMA synchronous = FULL")
        except sqlite3.Error:
            connection.close()  # the caller never gets this connection, so cannot close it
            raise
        return connection


def _create_privately(path: Path) -> None:
    """Make an empty file that only this user can read, if there is none; SQLite gives its journal the same mode.

    A file that exists is not opened here: closing it would drop the locks that this process holds on it.
    """
    try:
        _make_directory(path.parent)
        with suppress(FileExistsError):
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, _MODE))
        mode = path.lstat().st_mode
    except OSError as exc:
        hint = "name a file that can be written: PIPELINE_LEDGER=FILE, or ledger in the configuration"
        raise StorageError(f"the ledger {str(path)!r} cannot be made: {exc.strerror}", hint=hint) from exc
    if stat.S_ISLNK(mode):
        raise StorageError(f"the ledger {str(path)!r} is a symbolic link; name the file itself")
    if not stat.S_ISREG(mode):
        raise StorageError(f"the ledger {str(path)!r} is not a regular file")


def _make_directory(path: Path) -> None:
    if not path.is_dir():
        _make_directory(path.parent)
        path.mkdir(mode=_DIRECTORY_MODE, exist_ok=True)


def _version(connection: sqlite3.Connection, path: Path) -> int:
    """Return the version of the schema, 0 for an empty file; refuse a database of another program."""
    sql = "SELECT user_version, application_id, (SELECT COUNT(*) FROM sqlite_master) "
    sql += "FROM pragma_user_version, pragma_application_id"  # one statement sees one moment
    version, application, tables = connection.execute(sql).fetchone()
    if application != _APPLICATION_ID and (version or tables):
        raise StorageError(f"{str(path)!r} is a database, but not a ledger of this program; name another file")
    return int(version)


def _back_up(path: Path, version: int) -> None:
    """Copy a ledger to `NAME.vN` beside it."""
    backup = path.with_name(f"{path.name}.v{version}")
    try:
        backup.unlink(missing_ok=True)
        os.close(os.open(backup, os.O_WRONLY | os.O_CREAT | os.O_EXCL, _MODE))
    except OSError as exc:
        raise StorageError(f"the ledger cannot be copied to {str(backup)!r}: {exc.strerror}") from exc
    with closing(_connect(path)) as source, closing(_connect(backup)) as target:
        source.backup(target)


@contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """Hold the write lock from the beginning, so that two writers wait for each other and never fail midway."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


@contextmanager
def _explaining(path: Path) -> Iterator[None]:
    """Raise SQLite's errors as `StorageError`, except a violated constraint: that is a bug in this program."""
    try:
        yield
    except sqlite3.IntegrityError:
        raise
    except OverflowError as exc:
        raise StorageError(f"a count is too large for the ledger {str(path)!r}") from exc
    except sqlite3.Error as exc:
        code = (getattr(exc, "sqlite_errorcode", None) or 0) & 0xFF  # the lowest byte is the kind
        if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            hint = "move it away, then make it again from your results: pipeline report --rebuild RESULTS…"
            raise StorageError(f"the ledger {str(path)!r} is damaged: {exc}", hint=hint) from exc
        if code == sqlite3.SQLITE_BUSY:
            message = f"the ledger {str(path)!r} was in use by others for {_LOCK_SECONDS:.0f} s"
            raise StorageError(message, hint="try again; is a program holding it open?") from exc
        raise StorageError(
            f"the ledger {str(path)!r} cannot be used: {exc}; --ledger FILE or PIPELINE_LEDGER names another"
        ) from exc


# ── rows ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _insert(verb: str, table: str, columns: Sequence[str]) -> str:
    return f"{verb} INTO {table} ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))})"


def _run_row(run: RunRow) -> list[Any]:
    row = {name: getattr(run, name) for name in _RUN_COLUMNS}
    row["simulated"] = int(run.simulated)
    row["inputs"] = json.dumps(run.inputs)  # its escapes hold any file name, also one that is not UTF-8
    row["tags"] = json.dumps({_text(name): _text(tag) for name, tag in run.tags.items()})
    row["wall_seconds"] = float(run.wall_seconds)
    return [_text(value) for value in row.values()]


def _entry_row(run_id: str, entry: Entry) -> list[Any]:
    return [_text(run_id), *(_text(getattr(entry, name)) for name in _ENTRY_COLUMNS)]


def _to_run(row: Sequence[Any]) -> RunRow:
    values = dict(zip(_RUN_COLUMNS, row, strict=True))
    values["simulated"] = bool(values["simulated"])
    values["inputs"] = tuple(json.loads(values["inputs"]))
    values["tags"] = json.loads(values["tags"])
    return RunRow(**values)


def _text(value: Any) -> Any:
    """Escape the lone surrogates of a string, as SQLite stores UTF-8; return any other value unchanged."""
    if not isinstance(value, str):
        return value
    return value.encode("utf-8", "backslashreplace").decode()


def _first(day: date | None) -> str:
    # Days are compared as text, and the empty text sorts before every date.
    if day is None:
        return ""
    return day.isoformat()


def _last(day: date | None) -> str:
    if day is None:
        return date.max.isoformat()
    return day.isoformat()
