"""Results at an object store: runs against the simulator and a true S3 server; the simulator's count is the judge."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import anyio
import orjson
import pytest
from anyio import to_thread
from click.testing import CliRunner

import pipeline
from pipeline.accounting.ledger import Ledger
from pipeline.accounting.verify import verify
from pipeline.cli import main
from pipeline.core import config, environment, object_store
from pipeline.core import files as disk
from pipeline.core.config import Config
from pipeline.core.errors import PipelineError, TryLaterError, UsageError
from pipeline.results import object_store_writer
from pipeline.results.object_store_writer import ObjectStoreOutput, ObjectStoreWriter
from pipeline.runner.options import Options
from pipeline.runner.summary import Summary
from pipeline.simulator import Options as Simulation
from pipeline.simulator import Server, serving
from tests.bucket import KEY, SECRET, Barrier, Bucket
from tests.results.test_writer import a_line, a_result
from tests.torture.jobs import Provider
from tests.virtual import virtual_time

MODEL = "gpt-6-luna"
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, kw_only=True)
class World:
    """A simulator, a bucket, and machines: each has its own ledger, and so its own spool."""

    server: Server
    bucket: Bucket
    folder: Path

    @property
    def output(self) -> str:
        return f"{self.bucket.url}answers/"

    @property
    def calls(self) -> int:
        count: int = self.server.statistics()["by_model"].get(MODEL, {}).get("requests", 0)
        return count

    def machine(self, name: str = "here") -> Config:
        settings = config.simulated(Config(), self.server.url)
        return settings.replace(ledger=str(self.folder / name / "ledger.sqlite"))

    def spool(self, name: str = "here") -> Path:
        return environment.spool_path(self.machine(name), self.output)

    def source(self, *lines: Mapping[str, Any]) -> str:
        url = f"{self.bucket.url}in/q.jsonl"
        object_store.put(url, b"".join(orjson.dumps(line) + b"\n" for line in lines))
        return url

    async def run(self, source: str, machine: str = "here", **options: Any) -> Summary:
        return await pipeline.run_batch(
            [source], output=self.output, config=self.machine(machine), options=Options(**options)
        )

    def lines(self) -> list[dict[str, Any]]:
        """Return the results in all parts, in order."""
        content = b"".join(object_store.read(found.url)[0] for found in object_store_writer.parts_at(self.output))
        assert content == b"" or content.endswith(b"\n")
        return [orjson.loads(line) for line in content.split(b"\n")[:-1]]

    def names(self) -> list[str]:
        """Return the objects of the output."""
        return [name.removeprefix("answers/") for name in self.bucket.names() if name.startswith("answers/")]


@pytest.fixture
def world(bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.delenv("PIPELINE_LEDGER")
    with serving(Simulation(latency=0.002, journal=True)) as server:
        yield World(server=server, bucket=bucket, folder=tmp_path)


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let some ten lines be a part."""
    monkeypatch.setattr(object_store_writer, "_PART_BYTES", 10_000)


def _line(custom_id: str, text: str | None = None, **fields: Any) -> dict[str, Any]:
    message = {"role": "user", "content": text or f"question {custom_id}"}
    return {"custom_id": custom_id, "provider": "openai", "model": MODEL, "messages": [message], **fields}


def _questions(count: int) -> list[dict[str, Any]]:
    return [_line(f"q-{n}") for n in range(count)]


