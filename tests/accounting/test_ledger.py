from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
import sqlite3
import stat
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, date, datetime, timedelta, timezone
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.accounting import ledger
from pipeline.accounting.ledger import MIGRATIONS, Entry, Ledger, RunRow
from pipeline.core.errors import StorageError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.sqlite"


def run(run_id: str = "run-1", **values: Any) -> RunRow:
    return RunRow(**{"run_id": run_id, "started_at": "2026-11-26T01:02:03Z", "status": "completed"} | values)


def entry(day: str = "2026-11-26", model: str = "gpt-6-luna", **values: Any) -> Entry:
    return Entry(**{"day": day, "provider": "openai", "model": model} | values)


def pragma(path: Path, name: str) -> Any:
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute(f"PRAGMA {name}").fetchone()[0]


# ── what goes in comes out ────────────────────────────────────────────────────────────────────────────


def test_a_run_comes_back_as_it_went_in(path: Path) -> None:
    """Every field of a run and of its entries survives the file, and a second opening."""
    whole = RunRow(
        run_id="run-20261126T010203Z-abc123",
        started_at="2026-11-26T01:02:03Z",
        finished_at="2026-11-26T02:00:00Z",
        status="stopped",
        exit_code=3,
        stop_reason="no credit",
        simulated=False,
        results_file="answers.jsonl",
        inputs=("a.jsonl", "b.jsonl"),
        tags={"team": "search", "job": "nightly"},
        price_source="genai-prices 0.2.3",
        total=1,
        succeeded=2,
        failed=3,
        invalid=4,
        pending=5,
        reused=6,
        wall_seconds=7.5,
    )
    numbers = {field.name: n for n, field in enumerate(dataclasses.fields(Entry)) if field.type == "int"}
    full = Entry(day="2026-11-26", provider="anthropic", model="claude-haiku-5-5", lane="batch", **numbers)

    with Ledger.open(path) as book:
        book.record(whole, [full])

    with Ledger.open(path) as book:
        assert book.runs() == [whole]
        assert book.entries() == {whole.run_id: [full]}


@given(
    st.dictionaries(st.text(), st.text(), max_size=3),
    st.lists(st.text(st.characters()), max_size=3),
    st.text(),
)
def test_any_text_can_be_recorded(tags: dict[str, str], inputs: list[str], model: str) -> None:
    """Tags, file names (even those that are not UTF-8) and models may be any text, and come back the same."""
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
        ledger.bring_up_to_date(connection, Path("memory"))
        book = Ledger(connection, Path("memory"))
        recorded = run(tags=tags, inputs=tuple(inputs))
        book.record(recorded, [entry(model=model)])

        assert book.runs() == [recorded]
        assert book.entries() == {"run-1": [entry(model=model)]}


def test_lone_surrogates_become_escapes(path: Path) -> None:
    """A file, model or tag that is not UTF-8 is stored readable, and can be printed later."""
    with Ledger.open(path) as book:
        book.record(run(results_file="a\udcff.jsonl", tags={"t\udcff": "\udcfe"}), [entry(model="\ud800")])

        assert book.runs()[0].results_file == "a\\udcff.jsonl"
        assert book.runs()[0].tags == {"t\\udcff": "\\udcfe"}
        assert book.entries()["run-1"][0].model == "\\ud800"


def test_recording_again_replaces(path: Path) -> None:
    """A run that is recorded twice counts once, with what was said last; other runs stay."""
    with Ledger.open(path) as book:
        book.record(run("other"), [entry(cost_nano=1)])
        book.record(run(status="partial"), [entry(cost_nano=10), entry(model="gpt-6-sol", cost_nano=20)])
        book.record(run(status="completed"), [entry(cost_nano=30)])

        assert [(each.run_id, each.status) for each in book.runs()] == [("other", "completed"), ("run-1", "completed")]
        assert book.entries() == {"other": [entry(cost_nano=1)], "run-1": [entry(cost_nano=30)]}


