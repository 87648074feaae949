"""Every fault of the table, with both protocols, against the real program over real sockets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest

from pipeline.runner.run import Progress
from tests.torture import chaos, check, histories, trial
from tests.torture.chaos import Plan
from tests.torture.faults import DOORS, FAULTS, PROTOCOLS, End, Fault
from tests.torture.trial import MAX_ATTEMPTS, SHORT_TIMEOUT, Record, Trial

LATENESS = 5.0  # of a machine with other things to do; a call that no deadline ends lasts `LONGEST_WAIT`
PASSABLE = (End.ANSWERED, End.RETRIED, End.EITHER, End.LINE_ERROR)
CASES = trial.matrix(*PASSABLE)
LATE = [case for case in CASES if case[0].outlasts]
QUICK = [case for case in CASES if not case[0].outlasts]
POISONS = trial.matrix(End.RETRIED)
STOPS = trial.matrix(End.RUN_STOPS)
MODEL_STOPS = trial.matrix(End.MODEL_STOPS)
pytestmark = pytest.mark.timeout(trial.HANG_SECONDS + 20)


def attempts(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the failed calls that a result line tells of."""
    found: list[dict[str, Any]] = (result.get("failed_attempts") or []) + (result.get("error") or {}).get(
        "attempts", []
    )
    return found


def run(folder: Path, records: list[Record], *, echo: bool = False, **sending: Any) -> Trial:
    with chaos.serving(folder / "journal.jsonl", Plan(script=trial.script(records), echo=echo)) as server:
        return trial.run(folder, server.journal, records, trial.settings(server, records, **sending))


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Trial:
    """One run over all faults that end by themselves."""
    return run(tmp_path_factory.mktemp("quick"), [record for case in QUICK for record in trial.records(*case)])


@pytest.fixture(scope="module")
def late(tmp_path_factory: pytest.TempPathFactory) -> Trial:
    """One run over all faults that only a deadline ends."""
    records = [record for case in LATE for record in trial.records(*case)]
    return run(tmp_path_factory.mktemp("late"), records, timeout=SHORT_TIMEOUT)


# ── the matrix ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_table_is_wide() -> None:
    """There are at least forty kinds of faults."""
    assert len(FAULTS) + len(DOORS) >= 40


@pytest.mark.parametrize(("fault", "protocol"), QUICK, ids=trial.ids(QUICK))
def test_a_fault_ends_as_its_row_says(quick: Trial, fault: Fault, protocol: str) -> None:
    """Each record ends as the table says, after as many calls, and each failed call is told as an error of its kind."""
    for record in trial.records(fault, protocol):
        result = quick.results[record.id]
        met = min(len(record.faults), MAX_ATTEMPTS)
        if fault.end is End.EITHER:
            assert result["success"] is True  # a neighbour's dead connection may cost it another call
        elif fault.end is End.ANSWERED:
            assert (result["success"], result["attempts"]) == (True, 1)
        elif fault.end is End.RETRIED:
            assert (result["success"], result["attempts"]) == (met < MAX_ATTEMPTS, min(1 + met, MAX_ATTEMPTS))
        else:
            assert (result["success"], result["attempts"]) == (met == 0, 1)
        assert {attempt["type"] for attempt in attempts(result)} <= fault.types


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "protocol"), LATE, ids=trial.ids(LATE))
def test_a_deadline_ends_what_never_ends(late: Trial, fault: Fault, protocol: str) -> None:
    """A call that is held open ends as a timeout that may be billed, and its record is answered once that is over."""
    for record in trial.records(fault, protocol):
        result = late.results[record.id]
        assert result["success"] == (len(record.faults) < MAX_ATTEMPTS)
        assert len(attempts(result)) >= min(len(record.faults), MAX_ATTEMPTS)
        assert {(attempt["type"], attempt["may_be_billed"]) for attempt in attempts(result)} <= {("timeout", True)}


@pytest.mark.slow
def test_no_call_outlives_its_deadline(late: Trial) -> None:
    """By the server's clock, no call lasts longer than the timeout."""
    lasted = [call["ended_at"] - call["at"] for call in late.calls]

    assert max(lasted) < SHORT_TIMEOUT + LATENESS


@pytest.mark.parametrize("name", ["quick", pytest.param("late", marks=pytest.mark.slow)])
def test_the_books_agree(name: str, request: pytest.FixtureRequest) -> None:
    """Lines, texts, tokens and calls are what the server's journal says: nothing lost, swapped, invented or hidden."""
    done: Trial = request.getfixturevalue(name)

    assert done.verdict.faults == {}
    assert done.summary is not None
    assert (done.summary.exit_code, done.summary.status) == (1, "completed")


def test_what_may_be_billed_is_counted(quick: Trial) -> None:
    """Every call that the provider did the work for without an answer reaching us is in the totals as unknown."""
    assert quick.summary is not None
    assert quick.summary.attempts.total >= quick.verdict.calls
    lines = quick.results.values()
    attempts = [
        each for line in lines for each in line.get("failed_attempts") or line.get("error", {}).get("attempts", ())
    ]
    with_usage = sum("usage" in attempt for attempt in attempts)
    assert quick.summary.attempts.unknown + with_usage >= quick.verdict.repeated_paid_calls


