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
from pipeline.dispatch.batch.store import BatchItem, BatchRecord, BatchStore, Step, item_at, read_records

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


def item(custom_id: str = "r1", body: bytes = b'{"a":1}', **fields: Any) -> BatchItem:
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


def new_record(**fields: Any) -> BatchRecord:
    """Return a chunk that nothing was put into."""
    return BatchRecord(**{"run": "run-1", "provider": "openai", "model": "gpt-6-luna", "at": NOW} | fields)


def written(store: BatchStore, *items: BatchItem, save: bool = True, **fields: Any) -> BatchRecord:
    """Write a chunk, each request by a call of its own, and let the journal know it."""
    open_batch = store.begin()
    for each in items[:-1]:
        open_batch.add_entry(each, len(each.request.body))
        open_batch.write(open_batch.take())
    open_batch.add_entry(items[-1], len(items[-1].request.body))
    record = open_batch.finish(open_batch.take(), new_record(**fields))
    if save:
        store.save(record)
    return record


def record(**fields: Any) -> BatchRecord:
    """Return a chunk without a file."""
    basis: dict[str, Any] = {
        "local_id": "0a1b2c3d4e5f",
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


def members_of(store: BatchStore, record: BatchRecord) -> list[BatchItem]:
    return [each for _, each in store.items(record)]


def reopened(store: BatchStore) -> BatchStore:
    """Return what a later run finds."""
    store.release()
    again = BatchStore(store.directory.with_name("answers.jsonl"))
    again.open()
    return again


@pytest.fixture
def store(tmp_path: Path) -> Iterator[BatchStore]:
    opened = BatchStore(tmp_path / "answers.jsonl")
    opened.open()
    yield opened
    opened.release()


# ── requests ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "each",
    [
        pytest.param(item(), id="plain"),
        pytest.param(item(metadata={"n": 2**64 + 1, "m": -(10**300)}), id="integers beyond 64 bits"),
        pytest.param(item(metadata={"f": 0.1, "g": 1e300, "n": 2**70}), id="floats beside them"),
        pytest.param(item(metadata='é\u2028\u2029\x00\x7f\r\n"😀'), id="any character"),
        pytest.param(item(metadata=[[], {}, "", 0, False]), id="empty things"),
        pytest.param(item(custom_id='a "b"\\\n\u2028é'), id="an id of any characters"),
        pytest.param(item(custom_id="x" * 512, name="f" * 32), id="a name that is not the id"),
        pytest.param(item(body=b'{"n":18446744073709551617,"f":1.0,"e":"\xc3\xa9\\u00e9"}'), id="body byte for byte"),
        pytest.param(item(body=b'{"a" :\t1 }\r'), id="spaces in a body"),
        pytest.param(item(body=b'"%b"' % (b"x" * 3_000_000)), id="a large body"),
        pytest.param(item(attempts=(FAILED, BARE), counted=1), id="attempts"),
        pytest.param(item(max_output_tokens=10**9), id="bound"),
    ],
)
def test_a_request_is_read_back_equal(store: BatchStore, each: BatchItem) -> None:
    """Body, metadata and earlier attempts come out as they went in, whatever they hold; neighbours, too."""
    others = [item("first"), each, item("last")]

    whole = written(store, *others)

    assert members_of(store, whole) == others
    places = [place for place, _ in store.items(whole)]
    with store.reader(whole) as file:
        assert [item_at(file, place) for place in reversed(places)] == others[::-1]


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(metadata=values, custom_id=st.text(min_size=1), message=st.text())
def test_any_metadata_id_and_message_are_read_back(metadata: Any, custom_id: str, message: str) -> None:
    """No value of JSON and no text is changed by its way through the file."""
    each = item(custom_id, metadata=metadata, attempts=(replace(FAILED, message=message),))
    with TemporaryDirectory() as directory:
        store = BatchStore(Path(directory) / "answers.jsonl")

        assert members_of(store, written(store, each, save=False)) == [each]


