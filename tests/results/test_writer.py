from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio import wait_all_tasks_blocked
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core import files
from pipeline.core.errors import StorageError, TryLaterError, UsageError
from pipeline.core.hashing import FingerprintMap, FingerprintSet, fingerprint
from pipeline.core.types import Completion, Failure, OutputFormat, Request, Result, Usage
from pipeline.results import codec
from pipeline.results import writer as record
from pipeline.results.totals import Totals
from pipeline.results.writer import ResultWriter
from tests.tools import needs

FORMATS = list(OutputFormat)


def a_result(name: str, *, digest: str = "d", text: str | None = "hello", size: int = 0) -> Result:
    """Return the result of a line: an answer, or with `text=None` a failure."""
    asked = Request(
        custom_id=name, digest=digest, source="q.jsonl", line=1, provider="anthropic", model="m", body=b"{}"
    )
    reply = Completion(
        model="m",
        content=text,
        finish_reason="end_turn",
        truncated=False,
        usage=Usage(input_tokens=2, output_tokens=3),
        raw=b'{"id":"x","stop_reason":"end_turn","text":"' + b"x" * size + b'"}',
    )
    return Result(
        custom_id=name,
        line=1,
        source="q.jsonl",
        digest=digest,
        attempts=1,
        completed_at="2026-11-22T02:40:07Z",
        request=asked,
        reply=reply if text is not None else None,
        failure=Failure(type="timeout", message="too slow") if text is None else None,
    )


def a_line(name: str, **what: Any) -> bytes:
    return codec.encode(a_result(name, **what), OutputFormat.NATIVE)


LINES = [a_line("é-1"), a_line("q-2", text=None), a_line("q-3")]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a.jsonl"


def recorder(path: Path, done: list[Result] | None = None, **options: Any) -> ResultWriter:
    return ResultWriter(path, run_id="run-1", on_done=(done if done is not None else []).append, **options)


async def write(recorder: ResultWriter, *wanted: Result) -> None:
    """Run a recorder until it has written some results."""
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(recorder.run)
        for result in wanted:
            await recorder.append(result)
        recorder.stop()


async def make_calls(recorder: ResultWriter, *wanted: Result) -> None:
    """Run a recorder until it has noted a call for each of some requests, and no result."""
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(recorder.run)
        for result in wanted:
            assert result.request is not None
            await recorder.log_attempt(result.request, 1, "2026-11-22T02:40:07Z")
        recorder.stop()


def ids_in(path: Path) -> list[str]:
    return [json.loads(line)["custom_id"] for line in path.read_bytes().splitlines()]


def prepare(path: Path, content: bytes) -> None:
    """Make a file as an earlier run left it."""
    path.write_bytes(content)
    path.chmod(0o600)


def mode_of(path: Path) -> int:
    return path.stat().st_mode & 0o777


# ── writing ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("form", FORMATS)
async def test_results_are_written_and_found_again(path: Path, form: OutputFormat) -> None:
    """What is written is there when the file is opened again: who is answered, who failed, and the tokens."""
    told: list[Result] = []
    first = recorder(path, told, form=form)
    first.open()
    await write(first, a_result("a"), a_result("b", text=None), a_result("c"))
    first.close()

    totals = Totals()
    second = recorder(path, form=form)
    second.open()
    done = second.done(totals)
    second.close()

    assert [(each.custom_id, each.success) for each in told] == [("a", True), ("b", False), ("c", True)]
    assert [done.outcome(record.key(name, "d")) for name in ("a", "b", "c", "x")] == [True, False, True, None]
    assert done.outcome(record.key("a", "other")) is None
    assert (done.lines, done.damaged) == (3, 0)
    assert (totals.succeeded, totals.failed, totals.tokens.input, totals.tokens.output) == (2, 1, 4, 6)


