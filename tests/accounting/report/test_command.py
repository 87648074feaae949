"""`pipeline report` as a process."""

from __future__ import annotations

import csv
import io
import os
import stat
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import orjson
import pytest

from pipeline.accounting.ledger import Ledger
from tests.accounting.report.examples import entry, run

ROOT = Path(__file__).parents[3]
NOW = datetime.now(UTC)


@pytest.fixture
def ledger(tmp_path: Path) -> Path:
    """A ledger of a real run today, one of 40 days ago, and a rehearsal."""
    path = tmp_path / "data" / "pipeline" / "ledger.sqlite"
    old = NOW - timedelta(days=40)
    with Ledger.open(path) as book:
        book.record(run("new", results_file="a.jsonl"), [entry(f"{NOW:%Y-%m-%d}", cost_nano=2 * 10**9, requests=3)])
        book.record(run("old"), [entry(f"{old:%Y-%m-%d}", "gpt-6-sol", cost_nano=10**9, requests=5)])
        book.record(run("rehearsal", simulated=True), [entry(f"{NOW:%Y-%m-%d}", cost_nano=9 * 10**9)])
    return path


def call(words: Sequence[object], cwd: Path, **environ: str) -> subprocess.CompletedProcess[bytes]:
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "PYTHONPATH")}
    own = {"XDG_DATA_HOME": str(cwd / "data"), "PIPELINE_CONFIG": str(ROOT / "config.yaml")}
    command = [sys.executable, "-m", "pipeline", *(word if isinstance(word, bytes) else str(word) for word in words)]
    return subprocess.run(command, cwd=cwd, env=kept | own | environ, capture_output=True, timeout=50, check=False)


def call_report(words: Sequence[object], cwd: Path, **environ: str) -> subprocess.CompletedProcess[bytes]:
    return call(["report", *words], cwd, **environ)


@pytest.mark.usefixtures("ledger")
def test_the_default_is_a_table_of_all_days(tmp_path: Path) -> None:
    """Without options: every day of every real run as a table, on stdout only, without colours in a pipe."""
    done = call_report([], tmp_path)

    lines = done.stdout.decode().splitlines()
    assert (done.returncode, done.stderr) == (0, b"")
    assert lines[0].startswith("Costs by day, ")
    assert lines[-1].split()[:2] == ["total", "$3.00"]
    assert b"\x1b" not in done.stdout


@pytest.mark.usefixtures("ledger")
def test_options_reach_the_report(tmp_path: Path) -> None:
    """Grouping, period, form and simulated runs are as asked for."""
    done = call_report(["--by", "model", "--since", "30d", "--format", "json", "--include-simulated"], tmp_path)

    value = orjson.loads(done.stdout)
    assert [(row["key"], row["cost_usd"]) for row in value["rows"]] == [("openai/gpt-6-luna", 11.0)]
    assert value["total"]["previous_cost_usd"] == 1.0
    assert value["simulated_included"] is True


def test_the_nearest_word_names_the_ledger(tmp_path: Path, ledger: Path) -> None:
    """--ledger wins over PIPELINE_LEDGER, that over the configuration, and that over the user's data directory."""
    (tmp_path / "c.yaml").write_text("ledger: by-config.sqlite")
    empty_home = {"XDG_DATA_HOME": str(tmp_path / "none")}

    assert b"by-config.sqlite" in call_report(["-c", "c.yaml"], tmp_path, **empty_home).stderr
    assert b"by-variable.sqlite" in call_report(["-c", "c.yaml"], tmp_path, PIPELINE_LEDGER="by-variable.sqlite").stderr
    assert call_report(["--ledger", ledger], tmp_path, PIPELINE_LEDGER="by-variable.sqlite").returncode == 0
    assert call_report([], tmp_path).returncode == 0


@pytest.mark.usefixtures("ledger")
@pytest.mark.parametrize(
    ("form", "mode"),
    [("table", 0o600), ("json", 0o600), ("csv", 0o600), ("html", 0o600), ("prometheus", 0o644)],
)
def test_a_file_is_there_whole_or_not_at_all(tmp_path: Path, form: str, mode: int) -> None:
    """-o writes what stdout would get, readable by the user only, but metrics by all; nothing else is left behind."""
    before = set(tmp_path.rglob("*"))

    done = call_report(["--format", form, "-o", "out"], tmp_path)

    written = (tmp_path / "out").read_bytes()
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert _without_time(written) == _without_time(call_report(["--format", form], tmp_path).stdout)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == mode
    assert set(tmp_path.rglob("*")) - before == {tmp_path / "out"}


