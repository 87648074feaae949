"""`pipeline batches`: what past runs left with the providers is listed, asked after, cancelled, given up."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import orjson
import pytest

from pipeline import providers
from pipeline.accounting.ledger import Ledger, RunRow
from pipeline.core import config, http
from pipeline.core import files as disk
from pipeline.core.config import Config
from pipeline.core.errors import ProviderError, TryLaterError, UsageError
from pipeline.core.types import Protocol, Request
from pipeline.dispatch.batch import manage
from pipeline.dispatch.batch.client import batch_client
from pipeline.dispatch.batch.manage import Listed
from pipeline.dispatch.batch.store import BatchItem, BatchRecord, BatchStore, Step, read_records
from pipeline.simulator import Options, Server, serving

ROOT = Path(__file__).parents[3]
ANTHROPIC, OPENAI = Protocol.ANTHROPIC, Protocol.OPENAI
both = pytest.mark.parametrize("protocol", [ANTHROPIC, OPENAI])
MODELS = {ANTHROPIC: "claude-haiku-5-5", OPENAI: "gpt-6-luna"}
LIMIT = {ANTHROPIC: "max_tokens", OPENAI: "max_completion_tokens"}
TIME = "2026-11-22T02:40:{:02}Z"


async def _begin() -> None:
    """Note nothing."""


def _say_nothing(message: str) -> None:
    """Say nothing."""


@dataclass
class Desk:
    """Results files with chunks beside them, and the ledger that knows them; batches are made at a simulator."""

    directory: Path
    server: Server
    runs: list[str] = field(default_factory=list)

    @property
    def ledger(self) -> Path:
        return self.directory / "ledger.sqlite"

    @property
    def settings(self) -> Config:
        return config.simulated(Config(), self.server.url)

    def run(self, name: str, *, is_recorded: bool = True) -> Path:
        """Return the results file of a run, known to the ledger or not."""
        path = self.directory / name
        self.runs.append(f"run-{len(self.runs)}")
        if is_recorded:
            with Ledger.open(self.ledger) as book:
                book.record(
                    RunRow(run_id=self.runs[-1], started_at=TIME.format(0), status="completed", results_file=str(path)),
                    [],
                )
        return path

    def record(self, results_file: Path, protocol: Protocol = OPENAI, *, at: int = 0, **changes: Any) -> BatchRecord:
        """Write a chunk of two requests beside a results file."""
        codec, store = providers.batch_codec(protocol), BatchStore(results_file)
        store.open()
        open_batch = store.begin()
        for name in ("r1", "r2"):
            fields = {"model": MODELS[protocol], LIMIT[protocol]: 9, "messages": [{"role": "user", "content": name}]}
            request = Request(
                custom_id=name,
                digest=name,
                source="in.jsonl",
                line=1,
                provider=protocol.value,
                model=MODELS[protocol],
                body=orjson.dumps(fields),
            )
            named = BatchItem(request=request, name=codec.name(open_batch.local_id, name, "0" * 32))
            size = len(codec.entry(named.name, request.body)) + (len(codec.separator) if open_batch.requests else 0)
            open_batch.add_entry(named, size)
        model = MODELS[protocol] if codec.is_for_one_model else ""
        new_record = BatchRecord(run="run-0", provider=protocol.value, model=model, at=TIME.format(at))
        record = replace(open_batch.finish(open_batch.take(), new_record), **changes)
        store.save(record)
        store.release()
        return record

    async def made(self, results_file: Path, protocol: Protocol) -> BatchRecord:
        """Write a chunk and make its batch."""
        record, store = self.record(results_file, protocol), BatchStore(results_file)
        store.open()
        async with http.Client(self.settings.sending) as http_client:
            client = batch_client(self.settings, http_client, _say_nothing, protocol.value)
            record = replace(record, file_id=await client.upload(store, record))
            batch = await client.create(store, record, _begin)
        record = replace(record, step=Step.CREATED, batch_id=batch.id, status=batch.status, created_at=batch.created_at)
        store.save(record)
        store.release()
        return record

    def listed(self, *files: Path) -> list[Listed]:
        return manage.listed(self.ledger, self.settings, [str(file) for file in files])

    def state(self) -> dict[str, bytes]:
        """Return all files but the ledger."""
        return {
            str(path.relative_to(self.directory)): path.read_bytes()
            for path in self.directory.rglob("*")
            if path.is_file() and "ledger" not in path.name
        }


@pytest.fixture
def server() -> Iterator[Server]:
    with serving(Options(batch_seconds=600.0, batch_cancel_seconds=600.0)) as running:
        yield running


@pytest.fixture
def desk(tmp_path: Path, server: Server) -> Desk:
    return Desk(tmp_path, server)


# ── lists ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_batches_of_all_runs_are_listed(desk: Desk) -> None:
    """Every chunk beside every results file that the ledger knows, the oldest first, with what it belongs to."""
    first, second, other = desk.run("a.jsonl"), desk.run("b.jsonl"), desk.run("c.jsonl", is_recorded=False)
    desk.record(first, at=3, batch_id="batch_3")
    desk.record(first, at=1, batch_id="batch_1", step=Step.COLLECTED, status="completed", cost_nano=5)
    desk.record(second, ANTHROPIC, at=2)
    desk.record(other, at=0)

    found = desk.listed()

    assert [each.record.at for each in found] == [TIME.format(second) for second in (1, 2, 3)]
    told = [each.as_dict() for each in found]
    assert [(each["id"], each["provider"], each["model"]) for each in told] == [
        ("batch_1", "openai", "gpt-6-luna"),
        (None, "anthropic", None),
        ("batch_3", "openai", "gpt-6-luna"),
    ]
    assert [each["results_file"] for each in told] == [str(first), str(second), str(first)]


def test_batches_of_some_results_are_listed(desk: Desk) -> None:
    """Results that the ledger does not know, or one of many, are named; under a link, too."""
    known, unknown = desk.run("a.jsonl"), desk.run("b.jsonl", is_recorded=False)
    desk.record(known, batch_id="batch_1")
    desk.record(unknown, batch_id="batch_2")
    unknown.write_bytes(b"")
    (desk.directory / "link").symlink_to(unknown)

    assert [each.record.batch_id for each in desk.listed(unknown)] == ["batch_2"]
    assert [each.record.batch_id for each in desk.listed(desk.directory / "link")] == ["batch_2"]
    assert desk.listed(desk.directory / "absent.jsonl") == []


def test_what_is_not_listed(desk: Desk) -> None:
    """Rehearsals are no batches, a results file of two runs is looked at once, and no ledger means no runs."""
    assert desk.listed() == []
    desk.run("a.jsonl")
    path = desk.run("a.jsonl")
    with Ledger.open(desk.ledger) as book:
        book.record(RunRow(run_id="stream", started_at=TIME.format(0), status="completed"), [])
    desk.record(path, batch_id="batch_1")
    desk.record(path, batch_id="batch_2", simulated=True)

    assert [each.record.batch_id for each in desk.listed()] == ["batch_1"]


def test_batches_are_chosen_by_their_ids(desk: Desk) -> None:
    """By the provider's id or, of what has none yet, by ours; one that no run recorded is told with the way out."""
    path = desk.run("a.jsonl")
    desk.record(path, batch_id="batch_1")
    waiting = desk.record(path, at=1)
    made = desk.record(path, at=2, batch_id="batch_2")
    found = desk.listed()

    chosen = manage.chosen(found, ["batch_2", waiting.local_id])

    assert [each.record.batch_id for each in chosen] == ["batch_2", None]
    for unknown in ("batch_9", made.local_id):
        with pytest.raises(UsageError, match=unknown) as caught:
            manage.chosen(found, ["batch_1", unknown])
        assert "pipeline batches" in str(caught.value.hint)