def test_a_chunk_tells_what_its_file_and_its_upload_are(store: BatchStore) -> None:
    """Size and checksum are those of the file, `content` is what was told of each request; tokens are a sum."""
    items = [item(f"r{n}", b"{}" + b" " * n) for n in range(10)]
    whole = written(store, *items, model="m", deadline=NOW, simulated=True, retries_failed=True)

    file = store.path(whole).read_bytes()
    assert (whole.size, whole.sha256) == (len(file), sha256(file).hexdigest())
    assert (whole.requests, whole.content, whole.input_tokens) == (10, 10 * 2 + sum(range(10)), 100)
    assert whole.local_id == store.path(whole).stem
    assert (whole.model, whole.deadline, whole.simulated, whole.retries_failed) == ("m", NOW, True, True)
    assert (whole.step, whole.batch_id) == (Step.WRITTEN, None)


def test_what_is_uploaded_is_all_of_it_in_blocks(store: BatchStore) -> None:
    """Entries follow one another with the separator between them, in blocks, however many there are."""
    items = [item(f"r{n}", b'{"x":"%b"}' % (b"y" * 300_000)) for n in range(10)]
    whole = written(store, *items)
    for codec in CODECS:
        blocks = list(store.content(whole, separator=codec.separator, entry=codec.entry))

        assert b"".join(blocks) == codec.separator.join(codec.entry(each.name, each.request.body) for each in items)
        assert max(map(len, blocks)) < 1_500_000


def test_what_is_left_over_is_read_back(store: BatchStore) -> None:
    """What goes again is kept in the same form, without a chunk of its own, and deleted after use."""
    whole = written(store, item("a"), item("b"))
    rest = store.leftovers(whole)
    assert list(rest.read()) == []
    rest.add(item("a", attempts=(FAILED,)))
    rest.write(rest.take())
    rest.write(rest.take())

    assert (list(rest.read()), rest.requests) == ([item("a", attempts=(FAILED,))], 1)
    assert store.all == (whole,)
    rest.delete()
    rest.delete()
    assert {path.name for path in store.directory.iterdir()} == {"journal.jsonl", f"{whole.local_id}.jsonl"}


def test_what_an_earlier_collecting_left_over_does_not_stay(store: BatchStore) -> None:
    """A chunk that is collected anew, as the first time was cut short, leaves over what it leaves over now."""
    whole = written(store, item("a"), item("b"))
    cut = store.leftovers(whole)
    cut.add(item("a"))
    cut.write(cut.take())

    rest = store.leftovers(whole)
    rest.add(item("b"))
    rest.write(rest.take())

    assert list(rest.read()) == [item("b")]


def test_lines_that_were_taken_are_written_in_their_order(store: BatchStore) -> None:
    """What is added while a thread writes is part of the next writing."""
    open_batch = store.begin()
    open_batch.add_entry(item("a"), 1)
    first = open_batch.take()
    open_batch.add_entry(item("b"), 1)
    open_batch.write(first)
    second = open_batch.take()
    open_batch.add_entry(item("c"), 1)
    open_batch.write(second)

    whole = open_batch.finish(open_batch.take(), new_record())

    assert members_of(store, whole) == [item("a"), item("b"), item("c")]
    assert not store.is_damaged(whole)


# ── steps ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_last_line_of_a_chunk_counts(store: BatchStore) -> None:
    """Whoever reads the journal later knows how far each chunk has come, in the order in which they were begun."""
    first, second = written(store, item("a")), written(store, item("b"))
    store.save(replace(second, step=Step.UPLOADED, file_id="file-1"))
    store.save(replace(first, step=Step.CREATING, creating_at=NOW))
    last = replace(first, step=Step.CREATED, batch_id="batch_1", status="in_progress", succeeded=0, failed=0)
    store.save(last)

    again = reopened(store)

    expected = ["batch_1", None]
    assert [(each.local_id, each.batch_id) for each in again.all] == list(
        zip([first.local_id, second.local_id], expected, strict=True)
    )
    assert [each.step for each in again.all] == [Step.CREATED, Step.UPLOADED]
    assert [(each.run, each.sha256, each.content) for each in again.all] == [
        (each.run, each.sha256, each.content) for each in (first, second)
    ]
    assert again.all == again.still_open == tuple(read_records(store.directory))
    assert members_of(again, again.all[1]) == [item("b")]
    assert (again.all[0].creating_at, again.all[1].creating_at) == (None, None)


