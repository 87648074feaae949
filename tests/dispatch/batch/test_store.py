"""Chunks on the disk: what is written is read back, what a crash left does no harm, and nobody else can read it."""

from __future__ import annotations

import os
import resource
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import providers
from pipeline.core.errors import StorageError, UsageError
from pipeline.core.types import Attempt, Protocol, Request, Usage
from pipeline.dispatch.batch import store
from pipeline.dispatch.batch.store import BatchItem, BatchRecord, BatchStore, Step

NOW = "2026-11-22T02:40:07Z"
CODECS = [providers.batch_codec(protocol) for protocol in Protocol]
FAILED = Attempt(
    at=NOW,
    type="overloaded_error",
    message='full "of" \u2028é\x00',
    latency_s=1.234,
    status=529,
    code="c",
    request_id="req_1",
    may_be_billed=True,
    usage=Usage(
        input_tokens=9,
        output_tokens=8,
        cache_read_tokens=3,
        cache_write_tokens=4,
        cache_write_1h_tokens=2,
        reasoning_tokens=1,
        web_searches=5,
        service_tier="batch",
    ),
    cost_nano=123_456_789,
)
BARE = Attempt(at=NOW, type="batch_expired", message="", latency_s=0.0)


def member(custom_id: str = "r1", body: bytes = b'{"a":1}', **fields: Any) -> BatchItem:
    request = {name: fields.pop(name) for name in ("metadata", "max_output_tokens") if name in fields}
    return BatchItem(
        request=Request(
            custom_id=custom_id,
            digest="d" * 32,
            source="in.jsonl",
            line=7,
            provider="openai",
            model="gpt-6-luna",
            body=body,
            estimated_input_tokens=10,
            **request,
        ),
        **{"name": custom_id, **fields},
    )


def blank(**fields: Any) -> BatchRecord:
    """Return a chunk that nothing was put into."""
    return BatchRecord(**{"run": "run-1", "provider": "openai", "model": "gpt-6-luna", "at": NOW} | fields)


def written(chunks: BatchStore, *members: BatchItem, note: bool = True, **fields: Any) -> BatchRecord:
    """Write a chunk, each request by a call of its own, and let the journal know it."""
    spool = chunks.spool()
    for each in members[:-1]:
        spool.add_entry(each, len(each.request.body))
        spool.write(spool.take())
    spool.add_entry(members[-1], len(members[-1].request.body))
    chunk = spool.seal(spool.take(), blank(**fields))
    if note:
        chunks.note(chunk)
    return chunk


def chunk(**fields: Any) -> BatchRecord:
    """Return a chunk without a file."""
    basis: dict[str, Any] = {
        "nonce": "0a1b2c3d4e5f",
        "run": "run-1",
        "provider": "openai",
        "model": "m",
        "requests": 2,
        "size": 30,
        "content": 10,
        "sha256": "00",
        "input_tokens": 20,
        "at": NOW,
    }
    return BatchRecord(**basis | fields)


def members_of(chunks: BatchStore, chunk: BatchRecord) -> list[BatchItem]:
    return [each for _, each in chunks.members(chunk)]


def reopened(chunks: BatchStore) -> BatchStore:
    """Return what a later run finds."""
    chunks.release()
    again = BatchStore(chunks.directory.with_name("answers.jsonl"))
    again.open()
    return again


@pytest.fixture
def chunks(tmp_path: Path) -> Iterator[BatchStore]:
    opened = BatchStore(tmp_path / "answers.jsonl")
    opened.open()
    yield opened
    opened.release()