# ── status ────────────────────────────────────────────────────────────────────────────────────────────────────────


@both
async def test_providers_are_asked(desk: Desk, protocol: Protocol) -> None:
    """The provider's word is told, and nothing on the disk is changed: it is for the next run to find."""
    path = desk.run("a.jsonl")
    made = await desk.made(path, protocol)
    desk.record(path, protocol, at=1)
    before = desk.state()

    told = await manage.status(desk.settings, desk.listed())

    assert [each.record.batch_id for each in told] == [made.batch_id, None]
    assert told[0].record.status in ("validating", "in_progress")
    assert told[1].record.step is Step.WRITTEN
    assert desk.state() == before


async def test_a_batch_that_has_ended_is_told_with_its_counts(tmp_path: Path) -> None:
    """Counts of what was answered and what failed are the provider's."""
    with serving(Options(batch_seconds=0.0)) as server:
        desk = Desk(tmp_path, server)
        await desk.made(desk.run("a.jsonl"), ANTHROPIC)

        (told,) = await manage.status(desk.settings, desk.listed())

    assert (told.as_dict()["status"], told.as_dict()["succeeded"], told.as_dict()["failed"]) == ("ended", 2, 0)
    assert told.as_dict()["collected"] is False


@both
async def test_a_batch_that_its_provider_does_not_know_is_an_error(desk: Desk, protocol: Protocol) -> None:
    """A batch of another key, or one that is gone, is told as such, not as underway."""
    desk.record(desk.run("a.jsonl"), protocol, batch_id="batch_9", step=Step.CREATED)

    with pytest.raises(ProviderError) as caught:
        await manage.status(desk.settings, desk.listed())
    assert caught.value.status == 404


