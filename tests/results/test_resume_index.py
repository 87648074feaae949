"""The index beside results: what it says is what parsing and planning would say, whatever became of the files."""

from __future__ import annotations

import os
import subprocess
import sys
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import pipeline
from pipeline.core import config as configuration
from pipeline.core.config import Config
from pipeline.core.hashing import checksum
from pipeline.core.types import IdRange, OutputFormat
from pipeline.inputs import reader
from pipeline.inputs.planner import Planner
from pipeline.inputs.reader import Batch
from pipeline.results import codec, resume_index, writer
from pipeline.results.resume_index import InputRange, PendingRanges
from pipeline.results.totals import Totals
from pipeline.results.writer import ResultWriter
from pipeline.runner.context import SHOWN_FAILURES
from pipeline.runner.options import Options
from pipeline.runner.summary import Summary
from pipeline.simulator import Options as Simulation
from pipeline.simulator import serving
from tests.results.test_writer import a_line, a_result

NAMES = [f"q-{number}" for number in range(12)]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a few lines make several ranges of results and of inputs."""
    monkeypatch.setattr(resume_index, "_RANGE_LINES", 3)
    monkeypatch.setattr(resume_index, "_WAITING_RANGES", 1)
    monkeypatch.setattr(reader, "_BATCH_LINES", 4)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a.jsonl"


# ── ranges of results ──────────────────────────────────────────────────────────────────────────────────────────


def known(path: Path) -> tuple[Any, ...]:
    """Open a results file and return all that a run learns from it."""
    recorder, totals = ResultWriter(path, run_id="run-9", on_done=print), Totals()
    recorder.open()
    try:
        done = recorder.done(totals)
        recorder.begin()
        outcomes = [done.outcome(writer.key(name, digest)) for name in NAMES for digest in ("d", "d2")]
        return outcomes, done.lines, done.damaged, totals, recorder.unknown()
    finally:
        recorder.close()


def known_without_index(path: Path) -> tuple[Any, ...]:
    path.with_suffix(".index").unlink(missing_ok=True)
    return known(path)


RESULT_LINES = st.builds(
    lambda name, digest, text, run: codec.encode(
        a_result(name, digest=digest, text=text), OutputFormat.NATIVE, run_id=run
    ),
    st.sampled_from(NAMES),
    st.sampled_from(["d", "d2"]),
    st.sampled_from(["fine", None]),
    st.sampled_from(["run-1", "run-2"]),
)
FILES = st.lists(RESULT_LINES | st.sampled_from([b"\n", b"garbage\n"]), max_size=14).map(
    lambda lines: [a_line("q-0"), a_line("q-1"), *lines]  # without any result a file is refused
)


def damaged(lines: Sequence[bytes], place: int, harm: str) -> bytes:
    """Return the content of a file to which something happened near a line."""
    place = 1 + place % (len(lines) - 1)
    before, line, after = b"".join(lines[:place]), lines[place], b"".join(lines[place + 1 :])
    return {
        "nothing": before + line + after,
        "flipped bit": before + bytes([line[0] ^ 1]) + line[1:] + after,
        "deleted": before + after,
        "inserted": before + a_line("q-11", digest="d2") + line + after,
        "swapped": after + before + line,
        "cut": before + line[: len(line) // 2],
        "appended": before + line + after + a_line("q-11", digest="d2"),
    }[harm]


HARMS = ["nothing", "flipped bit", "deleted", "inserted", "swapped", "cut", "appended"]


@given(FILES, st.integers(0, 14), st.sampled_from(HARMS))
def test_an_index_says_what_parsing_says(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], place: int, harm: str
) -> None:
    """Whatever happened to the results since the index was written, a start learns what it would without one."""
    path = tmp_path_factory.mktemp("index") / "a.jsonl"
    path.write_bytes(b"".join(lines))
    known(path)

    path.write_bytes(damaged(lines, place, harm))

    with_index = known(path)
    assert known(path) == with_index
    assert known_without_index(path) == with_index


def changed(content: bytes, place: int, harm: str, other: bytes) -> bytes:
    """Return an index to which something happened."""
    entries = content.splitlines(keepends=True)
    at, entry = place % len(content), place % len(entries)
    return {
        "cut": content[:at],
        "flipped bit": content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :],
        "entry missing": b"".join(entries[:entry] + entries[entry + 1 :]),
        "entry twice": b"".join(entries[: entry + 1] + entries[entry:]),
        "other order": b"".join(entries[entry:] + entries[:entry]),
        "another's": other,
        "another's entry": b"".join(entries[:entry]) + other,
        "NULs": content[:at] + bytes(len(content) - at),
        "garbage": b"garbage\n",
    }[harm]


@given(
    FILES,
    FILES,
    st.integers(0, 10_000),
    st.sampled_from(
        [
            "cut",
            "flipped bit",
            "entry missing",
            "entry twice",
            "other order",
            "another's",
            "another's entry",
            "NULs",
            "garbage",
        ]
    ),
)
def test_a_wrong_index_is_none(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], others: list[bytes], place: int, harm: str
) -> None:
    """An index that is cut, damaged, mixed up or another file's never changes what a start learns."""
    path = tmp_path_factory.mktemp("index") / "a.jsonl"
    path.write_bytes(b"".join(others))
    known(path)
    other = path.with_suffix(".index").read_bytes()
    path.write_bytes(b"".join(lines))
    expected = known_without_index(path)

    path.with_suffix(".index").write_bytes(changed(path.with_suffix(".index").read_bytes(), place, harm, other))

    assert known(path) == expected
    assert known(path) == expected