async def test_a_result_is_told_only_when_it_is_on_the_disk(path: Path) -> None:
    """Whoever hears of a result finds its line in the file, whole."""
    seen: list[bool] = []

    def look(each: Result) -> None:
        seen.append(each.custom_id in ids_in(path))

    writer = ResultWriter(path, run_id="run-1", on_done=look)
    writer.open()
    await write(writer, *(a_result(str(number)) for number in range(50)))
    writer.close()

    assert seen == [True] * 50


async def test_later_runs_append(path: Path) -> None:
    """A second run adds to the file and changes nothing in it."""
    for name in ("a", "b"):
        writer = recorder(path)
        writer.open()
        await write(writer, a_result(name))
        writer.close()

    assert ids_in(path) == ["a", "b"]


async def test_many_writers_share_a_write(path: Path) -> None:
    """All who append at once wait for the disk together, and none of them for ever."""
    writer = recorder(path)
    writer.open()

    with anyio.fail_after(20):
        async with anyio.create_task_group() as running:
            running.start_soon(writer.run)
            async with anyio.create_task_group() as appending:
                for number in range(500):
                    appending.start_soon(writer.append, a_result(str(number)))
            writer.stop()
    writer.close()

    assert sorted(ids_in(path), key=int) == [str(number) for number in range(500)]


async def test_appending_takes_until_the_line_is_on_the_disk(path: Path) -> None:
    """While nobody writes, appending does not return: a result that is recorded is safe."""
    writer = recorder(path)

    with anyio.move_on_after(0.01) as scope:
        await writer.append(a_result("a"))

    assert scope.cancelled_caught


def test_results_are_synced_where_fdatasync_is_missing(path: Path) -> None:
    """macOS has no fdatasync: there the whole file is synced."""
    program = (
        "import os, sys; from pathlib import Path; os.__dict__.pop('fdatasync', None)\n"
        "from pipeline.core import files\n"
        "path = Path(sys.argv[1]); files.Appender(files.open_locked(path), path, sync=True).append(b'line')"
    )

    subprocess.run([sys.executable, "-c", program, str(path)], check=True)

    assert path.read_bytes() == b"line"