# ── requests ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "each",
    [
        pytest.param(member(), id="plain"),
        pytest.param(member(metadata={"n": 2**64 + 1, "m": -(10**300)}), id="integers beyond 64 bits"),
        pytest.param(member(metadata={"f": 0.1, "g": 1e300, "n": 2**70}), id="floats beside them"),
        pytest.param(member(metadata='é\u2028\u2029\x00\x7f\r\n"😀'), id="any character"),
        pytest.param(member(metadata=[[], {}, "", 0, False]), id="empty things"),
        pytest.param(member(custom_id='a "b"\\\n\u2028é'), id="an id of any characters"),
        pytest.param(member(custom_id="x" * 512, name="f" * 32), id="a name that is not the id"),
        pytest.param(member(body=b'{"n":18446744073709551617,"f":1.0,"e":"\xc3\xa9\\u00e9"}'), id="body byte for byte"),
        pytest.param(member(body=b'{"a" :\t1 }\r'), id="spaces in a body"),
        pytest.param(member(body=b'"%b"' % (b"x" * 3_000_000)), id="a large body"),
        pytest.param(member(attempts=(FAILED, BARE), counted=1), id="attempts"),
        pytest.param(member(max_output_tokens=10**9), id="bound"),
    ],
)
def test_a_request_is_read_back_equal(chunks: BatchStore, each: BatchItem) -> None:
    """Body, metadata and earlier attempts come out as they went in, whatever they hold; neighbours, too."""
    others = [member("first"), each, member("last")]

    whole = written(chunks, *others)

    assert members_of(chunks, whole) == others
    places = [place for place, _ in chunks.members(whole)]
    with chunks.reader(whole) as file:
        assert [store.item_at(file, place) for place in reversed(places)] == others[::-1]


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(metadata=values, custom_id=st.text(min_size=1), message=st.text())
def test_any_metadata_id_and_message_are_read_back(metadata: Any, custom_id: str, message: str) -> None:
    """No value of JSON and no text is changed by its way through the file."""
    each = member(custom_id, metadata=metadata, attempts=(replace(FAILED, message=message),))
    with TemporaryDirectory() as directory:
        chunks = BatchStore(Path(directory) / "answers.jsonl")

        assert members_of(chunks, written(chunks, each, note=False)) == [each]


def test_a_chunk_tells_what_its_file_and_its_upload_are(chunks: BatchStore) -> None:
    """Size and checksum are those of the file, `content` is what was told of each request; tokens are a sum."""
    members = [member(f"r{n}", b"{}" + b" " * n) for n in range(10)]
    whole = written(chunks, *members, model="m", deadline=NOW, simulated=True, retries_failed=True)

    file = chunks.path(whole).read_bytes()
    assert (whole.size, whole.sha256) == (len(file), sha256(file).hexdigest())
    assert (whole.requests, whole.content, whole.input_tokens) == (10, 10 * 2 + sum(range(10)), 100)
    assert whole.nonce == chunks.path(whole).stem
    assert (whole.model, whole.deadline, whole.simulated, whole.retries_failed) == ("m", NOW, True, True)
    assert (whole.step, whole.batch_id) == (Step.WRITTEN, None)


def test_what_is_uploaded_is_all_of_it_in_blocks(chunks: BatchStore) -> None:
    """Entries follow one another with the separator between them, in blocks, however many there are."""
    members = [member(f"r{n}", b'{"x":"%b"}' % (b"y" * 300_000)) for n in range(10)]
    whole = written(chunks, *members)
    for codec in CODECS:
        blocks = list(chunks.content(whole, separator=codec.separator, entry=codec.entry))

        assert b"".join(blocks) == codec.separator.join(codec.entry(each.name, each.request.body) for each in members)
        assert max(map(len, blocks)) < 1_500_000


def test_what_is_left_over_is_read_back(chunks: BatchStore) -> None:
    """What goes again is kept in the same form, without a chunk of its own, and deleted after use."""
    whole = written(chunks, member("a"), member("b"))
    rest = chunks.leftovers(whole)
    assert list(rest.read()) == []
    rest.add(member("a", attempts=(FAILED,)))
    rest.write(rest.take())
    rest.write(rest.take())

    assert (list(rest.read()), rest.requests) == ([member("a", attempts=(FAILED,))], 1)
    assert chunks.all == (whole,)
    rest.delete()
    rest.delete()
    assert {path.name for path in chunks.directory.iterdir()} == {"journal.jsonl", f"{whole.nonce}.jsonl"}


def test_what_an_earlier_collecting_left_over_does_not_stay(chunks: BatchStore) -> None:
    """A chunk that is collected anew, as the first time was cut short, leaves over what it leaves over now."""
    whole = written(chunks, member("a"), member("b"))
    cut = chunks.leftovers(whole)
    cut.add(member("a"))
    cut.write(cut.take())

    rest = chunks.leftovers(whole)
    rest.add(member("b"))
    rest.write(rest.take())

    assert list(rest.read()) == [member("b")]