def test_another_version_reads_results_itself(path: Path) -> None:
    """What another version of the program wrote is not believed, as it may have read lines otherwise."""
    path.write_bytes(b"".join(map(a_line, NAMES)))
    known(path)
    written = path.with_suffix(".index").read_bytes()

    rechained, *entries = written.splitlines(keepends=True)
    chain = checksum(b"another version")
    for entry in map(bytes.rstrip, entries):
        content = entry[33:].replace(b'"damaged":0', b'"damaged":7')
        chain = checksum(chain, content)
        rechained += chain.hex().encode() + b" " + content + b"\n"
    path.with_suffix(".index").write_bytes(rechained)

    assert known(path)[2] == 0


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda name: name.mkdir(), id="directory"),
        pytest.param(lambda name: name.symlink_to(name.with_name("precious")), id="link"),
        pytest.param(lambda name: os.mkfifo(name), id="pipe"),
        pytest.param(lambda name: name.symlink_to("/dev/full"), id="full device"),
    ],
)
def test_an_index_that_cannot_be_written_is_gone_without(path: Path, make: Callable[[Path], None]) -> None:
    """What stands in the index's place is left alone, and the results are read and written all the same."""
    path.with_name("precious").write_bytes(b"mine")
    path.write_bytes(b"".join(map(a_line, NAMES)))
    make(path.with_suffix(".index"))

    assert known(path)[1] == len(NAMES)

    assert path.with_name("precious").read_bytes() == b"mine"
    assert path.with_suffix(".index").is_symlink() or not path.with_suffix(".index").is_file()


@pytest.mark.parametrize("act", ["done", "set_aside"])
def test_a_file_of_that_name_that_is_no_index_is_left_alone(path: Path, act: str) -> None:
    """A file that does not begin as an index does is somebody's own: neither written nor deleted."""
    path.write_bytes(b"".join(map(a_line, NAMES)))
    path.with_suffix(".index").write_bytes(b"IxF2 somebody's vectors\n")
    recorder = ResultWriter(path, run_id="run-9", on_done=print)
    recorder.open()

    if act == "set_aside":
        recorder.set_aside()
    recorder.done(Totals())
    recorder.close()

    assert path.with_suffix(".index").read_bytes() == b"IxF2 somebody's vectors\n"


@pytest.mark.parametrize("size", [0, 1, 40])
def test_an_index_that_was_cut_in_its_first_line_is_begun_anew(path: Path, size: int) -> None:
    """What a full disk left of the first line is no reason to be without an index for good."""
    path.write_bytes(b"".join(map(a_line, NAMES)))
    known(path)
    whole = path.with_suffix(".index").read_bytes()

    path.with_suffix(".index").write_bytes(whole[:size])
    known(path)

    assert path.with_suffix(".index").read_bytes() == whole


def test_an_index_is_small_and_private(path: Path) -> None:
    """The index is readable by its owner only, and holds fingerprints: no ids, no texts."""
    path.write_bytes(b"".join(map(a_line, NAMES)))

    known(path)

    found = path.with_suffix(".index")
    assert found.stat().st_mode & 0o777 == 0o600
    assert b"q-1" not in found.read_bytes()
    assert b"hello" not in found.read_bytes()