def _ids(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    return sorted(line["custom_id"] for line in lines)


# ── a run ─────────────────────────────────────────────────────────────────────────────────────────────


async def test_input_and_results_may_be_at_a_store(world: World) -> None:
    """Each line has its one result in the parts, with the URL as its source; the totals are those of the provider."""
    source = world.source(*_questions(100))

    summary = await world.run(source)

    truth = world.server.statistics()["by_model"][MODEL]
    usage = orjson.loads(world.bucket.content("answers/usage.json"))
    assert (summary.exit_code, summary.results_file, summary.inputs) == (0, world.output, [source])
    assert world.names() == ["part-00000.jsonl", "usage.json"]
    assert _ids(world.lines()) == _ids(_questions(100))
    assert {line["source"] for line in world.lines()} == {source}
    assert usage["results"]["tokens"]["output"] == truth["output_tokens"]
    assert sum(line["usage"]["input_tokens"] for line in world.lines()) == truth["input_tokens"]


async def test_a_finished_job_sends_and_writes_nothing_again(world: World) -> None:
    """Repeating it asks the provider nothing, writes no part, and says that all is done."""
    source = world.source(*_questions(20))
    await world.run(source)
    world.bucket.gate.log.clear()

    again = await world.run(source)

    assert (again.exit_code, again.reused, world.calls) == (0, 20, 20)
    assert world.bucket.puts() == ["answers/usage.json"]


async def test_results_become_parts_while_the_run_goes_on(world: World, small_parts: None) -> None:
    """A part is written as soon as there is enough for one, of whole lines, each once."""
    early: list[int] = []
    world.bucket.gate.after = lambda method, key: early.append(world.calls) if "part-" in key else None

    await world.run(world.source(*_questions(200)))

    sizes = [found.size for found in object_store_writer.parts_at(world.output)]
    assert len(sizes) > 5
    assert max(sizes) <= 10_000
    assert early[0] < 200
    assert _ids(world.lines()) == _ids(_questions(200))


async def test_on_another_machine_nothing_is_sent_again(world: World, small_parts: None) -> None:
    """Where the spool is missing it is made from the parts, byte for byte, and the parts stay as they are."""
    source = world.source(*_questions(50))
    await world.run(source, limit=30)
    before = {name: world.bucket.content(f"answers/{name}") for name in world.names() if "part" in name}

    elsewhere = await world.run(source, "elsewhere")

    assert (elsewhere.reused, elsewhere.run.succeeded, world.calls) == (30, 20, 50)
    assert {name: world.bucket.content(f"answers/{name}") for name in before} == before
    assert _ids(world.lines()) == _ids(_questions(50))
    assert elsewhere.results.tokens.output == world.server.statistics()["by_model"][MODEL]["output_tokens"]
    spooled = (world.spool("elsewhere") / object_store_writer.SPOOL).read_bytes()
    assert [orjson.loads(line) for line in spooled.splitlines()] == world.lines()


async def test_a_spool_that_is_behind_learns_what_others_did(world: World) -> None:
    """After another machine went on, the first one finds all of it, and has nothing to do."""
    source = world.source(*_questions(30))
    await world.run(source, limit=10)
    await world.run(source, "elsewhere")

    back = await world.run(source)

    assert (back.exit_code, back.reused, world.calls) == (0, 30, 30)
    assert _ids(world.lines()) == _ids(_questions(30))


async def test_results_are_whole_as_verify_sees_them(world: World, tmp_path: Path) -> None:
    """A copy of the folder proves itself against the input, totals and ledger included."""
    source = world.source(*_questions(20), {"custom_id": "bad", "messages": "nonsense"})
    await world.run(source)

    copy = object_store_writer.fetch(world.output, tmp_path)
    report = verify(copy, [source], world.machine(), ledger=Path(str(world.machine().ledger)), name=world.output)

    assert (report.exit_code, report.shown, report.results, report.inputs) == (0, [], 21, 21)


async def test_the_ledger_names_the_folder(world: World) -> None:
    """A report of the run tells where its results are for everybody, not the spool of this machine."""
    await world.run(world.source(*_questions(1)))

    with Ledger.open(Path(str(world.machine().ledger))) as book:
        [run] = book.runs()

    assert run.results_file == world.output


# ── kill -9 ───────────────────────────────────────────────────────────────────────────────────────────

_DRIVER = (
    "import sys; from pipeline.cli import main; from pipeline.results import object_store_writer; "
    "object_store_writer._PART_BYTES = 10_000; sys.argv[0] = 'pipeline'; main.main()"
)


@contextmanager
def _process(world: World, source: str) -> Iterator[None]:
    """Start a run as a process, whose parts are small; it is killed in the end."""
    environ = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **world.bucket.environ} | {
        "OPENAI_BASE_URL": f"{world.server.url}/v1",
        "OPENAI_API_KEY": "any",
        "PIPELINE_LEDGER": str(world.machine().ledger),
    }
    words = ["run", source, "-o", world.output, "--concurrency", "8", "--progress", "none"]
    (world.folder / "config.yaml").write_text("{}")
    command = [sys.executable, "-c", _DRIVER, *words, "-c", str(world.folder / "config.yaml")]
    with subprocess.Popen(command, env=environ, stderr=subprocess.DEVNULL) as process:
        try:
            yield
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("is_spool_lost", "has_put"),
    [pytest.param(False, True, id="between put and manifest"), pytest.param(True, False, id="spool deleted")],
)
async def test_a_killed_run_is_finished(world: World, small_parts: None, is_spool_lost: bool, has_put: bool) -> None:
    """After kill -9 amid an upload the same job completes: each id and each part once, nothing of a part paid twice.

    What the provider counts beyond the lines is what was in flight and, where the spool is lost, not uploaded.
    """
    source = world.source(*_questions(150))
    amid = Barrier(lambda method, key: method == "PUT" and key.endswith("part-00002.jsonl"))
    if has_put:
        world.bucket.gate.after = amid
    else:
        world.bucket.gate.refuses = amid

    with _process(world, source):
        await to_thread.run_sync(amid.wait)
    amid.let_go()
    world.bucket.gate.open()
    kept = world.lines()
    assert len(object_store_writer.parts_at(world.output)) == 2 + has_put
    if is_spool_lost:
        shutil.rmtree(world.spool())
    again = await world.run(source)

    paid = {token: each.times for token, each in Provider(world.server.url).paid().items()}
    lines = world.lines()
    usage = orjson.loads(world.bucket.content("answers/usage.json"))
    repeated = world.calls - 150
    assert again.exit_code == 0
    assert _ids(lines) == _ids(_questions(150))
    assert lines[: len(kept)] == kept
    assert all(paid[line["content"].split()[0]] == 1 for line in kept)
    assert [found.name for found in object_store_writer.parts_at(world.output)] == [
        f"part-{n:05d}.jsonl" for n in range(len(object_store_writer.parts_at(world.output)))
    ]
    assert usage["results"]["tokens"]["output"] == sum(line["usage"]["output_tokens"] for line in lines)
    assert {line["content"].split()[0] for line in lines} == set(paid)
    if not is_spool_lost:
        assert repeated <= len(usage["possibly_billed"]) <= 8