@pytest.mark.parametrize(
    ("provider", "message"), [("gone", "not in the settings"), ("openai", "OPENAI_API_KEY")], ids=["gone", "no key"]
)
async def test_a_provider_that_cannot_be_asked(desk: Desk, provider: str, message: str) -> None:
    """A provider that is not configured any more, or has no key, is the user's to put right."""
    desk.record(desk.run("a.jsonl"), batch_id="batch_1", step=Step.CREATED, provider=provider)

    for ask in (manage.status, manage.cancel):
        with pytest.raises(UsageError, match=message):
            await ask(Config(), desk.listed())


# ── cancel ────────────────────────────────────────────────────────────────────────────────────────────────────────


@both
async def test_batches_are_cancelled(desk: Desk, protocol: Protocol) -> None:
    """The provider is told; what the batch answered stays for the next run, so nothing on the disk is changed."""
    made = await desk.made(desk.run("a.jsonl"), protocol)
    before = desk.state()

    (told,) = await manage.cancel(desk.settings, desk.listed())

    assert told.record.status in ("canceling", "cancelling")
    assert (told.record.batch_id, told.record.is_open) == (made.batch_id, True)
    assert desk.state() == before
    assert desk.server.statistics()["batches"]["calls"]["cancel"] == 1
    (asked,) = await manage.status(desk.settings, desk.listed())
    assert asked.record.status == told.record.status


@both
async def test_what_the_provider_does_not_know_is_not_given_up_unasked(desk: Desk, protocol: Protocol) -> None:
    """It may be the key that is another's: that is told, and all stays as it was."""
    desk.record(desk.run("a.jsonl"), protocol, batch_id="batch_9", step=Step.CREATED)
    before = desk.state()

    with pytest.raises(ProviderError) as caught:
        await manage.cancel(desk.settings, desk.listed())

    assert caught.value.status == 404
    assert desk.state() == before


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"step": Step.CREATING, "creating_at": TIME.format(1)}, id="its making is not confirmed"),
        pytest.param({"step": Step.CREATED, "batch_id": "batch_1", "is_confirmed": False}, id="it may be another's"),
    ],
)
async def test_what_is_uncertain_is_not_cancelled(desk: Desk, changes: dict[str, Any]) -> None:
    """No batch is cancelled that may not be ours, and none forgotten that may be there: the next run finds out."""
    record = desk.record(desk.run("a.jsonl"), ANTHROPIC, **changes)
    before = desk.state()

    with pytest.raises(UsageError, match=record.name) as caught:
        await manage.cancel(desk.settings, desk.listed())

    assert "--forget" in str(caught.value.hint)
    assert desk.state() == before
    assert desk.server.statistics()["batches"]["calls"].get("cancel", 0) == 0