async def test_cancelled_writing_still_writes_what_came(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second Ctrl-C loses no answer that was received, also of a group that still waits for others."""
    monkeypatch.setattr(record, "_GROUP_SECONDS", 3_600.0)
    writer = recorder(path)
    writer.open()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(writer.run)
        tasks.start_soon(writer.append, a_result("a"))
        await wait_all_tasks_blocked()
        tasks.cancel_scope.cancel()
    writer.close()

    assert ids_in(path) == ["a"]


# ── modes, names, kinds of files ──────────────────────────────────────────────────────────────────────


async def test_files_are_readable_by_their_owner_only(path: Path) -> None:
    """Every file that is made has the mode 0600, whatever the umask is."""
    prepare(path, b"".join(LINES) + LINES[0][:20])
    fresh = path.with_name("fresh.jsonl")
    before = os.umask(0)
    try:
        new = recorder(fresh)
        new.open()
        await write(new, a_result("a"))
        new.close()
        old = recorder(path)
        old.open()
        old.tidy(FingerprintMap(), FingerprintSet(), ordered=True)
        old.close()
        files.write_file(path.with_name("a.usage.json"), b"{}")
    finally:
        os.umask(before)

    modes = {each.name: mode_of(each) for each in path.parent.iterdir()}
    names = ("a.jsonl", "a.superseded.jsonl", "a.torn", "a.usage.json", "fresh.index", "fresh.jsonl")
    assert modes == dict.fromkeys(names, 0o600)


@pytest.mark.parametrize(
    ("name", "suffix", "expected"),
    [
        pytest.param("a.jsonl", ".usage.json", "a.usage.json", id="jsonl"),
        pytest.param("a.results.jsonl", ".superseded.jsonl", "a.results.superseded.jsonl", id="results"),
        pytest.param("answers", ".usage.json", "answers.usage.json", id="no suffix"),
        pytest.param("a.txt", ".torn", "a.txt.torn", id="other suffix"),
    ],
)
def test_files_beside_results_are_named_after_them(name: str, suffix: str, expected: str) -> None:
    """A file that belongs to results lies beside them under their name."""
    assert files.beside(Path("x") / name, suffix) == Path("x") / expected


def test_a_directory_is_no_output(tmp_path: Path) -> None:
    """An output that is a directory is a usage error."""
    with pytest.raises(UsageError, match="cannot be written: Is a directory"):
        recorder(tmp_path).open()


def test_a_missing_directory_is_a_usage_error(tmp_path: Path) -> None:
    """An output in a directory that is not there is a usage error."""
    with pytest.raises(UsageError, match="cannot be written: No such file"):
        recorder(tmp_path / "no" / "a.jsonl").open()


@pytest.mark.parametrize("kind", ["device", "pipe"])
def test_only_regular_files_are_outputs(tmp_path: Path, kind: str) -> None:
    """What cannot be read back and replaced, a device or a pipe, is no output."""
    os.mkfifo(tmp_path / "pipe")

    with pytest.raises(UsageError, match="is not a regular file"):
        recorder({"device": Path("/dev/null"), "pipe": tmp_path / "pipe"}[kind]).open()


def test_a_planted_link_is_not_followed(path: Path) -> None:
    """A symbolic link where a fragment goes is an error, and its target stays as it was."""
    target = path.with_name("precious")
    target.write_bytes(b"mine")
    path.with_name("a.torn").symlink_to(target)
    path.write_bytes(LINES[0] + b"torn")

    with pytest.raises(StorageError, match="cannot repair"):
        recorder(path).open()

    assert target.read_bytes() == b"mine"
    assert path.read_bytes() == LINES[0] + b"torn"


def test_a_file_that_was_there_becomes_its_owners_only(path: Path) -> None:
    """An empty file made with the usual permissions, as by `touch`, is as private as one that the run makes."""
    path.touch()
    path.chmod(0o644)
    writer = recorder(path)

    writer.open()

    assert mode_of(path) == 0o600
    writer.close()


def test_another_users_file_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever owns a file can read it and change it, so nobody's answers go into another user's."""
    path.touch()
    if os.geteuid() == 0:
        os.chown(path, 4321, -1)
    monkeypatch.setattr(os, "geteuid", lambda: 1234)
    writer = recorder(path)

    with pytest.raises(UsageError, match="belongs to another user"):
        writer.open()


# ── the lock ──────────────────────────────────────────────────────────────────────────────────────────

HOLD = """
import sys, time
from pathlib import Path
from pipeline.results.writer import ResultWriter
ResultWriter(Path(sys.argv[1]), run_id="run-1", on_done=print).open()
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Another process that holds the results file."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        yield process
        process.kill()


def names_of(path: Path) -> dict[str, Path]:
    """Make other names of a file, and a way to it through another directory."""
    path.with_name("soft.jsonl").symlink_to(path)
    path.with_name("hard.jsonl").hardlink_to(path)
    path.with_name("folder").symlink_to(path.parent)
    return {
        "itself": path,
        "symlink": path.with_name("soft.jsonl"),
        "hard link": path.with_name("hard.jsonl"),
        "other directory": path.parent / "folder" / path.name,
    }


@pytest.mark.parametrize("name", ["itself", "symlink", "hard link", "other directory"])
def test_a_file_has_one_writer(path: Path, name: str) -> None:
    """A second run on the same file, by whatever name, leaves at once and has written nothing."""
    first = recorder(path)
    first.open()
    path.write_bytes(LINES[0] + b"torn")

    with pytest.raises(TryLaterError, match="another run is writing"):
        recorder(names_of(path)[name]).open()

    assert path.read_bytes() == LINES[0] + b"torn"
    first.close()


def test_another_process_is_kept_out(path: Path, holder: subprocess.Popen[bytes]) -> None:
    """The lock holds between processes, too."""
    with pytest.raises(TryLaterError):
        recorder(path).open()


def test_a_killed_holder_blocks_nobody(path: Path, holder: subprocess.Popen[bytes]) -> None:
    """After kill -9 of the holder the next run starts at once."""
    holder.send_signal(signal.SIGKILL)
    holder.wait()

    second = recorder(path)
    second.open()
    second.close()


def test_a_released_file_is_free(path: Path) -> None:
    """After a run another one may write, and releasing twice harms nobody."""
    first, second = recorder(path), recorder(path)
    first.open()
    first.close()

    second.open()
    first.close()

    with pytest.raises(TryLaterError):
        recorder(path).open()
    second.close()


def test_the_lock_goes_to_the_new_file(path: Path) -> None:
    """After tidying put a new file in the old one's place, the new one is locked and is the one written to."""
    path.write_bytes(b"".join(LINES))
    writer = recorder(path)
    writer.open()

    writer.tidy(FingerprintMap(), FingerprintSet(), ordered=True)

    with pytest.raises(TryLaterError):
        recorder(path).open()
    writer.close()


# ── tails ─────────────────────────────────────────────────────────────────────────────────────────────


def reopened(path: Path) -> list[bytes]:
    """Open a file, add a line as the next run would, and return its lines."""
    writer = recorder(path)
    writer.open()
    with path.open("ab") as file:
        file.write(a_line("new"))
    writer.close()
    return path.read_bytes().splitlines(keepends=True)


CUTS = range(len(b"".join(LINES)) + 1)


@pytest.mark.parametrize("filling", [pytest.param(b"", id="cut"), pytest.param(b"\0" * 5, id="NULs")])
def test_every_cut_is_repaired(tmp_path: Path, filling: bytes) -> None:
    """Cut at any byte, half characters included, or filled with NULs, a file keeps every whole line, the next line
    never merges with a fragment, and the fragment is kept in `.torn`."""
    content = b"".join(LINES)
    ends = [len(b"".join(LINES[: count + 1])) for count in range(len(LINES))]
    for cut in CUTS:
        path = tmp_path / f"{cut}.jsonl"
        path.write_bytes(content[:cut] + filling)

        found = reopened(path)

        # A line without its newline is whole; followed by NULs it was never told to be done.
        whole = [line for line, end in zip(LINES, ends, strict=True) if cut >= end - (not filling)]
        fragment = content[:cut][len(b"".join(whole)) :]
        assert found == [*whole, a_line("new")]
        torn = path.with_name(f"{cut}.torn")
        assert (torn.read_bytes() if torn.exists() else b"") == (fragment + b"\n" if fragment or filling else b"")


@given(st.binary(max_size=200))
def test_any_tail_is_repaired(tmp_path_factory: pytest.TempPathFactory, tail: bytes) -> None:
    """Whatever stands at the end of a file, the lines before it stay and the next line is one of its own."""
    path = tmp_path_factory.mktemp("tails") / "a.jsonl"
    path.write_bytes(LINES[0] + tail)

    found = reopened(path)

    assert found[0] == LINES[0]
    assert b"".join(found).endswith(b"\n" + a_line("new"))


def test_a_long_torn_line_is_found(path: Path) -> None:
    """A fragment larger than any block is cut off as a whole."""
    path.write_bytes(LINES[0] + a_line("b", size=300_000)[:-9])

    assert reopened(path) == [LINES[0], a_line("new")]


def test_fragments_are_collected(path: Path) -> None:
    """A second fragment does not overwrite the first."""
    for fragment in (b"one", b"two"):
        path.write_bytes(LINES[0] + fragment)
        reopened(path)

    assert path.with_name("a.torn").read_bytes() == b"one\ntwo\n"


def test_damaged_lines_are_counted_and_passed_over(path: Path) -> None:
    """A line that is no result is counted as damaged; every other one counts as before."""
    path.write_bytes(LINES[0] + b"garbage\n" + b"\0\0\0\n" + b"\n" + LINES[1][:-20] + b"\n" + LINES[2])
    reader = recorder(path)
    reader.open()

    done = reader.done(Totals())
    reader.close()

    assert (done.lines, done.damaged) == (2, 3)
    assert [done.outcome(record.key(name, "d")) for name in ("é-1", "q-2", "q-3")] == [True, None, True]


# ── setting aside ─────────────────────────────────────────────────────────────────────────────────────


async def test_fresh_starts_over_and_keeps_the_old(path: Path) -> None:
    """Earlier results go to a free name, complete; the file is empty, locked and written to."""
    prepare(path, LINES[0])
    prepare(path.with_name("a.old-1.jsonl"), b"older")
    writer = recorder(path)
    writer.open()

    aside = writer.set_aside()
    await write(writer, a_result("b"))

    assert aside == str(path.with_name("a.old-2.jsonl"))
    assert path.with_name("a.old-2.jsonl").read_bytes() == LINES[0]
    assert path.with_name("a.old-1.jsonl").read_bytes() == b"older"
    assert ids_in(path) == ["b"]
    with pytest.raises(TryLaterError):
        recorder(path).open()
    writer.close()


async def test_fresh_still_tells_of_calls_without_an_answer(path: Path) -> None:
    """What a crashed run had in flight may be billed, also if its results go; what they answer is told by them."""
    killed = recorder(path)
    killed.open()
    killed.begin()
    await make_calls(killed, a_result("a"), a_result("b"))
    killed.close()
    prepare(path, codec.encode(a_result("a"), OutputFormat.NATIVE, run_id="run-1"))
    writer = ResultWriter(path, run_id="run-2", on_done=print)
    writer.open()

    writer.set_aside()
    writer.done(Totals())
    writer.begin()

    assert [sent.sent for sent in writer.unknown()] == ["b"]
    writer.close()


def test_nothing_is_set_aside_from_an_empty_file(path: Path) -> None:
    """An empty file has nothing to set aside."""
    writer = recorder(path)
    writer.open()

    assert writer.set_aside() is None
    assert [each.name for each in path.parent.iterdir()] == ["a.jsonl"]
    writer.close()


@pytest.mark.parametrize("act", ["tidy", "set aside"])
def test_a_link_stays_a_link(tmp_path: Path, act: str) -> None:
    """Behind a symbolic link the file itself is rewritten or set aside, and the link stays."""
    (tmp_path / "real").mkdir()
    real, link = tmp_path / "real" / "r.jsonl", tmp_path / "a.jsonl"
    real.write_bytes(b"".join(LINES))
    link.symlink_to(real)
    writer = recorder(link)
    writer.open()

    if act == "tidy":
        writer.tidy(FingerprintMap(), FingerprintSet(), ordered=False)
    else:
        writer.set_aside()

    assert link.is_symlink()
    assert link.read_bytes() == real.read_bytes() != b"".join(LINES)
    with pytest.raises(TryLaterError):
        recorder(real).open()
    writer.close()


def test_what_belongs_to_results_lies_beside_the_file_itself(tmp_path: Path) -> None:
    """Under a symbolic link's name the same files are found and written as under the file's own."""
    (tmp_path / "real").mkdir()
    real, link = tmp_path / "real" / "r.jsonl", tmp_path / "a.jsonl"
    real.write_bytes(A2 + B + b"torn")
    link.symlink_to(real)
    positions, ids = FingerprintMap(), FingerprintSet()
    positions.put(record.key("a", "d"), 0)
    ids.add(fingerprint("a"))
    writer = recorder(link)

    writer.open()
    writer.done(Totals())
    writer.begin()
    writer.tidy(positions, ids, ordered=False)
    writer.done(Totals())
    writer.close()

    assert sorted(each.name for each in tmp_path.iterdir()) == ["a.jsonl", "real"]
    assert sorted(each.name for each in real.parent.iterdir()) == [
        "r.attempts.jsonl",
        "r.index",
        "r.jsonl",
        "r.superseded.jsonl",
        "r.torn",
    ]
    assert files.beside(link, ".usage.json") == writer.beside(".usage.json") == real.with_name("r.usage.json")


async def test_a_crash_is_told_under_every_name(tmp_path: Path) -> None:
    """Who goes on through a symbolic link is told of the calls that a run under the file's own name had in flight."""
    real, link = tmp_path / "r.jsonl", tmp_path / "a.jsonl"
    killed = recorder(real)
    killed.open()
    killed.begin()
    await make_calls(killed, a_result("a"))
    killed.close()
    link.symlink_to(real)

    writer = recorder(link)
    writer.open()

    assert [sent.sent for sent in writer.unknown()] == ["a"]
    writer.close()


# ── tidying ───────────────────────────────────────────────────────────────────────────────────────────


def tidied(path: Path, lines: list[bytes], wanted: list[tuple[str, str]], *, ordered: bool = False) -> int:
    """Tidy a file with these lines for an input with these ids and digests; return how many lines left."""
    path.write_bytes(b"".join(lines))
    positions, ids = FingerprintMap(), FingerprintSet()
    for place, (name, digest) in enumerate(wanted):
        positions.put(record.key(name, digest), place)
        ids.add(fingerprint(name))
    writer = recorder(path)
    writer.open()
    try:
        return writer.tidy(positions, ids, ordered=ordered)
    finally:
        writer.close()


A, B, C = a_line("a"), a_line("b"), a_line("c")
A2, A_FAILED, B_FAILED = a_line("a", digest="d2"), a_line("a", text=None), a_line("b", text=None)
AB = [("a", "d"), ("b", "d")]


@pytest.mark.parametrize(
    ("lines", "wanted", "staying", "leaving"),
    [
        pytest.param([A, B], AB, [A, B], [], id="nothing to do"),
        pytest.param([A, B, A2], [("a", "d2"), ("b", "d")], [B, A2], [A], id="superseded by new content"),
        pytest.param([A, B], [("a", "d2"), ("b", "d")], [B], [A], id="content changed, not answered yet"),
        pytest.param([A_FAILED, B, A], AB, [B, A], [A_FAILED], id="failure, then answer"),
        pytest.param([A, B, A_FAILED], AB, [A, B], [A_FAILED], id="answer, then failure"),
        pytest.param([A_FAILED, A_FAILED, B], AB, [A_FAILED, B], [A_FAILED], id="failures only"),
        pytest.param([A, B, C], AB, [A, B, C], [], id="answered orphan stays"),
        pytest.param([A, B, a_line("c", text=None)], AB, [A, B], [a_line("c", text=None)], id="failed orphan leaves"),
        pytest.param([A, b"garbage\n", B], AB, [A, B], [b"garbage\n"], id="damaged line leaves"),
        pytest.param([A, b"\n", B, C, b"x\n"], AB, [A, B, C], [b"x\n"], id="blank line vanishes"),
        pytest.param([A, A, B], AB, [A, B], [A], id="same line twice"),
        pytest.param(
            [B, A_FAILED, C, A2], [("a", "d2"), ("b", "d")], [B, C, A2], [A_FAILED], id="order of the file stays"
        ),
        pytest.param([], AB, [], [], id="empty"),
    ],
)
def test_tidying_keeps_what_counts(
    path: Path, lines: list[bytes], wanted: list[tuple[str, str]], staying: list[bytes], leaving: list[bytes]
) -> None:
    """One line for each line of the input stays, and answers that were paid for; what leaves is kept beside."""
    left = tidied(path, lines, wanted)

    superseded = path.with_name("a.superseded.jsonl")
    assert left == len(leaving)
    assert path.read_bytes() == b"".join(staying)
    assert (superseded.read_bytes() if superseded.exists() else b"") == b"".join(leaving)


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        pytest.param([B, A], [A, B], id="input order"),
        pytest.param([C, B, A], [A, B, C], id="orphans at the end"),
        pytest.param([A2, B, A_FAILED, A], [A, B], id="without what was superseded"),
        pytest.param([A, B], [A, B], id="in order already"),
    ],
)
def test_results_can_be_put_in_input_order(path: Path, lines: list[bytes], expected: list[bytes]) -> None:
    """With `ordered` the lines stand as in the input."""
    tidied(path, lines, AB, ordered=True)

    assert path.read_bytes() == b"".join(expected)
    assert path.with_name("a.jsonl.tmp").exists() is False