# ── two writers ───────────────────────────────────────────────────────────────────────────────────────


async def test_two_runs_of_one_machine_do_not_write_one_output(world: World) -> None:
    """The second leaves at once with 75, names the output and sends nothing."""
    source = world.source(*_questions(5))
    disk.make_private(lock := disk.open_locked(_made(world.spool()) / "lock"))

    with pytest.raises(TryLaterError, match=f"another run is writing '{world.output}'"):
        await world.run(source)

    disk.close(lock)
    assert world.calls == 0
    assert (await world.run(source)).exit_code == 0


def _made(path: Path) -> Path:
    path.mkdir(parents=True)
    return path


async def test_two_machines_do_not_double_results(world: World) -> None:
    """Of two that write at once the one that comes second ends with 75; repeated, it brings its own; no id is twice."""
    source = world.source(*_questions(40))
    summaries: list[Summary] = []

    async def work(machine: str) -> None:
        summaries.append(await world.run(source, machine))

    async with anyio.create_task_group() as both:
        both.start_soon(work, "here")
        both.start_soon(work, "elsewhere")
    first, second = sorted(summaries, key=lambda each: each.exit_code)
    ids = _ids(world.lines())
    spools = [world.spool(name) / object_store_writer.SPOOL for name in ("here", "elsewhere")]

    assert (first.exit_code, second.exit_code, second.status) == (0, 75, "stopped")
    assert "somebody else writes" in str(second.stop_reason)
    assert ids == _ids(_questions(40))
    assert [len(spool.read_bytes().splitlines()) for spool in spools] == [40, 40]

    calls = world.calls
    again = [await world.run(source, name) for name in ("here", "elsewhere")]

    assert [each.exit_code for each in again] == [0, 0]
    assert world.calls == calls
    assert _ids(world.lines()) == _ids(_questions(40))