async def test_a_chunk_without_a_batch_is_given_up(desk: Desk) -> None:
    """Nobody needs to be asked: there is no batch."""
    waiting = desk.record(desk.run("a.jsonl"))

    (told,) = await manage.cancel(desk.settings, manage.chosen(desk.listed(), [waiting.local_id]))

    assert told.record.step is Step.DROPPED
    assert [each.record.step for each in desk.listed()] == []
    (kept,) = read_records(desk.directory / "a.batches")
    assert (kept.local_id, kept.step) == (waiting.local_id, Step.DROPPED)
    assert desk.server.statistics()["batches"]["calls"].get("cancel", 0) == 0


async def test_what_a_run_is_at_is_not_given_up(desk: Desk) -> None:
    """Who holds the results may be making the batch this moment."""
    path = desk.run("a.jsonl")
    desk.record(path)
    fd = disk.open_locked(path)
    before = desk.state()
    try:
        with pytest.raises(TryLaterError, match="another run"):
            await manage.cancel(desk.settings, desk.listed())
        with pytest.raises(TryLaterError, match="another run"):
            manage.give_up(desk.listed()[0])
    finally:
        disk.close(fd)

    assert desk.state() == before


async def test_a_batch_that_was_made_meanwhile_is_not_given_up(desk: Desk) -> None:
    """Listed, then a run makes the batch and leaves, then cancelled by its nonce: the batch is not forgotten."""
    path = desk.run("a.jsonl")
    waiting = desk.record(path, step=Step.UPLOADED)
    found = desk.listed()
    _note(path, replace(waiting, step=Step.CREATED, batch_id="batch_1"))

    with pytest.raises(UsageError, match="a run is working on"):
        await manage.cancel(desk.settings, found)

    (now,) = desk.listed()
    assert (now.record.batch_id, now.record.step) == ("batch_1", Step.CREATED)


def _note(results_file: Path, record: BatchRecord) -> None:
    """Note a step of a chunk, as a run does."""
    store = BatchStore(results_file)
    store.open()
    store.save(record)
    store.release()


# ── give up ───────────────────────────────────────────────────────────────────────────────────────────────────────


@both
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"batch_id": "batch_9", "step": Step.CREATED}, id="made"),
        pytest.param({"batch_id": "batch_9", "step": Step.CREATED, "is_confirmed": False}, id="uncertain"),
        pytest.param({"step": Step.CREATING, "creating_at": TIME.format(1)}, id="being made"),
        pytest.param({"step": Step.UPLOADED}, id="uploaded"),
    ],
)
async def test_what_is_to_be_forgotten_is_given_up(desk: Desk, protocol: Protocol, changes: dict[str, Any]) -> None:
    """Nobody is asked: the next run sends its requests anew; other batches stay."""
    path = desk.run("a.jsonl")
    gone = desk.record(path, protocol, **changes)
    other = desk.record(path, protocol, at=1, batch_id="batch_8", step=Step.CREATED)

    told = manage.give_up(manage.chosen(desk.listed(), [gone.name])[0])

    assert (told.record.local_id, told.record.step, told.record.is_open) == (gone.local_id, Step.DROPPED, False)
    assert {each.local_id: each.step for each in read_records(desk.directory / "a.batches")} == {
        gone.local_id: Step.DROPPED,
        other.local_id: Step.CREATED,
    }
    names = {Path(name).name for name in desk.state()}
    assert f"{gone.local_id}.jsonl" not in names
    assert f"{other.local_id}.jsonl" in names
    assert not any(desk.server.statistics()["batches"]["calls"].values())


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"step": Step.CREATING}, id="looked for again"),
        pytest.param({"batch_id": "batch_2"}, id="another batch"),
    ],
)
def test_what_a_run_has_gone_on_with_is_not_given_up(desk: Desk, changes: dict[str, Any]) -> None:
    """What is given up is what was listed: a chunk that is elsewhere now stays as it is."""
    path = desk.run("a.jsonl")
    made = desk.record(path, step=Step.CREATED, batch_id="batch_1")
    (found,) = desk.listed()
    now = replace(made, **changes)
    _note(path, now)

    with pytest.raises(UsageError, match="a run is working on"):
        manage.give_up(found)

    assert read_records(desk.directory / "a.batches") == [now]