def test_a_run_is_recorded_whole_or_not_at_all(path: Path) -> None:
    """When one entry cannot be stored, nothing of the run changes."""
    with Ledger.open(path) as book:
        book.record(run(status="partial"), [entry(cost_nano=10)])
        with pytest.raises(StorageError, match="too large"):
            book.record(run(), [entry(cost_nano=20), entry(model="gpt-6-sol", cost_nano=2**63)])

        assert (book.runs()[0].status, book.entries()) == ("partial", {"run-1": [entry(cost_nano=10)]})


def test_an_old_sqlite_can_hold_it() -> None:
    """Where SQLite is older than STRICT tables, the schema is the same without them."""
    old = [[statement.replace("STRICT", "") for statement in step] for step in MIGRATIONS]
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
        ledger.bring_up_to_date(connection, Path("memory"), old)
        book = Ledger(connection, Path("memory"))
        book.record(run(), [entry(cost_nano=7)])

        assert (book.runs(), book.entries()) == ([run()], {"run-1": [entry(cost_nano=7)]})


@pytest.mark.skipif(sqlite3.sqlite_version_info < (3, 37), reason="this SQLite knows no STRICT tables")
def test_money_is_whole(path: Path) -> None:
    """A fraction of a nano-dollar is refused as the bug it is, and never rounded in silence."""
    with Ledger.open(path) as book, pytest.raises(sqlite3.IntegrityError):
        book.record(run(), [entry(cost_nano=0.5)])


# ── questions ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def book(path: Path) -> Iterator[Ledger]:
    """Three days of a real run and one of a simulated one."""
    with Ledger.open(path) as opened:
        opened.record(
            run("real"),
            [
                entry("2026-11-24", cost_nano=1, succeeded=1, input_tokens=10, output_tokens=5),
                entry("2026-11-25", cost_nano=20, wasted_nano=5, succeeded=3, input_tokens=30, output_tokens=7),
                entry("2026-11-26", cost_nano=300, model="gpt-6-sol", failed=2),
            ],
        )
        opened.record(run("rehearsal", simulated=True), [entry("2026-11-26", cost_nano=10**9, succeeded=9)])
        yield opened


def test_runs_of_one_file_and_status(book: Ledger) -> None:
    """A run that ends asks for those that were killed over its results, and never for all that there ever were."""
    for number, (status, name) in enumerate(product(("running", "completed"), ("a.jsonl", "a\udcff.jsonl", None))):
        book.record(run(run_id=f"run-{number}", status=status, results_file=name), [])

    found = [each.run_id for each in book.runs(status="running", results_file="a\udcff.jsonl")]
    assert found == ["run-1"]
    assert [each.run_id for each in book.runs(results_file="a.jsonl")] == ["run-0", "run-3"]
    assert len(book.runs()) == 7  # with the fixture's run


def test_simulated_runs_stay_out(book: Ledger) -> None:
    """Simulated runs are in no answer unless they are asked for."""
    assert [each.run_id for each in book.runs()] == ["real"]
    assert list(book.entries()) == ["real"]
    assert [each.run_id for each in book.runs(include_simulated=True)] == ["real", "rehearsal"]
    assert sorted(book.entries(include_simulated=True)) == ["real", "rehearsal"]


@pytest.mark.parametrize(
    ("since", "until", "days"),
    [
        pytest.param(None, None, ["24", "25", "26"], id="all"),
        pytest.param(date(2026, 11, 25), None, ["25", "26"], id="since"),
        pytest.param(None, date(2026, 11, 25), ["24", "25"], id="until"),
        pytest.param(date(2026, 11, 25), date(2026, 11, 25), ["25"], id="one day"),
        pytest.param(date(2027, 1, 1), None, [], id="none"),
    ],
)
def test_entries_of_a_period(book: Ledger, since: date | None, until: date | None, days: list[str]) -> None:
    """The first and the last day belong to the period."""
    found = book.entries(since=since, until=until)

    assert [each.day[-2:] for rows in found.values() for each in rows] == days