def test_lines_that_were_taken_are_written_in_their_order(chunks: BatchStore) -> None:
    """What is added while a thread writes is part of the next writing."""
    spool = chunks.spool()
    spool.add_entry(member("a"), 1)
    first = spool.take()
    spool.add_entry(member("b"), 1)
    spool.write(first)
    second = spool.take()
    spool.add_entry(member("c"), 1)
    spool.write(second)

    whole = spool.seal(spool.take(), blank())

    assert members_of(chunks, whole) == [member("a"), member("b"), member("c")]
    assert not chunks.is_damaged(whole)


# ── steps ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_last_line_of_a_chunk_counts(chunks: BatchStore) -> None:
    """Whoever reads the journal later knows how far each chunk has come, in the order in which they were begun."""
    first, second = written(chunks, member("a")), written(chunks, member("b"))
    chunks.note(replace(second, step=Step.UPLOADED, file_id="file-1"))
    chunks.note(replace(first, step=Step.CREATING, creating_at=NOW))
    last = replace(first, step=Step.CREATED, batch_id="batch_1", status="in_progress", succeeded=0, failed=0)
    chunks.note(last)

    again = reopened(chunks)

    expected = ["batch_1", None]
    assert [(each.nonce, each.batch_id) for each in again.all] == list(
        zip([first.nonce, second.nonce], expected, strict=True)
    )
    assert [each.step for each in again.all] == [Step.CREATED, Step.UPLOADED]
    assert [(each.run, each.sha256, each.content) for each in again.all] == [
        (each.run, each.sha256, each.content) for each in (first, second)
    ]
    assert again.all == again.still_open == tuple(store.read(chunks.directory))
    assert members_of(again, again.all[1]) == [member("b")]
    assert (again.all[0].creating_at, again.all[1].creating_at) == (None, None)


@pytest.mark.parametrize("step", list(Step))
def test_which_chunks_are_open(chunks: BatchStore, step: Step) -> None:
    """Only what was collected or dropped is over, at once and for a later run."""
    chunks.note(chunk(step=step))

    again = reopened(chunks)

    (only,) = again.all
    assert only.step is step
    assert len(again.still_open) == len(chunks.still_open) == (step not in (Step.COLLECTED, Step.DROPPED))


@pytest.mark.parametrize("step", [Step.COLLECTED, Step.DROPPED])
def test_a_closed_chunk_leaves_a_line_and_no_requests(chunks: BatchStore, step: Step) -> None:
    """Prompts do not stay on the disk longer than they are needed; that there was a batch stays known."""
    whole, other = written(chunks, member("a")), written(chunks, member("b"))
    chunks.download_path(whole).write_bytes(b"x")

    chunks.close_chunk(replace(whole, cost_nano=5), step)

    names = {path.name for path in chunks.directory.iterdir()}
    assert names == {"journal.jsonl", f"{other.nonce}.jsonl"}
    again = reopened(chunks)
    assert [(each.step, each.cost_nano) for each in again.all] == [(step, 5), (Step.WRITTEN, 0)]
    chunks.close_chunk(whole, step)


def test_a_later_run_notes_on(chunks: BatchStore) -> None:
    """The first note of a run writes the journal anew, one line for each chunk; nothing is forgotten."""
    first = written(chunks, member("a"))
    for number in range(20):
        chunks.note(replace(first, step=Step.CREATED, batch_id="batch_1", status=f"s{number}"))
    again = reopened(chunks)

    second = written(again, member("b"))

    assert (again.directory / "journal.jsonl").read_bytes().count(b"\n") == 2
    assert [(each.nonce, each.status) for each in reopened(again).all] == [(first.nonce, "s19"), (second.nonce, None)]