def test_what_is_over_cannot_be_given_up(desk: Desk) -> None:
    """A batch whose results are in is not told to be given up."""
    desk.record(desk.run("a.jsonl"), batch_id="batch_1", step=Step.COLLECTED)

    with pytest.raises(UsageError, match="collected already"):
        manage.give_up(desk.listed()[0])


@pytest.mark.parametrize("step", [Step.COLLECTED, Step.DROPPED])
async def test_what_is_over_cannot_be_cancelled(desk: Desk, step: Step) -> None:
    """A batch whose results are in is told to be over, and nobody is asked."""
    desk.record(desk.run("a.jsonl"), batch_id="batch_1", step=step)

    with pytest.raises(UsageError, match=f"batch_1 is {step.value} already"):
        await manage.cancel(desk.settings, desk.listed())
    assert desk.server.statistics()["batches"]["calls"].get("cancel", 0) == 0


async def test_a_refusal_gives_nothing_up(desk: Desk) -> None:
    """Only a batch that is not there is given up; any other error leaves all as it was."""
    desk.record(desk.run("a.jsonl"), batch_id="batch_1", step=Step.CREATED)
    before = desk.state()
    with serving(Options(keys=frozenset({"another"}))) as strict, pytest.raises(ProviderError) as caught:
        await manage.cancel(config.simulated(Config(), strict.url), desk.listed())

    assert caught.value.status == 401
    assert desk.state() == before


# ── the command ───────────────────────────────────────────────────────────────────────────────────────────────────