async def test_somebody_elses_part_stops_the_run(world: World, small_parts: None) -> None:
    """A part that appears meanwhile is left alone; nothing new is paid for, and what was answered is safe."""
    source = world.source(*_questions(400))
    theirs = a_line("theirs")

    def interfere(method: str, key: str) -> None:
        if method == "PUT" and key.endswith("part-00001.jsonl"):
            world.bucket.gate.before = lambda method, key: None
            object_store.put(f"{world.output}part-00001.jsonl", theirs)

    world.bucket.gate.before = interfere
    said: list[str] = []

    summary = await pipeline.run_batch([source], output=world.output, config=world.machine(), say=said.append)

    answered = len((world.spool() / object_store_writer.SPOOL).read_bytes().splitlines())
    assert (summary.exit_code, summary.status) == (75, "stopped")
    assert any("somebody else writes" in text for text in said)
    assert world.bucket.content("answers/part-00001.jsonl") == theirs
    assert world.calls == answered < 400
    again = await world.run(source)
    assert (again.exit_code, world.calls) == (0, 400)
    assert Counter(_ids(world.lines())) == Counter([*_ids(_questions(400)), "theirs"])


# ── trouble ───────────────────────────────────────────────────────────────────────────────────────────


async def test_a_store_that_refuses_loses_nothing(world: World) -> None:
    """Without the right to write a run ends with 5; the same command uploads, and pays for nothing again."""
    source = world.source(*_questions(30))
    world.bucket.gate.refuses = lambda method, key: method == "PUT"

    summary = await world.run(source)
    told = orjson.loads((world.spool() / "results.usage.json").read_bytes())
    world.bucket.gate.open()
    again = await world.run(source)

    assert (summary.exit_code, summary.status, told["exit_code"]) == (5, "stopped", 5)
    assert "403 Forbidden" in str(summary.stop_reason)
    assert "results are safe in" in str(summary.stop_reason)
    assert KEY not in json.dumps(told)
    assert (again.exit_code, again.reused, world.calls) == (0, 30, 30)
    assert _ids(world.lines()) == _ids(_questions(30))


async def test_a_store_that_refuses_for_a_while_is_tried_again(world: World, small_parts: None) -> None:
    """What passes is said and no reason to stop: the run ends with all its results at the store."""
    refused: list[str] = []

    def refuse(method: str, key: str) -> bool:
        if method == "PUT" and len(refused) < 2:
            refused.append(key)
            return True
        return False

    source = world.source(*_questions(200))
    world.bucket.gate.refuses = refuse
    said: list[str] = []

    summary = await pipeline.run_batch([source], output=world.output, config=world.machine(), say=said.append)

    assert (summary.exit_code, len(refused)) == (0, 2)
    assert len([text for text in said if "403 Forbidden" in text]) == 1
    assert _ids(world.lines()) == _ids(_questions(200))


async def test_a_store_that_cannot_be_used_is_told_before_anything_is_sent(world: World) -> None:
    """Without the right to list the run ends with 2, and nothing was sent."""
    source = world.source(*_questions(3))
    world.bucket.gate.refuses = lambda method, key: key == world.bucket.name

    with pytest.raises(UsageError, match="cannot be listed: 403 Forbidden"):
        await world.run(source)

    assert world.calls == 0