@pytest.mark.slow
def test_a_poison_costs_no_more_than_its_attempts(quick: Trial, late: Trial) -> None:
    """A record that fails for ever ends as a line error after `max_attempts` calls, by the server's count too."""
    poisons = [r for done in (quick, late) for r in done.records if len(r.faults) > MAX_ATTEMPTS]

    assert len(poisons) == sum(fault.may_poison for fault, _ in POISONS)
    for record in poisons:
        done = late if FAULTS[record.faults[0]].outlasts else quick
        assert done.results[record.id]["success"] is False
        assert 1 <= done.calls_for(record) <= MAX_ATTEMPTS


@pytest.mark.slow
def test_every_fault_was_met(quick: Trial, late: Trial) -> None:
    """The server's journal shows every fault of the table with both protocols: none is in it for show."""
    met = {(call["fault"], call["protocol"]) for done in (quick, late) for call in done.calls if call["fault"]}

    assert met == {(fault.name, protocol) for fault, protocol in CASES}


# ── connections without a request ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("door", DOORS)
def test_connections_that_are_slammed_are_tried_again(tmp_path: Path, door: str, protocol: str) -> None:
    """A server that ends connections before it reads anything costs no record; once it stops, all are answered."""
    records = [Record(id=f"{door}.{n}", lane="slammed", protocol=protocol) for n in range(5)]
    with chaos.serving(tmp_path / "journal.jsonl", Plan()) as server:
        providers = {"slammed": trial.endpoint(server.open(door=door, times=3), protocol)}
        settings = {"providers": providers, "sending": trial.SENDING}
        done = trial.run(tmp_path, server.journal, records, settings)

    slammed = [entry for entry in check.read_journal(done.journal) if entry["event"] == "connection"]
    assert [entry["fault"] for entry in slammed] == [door] * 3
    assert done.verdict.faults == {}
    assert all(result["success"] for result in done.results.values())


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_server_that_is_not_there_is_waited_for(tmp_path: Path, protocol: str) -> None:
    """Refused connections use up no attempts and count as not sent; when the server comes, all are answered."""
    records = [Record(id=f"refused.{n}", lane="refused", protocol=protocol) for n in range(5)]
    sock = chaos.bound()
    with chaos.serving(tmp_path / "journal.jsonl", Plan()) as server:
        url = f"http://{chaos.HOST}:{sock.getsockname()[1]}"
        sending = {**trial.SENDING, "max_attempts": 1}
        settings = {"providers": {"refused": trial.endpoint(url, protocol)}, "sending": sending}

        async def come_late(progress: Callable[[], Progress]) -> None:
            while progress().sender.failed < 3:  # noqa: ASYNC110 (a refusal leaves no other trace)
                await anyio.sleep(0.01)
            await anyio.to_thread.run_sync(server.open, sock)

        done = trial.run(tmp_path, server.journal, records, settings, watch=come_late)

    assert done.verdict.faults == {}
    failed = [attempt for result in done.results.values() for attempt in attempts(result)]
    assert {(attempt["type"], attempt["may_be_billed"]) for attempt in failed} == {("connection_error", False)}
    assert len(failed) >= 3
    assert all(result["success"] for result in done.results.values())


# ── what stops ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("fault", "protocol"), STOPS, ids=trial.ids(STOPS))
def test_what_no_retry_mends_stops_the_run(tmp_path: Path, fault: Fault, protocol: str) -> None:
    """A wrong key, no credit, or a redirect costs two calls, fails no line, and the same command finishes later."""
    records = [Record(id=f"{n}", lane="stops", protocol=protocol, faults=[fault.name]) for n in range(20)]

    with chaos.serving(tmp_path / "journal.jsonl", Plan(script=trial.script(records))) as server:
        settings = trial.settings(server, records)
        stopped = trial.run(tmp_path, server.journal, records, settings)

    assert stopped.summary is not None
    assert (stopped.summary.exit_code, stopped.summary.pending, stopped.results) == (3, 20, {})
    assert 1 <= len(stopped.calls) <= 2

    mended = run(tmp_path, [Record(id=record.id, lane="stops", protocol=protocol) for record in records])
    assert [result["success"] for result in mended.results.values()] == [True] * 20
    assert mended.verdict.faults == {}


@pytest.mark.parametrize(("fault", "protocol"), MODEL_STOPS, ids=trial.ids(MODEL_STOPS))
def test_one_model_stops_alone(tmp_path: Path, fault: Fault, protocol: str) -> None:
    """A model that is unknown, or that may not be called for an hour, costs three calls at most; another goes on."""
    bad = [Record(id=f"bad.{n}", lane="one", protocol=protocol, faults=[fault.name] * 9) for n in range(20)]
    good = [Record(id=f"good.{n}", lane="one", protocol=protocol, model="other") for n in range(20)]
    done = run(tmp_path, [record for pair in zip(bad, good, strict=True) for record in pair])

    assert done.summary is not None
    assert done.summary.exit_code == (75 if fault.group == "C7" else 3)
    assert done.results.keys() == {record.id for record in good}
    assert done.verdict.faults == {}
    assert 1 <= sum(done.calls_for(record) for record in bad) <= 3


# ── by chance ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("seed", [1, 2])
def test_a_history_drawn_by_lot_ends_well(tmp_path: Path, seed: int) -> None:
    """Whatever meets whom, every record ends once, and as the server's books say."""
    done = histories.run(tmp_path, records=300, lanes=20, seed=seed, rate=0.2)

    assert done.verdict.faults == {}
    assert done.verdict.answered == 300
    assert len({call["fault"] for call in done.calls}) > 20