def test_a_chunk_as_the_journal_has_it_now(chunks: BatchStore) -> None:
    """Who holds an older state learns the newer one; of a chunk that was never noted it is the state that he has."""
    whole, other = written(chunks, member("a")), written(chunks, member("b"), note=False)
    chunks.note(replace(whole, step=Step.CREATED, batch_id="batch_1"))

    assert chunks.reread(whole) == replace(whole, step=Step.CREATED, batch_id="batch_1")
    assert chunks.reread(other) == other


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({}, id="bare"),
        pytest.param({"not_ours": ("b1", "b2"), "is_confirmed": False}, id="not ours"),
        pytest.param({"deadline": NOW, "retries_failed": True, "simulated": True, "is_given_up": True}, id="flags"),
        pytest.param({"succeeded": 0, "failed": 2, "cost_nano": 2**63, "unpriced": 1, "file_id": "é\n"}, id="counts"),
    ],
)
def test_a_chunk_is_read_back_equal(chunks: BatchStore, fields: dict[str, Any]) -> None:
    """A later run knows of a chunk all that this one did."""
    noted = chunk(step=Step.CREATED, **fields)
    chunks.note(noted)

    assert reopened(chunks).all == (noted,)


# ── crashes ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_journal_cut_anywhere_tells_the_step_before(tmp_path: Path) -> None:
    """A crash that cuts the last line leaves the chunk one step back, never one ahead, never lost."""
    directory = tmp_path / "answers.batches"
    directory.mkdir()
    chunks = BatchStore(tmp_path / "answers.jsonl")
    chunks.note(chunk(step=Step.UPLOADED, file_id="file-é"))
    whole = (directory / "journal.jsonl").read_bytes()
    chunks.note(chunk(step=Step.CREATING, file_id="file-é"))
    chunks.release()
    longer = (directory / "journal.jsonl").read_bytes()

    for end in range(len(longer) + 1):
        (directory / "journal.jsonl").write_bytes(longer[:end])
        steps = [each.step for each in store.read(directory)]
        last = Step.CREATING if end >= len(longer) - 1 else Step.UPLOADED
        assert steps == ([last] if end >= len(whole) - 1 else []), end


WHOLE_LINE = b'{"step":"written","run":"r","provider":"openai","model":"m","at":"2026","nonce":%b}'


@pytest.mark.parametrize(
    "line",
    [
        *(b"", b"\0" * 50, b"\xff", b"[1]", b"null", b"5", b'"x"', b"{}", b'{"nonce":"0a1b2c3d4e5f"}'),
        *(b'{"step":"written"}', b'{"step":5}', b'{"nonce":"0a1b2c3d4e5f","step":"unknown"}', b'{"step":{}}'),
        *(WHOLE_LINE % nonce for nonce in (b"[]", b"{}", b"5", b"null", b'""', b'"../../0a1b2c"', b'"0A1B2C3D4E5F"')),
        WHOLE_LINE.replace(b"{", b'{"not_ours":5,') % b'"0a1b2c3d4e5f"',
    ],
)
def test_a_damaged_line_tells_nothing(chunks: BatchStore, line: bytes) -> None:
    """Whatever stands in the journal, reading it neither fails nor forgets the other lines."""
    chunks.note(chunk(step=Step.CREATED, batch_id="batch_1"))
    path = chunks.directory / "journal.jsonl"
    path.write_bytes(line + b"\n" + path.read_bytes() + line + b"\n" + line)

    assert [each.batch_id for each in store.read(chunks.directory)] == ["batch_1"]


def test_a_line_with_a_good_name_is_a_chunk(chunks: BatchStore) -> None:
    """The damaged lines above are damaged by their names only: with ours it is read."""
    chunks.note(chunk())
    path = chunks.directory / "journal.jsonl"
    path.write_bytes(WHOLE_LINE % b'"ffffffffffff"')

    assert [each.nonce for each in store.read(chunks.directory)] == ["ffffffffffff"]


def test_fields_of_a_newer_version_are_passed_over(chunks: BatchStore) -> None:
    """A journal that a newer version wrote is read."""
    chunks.note(chunk(batch_id="batch_1"))
    path = chunks.directory / "journal.jsonl"
    path.write_bytes(path.read_bytes().replace(b'{"run"', b'{"new":{"a":1},"run"'))

    assert [each.batch_id for each in store.read(chunks.directory)] == ["batch_1"]