async def test_a_lost_answer_of_the_store_is_no_other_writer(world: World) -> None:
    """A part that is there already with our very content is ours: the store had heard, and we had not."""
    source = world.source(*_questions(10))

    def forget(method: str, key: str) -> None:
        if method == "PUT" and key.endswith("part-00000.jsonl"):
            (world.spool() / "manifest.json").unlink(missing_ok=True)

    world.bucket.gate.after = forget
    await world.run(source)
    (world.spool() / "manifest.json").unlink()

    again = await world.run(source)

    assert (again.exit_code, world.calls) == (0, 10)
    assert world.names() == ["part-00000.jsonl", "usage.json"]


async def test_a_part_that_was_deleted_is_uploaded_again(world: World, small_parts: None) -> None:
    """What is missing at the store and is in the spool comes back, as a new part."""
    source = world.source(*_questions(50))
    await world.run(source)
    object_store.delete(f"{world.output}part-00001.jsonl")

    again = await world.run(source)

    assert (again.exit_code, world.calls) == (0, 50)
    assert _ids(world.lines()) == _ids(_questions(50))


# ── superseded lines, setting aside ───────────────────────────────────────────────────────────────────


async def test_changed_lines_take_the_place_of_old_ones(world: World, small_parts: None) -> None:
    """A newer answer replaces the older in the parts; the older one is kept beside them, once."""
    await world.run(world.source(*_questions(40)))
    old = {line["custom_id"]: line for line in world.lines()}
    changed = [_line(f"q-{n}", "another question" if n % 10 == 0 else None) for n in range(40)]

    summary = await world.run(world.source(*changed))

    now = {line["custom_id"]: line for line in world.lines()}
    [aside] = [name for name in world.names() if name.startswith("superseded-")]
    kept = [orjson.loads(line) for line in world.bucket.content(f"answers/{aside}").splitlines()]
    assert (summary.exit_code, summary.superseded, world.calls) == (0, 4, 44)
    assert _ids(world.lines()) == _ids(_questions(40))
    assert _ids(kept) == ["q-0", "q-10", "q-20", "q-30"]
    assert all(line == old[line["custom_id"]] for line in kept)
    assert {name for name in now if now[name] != old[name]} == set(_ids(kept))
    assert (await world.run(world.source(*changed), "elsewhere")).reused == 40


@pytest.mark.parametrize("fails", ["superseded-", "part-00000", "part-00002"])
async def test_tidying_that_is_cut_is_finished_later(world: World, small_parts: None, fails: str) -> None:
    """Wherever the store fails amid it, nothing is lost, and the next run leaves each id once."""
    await world.run(world.source(*_questions(40)))
    old = world.lines()
    changed = world.source(*(_line(f"q-{n}", "another question" if n % 2 == 0 else None) for n in range(40)))
    world.bucket.gate.refuses = lambda method, key: method == "PUT" and f"answers/{fails}" in key

    cut = await world.run(changed)
    everything = {line["custom_id"] for line in world.lines()}
    world.bucket.gate.open()
    again = await world.run(changed)

    aside = [world.bucket.content(f"answers/{name}") for name in world.names() if name.startswith("superseded-")]
    assert (cut.exit_code, again.exit_code, world.calls) == (5, 0, 60)
    assert everything == set(_ids(old))
    assert _ids(world.lines()) == _ids(old)
    assert {line["content"] for line in old} <= {
        orjson.loads(line)["content"] for line in b"".join(aside).splitlines()
    } | {line["content"] for line in world.lines()}
    assert (await world.run(changed, "elsewhere")).reused == 40