@pytest.mark.parametrize(
    ("since", "until", "nano"),
    [
        pytest.param(datetime(2026, 11, 26, tzinfo=UTC), None, 300, id="a day"),
        pytest.param(datetime(2026, 11, 1, tzinfo=UTC), None, 326, id="a month, waste included"),
        pytest.param(datetime(2026, 11, 26, 23, tzinfo=UTC), None, 300, id="a day begun counts whole"),
        pytest.param(datetime(2026, 11, 24, tzinfo=UTC), datetime(2026, 11, 26, tzinfo=UTC), 26, id="until midnight"),
        pytest.param(datetime(2026, 11, 24, tzinfo=UTC), datetime(2026, 11, 26, 1, tzinfo=UTC), 326, id="until one"),
        pytest.param(datetime(2026, 11, 26, 1, tzinfo=timezone(timedelta(hours=2))), None, 325, id="another zone"),
        pytest.param(datetime(2027, 1, 1, tzinfo=UTC), None, 0, id="nothing"),
    ],
)
def test_what_was_spent(book: Ledger, since: datetime, until: datetime | None, nano: int) -> None:
    """Real runs' answers and waste count, by whole days in UTC; rehearsals cost nothing."""
    assert book.spent(since, until) == nano


def test_history_tells_means(book: Ledger) -> None:
    """A model's history is the mean per answer over real runs; without an answer there is none."""
    past = ledger.History(model="gpt-6-luna", answers=4, mean_input_tokens=10, mean_output_tokens=3)

    assert book.history("openai", "gpt-6-luna") == past
    assert book.history("openai", "gpt-6-sol") is None
    assert book.history("openai", "absent") is None


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        pytest.param("gpt-4o", "gpt-4o-2024-08-06", id="newest date, not another model"),
        pytest.param("gpt-4o-2024-05-13", "gpt-4o-2024-05-13", id="the very name"),
        pytest.param("gpt-4o-mini", "gpt-4o-mini", id="the very name before a date"),
        pytest.param("claude-3-5-sonnet-latest", "claude-3-5-sonnet-20241022", id="latest"),
        pytest.param("claude-opus-4", None, id="4-1 is another model"),
        pytest.param("gpt", None, id="the beginning of a name"),
        pytest.param("gpt-4?", None, id="no pattern"),
    ],
)
def test_history_knows_an_alias(asked: str, found: str | None, path: Path) -> None:
    """Requests name an alias, answers the dated model: the history comes from the newest date, and no other model."""
    names = ["gpt-4o-2024-05-13", "gpt-4o-2024-08-06", "gpt-4o-mini", "gpt-4o-mini-2024-07-18"]
    names += ["claude-3-5-sonnet-20241022", "claude-opus-4-1-20250805"]
    with Ledger.open(path) as book:
        book.record(run(), [entry(model=name, requests=1, succeeded=1) for name in names])
        past = book.history("openai", asked)

    assert (past.model if past else None) == found


@given(st.lists(st.integers(0, 2**40), max_size=20))
def test_spent_is_the_exact_sum(costs: list[int]) -> None:
    """What was spent is the sum of all entries, to the nano-dollar."""
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
        ledger.bring_up_to_date(connection, Path("memory"))
        book = Ledger(connection, Path("memory"))
        for number, nano in enumerate(costs):
            book.record(run(f"run-{number}"), [entry(cost_nano=nano)])

        assert book.spent(datetime(2026, 11, 1, tzinfo=UTC)) == sum(costs)


# ── many at once ──────────────────────────────────────────────────────────────────────────────────────

WRITERS = 8
RUNS_EACH = 12