def test_orphans_are_deleted(chunks: BatchStore) -> None:
    """What belongs to chunks that the journal does not know, or that are over, goes when a run begins; nothing else."""
    known = written(chunks, member("a"))
    unknown = written(chunks, member("b"), note=False)
    closed = written(chunks, member("c"))
    chunks.close_chunk(closed, Step.COLLECTED)
    for name in (
        f"{unknown.nonce}.results",
        f"{unknown.nonce}.left",
        f"{closed.nonce}.jsonl",
        f"{closed.nonce}.left",
        f"{known.nonce}.results",
        "journal.jsonl.tmp",
    ):
        (chunks.directory / name).write_bytes(b"x")

    again = reopened(chunks)

    names = {path.name for path in again.directory.iterdir()}
    assert names == {"journal.jsonl", f"{known.nonce}.jsonl", f"{known.nonce}.results"}
    assert members_of(again, known) == [member("a")]


@pytest.mark.parametrize("kind", ["a file", "a directory", "a link", "a name like ours", "another's answers"])
def test_a_directory_of_somebody_elses_is_not_touched(tmp_path: Path, kind: str) -> None:
    """Where anything lies that is not ours, nothing is deleted or written; that it is not ours is told."""
    chunks = BatchStore(tmp_path / "answers.jsonl")
    orphan = "0a1b2c3d4e5f.jsonl"
    (tmp_path / "answers.batches").mkdir(mode=0o755)
    (tmp_path / "answers.batches" / orphan).write_bytes(b"x")
    name = {"a name like ours": f"{orphan}.txt", "another's answers": "0A1B2C3D4E5F.results"}.get(kind, "notes")
    stranger = tmp_path / "answers.batches" / name
    if kind == "a directory":
        stranger.mkdir()
    elif kind == "a link":
        stranger.symlink_to(tmp_path / "elsewhere")
    else:
        stranger.write_bytes(b"mine")

    chunks.open()
    for work in (chunks.spool, lambda: chunks.note(chunk())):
        with pytest.raises(UsageError, match=name) as caught:
            work()
        assert "-o" in str(caught.value.hint)

    assert {path.name for path in chunks.directory.iterdir()} == {orphan, name}
    assert (chunks.directory / orphan).read_bytes() == b"x"
    assert stat.S_IMODE(chunks.directory.stat().st_mode) == 0o755


def test_a_batch_beside_a_strangers_file_is_not_forgotten(chunks: BatchStore) -> None:
    """A file that somebody's file manager left among ours hides no batch: it is known, or the run ends by our error."""
    whole = written(chunks, member("a"))
    chunks.note(replace(whole, step=Step.CREATED, batch_id="batch_1"))
    (chunks.directory / ".DS_Store").write_bytes(b"x")

    with suppress(UsageError):
        assert [each.batch_id for each in reopened(chunks).still_open] == ["batch_1"]


def test_a_directory_named_as_a_chunk_is_not_touched(tmp_path: Path) -> None:
    """What has one of our names and is a directory is somebody else's, too."""
    chunks = BatchStore(tmp_path / "answers.jsonl")
    (tmp_path / "answers.batches" / "0a1b2c3d4e5f.jsonl").mkdir(parents=True)

    chunks.open()
    with pytest.raises(UsageError, match=r"0a1b2c3d4e5f\.jsonl"):
        chunks.spool()

    assert (tmp_path / "answers.batches" / "0a1b2c3d4e5f.jsonl").is_dir()


def test_a_link_in_the_place_of_the_directory_is_not_followed(tmp_path: Path) -> None:
    """Prompts go to no other place, and nothing is deleted there."""
    chunks = BatchStore(tmp_path / "answers.jsonl")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "0a1b2c3d4e5f.jsonl").write_bytes(b"x")
    (tmp_path / "answers.batches").symlink_to(tmp_path / "elsewhere")

    chunks.open()
    with pytest.raises(UsageError, match=r"answers\.batches"):
        chunks.spool()

    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["0a1b2c3d4e5f.jsonl"]


def test_opening_makes_nothing(tmp_path: Path) -> None:
    """A run that makes no batch leaves no directory."""
    chunks = BatchStore(tmp_path / "answers.jsonl")
    chunks.open()
    chunks.release()

    assert (chunks.all, list(tmp_path.iterdir())) == ((), [])