def _without_time(content: bytes) -> bytes:
    return b"\n".join(line for line in content.splitlines() if b"generated_at" not in line and b"Made 20" not in line)


@pytest.mark.usefixtures("ledger")
def test_csv_comes_as_written(tmp_path: Path) -> None:
    """The CSV on stdout is what a reader of CSV expects."""
    rows = list(csv.DictReader(io.StringIO(call_report(["--by", "run", "--format", "csv"], tmp_path).stdout.decode())))

    assert [(row["key"], row["cost_usd"]) for row in rows] == [("new", "2"), ("old", "1")]


@pytest.mark.parametrize("form", ["table", "json", "csv", "html", "prometheus"])
def test_tags_that_are_not_utf8_can_be_told(tmp_path: Path, ledger: Path, form: str) -> None:
    """A tag with bytes that are no text, as a shell may give it, breaks no form and can be asked for."""
    with Ledger.open(ledger) as book:
        book.record(run("new", tags={"t\udcff": "x\udcfe"}), [entry(requests=1)])

    done = call_report([b"--by", b"tag:t\xff", b"--format", form], tmp_path)

    assert (done.returncode, done.stderr) == (0, b"")
    assert b"x\\udcfe" in done.stdout.replace(b"\\\\", b"\\") or form == "prometheus"


@pytest.mark.usefixtures("ledger")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        pytest.param(["--by", "colour"], "--by 'colour' is not one of day, week", id="grouping"),
        pytest.param(["--since", "soon"], "--since 'soon'", id="period"),
        pytest.param(["--format", "prometheus", "--since", "7d"], "would make counters fall", id="metrics of a period"),
        pytest.param(["--ledger", "absent"], "no ledger at 'absent'", id="no ledger"),
        pytest.param(["a.jsonl"], "together with --rebuild", id="files without a purpose"),
        pytest.param(["--rebuild"], "give results files together with --rebuild", id="a purpose without files"),
        pytest.param(["-o", "data/pipeline/ledger.sqlite"], "not a file that a report may replace", id="the ledger"),
        pytest.param(["-o", "/dev/null"], "not a file that a report may replace", id="a device"),
        pytest.param(["-o", "data"], "not a file that a report may replace", id="a directory"),
    ],
)
def test_usage_errors_are_one_message_and_exit_2(tmp_path: Path, words: list[str], message: str) -> None:
    """Wrong usage: exit 2, the thing is named, nothing is written."""
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    done = call_report(words, tmp_path)

    assert (done.returncode, done.stdout) == (2, b"")
    assert message in done.stderr.decode()
    assert b"Traceback" not in done.stderr
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_damaged_ledger_is_a_storage_error(tmp_path: Path, ledger: Path) -> None:
    """A ledger that cannot be read: exit 5, with what to do."""
    ledger.write_bytes(b"no database " * 1_000)

    done = call_report([], tmp_path)

    assert done.returncode == 5
    assert b"pipeline report --rebuild" in done.stderr


def test_rebuilding_makes_the_ledger_anew(tmp_path: Path) -> None:
    """Results of a real run are enough: the ledger is made, the words go to stderr, damage is exit 6."""
    answers = tmp_path / "answers.jsonl"
    sample = ROOT / "samples" / "conversations.jsonl"
    call(["run", sample, "-o", answers, "--simulate", "-q"], tmp_path)
    lines = len(answers.read_bytes().splitlines())

    done = call_report(["--rebuild", answers], tmp_path)
    assert (done.returncode, done.stdout) == (0, b"")
    assert f"1 runs with {lines} results recorded in" in done.stderr.decode()

    total = orjson.loads(call_report(["--format", "json", "--include-simulated"], tmp_path).stdout)["total"]
    summary = orjson.loads(answers.with_suffix(".usage.json").read_bytes())
    assert (total["requests"], total["input_tokens"]) == (lines, summary["tokens"]["input"])

    with answers.open("ab") as file:
        file.write(b"{torn")
    assert call_report(["--rebuild", answers], tmp_path).returncode == 6