@pytest.mark.parametrize("step", list(Step))
def test_which_chunks_are_open(store: BatchStore, step: Step) -> None:
    """Only what was collected or dropped is over, at once and for a later run."""
    store.save(record(step=step))

    again = reopened(store)

    (only,) = again.all
    assert only.step is step
    assert len(again.still_open) == len(store.still_open) == (step not in (Step.COLLECTED, Step.DROPPED))


@pytest.mark.parametrize("step", [Step.COLLECTED, Step.DROPPED])
def test_a_closed_chunk_leaves_a_line_and_no_requests(store: BatchStore, step: Step) -> None:
    """Prompts do not stay on the disk longer than they are needed; that there was a batch stays known."""
    whole, other = written(store, item("a")), written(store, item("b"))
    store.download_path(whole).write_bytes(b"x")

    store.close_record(replace(whole, cost_nano=5), step)

    names = {path.name for path in store.directory.iterdir()}
    assert names == {"journal.jsonl", f"{other.local_id}.jsonl"}
    again = reopened(store)
    assert [(each.step, each.cost_nano) for each in again.all] == [(step, 5), (Step.WRITTEN, 0)]
    store.close_record(whole, step)


def test_a_later_run_notes_on(store: BatchStore) -> None:
    """The first note of a run writes the journal anew, one line for each chunk; nothing is forgotten."""
    first = written(store, item("a"))
    for number in range(20):
        store.save(replace(first, step=Step.CREATED, batch_id="batch_1", status=f"s{number}"))
    again = reopened(store)

    second = written(again, item("b"))

    assert (again.directory / "journal.jsonl").read_bytes().count(b"\n") == 2
    assert [(each.local_id, each.status) for each in reopened(again).all] == [
        (first.local_id, "s19"),
        (second.local_id, None),
    ]


def test_a_chunk_as_the_journal_has_it_now(store: BatchStore) -> None:
    """Who holds an older state learns the newer one; of a chunk that was never noted it is the state that he has."""
    whole, other = written(store, item("a")), written(store, item("b"), save=False)
    store.save(replace(whole, step=Step.CREATED, batch_id="batch_1"))

    assert store.reread(whole) == replace(whole, step=Step.CREATED, batch_id="batch_1")
    assert store.reread(other) == other


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({}, id="bare"),
        pytest.param({"not_ours": ("b1", "b2"), "is_confirmed": False}, id="not ours"),
        pytest.param({"deadline": NOW, "retries_failed": True, "simulated": True, "is_given_up": True}, id="flags"),
        pytest.param({"succeeded": 0, "failed": 2, "cost_nano": 2**63, "unpriced": 1, "file_id": "é\n"}, id="counts"),
    ],
)
def test_a_chunk_is_read_back_equal(store: BatchStore, fields: dict[str, Any]) -> None:
    """A later run knows of a chunk all that this one did."""
    noted = record(step=Step.CREATED, **fields)
    store.save(noted)

    assert reopened(store).all == (noted,)


# ── crashes ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_journal_cut_anywhere_tells_the_step_before(tmp_path: Path) -> None:
    """A crash that cuts the last line leaves the chunk one step back, never one ahead, never lost."""
    directory = tmp_path / "answers.batches"
    directory.mkdir()
    store = BatchStore(tmp_path / "answers.jsonl")
    store.save(record(step=Step.UPLOADED, file_id="file-é"))
    whole = (directory / "journal.jsonl").read_bytes()
    store.save(record(step=Step.CREATING, file_id="file-é"))
    store.release()
    longer = (directory / "journal.jsonl").read_bytes()

    for end in range(len(longer) + 1):
        (directory / "journal.jsonl").write_bytes(longer[:end])
        steps = [each.step for each in read_records(directory)]
        last = Step.CREATING if end >= len(longer) - 1 else Step.UPLOADED
        assert steps == ([last] if end >= len(whole) - 1 else []), end