@pytest.mark.parametrize("kind", ["absent", "empty", "a file"])
def test_reading_where_nothing_is(tmp_path: Path, kind: str) -> None:
    """Where no run made a batch there are no chunks, and that is no error."""
    directory = tmp_path / "answers.batches"
    if kind == "empty":
        directory.mkdir()
    elif kind == "a file":
        directory.write_bytes(b"")

    assert store.read(directory) == []


# ── the disk ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_nobody_else_can_read_it(tmp_path: Path) -> None:
    """Prompts are their owner's only, whatever the umask."""
    chunks = BatchStore(tmp_path / "answers.jsonl")
    old = os.umask(0)
    try:
        written(chunks, member("a"))
        chunks.note(replace(chunks.all[0], step=Step.UPLOADED))
    finally:
        os.umask(old)
        chunks.release()

    modes = {path.suffix: stat.S_IMODE(path.stat().st_mode) for path in chunks.directory.iterdir()}
    assert stat.S_IMODE(chunks.directory.stat().st_mode) == 0o700
    assert len(list(chunks.directory.iterdir())) == 2
    assert modes == {".jsonl": 0o600}


def test_it_lies_beside_the_results_themselves(tmp_path: Path) -> None:
    """Under whatever name the results are opened, their batches are found."""
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "answers.jsonl").write_bytes(b"")
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "real" / "answers.jsonl")

    assert BatchStore(tmp_path / "link.jsonl").directory == tmp_path / "real" / "answers.batches"
    assert BatchStore(tmp_path / "x.out").directory == tmp_path / "x.out.batches"


def test_a_file_in_the_place_of_the_directory_is_told(tmp_path: Path) -> None:
    """Where the directory cannot be made, the run ends with its own error, before anything is sent."""
    (tmp_path / "answers.batches").write_bytes(b"mine")
    chunks = BatchStore(tmp_path / "answers.jsonl")

    chunks.open()
    for work in (chunks.spool, lambda: chunks.note(chunk())):
        with pytest.raises(UsageError, match=r"answers\.batches"):
            work()
    assert (tmp_path / "answers.batches").read_bytes() == b"mine"


def test_a_directory_that_cannot_be_made_is_a_storage_error(tmp_path: Path) -> None:
    """Where there is no place for the directory, the run ends with our error, too."""
    chunks = BatchStore(tmp_path / "absent" / "answers.jsonl")

    with pytest.raises(StorageError, match=r"answers\.batches"):
        chunks.spool()
    with pytest.raises(StorageError, match=r"answers\.batches"):
        chunks.note(chunk())


