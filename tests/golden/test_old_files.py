"""Files of earlier versions: today's code reads what commit da9b3e0 left behind, and finishes it (see `make.py`)."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Literal

import anthropic
import openai
import orjson
import pytest

import pipeline
from pipeline.accounting.verify import verify
from pipeline.core import config, environment, object_store
from pipeline.core.config import Config
from pipeline.results import object_store_writer
from pipeline.runner.summary import Summary
from pipeline.simulator import Options as Simulation
from pipeline.simulator import Server, serving
from tests.bucket import Bucket

HERE = Path(__file__).parent
LINES = 16
IDS = sorted([f"q-{number}" for number in range(LINES) if number != 3] + ["line-d7c2b85df2f20fce"])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty folder where runs work, as the old ones did: under relative names, with their own ledger."""
    monkeypatch.delenv("PIPELINE_LEDGER")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@contextmanager
def world(**simulation: Any) -> Iterator[tuple[Config, Server]]:
    """Run today's simulator; yield a configuration that points at it, and the server."""
    with serving(Simulation(journal=True, **simulation)) as server:
        yield config.simulated(Config(), server.url).replace(ledger="ledger.sqlite"), server


def unpack(name: str, folder: Path) -> None:
    """Write the files of one JSON file into a folder."""
    files: dict[str, list[str]] = json.loads((HERE / f"{name}.json").read_text())["files"]
    for path, lines in files.items():
        text = "".join(lines).replace("@FOLDER@", str(folder))
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if path == "ledger.sql":
            with closing(sqlite3.connect(folder / "ledger.sqlite")) as connection:
                connection.executescript(text)
        else:
            target.write_bytes(text.encode("latin-1"))


def results(content: bytes) -> list[dict[str, Any]]:
    return [orjson.loads(line) for line in content.splitlines()]


def calls_in_flight(old: list[dict[str, Any]], *logs: Path) -> list[str]:
    """Return the ids of the calls in some attempts logs that have no result; the files were made to have some."""
    known = {result["custom_id"] for result in old}
    lines = [line for log in logs for line in results(log.read_bytes())]
    found = sorted(line["sent"] for line in lines if "sent" in line and line["sent"] not in known)
    assert found
    return found


def old_runs(folder: Path) -> list[str]:
    """Return the ids of the runs in the old ledger."""
    with closing(sqlite3.connect(folder / "ledger.sqlite")) as connection:
        return [row[0] for row in connection.execute("SELECT run_id FROM runs ORDER BY run_id")]


def assert_finished(summary: Summary, old: list[dict[str, Any]], new: list[dict[str, Any]]) -> None:
    """Each line has one result, old ones stand as they were, and totals and ledger agree with the results."""
    assert (summary.exit_code, summary.pending, summary.total) == (1, 0, LINES)  # one line is invalid
    assert (summary.reused, summary.results.finished) == (len(old), LINES)
    assert sorted(result["custom_id"] for result in new) == IDS
    assert all(result in new for result in old)
    answered = [result for result in new if result["success"]]
    assert summary.results.tokens.output == sum(result["usage"]["output_tokens"] for result in answered)


async def test_a_live_run_that_was_killed(folder: Path) -> None:
    """Results, attempts log, totals, index and ledger: only what has no result is sent, and old calls are listed."""
    unpack("live", folder)
    before = old_runs(folder)
    old = results((folder / "answers.jsonl").read_bytes())
    in_flight = calls_in_flight(old, folder / "answers.attempts.jsonl")

    with world() as (settings, server):
        summary = await pipeline.run_batch(["in.jsonl"], output=Path("answers.jsonl"), config=settings)
        received = server.statistics()["received"]

    new = results((folder / "answers.jsonl").read_bytes())
    assert_finished(summary, old, new)
    assert received == LINES - len(old)
    assert sorted(call.sent for call in summary.possibly_billed) == in_flight
    assert set(before) < set(old_runs(folder))
    proof = verify(Path("answers.jsonl"), ["in.jsonl"], settings, ledger=folder / "ledger.sqlite")
    assert (proof.exit_code, proof.shown) == (0, [])