def write_runs(path: Path, writer: int, barrier: Any) -> None:
    """Record some runs, each in a ledger opened anew, as as many cron jobs would."""
    barrier.wait()
    for number in range(RUNS_EACH):
        with Ledger.open(path) as book:
            book.record(run(f"{writer}-{number}"), [entry(cost_nano=1), entry(model="gpt-6-sol", cost_nano=1000)])


def test_eight_processes_lose_nothing(path: Path) -> None:
    """Eight processes that begin at once, on a file that is not there yet, all record all their runs."""
    processes = multiprocessing.get_context("spawn")
    barrier = processes.Barrier(WRITERS)
    writers = [processes.Process(target=write_runs, args=(path, number, barrier)) for number in range(WRITERS)]

    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()

    assert [writer.exitcode for writer in writers] == [0] * WRITERS
    with Ledger.open(path) as book:
        assert {each.run_id for each in book.runs()} == {f"{w}-{n}" for w in range(WRITERS) for n in range(RUNS_EACH)}
        assert book.spent(datetime(2026, 1, 1, tzinfo=UTC)) == WRITERS * RUNS_EACH * 1001
    assert pragma(path, "integrity_check") == "ok"


def die_midway(path: Path) -> None:
    """Be killed while holding the write lock, with changes that are not committed."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("BEGIN IMMEDIATE")
    connection.execute("DELETE FROM runs")
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_writer_that_dies_takes_nothing_along(path: Path) -> None:
    """A transaction that was not committed when its process was killed leaves no trace and no lock."""
    with Ledger.open(path) as book:
        book.record(run("before"), [entry(cost_nano=1)])
    writer = multiprocessing.get_context("spawn").Process(target=die_midway, args=(path,))
    writer.start()
    writer.join()

    with Ledger.open(path) as book:
        book.record(run("after"), [entry(cost_nano=2)])
        assert sorted(book.entries()) == ["after", "before"]


def test_writers_wait_for_each_other(path: Path) -> None:
    """A writer takes the lock before it looks at anything, so it never fails midway, and waits 30 seconds for it."""
    statements: list[str] = []
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.set_trace_callback(statements.append)
        ledger.bring_up_to_date(connection, path)
        Ledger(connection, path).record(run(), [entry()])

    assert [each for each in statements if "BEGIN" in each] == ["BEGIN IMMEDIATE"] * 2
    with Ledger.open(path) as book:
        assert book._connection.execute("PRAGMA busy_timeout").fetchone() == (30_000,)


def test_durability_does_not_rest_on_a_broken_wal(path: Path) -> None:
    """The journal is a rollback journal, even if WAL had been turned on, and every commit is synced in full."""
    with Ledger.open(path) as book:
        assert book._connection.execute("PRAGMA synchronous").fetchone() == (2,)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")

    with Ledger.open(path) as book:
        assert book._connection.execute("PRAGMA journal_mode").fetchone() == ("truncate",)


# ── files ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def _no_mask() -> Iterator[None]:
    """Create files as a process under cron may: with no umask at all."""
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.mark.usefixtures("_no_mask")
def test_only_the_user_can_read_it(tmp_path: Path) -> None:
    """The ledger and what SQLite puts beside it are 0600, directories made for it 0700, whatever the umask."""
    path = tmp_path / "new" / "data" / "ledger.sqlite"

    with Ledger.open(path) as book:
        book.record(run(), [entry()])

    modes = {each.name: stat.S_IMODE(each.stat().st_mode) for each in (tmp_path / "new").rglob("*")}
    assert modes == {"data": 0o700, "ledger.sqlite": 0o600, "ledger.sqlite-journal": 0o600}
    assert stat.S_IMODE(path.parent.parent.stat().st_mode) == 0o700


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        pytest.param(lambda path: path.mkdir(), "not a regular file", id="directory"),
        pytest.param(lambda path: os.mkfifo(path), "not a regular file", id="pipe"),
        pytest.param(lambda path: path.symlink_to(path.parent / "elsewhere"), "symbolic link", id="planted link"),
        pytest.param(lambda path: path.write_bytes(b"custom_id,cost\n" * 100), "is damaged", id="another file"),
    ],
)
def test_what_is_no_ledger_is_refused(path: Path, prepare: Any, message: str) -> None:
    """What stands in the ledger's place and is none is named, and neither followed nor changed."""
    prepare(path)

    with pytest.raises(StorageError, match=message), Ledger.open(path):
        pass

    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_a_place_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    """A directory that cannot be made is a storage error with its reason."""
    (tmp_path / "file").write_text("")

    with pytest.raises(StorageError, match="cannot be made"), Ledger.open(tmp_path / "file" / "x" / "l"):
        pass