async def test_fresh_sets_parts_aside(world: World, small_parts: None) -> None:
    """`--fresh` moves what is there into a folder of its own and starts over; nothing that was paid for is deleted."""
    source = world.source(*_questions(30))
    await world.run(source)
    old = {name: world.bucket.content(f"answers/{name}") for name in world.names()}

    said: list[str] = []
    await pipeline.run_batch(
        [source], output=world.output, config=world.machine(), options=Options(fresh=True), say=said.append
    )
    await world.run(source, fresh=True)

    assert said == [f"earlier results were moved to {world.output}old-1/"]
    assert world.calls == 90
    assert _ids(world.lines()) == _ids(_questions(30))
    assert {name: world.bucket.content(f"answers/old-1/{name}") for name in old} == old
    assert any(name.startswith("old-2/part-") for name in world.names())


# ── refusals ──────────────────────────────────────────────────────────────────────────────────────────


async def test_ordered_results_want_a_file(world: World) -> None:
    """`--ordered` cannot be kept at a store: it is refused with the way out, and nothing is sent."""
    settings = world.machine().with_("output", ordered=True)

    with pytest.raises(UsageError, match="--ordered requires a file") as told:
        await pipeline.run_batch([world.source(*_questions(2))], output=world.output, config=settings)

    assert "-o answers.jsonl --ordered" in str(told.value.hint)
    assert world.calls == 0


async def test_objects_of_others_are_not_taken_for_results(world: World) -> None:
    """A folder with parts that hold no results is somebody's: it is refused, and stays as it is."""
    object_store.put(f"{world.output}part-00000.jsonl", b'{"mine": 1}\n')

    with pytest.raises(UsageError, match="holds no results"):
        await world.run(world.source(*_questions(2)))

    assert world.names() == ["part-00000.jsonl"]
    assert world.calls == 0


async def test_an_output_is_no_input(world: World) -> None:
    """A part of the output cannot be asked about: it would be overwritten."""
    object_store.put(f"{world.output}part-00000.jsonl", orjson.dumps(_line("q-1")) + b"\n")

    with pytest.raises(UsageError, match="contains the input"):
        await world.run(f"{world.output}part-00000.jsonl")


# ── the spool, step by step ───────────────────────────────────────────────────────────────────────────


@pytest.fixture
def output() -> Iterator[str]:
    folder = f"memory://{os.urandom(8).hex()}/"
    yield folder
    for found in object_store.listed_deep(folder):
        object_store.delete(found.url)


def _spool(tmp_path: Path, *lines: bytes) -> Path:
    path = tmp_path / object_store_writer.SPOOL
    path.write_bytes(b"".join(lines))
    return path


LINES = [a_line(f"q-{n}") for n in range(6)]


@pytest.mark.parametrize(
    ("spooled", "expected"),
    [
        pytest.param([], LINES[:4], id="no spool"),
        pytest.param(LINES[:2], LINES[:4], id="behind"),
        pytest.param(LINES[:4], LINES[:4], id="equal"),
        pytest.param(LINES, LINES, id="ahead"),
        pytest.param([LINES[3], LINES[5], LINES[1]], [*LINES[:4], LINES[5]], id="in another order"),
        pytest.param([*LINES[:4], LINES[4][:20]], [*LINES[:4], LINES[4][:20]], id="with a torn line"),
    ],
)
@pytest.mark.parametrize("has_manifest", [True, False], ids=["manifest", "no manifest"])
def test_a_start_brings_spool_and_parts_together(
    tmp_path: Path, output: str, spooled: Sequence[bytes], expected: Sequence[bytes], has_manifest: bool
) -> None:
    """The spool becomes the parts, one after the other, and then what no part holds; each line stands once."""
    path = _spool(tmp_path, *LINES[:2])
    folder = ObjectStoreOutput(output, path)
    folder.reconcile()
    folder.upload(len(b"".join(LINES[:2])))
    object_store.create(f"{output}part-00001.jsonl", b"".join(LINES[2:4]))
    if not has_manifest:
        path.with_name("manifest.json").unlink()
    _spool(tmp_path, *spooled)

    again = ObjectStoreOutput(output, path)
    again.reconcile()

    assert path.read_bytes() == b"".join(expected)
    assert again.uploaded == len(b"".join(LINES[:4]))