async def test_batches_that_are_in_progress(folder: Path) -> None:
    """The batches at both providers are fetched by their ids, and no other batch is made."""
    unpack("batch", folder)
    old = results((folder / "answers.jsonl").read_bytes())
    with world(batch_seconds=0.5) as (settings, server):
        gpt = openai.OpenAI(base_url=f"{server.url}/v1", api_key="simulated")
        claude = anthropic.Anthropic(base_url=server.url, api_key="simulated")
        submit_again(folder, gpt, claude)
        settings = settings.replace(lane="batch").with_("batches", poll_interval=0.2)
        summary = await pipeline.run_batch(["in.jsonl"], output=Path("answers.jsonl"), config=settings)
        batches = len(list(gpt.batches.list())) + len(list(claude.messages.batches.list()))

    new = results((folder / "answers.jsonl").read_bytes())
    assert_finished(summary, old, new)
    assert batches == 2
    assert all(batch["collected"] for batch in summary.batches)
    proof = verify(Path("answers.jsonl"), ["in.jsonl"], settings, ledger=folder / "ledger.sqlite")
    assert (proof.exit_code, proof.shown) == (0, [])


def submit_again(folder: Path, gpt: openai.OpenAI, claude: anthropic.Anthropic) -> None:
    """Give today's simulator the batches that the old one had, and put their new ids into the old journal."""
    journal = folder / "answers.batches" / "journal.jsonl"
    text = journal.read_text()
    last = {step["nonce"]: step for step in results(text.encode())}
    for step in last.values():
        lines = results((folder / "answers.batches" / f"{step['nonce']}.jsonl").read_bytes())
        requests = list(zip(lines[::2], lines[1::2], strict=True))
        if step["provider"] == "anthropic":
            params: Any = [{"custom_id": head["name"], "params": body} for head, body in requests]
            text = text.replace(step["batch_id"], claude.messages.batches.create(requests=params).id)
            continue
        url: Literal["/v1/chat/completions"] = "/v1/chat/completions"
        rows = [{"custom_id": head["name"], "method": "POST", "url": url, "body": body} for head, body in requests]
        content = b"".join(orjson.dumps(row) + b"\n" for row in rows)
        file_id = gpt.files.create(file=("requests.jsonl", content), purpose="batch").id
        made = gpt.batches.create(input_file_id=file_id, endpoint=url, completion_window="24h")
        text = text.replace(step["batch_id"], made.id).replace(step["file_id"], file_id)
    journal.write_text(text)


async def test_results_at_an_object_store(folder: Path, bucket: Bucket) -> None:
    """The part stays as it is, what only the spool held is uploaded, and the rest is sent."""
    unpack("store", folder)
    url = f"{bucket.url}answers/"
    for path in (folder / "store" / "answers").iterdir():
        object_store.put(f"{url}{path.name}", path.read_bytes())

    with world() as (settings, server):
        spool = environment.spool_path(settings, url)
        (folder / "spool" / "one").rename(spool)
        old = results((spool / "results.jsonl").read_bytes())
        in_flight = calls_in_flight(old, spool / "results.attempts.jsonl")
        part = bucket.content("answers/part-00000.jsonl")
        bucket.gate.log.clear()
        summary = await pipeline.run_batch(["in.jsonl"], output=url, config=settings)
        received = server.statistics()["received"]
        fetched = [key for method, key in bucket.gate.log if method == "GET" and key.endswith("part-00000.jsonl")]

    assert not fetched  # the old manifest says that the spool holds it
    content = [object_store.read(found.url)[0] for found in object_store_writer.parts_at(url)]
    assert content[0] == part
    assert_finished(summary, old, results(b"".join(content)))
    assert len(old) > len(results(part))
    assert received == LINES - len(old)
    assert sorted(call.sent for call in summary.possibly_billed) == in_flight


async def test_parts_of_a_cluster_that_was_lost(folder: Path) -> None:
    """What workers had answered is taken over from their parts, and their calls in flight are listed."""
    unpack("cluster", folder)
    parts = [path for path in (folder / "answers.parts").glob("part-*.jsonl") if "attempts" not in path.name]
    old = results(b"".join(path.read_bytes() for path in parts))
    in_flight = calls_in_flight(old, *(folder / "answers.parts").glob("*.attempts.jsonl"))

    with world() as (settings, server):
        summary = await pipeline.run_batch(["in.jsonl"], output=Path("answers.jsonl"), config=settings)
        received = server.statistics()["received"]

    new = results((folder / "answers.jsonl").read_bytes())
    assert_finished(summary, old, new)
    assert received == LINES - len(old)
    assert sorted(call.sent for call in summary.possibly_billed) == in_flight
    assert not (folder / "answers.parts").exists()