def test_somebody_elses_database_is_refused(path: Path) -> None:
    """A database of another program gets no tables of ours."""
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE places (url TEXT)")

    with pytest.raises(StorageError, match="not a ledger of this program"), Ledger.open(path):
        pass


def test_a_damaged_ledger_says_what_to_do(path: Path) -> None:
    """A damaged ledger is reported as damaged, with the way to rebuild it."""
    with Ledger.open(path) as book:
        book.record(run(), [entry()])
    content = bytearray(path.read_bytes())
    content[4096:] = b"\xff" * (len(content) - 4096)
    path.write_bytes(content)

    with pytest.raises(StorageError, match="is damaged") as caught, Ledger.open(path) as book:
        book.runs()

    assert "--rebuild" in (caught.value.hint or "")


# ── versions ──────────────────────────────────────────────────────────────────────────────────────────


def test_a_newer_ledger_is_refused(path: Path) -> None:
    """A ledger of a newer version of the program is refused with the way out, and stays as it is."""
    with Ledger.open(path):
        pass
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 99")
    before = path.read_bytes()

    with pytest.raises(StorageError, match="newer version of this program") as caught, Ledger.open(path):
        pass

    assert "update this program" in (caught.value.hint or "")
    assert path.read_bytes() == before


NEXT = (*MIGRATIONS, ("ALTER TABLE runs ADD COLUMN note TEXT", "UPDATE runs SET note = 'old'"))


def test_migrating_keeps_everything_and_a_copy(path: Path) -> None:
    """An older ledger is brought up to date in place, and the copy beside it is as it was."""
    with Ledger.open(path) as book:
        book.record(run(), [entry(cost_nano=7)])

    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        ledger.bring_up_to_date(connection, path, NEXT)
        assert connection.execute("SELECT run_id, note FROM runs").fetchall() == [("run-1", "old")]

    assert pragma(path, "user_version") == 2
    with Ledger.open(path.with_name("ledger.sqlite.v1")) as copy:
        assert copy.entries() == {"run-1": [entry(cost_nano=7)]}
    assert stat.S_IMODE(path.with_name("ledger.sqlite.v1").stat().st_mode) == 0o600


def test_a_migration_that_fails_changes_nothing(path: Path) -> None:
    """All steps of a migration are one transaction."""
    with Ledger.open(path) as book:
        book.record(run(), [entry(cost_nano=7)])

    with closing(sqlite3.connect(path, isolation_level=None)) as connection, pytest.raises(sqlite3.OperationalError):
        ledger.bring_up_to_date(connection, path, (*NEXT, ("ALTER TABLE absent ADD COLUMN x",)))

    with Ledger.open(path) as book:
        assert book.entries() == {"run-1": [entry(cost_nano=7)]}


@pytest.mark.parametrize(("table", "cls"), [("runs", RunRow), ("entries", Entry)])
def test_tables_mirror_the_values(path: Path, table: str, cls: type[Any]) -> None:
    """Each field of a value is a column, and there is no other but an entry's run."""
    with Ledger.open(path), closing(sqlite3.connect(path)) as connection:
        columns = [row[1] for row in connection.execute(f"PRAGMA table_info({table})")]

    own = [name for name in columns if table == "runs" or name != "run_id"]
    assert sorted(own) == sorted(field.name for field in dataclasses.fields(cls))