@pytest.mark.parametrize("answered_by", ["run-1", "run-0"])
@pytest.mark.parametrize("others", [pytest.param(3, id="range of one run"), pytest.param(5, id="of several")])
def test_calls_of_a_crashed_run_are_settled_by_its_own_results(path: Path, answered_by: str, others: int) -> None:
    """A call that was on its way is told by a result of its run, also one the index knows; another run's tells not."""
    lines = [a_line(name) for name in NAMES[:others]]
    own = codec.encode(a_result("q-7"), OutputFormat.NATIVE, run_id=answered_by)
    path.write_bytes(b"".join(lines) + own)
    sent = {
        "sent": "q-7",
        "digest": "d",
        "attempt": 1,
        "run": "run-1",
        "provider": "p",
        "model": "m",
        "at": "2026-11-22T02:40:07Z",
        "input_tokens": 1,
        "max_output_tokens": None,
    }
    known(path)
    path.with_suffix(".attempts.jsonl").write_bytes(orjson.dumps({"run": "run-1"}) + b"\n" + orjson.dumps(sent) + b"\n")

    unknown = known(path)[-1]

    assert [call.sent for call in unknown] == ([] if answered_by == "run-1" else ["q-7"])


# ── ranges of inputs ─────────────────────────────────────────────────────────────────────────────────────────


def input_range(name: bytes) -> InputRange:
    claims = IdRange(marks=array("Q", [1]), repeats={}, is_alone=True)
    return InputRange(mark=name * 16, start=b"s" * 16, size=9, lines=2, claims=claims, failed=array("Q"))


def test_an_input_range_is_done_with_its_last_result() -> None:
    """A range comes back with the last of its results, in whatever order they come, with those that failed."""
    awaited, one, two = PendingRanges(), input_range(b"1"), input_range(b"2")
    awaited.add(one, "a.jsonl", range(1, 4), 2)
    awaited.add(two, "a.jsonl", range(4, 9), 1)

    came = [
        awaited.finished("a.jsonl", number, failed) for number, failed in ((3, 77), (5, None), (9, None), (1, None))
    ]

    assert came == [None, two, None, one]
    assert list(one.failed) == [77]
    assert awaited.finished("b.jsonl", 1, None) is None