@contextmanager
def full_disk() -> Iterator[None]:
    """Let no file take another byte; not longer than needed, as the log of the tests is a file, too."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_is_a_storage_error(chunks: BatchStore) -> None:
    """Requests that cannot be written, all at once or later, end the run by our error."""
    spool = chunks.spool()
    spool.add_entry(member("a"), 1)
    spool.write(spool.take())
    spool.add_entry(member("b"), 1)

    with full_disk(), pytest.raises(StorageError, match=spool.nonce):
        spool.write(spool.take())
    spool.add_entry(member("c"), 1)
    with full_disk(), pytest.raises(StorageError, match=spool.nonce):
        spool.seal(spool.take(), blank())


@pytest.mark.parametrize("is_begun", [False, True])
def test_a_step_that_cannot_be_noted_is_a_storage_error(chunks: BatchStore, is_begun: bool) -> None:
    """Where the journal takes nothing, the first step or a later one, the run ends; what it held stays readable."""
    if is_begun:
        chunks.note(chunk())

    with full_disk(), pytest.raises(StorageError, match="journal"):
        chunks.note(chunk(step=Step.CREATING))

    assert [each.step for each in store.read(chunks.directory)] == [Step.WRITTEN] * is_begun


@pytest.mark.parametrize(
    ("content", "place"),
    [
        pytest.param(b"", None, id="cut to nothing"),
        pytest.param(b"x\n{}\n", 0, id="no JSON"),
        pytest.param(b"{}\n{}\n", 0, id="nothing told"),
        pytest.param(b"[1]\n{}\n", 0, id="a list"),
        pytest.param(None, None, id="gone"),
    ],
)
def test_a_chunk_that_is_damaged_is_a_storage_error(
    chunks: BatchStore, content: bytes | None, place: int | None
) -> None:
    """Requests that are not what was written are not taken for it; whoever reads them is told where."""
    whole = written(chunks, member("a"), member("b"))
    assert not chunks.is_damaged(whole)
    chunks.path(whole).unlink()
    if content is not None:
        chunks.path(whole).write_bytes(content)

    assert chunks.is_damaged(whole)
    if place is not None or content is None:
        with pytest.raises(StorageError, match=whole.nonce):
            list(chunks.members(whole))
        with pytest.raises(StorageError, match=whole.nonce):
            list(chunks.content(whole, separator=b",", entry=lambda name, body: body))


def test_any_changed_byte_is_damage(chunks: BatchStore) -> None:
    """Whatever bit is turned or byte is cut off: the file is not what was written, and is never read as anything else
    than requests or damage."""
    whole = written(chunks, member("a", attempts=(FAILED,)), member("b"))
    content = chunks.path(whole).read_bytes()

    for place in range(len(content)):
        for changed in (content[:place], content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]):
            chunks.path(whole).write_bytes(changed)
            assert chunks.is_damaged(whole)
            with suppress(StorageError):
                list(chunks.members(whole))


def test_a_link_in_the_place_of_a_chunk_is_not_followed(chunks: BatchStore, tmp_path: Path) -> None:
    """Requests go into a file of our own, nowhere else."""
    spool = chunks.spool()
    spool.add_entry(member("a"), 1)
    (chunks.directory / f"{spool.nonce}.jsonl").symlink_to(tmp_path / "elsewhere")

    with pytest.raises(StorageError):
        spool.write(spool.take())
    assert not (tmp_path / "elsewhere").exists()


def test_a_journal_that_cannot_be_read_is_a_storage_error(chunks: BatchStore) -> None:
    """Not knowing which batches there are is no reason to make them again."""
    chunks.spool()
    (chunks.directory / "journal.jsonl").mkdir()

    with pytest.raises(StorageError, match="journal"):
        store.read(chunks.directory)


# ── what is told of it ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        pytest.param({}, {"id": None, "status": "written", "collected": False, "cost": None}, id="written"),
        pytest.param(
            {"step": Step.CREATED, "batch_id": "b", "status": "in_progress", "succeeded": 1, "failed": 0},
            {"id": "b", "status": "in_progress", "succeeded": 1, "failed": 0, "cost": None},
            id="underway",
        ),
        pytest.param(
            {"step": Step.COLLECTED, "status": "completed", "cost_nano": 1_500_000_000},
            {"status": "completed", "collected": True, "cost": 1.5},
            id="collected",
        ),
        pytest.param(
            {"step": Step.COLLECTED, "cost_nano": 5, "unpriced": 1}, {"collected": True, "cost": None}, id="unpriced"
        ),
        pytest.param({"step": Step.COLLECTED}, {"cost": 0.0}, id="cost nothing"),
        pytest.param({"step": Step.DROPPED, "cost_nano": 5}, {"status": "dropped", "cost": None}, id="dropped"),
        pytest.param({"model": ""}, {"model": None, "provider": "openai"}, id="several models"),
    ],
)
def test_what_a_summary_shows_of_a_chunk(fields: dict[str, Any], expected: dict[str, Any]) -> None:
    """The provider's word where it has one, else ours; a cost only when all of it is known."""
    told = chunk(**fields).as_dict()

    assert {name: told[name] for name in expected} == expected
    assert (told["requests"], told["run"]) == (2, "run-1")


def test_whose_batch_it_is() -> None:
    """Provider and model, or the provider where a batch may hold several; the provider's id for it, else ours."""
    assert (chunk().group, chunk(model="").group) == ("openai/m", "openai")
    assert (chunk().name, chunk(batch_id="batch_1").name) == ("0a1b2c3d4e5f", "batch_1")


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        *((step, False) for step in (Step.WRITTEN, Step.UPLOADED, Step.COLLECTED, Step.DROPPED)),
        *((step, True) for step in (Step.CREATING, Step.CREATED)),
    ],
)
def test_whether_there_may_be_a_batch(step: Step, expected: bool) -> None:
    """From the first call that makes one to its end."""
    assert chunk(step=step).may_have_batch is expected