def test_superseded_lines_are_collected(path: Path) -> None:
    """A later tidying adds to what left before."""
    tidied(path, [A, B], [("a", "d2"), ("b", "d")])
    tidied(path, [B_FAILED, B], AB)

    assert path.with_name("a.superseded.jsonl").read_bytes() == A + B_FAILED


def test_a_fragment_among_superseded_lines_spoils_no_other(path: Path) -> None:
    """Where a crash or a full disk cut the line that was being kept, the next one begins a line of its own."""
    path.with_name("a.superseded.jsonl").write_bytes(A[:20])

    tidied(path, [A, B], [("a", "d2"), ("b", "d")])

    assert path.with_name("a.superseded.jsonl").read_bytes() == A[:20] + b"\n" + A


def test_a_leftover_of_a_crash_is_no_obstacle(path: Path) -> None:
    """A temporary file of a run that died is replaced."""
    path.with_name("a.jsonl.tmp").write_bytes(b"half")

    tidied(path, [B, A], AB, ordered=True)

    assert path.read_bytes() == A + B


# They begin with a result: a file that holds none is refused before it is tidied.
SOME_LINES = st.lists(st.sampled_from([A, A2, A_FAILED, B, B_FAILED, C, b"garbage\n"]), max_size=10).map(
    lambda lines: [C, *lines] if lines else lines
)