WHOLE_LINE = b'{"step":"written","run":"r","provider":"openai","model":"m","at":"2026","nonce":%b}'


@pytest.mark.parametrize(
    "line",
    [
        *(b"", b"\0" * 50, b"\xff", b"[1]", b"null", b"5", b'"x"', b"{}", b'{"nonce":"0a1b2c3d4e5f"}'),
        *(b'{"step":"written"}', b'{"step":5}', b'{"nonce":"0a1b2c3d4e5f","step":"unknown"}', b'{"step":{}}'),
        *(
            WHOLE_LINE % local_id
            for local_id in (b"[]", b"{}", b"5", b"null", b'""', b'"../../0a1b2c"', b'"0A1B2C3D4E5F"')
        ),
        WHOLE_LINE.replace(b"{", b'{"not_ours":5,') % b'"0a1b2c3d4e5f"',
    ],
)
def test_a_damaged_line_tells_nothing(store: BatchStore, line: bytes) -> None:
    """Whatever stands in the journal, reading it neither fails nor forgets the other lines."""
    store.save(record(step=Step.CREATED, batch_id="batch_1"))
    path = store.directory / "journal.jsonl"
    path.write_bytes(line + b"\n" + path.read_bytes() + line + b"\n" + line)

    assert [each.batch_id for each in read_records(store.directory)] == ["batch_1"]


def test_a_line_with_a_good_name_is_a_chunk(store: BatchStore) -> None:
    """The damaged lines above are damaged by their names only: with ours it is read."""
    store.save(record())
    path = store.directory / "journal.jsonl"
    path.write_bytes(WHOLE_LINE % b'"ffffffffffff"')

    assert [each.local_id for each in read_records(store.directory)] == ["ffffffffffff"]


def test_fields_of_a_newer_version_are_passed_over(store: BatchStore) -> None:
    """A journal that a newer version wrote is read."""
    store.save(record(batch_id="batch_1"))
    path = store.directory / "journal.jsonl"
    path.write_bytes(path.read_bytes().replace(b'{"run"', b'{"new":{"a":1},"run"'))

    assert [each.batch_id for each in read_records(store.directory)] == ["batch_1"]


def test_orphans_are_deleted(store: BatchStore) -> None:
    """What belongs to chunks that the journal does not know, or that are over, goes when a run begins; nothing else."""
    known = written(store, item("a"))
    unknown = written(store, item("b"), save=False)
    closed = written(store, item("c"))
    store.close_record(closed, Step.COLLECTED)
    for name in (
        f"{unknown.local_id}.results",
        f"{unknown.local_id}.left",
        f"{closed.local_id}.jsonl",
        f"{closed.local_id}.left",
        f"{known.local_id}.results",
        "journal.jsonl.tmp",
    ):
        (store.directory / name).write_bytes(b"x")

    again = reopened(store)

    names = {path.name for path in again.directory.iterdir()}
    assert names == {"journal.jsonl", f"{known.local_id}.jsonl", f"{known.local_id}.results"}
    assert members_of(again, known) == [item("a")]


@pytest.mark.parametrize("kind", ["a file", "a directory", "a link", "a name like ours", "another's answers"])
def test_a_directory_of_somebody_elses_is_not_touched(tmp_path: Path, kind: str) -> None:
    """Where anything lies that is not ours, nothing is deleted or written; that it is not ours is told."""
    store = BatchStore(tmp_path / "answers.jsonl")
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

    store.open()
    for work in (store.begin, lambda: store.save(record())):
        with pytest.raises(UsageError, match=name) as caught:
            work()
        assert "-o" in str(caught.value.hint)

    assert {path.name for path in store.directory.iterdir()} == {orphan, name}
    assert (store.directory / orphan).read_bytes() == b"x"
    assert stat.S_IMODE(store.directory.stat().st_mode) == 0o755