def test_a_rewritten_part_is_taken_as_it_is(tmp_path: Path, output: str) -> None:
    """Where another machine took superseded lines out of a part, they leave this spool, too."""
    path = _spool(tmp_path, *LINES)
    folder = ObjectStoreOutput(output, path)
    folder.reconcile()
    folder.upload(path.stat().st_size)
    [part] = object_store_writer.parts_at(output)
    object_store.update(part.url, b"".join(LINES[1:]), part.etag)

    folder = ObjectStoreOutput(output, path)
    folder.reconcile()

    assert path.read_bytes() == b"".join(LINES[1:])


def test_a_crash_between_rewriting_spool_and_manifest_doubles_nothing(tmp_path: Path, output: str) -> None:
    """A manifest that tells of an older spool is found out by checksums."""
    path = _spool(tmp_path, *LINES)
    folder = ObjectStoreOutput(output, path)
    folder.reconcile()
    folder.upload(path.stat().st_size)
    folder.withdraw([0])
    _spool(tmp_path, *LINES[1:])

    again = ObjectStoreOutput(output, path)
    again.reconcile()

    assert path.read_bytes() == b"".join(LINES[1:])
    assert again.uploaded == path.stat().st_size


@pytest.mark.parametrize("damage", [b"", b"nonsense", b"[]", b'{"parts": [{"name": 1}]}', b'{"parts": 7}'])
def test_a_damaged_manifest_is_none(tmp_path: Path, output: str, damage: bytes) -> None:
    """What the manifest says is not believed but where the store bears it out."""
    path = _spool(tmp_path, *LINES)
    folder = ObjectStoreOutput(output, path)
    folder.reconcile()
    folder.upload(len(LINES[0]))
    path.with_name("manifest.json").write_bytes(damage)

    again = ObjectStoreOutput(output, path)
    again.reconcile()

    assert path.read_bytes() == b"".join(LINES)
    assert again.uploaded == len(LINES[0])