def test_ranges_that_wait_too_long_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many lines never get a result, memory is bounded: the oldest range is not waited for any more."""
    monkeypatch.setattr(resume_index, "_MOST_AWAITED", 2)
    awaited = PendingRanges()
    for number in range(3):
        awaited.add(input_range(b"%d" % number), "a.jsonl", range(number, number + 1), 1)

    assert [awaited.finished("a.jsonl", number, None) is None for number in range(3)] == [True, False, False]


CHAT = {"model": "gpt-6-luna", "messages": [{"role": "user", "content": "hi"}]}
INPUT_LINES = st.one_of(
    st.integers(1, 6).map(lambda number: orjson.dumps({"custom_id": f"q-{number}", **CHAT})),
    st.integers(1, 3).map(lambda number: orjson.dumps({**CHAT, "temperature": number / 10})),
    st.sampled_from([b"{", b"[1]", b'{"custom_id":"q-1"}', b'{"custom_id":"q-9","messages":[]}', b"  "]),
).map(lambda line: line + b"\n")
SAME = orjson.dumps(CHAT) + b"\n"
PARTS = st.lists(INPUT_LINES, max_size=5).map(b"".join)


def plan(planner: Planner, content: bytes) -> tuple[list[tuple[str, str]], IdRange]:
    planner.take_claims()
    lines = Batch(source="in.jsonl", number=1, count=content.count(b"\n"), content=content).lines()
    items = [planner.plan(line) for line in lines]
    return [(item.custom_id, item.digest) for item in items], planner.take_claims()


@example(b"", SAME + SAME, b"", SAME)
@given(PARTS, PARTS, PARTS, PARTS)
def test_claims_stand_for_planning(before: bytes, part: bytes, elsewhere: bytes, after: bytes) -> None:
    """Where claims of lines are taken, planning them would give what it gave, and what comes after is the same."""
    first = Planner(Config())
    plan(first, before)
    keys, claims = plan(first, part)
    planned, claimed = Planner(Config()), Planner(Config())
    for planner in (planned, claimed):
        plan(planner, elsewhere)

    if not claims.is_alone or not claimed.claim(claims):
        claimed_keys, _ = plan(claimed, part)
    else:
        claimed_keys = keys

    assert claimed_keys == plan(planned, part)[0]
    assert plan(claimed, after) == plan(planned, after)
    assert len(claimed.ids) == len(planned.ids)


def test_lines_without_repeats_are_taken() -> None:
    """Lines that are all different, bad ones included, can be passed over, and so can repeats among themselves."""
    content = (
        b"".join(orjson.dumps({**CHAT, "temperature": number % 3}) + b"\n" for number in range(6)) + b"{\n[1]\n{\n"
    )

    _, claims = plan(Planner(Config()), content)

    assert claims.is_alone
    assert Planner(Config()).claim(claims)


@pytest.mark.parametrize(
    ("change", "is_same"),
    [
        pytest.param({"request": {"temperature": 0.5}}, False, id="default"),
        pytest.param({"provider": "openai"}, False, id="provider"),
        pytest.param({"providers": {"openai": {"store": True}}}, False, id="endpoint"),
        pytest.param({"providers": {"openai": {"base_url": "https://other.example/v1"}}}, False, id="host"),
        pytest.param({"input": {"max_line_bytes": 100}}, False, id="line limit"),
        pytest.param({"sending": {"concurrency": 7}}, True, id="how it is sent"),
        pytest.param({"output": {"ordered": True}}, True, id="what comes out"),
    ],
)
def test_the_basis_of_plans_changes_with_what_they_depend_on(change: dict[str, Any], is_same: bool) -> None:
    """Another default, endpoint or limit is another basis; how requests are sent is not part of it."""
    assert (Planner(Config.model_validate(change)).basis() == Planner(Config()).basis()) is is_same


@pytest.mark.parametrize("words", [{"provider": "openai"}, {"model": "m"}, {"salt": "simulated:"}], ids=str)
def test_the_basis_of_plans_changes_with_the_command(words: dict[str, str]) -> None:
    """What the command line says for lines that do not say is part of what plans depend on."""
    assert Planner(Config(), **words).basis() != Planner(Config()).basis()


# ── batches ───────────────────────────────────────────────────────────────────────────────────────────

TEXTS = st.lists(st.sampled_from([b"a", b"bb", b"", b" ", b"ccc\r", b"x" * 40]), max_size=30)


@given(TEXTS, TEXTS, st.booleans())
def test_batches_are_cut_anywhere_and_lose_nothing(
    tmp_path_factory: pytest.TempPathFactory, texts: list[bytes], others: list[bytes], ends: bool
) -> None:
    """However batches were cut before, they hold every line once, with its number, as reading line by line does."""
    folder = tmp_path_factory.mktemp("batches")
    source, other = folder / "a.jsonl", folder / "b.jsonl"
    source.write_bytes(b"\n".join(texts) + b"\n" * ends)
    other.write_bytes(b"\n".join(others))
    sizes = {checksum(batch.first_line()): len(batch.content) for batch in reader.batches([str(other)], 30)}

    found = [line for batch in reader.batches([str(source)], 30, sizes.get) for line in batch.lines()]

    assert [(line.number, line.data, line.problem is None) for line in found] == [
        (number, text[:30], len(text) <= 30)
        for number, text in enumerate(texts, start=1)
        if (text and not text.isspace())
    ]


def test_after_an_edit_batches_are_the_same_again(tmp_path: Path) -> None:
    """Lines inserted, deleted and changed change the batches that they are in, and hardly any other."""
    lines = [b"line %d\n" % number for number in range(80)]
    source = tmp_path / "a.jsonl"
    source.write_bytes(b"".join(lines))
    before = list(reader.batches([str(source)], 100))
    sizes = {checksum(batch.first_line()): len(batch.content) for batch in before}

    lines[70] = b"changed\n"
    del lines[41:43]
    source.write_bytes(b"new\n" + b"".join(lines))
    after = list(reader.batches([str(source)], 100, sizes.get))

    same = {batch.content for batch in before} & {batch.content for batch in after}
    assert len(same) == len(before) - 3  # one of them because lines of one length end where others ended


# ── whole runs ────────────────────────────────────────────────────────────────────────────────────────


def question(custom_id: str | None, text: str) -> bytes:
    line = {"model": "gpt-6-luna", "messages": [{"role": "user", "content": text}]}
    return orjson.dumps(line if custom_id is None else {"custom_id": custom_id, **line}) + b"\n"


QUESTIONS = [
    *(question(f"q-{number}", f"question {number}") for number in range(12)),
    question(None, "again"),
    question(None, "and again"),
    question("bad", "[[status:400]]"),
    question("worse", "[[status:400]] too"),
    b"{\n",
    b'{"custom_id":"empty","messages":[]}\n',
    b"\n",
]
INPUTS = st.lists(st.sampled_from(QUESTIONS), min_size=4, max_size=24)


@st.composite
def edits(draw: st.DrawFn) -> tuple[list[bytes], list[bytes]]:
    """Return an input, and what became of it."""
    before = draw(st.permutations(QUESTIONS)) if draw(st.booleans()) else draw(INPUTS)
    after = list(before)
    for _ in range(draw(st.integers(0, 3))):
        place = draw(st.integers(0, len(after) - 1))
        kind = draw(st.sampled_from(["insert", "delete", "repeat", "change", "move", "append"]))
        if kind == "insert":
            after.insert(place, draw(st.sampled_from(QUESTIONS)))
        elif kind == "delete" and len(after) > 1:
            del after[place]
        elif kind == "repeat":
            after.append(after[place])
        elif kind == "change":
            after[place] = question(f"q-{place}", "changed")
        elif kind == "move":
            after.insert(0, after.pop(place))
        else:
            after.append(question("new", "new"))
    return list(before), after


@contextmanager
def world() -> Iterator[Config]:
    with serving(Simulation(latency=0.0)) as server:
        yield configuration.simulated(Config(), server.url)


def what_came_out(summary: Summary, output: Path) -> tuple[Any, ...]:
    """Return all of a run that does not depend on time or on the order of completion."""
    lines = Counter(
        (value["custom_id"], value["digest"], value["success"])
        for name in (output, output.with_suffix(".superseded.jsonl"))
        if name.exists()
        for value in map(orjson.loads, name.read_bytes().splitlines())
    )
    values = summary.as_dict()
    names = ("status", "exit_code", "requests", "attempts", "tokens", "by_model", "results", "superseded", "warnings")
    staying = Counter(orjson.loads(line)["custom_id"] for line in output.read_bytes().splitlines())
    are_all = len(summary.failures) < SHOWN_FAILURES  # else which are shown is a matter of time
    failures = sorted(text.replace(str(output.parent), "") for text in summary.failures if are_all)
    return lines, staying, [values[name] for name in names], failures


def prepared(folder: Path, content: list[bytes], *, with_index: bool) -> tuple[Path, Path]:
    """Write an input, and take the index away or leave it."""
    folder.mkdir(exist_ok=True)
    source, output = folder / "in.jsonl", folder / "out.jsonl"
    source.write_bytes(b"".join(content))
    if not with_index:
        output.with_suffix(".index").unlink(missing_ok=True)
    return source, output


async def run(folder: Path, content: list[bytes], config: Config, *, with_index: bool, **options: Any) -> Summary:
    source, output = prepared(folder, content, with_index=with_index)
    return await pipeline.run_batch([source], output=output, config=config, options=Options(**options))


@pytest.mark.slow
@settings(max_examples=25)
@given(edits(), st.booleans(), st.booleans())
async def test_runs_are_the_same_with_and_without_an_index(
    tmp_path_factory: pytest.TempPathFactory,
    inputs: tuple[list[bytes], list[bytes]],
    retry_failed: bool,
    is_warm: bool,
) -> None:
    """Over inputs reordered, inserted into, deleted from and changed, an index changes nothing of what comes out."""
    folder = tmp_path_factory.mktemp("runs")
    before, after = inputs
    came: dict[bool, list[Any]] = {True: [], False: []}
    with world() as config:
        other = config.with_("request", temperature=0.5) if is_warm else config
        steps: list[tuple[list[bytes], Config, dict[str, Any]]] = [
            (before, config, {"limit": 9}),
            (before, config, {}),
            (after, other, {"retry_failed": retry_failed}),
            (after, other, {}),
        ]
        for with_index, seen in came.items():
            place = folder / str(with_index)
            for content, settings_then, options in steps:
                summary = await run(place, content, settings_then, with_index=with_index, **options)
                seen.append(what_came_out(summary, place / "out.jsonl"))

    assert came[True] == came[False]


async def test_a_finished_input_is_passed_over(tmp_path: Path) -> None:
    """After a run every range of its input is known, the lines that failed or were invalid too."""
    content = QUESTIONS[:-1] + [question(f"more-{number}", f"more {number}") for number in range(30)]
    with world() as config:
        await run(tmp_path, content, config, with_index=True)
        config = config.with_("sending", concurrency=3)

    recorder = ResultWriter(tmp_path / "out.jsonl", run_id="run-9", on_done=print)
    recorder.open()
    done = recorder.done(Totals())
    basis = Planner(config).basis()
    batches = list(reader.batches([str(tmp_path / "in.jsonl")], 2**24, recorder.range_sizes()))
    found = [recorder.find_range(checksum(basis, batch.content), checksum(batch.first_line())) for batch in batches]
    recorder.close()

    ranges = [part for part in found if part]
    assert len(ranges) == len(batches) == -(-len(content) // 4)
    assert sum(part.lines for part in ranges) == done.lines == len(content)
    assert sum(len(part.failed) for part in ranges) == 4


async def test_a_duplicate_is_none_once_the_first_is_gone(tmp_path: Path) -> None:
    """Lines that mean something else without lines before them are planned, however well they are known."""
    first, others = question("q-0", "first"), [question(f"q-{number}", "other") for number in range(1, 4)]
    part = [question("q-0", "second"), *(question(f"p-{number}", "more") for number in range(3))]
    with world() as config:
        refused = await run(tmp_path, [first, *others, *part], config, with_index=True)
        answered = await run(tmp_path, [*others, *part], config, with_index=True)

    assert (refused.run.succeeded, refused.run.invalid) == (7, 1)
    assert (answered.reused, answered.run.succeeded, answered.exit_code) == (6, 1, 0)


def test_a_pipe_is_tidied_after_too(tmp_path: Path) -> None:
    """An input that can be read only once leaves one line for each of its own, as files do."""
    output = tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "pipeline", "run", "-", "-o", str(output), "--simulate", "-q"]
    lines = [question(f"q-{number}", "first") for number in range(3)]
    for content in (lines, [lines[2], question("q-0", "changed"), lines[1]]):
        subprocess.run(command, input=b"".join(content), check=True, timeout=60)

    superseded = output.with_suffix(".superseded.jsonl")
    assert [orjson.loads(line)["custom_id"] for line in superseded.read_bytes().splitlines()] == ["q-0"]
    assert sorted(orjson.loads(line)["custom_id"] for line in output.read_bytes().splitlines()) == ["q-0", "q-1", "q-2"]


def test_an_index_that_only_grows_is_begun_anew(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An index that is large beside its results, from edits and settings of long ago, is dropped and written anew."""
    path.write_bytes(b"".join(map(a_line, NAMES)))
    expected = known(path)
    found = path.with_suffix(".index")
    size = found.stat().st_size
    monkeypatch.setattr(resume_index, "_MOST_BYTES", 1_000)
    found.write_bytes(found.read_bytes() + bytes(path.stat().st_size))

    assert known(path) == expected
    assert found.stat().st_size == size