def test_a_batch_beside_a_strangers_file_is_not_forgotten(store: BatchStore) -> None:
    """A file that somebody's file manager left among ours hides no batch: it is known, or the run ends by our error."""
    whole = written(store, item("a"))
    store.save(replace(whole, step=Step.CREATED, batch_id="batch_1"))
    (store.directory / ".DS_Store").write_bytes(b"x")

    with suppress(UsageError):
        assert [each.batch_id for each in reopened(store).still_open] == ["batch_1"]


def test_a_directory_named_as_a_chunk_is_not_touched(tmp_path: Path) -> None:
    """What has one of our names and is a directory is somebody else's, too."""
    store = BatchStore(tmp_path / "answers.jsonl")
    (tmp_path / "answers.batches" / "0a1b2c3d4e5f.jsonl").mkdir(parents=True)

    store.open()
    with pytest.raises(UsageError, match=r"0a1b2c3d4e5f\.jsonl"):
        store.begin()

    assert (tmp_path / "answers.batches" / "0a1b2c3d4e5f.jsonl").is_dir()


def test_a_link_in_the_place_of_the_directory_is_not_followed(tmp_path: Path) -> None:
    """Prompts go to no other place, and nothing is deleted there."""
    store = BatchStore(tmp_path / "answers.jsonl")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "0a1b2c3d4e5f.jsonl").write_bytes(b"x")
    (tmp_path / "answers.batches").symlink_to(tmp_path / "elsewhere")

    store.open()
    with pytest.raises(UsageError, match=r"answers\.batches"):
        store.begin()

    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["0a1b2c3d4e5f.jsonl"]


def test_opening_makes_nothing(tmp_path: Path) -> None:
    """A run that makes no batch leaves no directory."""
    store = BatchStore(tmp_path / "answers.jsonl")
    store.open()
    store.release()

    assert (store.all, list(tmp_path.iterdir())) == ((), [])


@pytest.mark.parametrize("kind", ["absent", "empty", "a file"])
def test_reading_where_nothing_is(tmp_path: Path, kind: str) -> None:
    """Where no run made a batch there are no chunks, and that is no error."""
    directory = tmp_path / "answers.batches"
    if kind == "empty":
        directory.mkdir()
    elif kind == "a file":
        directory.write_bytes(b"")

    assert read_records(directory) == []


# ── the disk ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_nobody_else_can_read_it(tmp_path: Path) -> None:
    """Prompts are their owner's only, whatever the umask."""
    store = BatchStore(tmp_path / "answers.jsonl")
    old = os.umask(0)
    try:
        written(store, item("a"))
        store.save(replace(store.all[0], step=Step.UPLOADED))
    finally:
        os.umask(old)
        store.release()

    modes = {path.suffix: stat.S_IMODE(path.stat().st_mode) for path in store.directory.iterdir()}
    assert stat.S_IMODE(store.directory.stat().st_mode) == 0o700
    assert len(list(store.directory.iterdir())) == 2
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
    store = BatchStore(tmp_path / "answers.jsonl")

    store.open()
    for work in (store.begin, lambda: store.save(record())):
        with pytest.raises(UsageError, match=r"answers\.batches"):
            work()
    assert (tmp_path / "answers.batches").read_bytes() == b"mine"


def test_a_directory_that_cannot_be_made_is_a_storage_error(tmp_path: Path) -> None:
    """Where there is no place for the directory, the run ends with our error, too."""
    store = BatchStore(tmp_path / "absent" / "answers.jsonl")

    with pytest.raises(StorageError, match=r"answers\.batches"):
        store.begin()
    with pytest.raises(StorageError, match=r"answers\.batches"):
        store.save(record())