@given(
    SOME_LINES, st.lists(st.sampled_from([("a", "d"), ("a", "d2"), ("b", "d"), ("c", "d")]), unique=True), st.booleans()
)
def test_tidying_loses_no_line(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], wanted: list[tuple[str, str]], ordered: bool
) -> None:
    """Every line that was there is there or beside afterwards, and each request of the input has one line at most."""
    path = tmp_path_factory.mktemp("tidy") / "a.jsonl"

    tidied(path, lines, wanted, ordered=ordered)

    superseded = path.with_name("a.superseded.jsonl")
    staying = path.read_bytes().splitlines(keepends=True)
    leaving = superseded.read_bytes().splitlines(keepends=True) if superseded.exists() else []
    keys = [(each.custom_id, each.digest) for each in map(codec.decode, staying)]
    assert sorted(staying + leaving) == sorted(lines)
    assert [key for key in set(keys) & set(wanted) if keys.count(key) > 1] == []


# ── failing disks ─────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 kB."""
    files = tmp_path / "disk"
    files.mkdir()
    options = ["-t", "tmpfs", "-o", "size=64k", "tmpfs", str(files)]
    subprocess.run(["mount", *options], check=True)
    yield files
    subprocess.run(["umount", str(files)], check=True)


def enlarge(mounted: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=1m", str(mounted)], check=True)


@needs("mounting")
async def test_a_full_disk_stops_on_a_line_boundary(small_disk: Path) -> None:
    """When the disk is full that is a StorageError; what was told is there, whole, and nothing else is; with room
    again the run goes on."""
    path = small_disk / "a.jsonl"
    told: list[Result] = []
    writer = recorder(path, told)
    writer.open()

    with pytest.RaisesGroup(pytest.RaisesExc(StorageError, match="No space left on device")):
        for number in range(100):
            await write(writer, a_result(str(number), size=3_000))
    writer.close()

    assert ids_in(path) == [each.custom_id for each in told]
    assert 0 < len(told) < 100
    assert path.read_bytes().endswith(b"\n")
    enlarge(small_disk)
    again = recorder(path, told)
    again.open()
    await write(again, a_result("again"))
    again.close()
    assert ids_in(path)[-1] == "again"


LIMITED = """
import anyio, resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from tests.results.test_writer import a_result, write
from pipeline.core.errors import StorageError
from pipeline.results.writer import ResultWriter

told = []
writer = ResultWriter(Path(sys.argv[1]), run_id="run-1", on_done=lambda each: told.append(each.custom_id))
writer.open()
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    anyio.run(write, writer, *[a_result(str(number), size=700) for number in range(50)])
except* StorageError as group:
    print(group.exceptions[0], *told, sep="\\n")
"""


def test_a_file_that_may_not_grow_stops_on_a_line_boundary(path: Path) -> None:
    """A quota in the middle of a write leaves no half line: the file is cut back to what was told."""
    command = [sys.executable, "-c", LIMITED, str(path), str(Path(__file__).parents[2])]

    done = subprocess.run(command, capture_output=True, check=True, text=True)

    message, *told = done.stdout.splitlines()
    assert message == f"cannot write {str(path)!r}: File too large"
    assert 5 < len(told) < 20
    assert ids_in(path) == told


@needs("mounting")
def test_tidying_on_a_full_disk_changes_nothing(small_disk: Path) -> None:
    """Where there is no room for the new file, that is a StorageError and the old file is as it was."""
    path = small_disk / "a.jsonl"
    lines = [a_line(str(number), size=3_000) for number in range(12)]

    with pytest.raises(StorageError, match="cannot rewrite"):
        tidied(path, lines, [(str(number), "d") for number in reversed(range(12))], ordered=True)

    assert path.read_bytes() == b"".join(lines)
    assert [each.name for each in small_disk.iterdir()] == ["a.jsonl"]


# ── small files ───────────────────────────────────────────────────────────────────────────────────────


def test_a_small_file_is_replaced_whole(path: Path) -> None:
    """Writing replaces the old content, leaves nothing beside it and follows no link."""
    precious = path.with_name("precious")
    precious.write_bytes(b"mine")
    path.symlink_to(precious)
    path.with_name("a.jsonl.tmp").symlink_to(precious)

    files.write_file(path, b"new")

    assert path.read_bytes() == b"new"
    assert not path.is_symlink()
    assert precious.read_bytes() == b"mine"
    assert sorted(each.name for each in path.parent.iterdir()) == ["a.jsonl", "precious"]


@needs("mounting")
def test_a_small_file_is_there_whole_or_not_at_all(small_disk: Path) -> None:
    """When the disk is full the old content stays."""
    path = small_disk / "a.usage.json"
    files.write_file(path, b"old")

    with pytest.raises(StorageError, match="No space left on device"):
        files.write_file(path, b"x" * 100_000)

    assert path.read_bytes() == b"old"
    assert [each.name for each in small_disk.iterdir()] == ["a.usage.json"]


def test_the_lock_is_on_the_file_itself(path: Path) -> None:
    """The lock is a flock on the results file: other programs can see it, and no lock file lies about."""
    writer = recorder(path)
    writer.open()

    with path.open() as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    assert [each.name for each in path.parent.iterdir()] == ["a.jsonl"]
    writer.close()


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b'{"custom_id":"a","messages":[]}\n{"custom_id":"b","messages":[]}', id="input lines"),
        pytest.param(b'{"custom_id":"a","messages":[]}', id="one input line without end"),
        pytest.param(b"remember the milk", id="one line of text without end"),
    ],
)
def test_a_file_of_somebody_elses_is_refused_and_left_alone(tmp_path: Path, content: bytes) -> None:
    """An output that holds no result, such as an input given as -o, is not touched."""
    path = tmp_path / "questions.jsonl"
    path.write_bytes(content)
    before = path.read_bytes()

    with pytest.raises(UsageError, match="holds no results"):
        recorder(path).open()

    assert path.read_bytes() == before
    assert sorted(tmp_path.iterdir()) == [path]