def test_a_line_larger_than_a_part_is_a_part(tmp_path: Path, output: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts are cut between lines only."""
    monkeypatch.setattr(object_store_writer, "_PART_BYTES", len(LINES[0]) - 1)
    path = _spool(tmp_path, *LINES)
    folder = ObjectStoreOutput(output, path)
    folder.reconcile()

    folder.upload(path.stat().st_size)

    assert [object_store.read(found.url)[0] for found in object_store_writer.parts_at(output)] == LINES


def _recorder(output: str, tmp_path: Path, trouble: Callable[[PipelineError], None] | None = None) -> ObjectStoreWriter:
    on_trouble = trouble or (lambda each: None)
    return ObjectStoreWriter(
        output, tmp_path / "spool", on_trouble=on_trouble, run_id="run-1", on_done=lambda each: None
    )


class TestOnAVirtualClock:
    """When parts are written."""

    pytestmark: ClassVar = [*virtual_time, pytest.mark.usefixtures("no_threads")]

    async def test_what_trickles_in_becomes_a_part_every_ten_seconds(self, output: str, tmp_path: Path) -> None:
        """A lost machine costs what came in the last ten seconds; there is no part where nothing came."""
        recorder = _recorder(output, tmp_path)
        recorder.open()
        counts: dict[float, int] = {}

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(recorder.run)
            for second in (3, 9, 11, 35, 41):
                await anyio.sleep(second - anyio.current_time() % 100)
                counts[second] = len(object_store_writer.parts_at(output))
                await recorder.append(a_result(f"q-{second}"))
            recorder.stop()
        recorder.close()

        assert counts == {3: 0, 9: 0, 11: 1, 35: 2, 41: 3}

    async def test_a_long_run_makes_fewer_parts(self, output: str, tmp_path: Path) -> None:
        """Quarter of an hour of answers that trickle in is some sixty parts, not ninety; a day some seven hundred."""
        recorder = _recorder(output, tmp_path)
        recorder.open()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(recorder.run)
            for n in range(90):
                await recorder.append(a_result(f"q-{n}"))
                await anyio.sleep(10)
            recorder.stop()
        recorder.close()

        assert 55 < len(object_store_writer.parts_at(output)) < 65


def test_the_spool_is_its_owners_only(output: str, tmp_path: Path) -> None:
    """What lies on this machine for a while holds conversations: nobody else may read it."""
    recorder = _recorder(output, tmp_path)
    recorder.open()
    recorder.begin()
    recorder.publish(b"{}")
    recorder.close()

    modes = {each.name: each.stat().st_mode & 0o777 for each in (tmp_path / "spool").iterdir()}
    assert (tmp_path / "spool").stat().st_mode & 0o777 == 0o700
    assert set(modes.values()) == {0o600}


@pytest.mark.parametrize(
    ("url", "folder"),
    [
        pytest.param("s3://b/answers/", "s3://b/answers/", id="folder"),
        pytest.param("s3://b/answers", "s3://b/answers/", id="without a slash"),
        pytest.param("s3://b/answers.jsonl", "s3://b/answers/", id="like a file"),
        pytest.param("s3://b.jsonl", "s3://b.jsonl/", id="bucket"),
        pytest.param("s3://b/", "s3://b/", id="bucket with a slash"),
    ],
)
def test_an_output_is_a_folder(url: str, folder: str) -> None:
    """However an output at a store is written, its parts lie in a folder."""
    assert object_store_writer.folder_of(url) == folder


# ── the command ───────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def command(world: World, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str]]:
    """Call a command; return its exit code and what it told."""
    monkeypatch.setenv("PIPELINE_LEDGER", str(world.folder / "ledger.sqlite"))
    monkeypatch.setenv("PIPELINE_CONFIG", str(ROOT / "config.yaml"))
    monkeypatch.chdir(world.folder)

    def call(*words: str) -> tuple[int, str]:
        done = CliRunner().invoke(main.main, words)
        return done.exit_code, done.output

    return call


def test_the_commands_take_urls(world: World, command: Callable[..., tuple[int, str]]) -> None:
    """check, run, verify and estimate know objects; results go beside the input; no secret is told or written."""
    source = world.source(*_questions(3))
    folder = f"{world.bucket.url}in/q.results/"

    told = [
        command("check", f"{world.bucket.url}in/"),
        command("run", source, "--simulate"),
        command("verify", folder, "--input", source),
        command("estimate", source),
        command("report", "--rebuild", folder),
        command("batches", "list", folder),
    ]

    assert [code for code, _ in told] == [0, 0, 0, 0, 2, 0], told
    assert f"results in {folder}" in told[1][1]
    assert "proven: 3 results, 3 input lines" in told[2][1]
    assert "3 to send" in told[3][1]
    assert "is in an object store" in told[4][1]
    files = [path for path in world.folder.rglob("*") if path.is_file()]
    assert not any(SECRET in text or KEY in text for _, text in told)
    assert not any(SECRET.encode() in path.read_bytes() or KEY.encode() in path.read_bytes() for path in files)


def test_each_input_may_have_its_own_folder(world: World, command: Callable[..., tuple[int, str]]) -> None:
    """With -d at a store each input, wherever it is, gets a folder there."""
    source = world.source(*_questions(2))
    (world.folder / "local.jsonl").write_bytes(orjson.dumps(_line("l-1")) + b"\n")

    code, told = command("run", source, "local.jsonl", "-d", f"{world.bucket.url}out", "--simulate")

    assert code == 0, told
    assert [name for name in world.bucket.names() if "/part-" in name] == [
        "out/local.results/part-00000.jsonl",
        "out/q.results/part-00000.jsonl",
    ]