@contextmanager
def full_disk() -> Iterator[None]:
    """Let no file take another byte; not longer than needed, as the log of the tests is a file, too."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_is_a_storage_error(store: BatchStore) -> None:
    """Requests that cannot be written, all at once or later, end the run by our error."""
    open_batch = store.begin()
    open_batch.add_entry(item("a"), 1)
    open_batch.write(open_batch.take())
    open_batch.add_entry(item("b"), 1)

    with full_disk(), pytest.raises(StorageError, match=open_batch.local_id):
        open_batch.write(open_batch.take())
    open_batch.add_entry(item("c"), 1)
    with full_disk(), pytest.raises(StorageError, match=open_batch.local_id):
        open_batch.finish(open_batch.take(), new_record())


@pytest.mark.parametrize("is_begun", [False, True])
def test_a_step_that_cannot_be_noted_is_a_storage_error(store: BatchStore, is_begun: bool) -> None:
    """Where the journal takes nothing, the first step or a later one, the run ends; what it held stays readable."""
    if is_begun:
        store.save(record())

    with full_disk(), pytest.raises(StorageError, match="journal"):
        store.save(record(step=Step.CREATING))

    assert [each.step for each in read_records(store.directory)] == [Step.WRITTEN] * is_begun


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
    store: BatchStore, content: bytes | None, place: int | None
) -> None:
    """Requests that are not what was written are not taken for it; whoever reads them is told where."""
    whole = written(store, item("a"), item("b"))
    assert not store.is_damaged(whole)
    store.path(whole).unlink()
    if content is not None:
        store.path(whole).write_bytes(content)

    assert store.is_damaged(whole)
    if place is not None or content is None:
        with pytest.raises(StorageError, match=whole.local_id):
            list(store.items(whole))
        with pytest.raises(StorageError, match=whole.local_id):
            list(store.content(whole, separator=b",", entry=lambda name, body: body))


def test_any_changed_byte_is_damage(store: BatchStore) -> None:
    """Whatever bit is turned or byte is cut off: the file is not what was written, and is never read as anything else
    than requests or damage."""
    whole = written(store, item("a", attempts=(FAILED,)), item("b"))
    content = store.path(whole).read_bytes()

    for place in range(len(content)):
        for changed in (content[:place], content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]):
            store.path(whole).write_bytes(changed)
            assert store.is_damaged(whole)
            with suppress(StorageError):
                list(store.items(whole))


def test_a_link_in_the_place_of_a_chunk_is_not_followed(store: BatchStore, tmp_path: Path) -> None:
    """Requests go into a file of our own, nowhere else."""
    open_batch = store.begin()
    open_batch.add_entry(item("a"), 1)
    (store.directory / f"{open_batch.local_id}.jsonl").symlink_to(tmp_path / "elsewhere")

    with pytest.raises(StorageError):
        open_batch.write(open_batch.take())
    assert not (tmp_path / "elsewhere").exists()


def test_a_journal_that_cannot_be_read_is_a_storage_error(store: BatchStore) -> None:
    """Not knowing which batches there are is no reason to make them again."""
    store.begin()
    (store.directory / "journal.jsonl").mkdir()

    with pytest.raises(StorageError, match="journal"):
        read_records(store.directory)


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
    told = record(**fields).as_dict()

    assert {name: told[name] for name in expected} == expected
    assert (told["requests"], told["run"]) == (2, "run-1")


def test_whose_batch_it_is() -> None:
    """Provider and model, or the provider where a batch may hold several; the provider's id for it, else ours."""
    assert (record().group, record(model="").group) == ("openai/m", "openai")
    assert (record().name, record(batch_id="batch_1").name) == ("0a1b2c3d4e5f", "batch_1")


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        *((step, False) for step in (Step.WRITTEN, Step.UPLOADED, Step.COLLECTED, Step.DROPPED)),
        *((step, True) for step in (Step.CREATING, Step.CREATED)),
    ],
)
def test_whether_there_may_be_a_batch(step: Step, expected: bool) -> None:
    """From the first call that makes one to its end."""
    assert record(step=step).may_have_batch is expected