def call(desk: Desk, *words: str, environ: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[bytes]:
    """Run `pipeline batches` with the simulator as both providers."""
    own = {
        "PIPELINE_CONFIG": str(ROOT / "config.yaml"),
        "PIPELINE_LEDGER": str(desk.ledger),
        "PYTHONPATH": str(ROOT),
        "ANTHROPIC_BASE_URL": desk.server.url,
        "OPENAI_BASE_URL": f"{desk.server.url}/v1",
        "ANTHROPIC_API_KEY": "simulated",
        "OPENAI_API_KEY": "simulated",
        "PATH": os.environ["PATH"],
    }
    return subprocess.run(
        [sys.executable, "-m", "pipeline", "batches", *words],
        cwd=desk.directory,
        env=own | dict(environ or {}),
        capture_output=True,
        timeout=50,
        check=False,
    )


def objects(done: subprocess.CompletedProcess[bytes]) -> list[dict[str, Any]]:
    return [orjson.loads(line) for line in done.stdout.splitlines()]


def test_the_list_as_a_table_and_as_json(desk: Desk) -> None:
    """The table is for people, done batches first; `--json` is one object a batch, and neither needs a key."""
    path = desk.run("a.jsonl")
    desk.record(path, batch_id="batch_1", step=Step.CREATED, status="in_progress")
    desk.record(
        path,
        at=1,
        batch_id="batch_2\x1b[2J",
        step=Step.COLLECTED,
        status="completed",
        succeeded=1_000,
        failed=1,
        cost_nano=1_500_000_000,
    )
    nothing = {"OPENAI_API_KEY": ""}

    table = call(desk, environ=nothing)
    same = call(desk, "list", environ=nothing)
    told = call(desk, "list", "--json", environ=nothing)

    assert (table.returncode, same.returncode, told.returncode) == (0, 0, 0)
    assert (table.stderr, told.stderr) == (b"", b"")
    assert table.stdout == same.stdout
    lines = table.stdout.decode().splitlines()
    assert lines[0].split()[:4] == ["batch", "model", "status", "created"]
    assert "$1.50" in table.stdout.decode()
    assert "1,000" in table.stdout.decode()
    assert table.stdout.index(b"batch_2") < table.stdout.index(b"batch_1")
    assert b"\x1b" not in table.stdout
    assert [(each["id"], each["status"], each["cost"]) for each in objects(told)] == [
        ("batch_1", "in_progress", None),
        ("batch_2\x1b[2J", "completed", 1.5),
    ]


def test_no_batches(desk: Desk) -> None:
    """That there are none is told on stderr; as JSON it is nothing."""
    plain, as_json = call(desk), call(desk, "list", "--json")

    assert (plain.returncode, plain.stdout, as_json.returncode, as_json.stdout) == (0, b"", 0, b"")
    assert b"no recorded run has batches" in plain.stderr


def test_the_list_of_some_results(desk: Desk) -> None:
    """Named results need not be known to the ledger."""
    path = desk.run("b.jsonl", is_recorded=False)
    desk.record(path, batch_id="batch_2")

    done = call(desk, "list", str(path), "--json")

    assert [(each["id"], each["results_file"]) for each in objects(done)] == [("batch_2", str(path))]


@both
async def test_a_batch_is_asked_after_and_cancelled(desk: Desk, protocol: Protocol) -> None:
    """The commands as a user gives them, with the ledger named."""
    made = await desk.made(desk.run("a.jsonl"), protocol)
    assert made.batch_id is not None

    asked = call(desk, "status", made.batch_id, "--json", "--ledger", str(desk.ledger))
    cancelled = call(desk, "cancel", made.batch_id)
    again = call(desk, "status", made.batch_id, "--json")

    assert (asked.returncode, cancelled.returncode, again.returncode) == (0, 0, 0), cancelled.stderr
    assert [each["id"] for each in objects(asked)] == [made.batch_id]
    assert b"cancel" in cancelled.stdout
    assert objects(again)[0]["status"] in ("canceling", "cancelling")


@both
async def test_a_batch_is_forgotten_by_the_command(desk: Desk, protocol: Protocol) -> None:
    """`cancel --forget` needs no key and asks nobody; the next run does not know the batch any more."""
    made = await desk.made(desk.run("a.jsonl"), protocol)
    assert made.batch_id is not None
    calls = dict(desk.server.statistics()["batches"]["calls"])

    done = call(desk, "cancel", "--forget", made.batch_id, environ={"OPENAI_API_KEY": "", "ANTHROPIC_API_KEY": ""})

    assert done.returncode == 0, done.stderr
    (kept,) = read_records(desk.directory / "a.batches")
    assert (kept.batch_id, kept.step) == (made.batch_id, Step.DROPPED)
    assert desk.server.statistics()["batches"]["calls"] == calls


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        pytest.param(["status", "batch_9"], 2, b"no run recorded a batch 'batch_9'", id="unknown"),
        pytest.param(["cancel", "batch_9"], 2, b"hint", id="hint"),
        pytest.param(["cancel"], 2, b"ID", id="no id"),
        pytest.param(["cancel", "--forget", "batch_9"], 2, b"hint", id="nothing to forget"),
        pytest.param(["cancel", "batch_1"], 1, b"batch_1", id="not to cancel at the provider"),
        pytest.param(["status", "batch_1"], 1, b"batch_1", id="not at the provider"),
    ],
)
def test_what_cannot_be_asked_is_told(desk: Desk, words: list[str], code: int, message: bytes) -> None:
    """Errors have their exit codes and a message, nothing on stdout."""
    desk.record(desk.run("a.jsonl"), batch_id="batch_1", step=Step.CREATED)

    done = call(desk, *words)

    assert (done.returncode, done.stdout) == (code, b"")
    assert message in done.stderr
    assert b"Traceback" not in done.stderr