def test_numbers_beyond_64_bits_are_no_obstacle(path: Path) -> None:
    """Tokens that add up to more than an index can hold cost the index, and nothing else."""
    line = a_line("q-0").replace(b'"input_tokens":2', b'"input_tokens":%d' % (2**63 - 1))
    path.write_bytes(line + line.replace(b"q-0", b"q-1") + line.replace(b"q-0", b"q-2"))

    first = known(path)

    assert known(path) == first
    assert first[3].tokens.input == 3 * (2**63 - 1)


async def test_a_killed_run_has_an_index(tmp_path: Path) -> None:
    """What an index says is true whenever the run dies: cut at any entry, the next run sends only what is missing."""
    content = [question(f"q-{number}", f"question {number}") for number in range(40)]
    output = tmp_path / "out.jsonl"
    with serving(Simulation(latency=0.0)) as server:
        config = configuration.simulated(Config(), server.url)
        await run(tmp_path, content, config, with_index=True)
        whole, entries = output.read_bytes(), output.with_suffix(".index").read_bytes().splitlines(keepends=True)
        for count in range(0, len(entries), 4):
            lines = whole.splitlines(keepends=True)
            output.write_bytes(b"".join(lines[: len(lines) * count // len(entries)]))
            output.with_suffix(".index").write_bytes(b"".join(entries[:count]))
            summary = await run(tmp_path, content, config, with_index=True)
            assert (summary.exit_code, summary.total) == (0, 40)
            assert summary.reused == len(lines) * count // len(entries)
            assert sorted(orjson.loads(line)["custom_id"] for line in output.read_bytes().splitlines()) == sorted(
                f"q-{number}" for number in range(40)
            )
