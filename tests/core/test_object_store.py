"""Object stores: a true S3 server on this machine, and the stores of memory and files behind the same functions."""

from __future__ import annotations

import gzip
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import pytest

from pipeline.core import object_store
from pipeline.core.errors import PipelineError, StorageError, UsageError
from pipeline.inputs import reader as read
from tests.bucket import KEY, SECRET, Bucket

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

MEGABYTE = 1024 * 1024
LIMIT = 16 * MEGABYTE
_numbers = count()


@pytest.fixture(params=["s3", "memory", "file"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty folder, at each kind of store."""
    if request.param == "s3":
        bucket: Bucket = request.getfixturevalue("bucket")
        return f"{bucket.url}folder/"
    return f"memory://folder-{next(_numbers)}/" if request.param == "memory" else f"file://{tmp_path}/"


# ── writing ───────────────────────────────────────────────────────────────────────────────────────────


def test_what_is_there_is_not_created_again(folder: str) -> None:
    """An object is created where there is none; the second who tries is told so, and changes nothing."""
    first = object_store.create(f"{folder}a.jsonl", b"first")

    assert first is not None
    assert object_store.create(f"{folder}a.jsonl", b"second") is None
    assert object_store.read(f"{folder}a.jsonl") == (b"first", first)


def test_only_the_state_that_is_known_is_replaced(folder: str) -> None:
    """An object is replaced if it is as it was when it was seen; else it stays."""
    seen = object_store.put(f"{folder}a.jsonl", b"one")

    newer = object_store.update(f"{folder}a.jsonl", b"other", seen)

    assert newer is not None
    assert object_store.update(f"{folder}a.jsonl", b"three", seen) is None
    assert object_store.read(f"{folder}a.jsonl") == (b"other", newer)


def test_of_many_who_create_one_succeeds(folder: str) -> None:
    """However many try at once, one of them creates the object, and it is that one's."""
    with ThreadPoolExecutor(8) as threads:
        made = list(threads.map(lambda n: object_store.create(f"{folder}a", f"{n}".encode()), range(16)))

    [winner] = [n for n, etag in enumerate(made) if etag is not None]
    assert object_store.read(f"{folder}a")[0] == str(winner).encode()


def test_what_is_moved_or_deleted_is_gone(folder: str) -> None:
    """A moved object is where it went and not where it was; to delete what is gone is no error."""
    object_store.put(f"{folder}a", b"content")

    object_store.move(f"{folder}a", f"{folder}old-1/a")

    assert object_store.head(f"{folder}a") is None
    assert object_store.read(f"{folder}old-1/a")[0] == b"content"
    object_store.delete(f"{folder}old-1/a")
    object_store.delete(f"{folder}old-1/a")
    assert object_store.listed_deep(folder) == []


# ── looking ───────────────────────────────────────────────────────────────────────────────────────────


KEYS = ("a.jsonl", "b c.jsonl", "b/a.jsonl", "b/deep/é.jsonl", "c.txt", "x[1]?%20#.jsonl")


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        pytest.param("*.jsonl", ["a.jsonl", "b c.jsonl", "x[1]?%20#.jsonl"], id="in one folder"),
        pytest.param("*/*.jsonl", ["b/a.jsonl"], id="one deeper"),
        pytest.param("**/*.jsonl", [key for key in KEYS if key != "c.txt"], id="any depth"),
        pytest.param("b/**/*.jsonl", ["b/a.jsonl", "b/deep/é.jsonl"], id="any depth below"),
        pytest.param("[ab].jsonl", ["a.jsonl"], id="one of some characters"),
        pytest.param("?.txt", ["c.txt"], id="any character"),
        pytest.param("*.csv", [], id="nothing"),
    ],
)
def test_globs_match_as_for_files(folder: str, pattern: str, expected: list[str]) -> None:
    """`*` stays within a folder, `**` does not; names are taken as they are, without any encoding."""
    for key in KEYS:
        object_store.put(folder + key, b"")

    found = object_store.matching(folder + pattern)

    assert [each.url for each in found] == [folder + key for key in expected]


def test_a_folder_holds_what_is_right_under_it(folder: str) -> None:
    """Listing a folder tells names, sizes and etags, and nothing of what lies deeper or beside it."""
    etag = object_store.put(f"{folder}q/a.jsonl", b"abc")
    object_store.put(f"{folder}q/deep/b.jsonl", b"")
    object_store.put(f"{folder}qq.jsonl", b"")

    [found] = object_store.listed(f"{folder}q/")

    assert (found.url, found.name, found.size) == (f"{folder}q/a.jsonl", "a.jsonl", 3)
    assert object_store.is_same(found.etag, etag)
    assert object_store.head(found.url) == found
    assert object_store.listed(f"{folder}nothing/") == []


@pytest.mark.parametrize(
    ("text", "is_url"),
    [
        pytest.param("s3://b/k", True, id="S3"),
        pytest.param("gs://b/k", True, id="Google"),
        pytest.param("az://b/k", True, id="Azure"),
        pytest.param("q.jsonl", False, id="file"),
        pytest.param("s3:/b/k", False, id="one slash"),
        pytest.param("https://b/k", False, id="web"),
        pytest.param("dir/s3://b", False, id="inside"),
        pytest.param("-", False, id="stdin"),
    ],
)
def test_urls_of_stores_are_told_from_files(text: str, is_url: bool) -> None:
    """Only what begins with the scheme of a store is at one."""
    assert object_store.is_url(text) is is_url


# ── reading ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("size", [0, 1, 9 * MEGABYTE], ids=["empty", "one byte", "three blocks"])
def test_an_object_is_read_as_it_is(folder: str, size: int) -> None:
    """All bytes come, in order, whatever the size."""
    content = bytes(n % 251 for n in range(min(size, MEGABYTE))) * (size // MEGABYTE or 1)
    object_store.put(f"{folder}a", content)

    with object_store.open_reader(f"{folder}a") as reader:
        assert reader.read() == content


@pytest.mark.parametrize(
    ("start", "end"),
    [
        pytest.param(0, 3, id="beginning"),
        pytest.param(4, None, id="rest"),
        pytest.param(2, 100, id="beyond the end"),
        pytest.param(5, 5, id="nothing"),
        pytest.param(50, None, id="from beyond the end"),
    ],
)
def test_a_part_of_an_object_is_read(folder: str, start: int, end: int | None) -> None:
    """From `start` to before `end`, as a slice."""
    object_store.put(f"{folder}a", b"0123456789")

    with object_store.open_reader(f"{folder}a", start, end) as reader:
        assert reader.read() == b"0123456789"[start:end]


def test_reading_holds_a_bounded_part(tmp_path: Path) -> None:
    """Memory does not follow the size of the object; here it is a file, as the other stores live in this process."""
    folder = f"file://{tmp_path}/"
    object_store.put(f"{folder}a", b"x" * 32 * MEGABYTE)
    tracemalloc.start()

    with object_store.open_reader(f"{folder}a") as reader:
        size = sum(len(block) for block in iter(lambda: reader.read(MEGABYTE), b""))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert size == 32 * MEGABYTE
    assert peak < 16 * MEGABYTE


def test_an_object_that_is_replaced_while_it_is_read_is_an_error(folder: str) -> None:
    """What is read is one state of an object: a mixture of two is never handed out."""
    line = b'{"a": "' + b"a" * 1_000 + b'"}\n'
    object_store.put(f"{folder}a.jsonl", line * (6 * MEGABYTE // len(line)))
    lines = read.lines(f"{folder}a.jsonl", LIMIT)
    first = next(lines)

    object_store.put(f"{folder}a.jsonl", line.replace(b"a", b"b") * (6 * MEGABYTE // len(line)))
    *rest, last = lines

    assert {each.data for each in (first, *rest)} == {line[:-1]}
    assert last.problem is not None
    assert "cannot be read beyond this line" in last.problem
    assert "was replaced while it was being read" in last.problem


def test_a_reader_can_be_held_to_a_state_seen_before(folder: str) -> None:
    """With an etag only that state is read."""
    seen = object_store.put(f"{folder}a", b"one")
    object_store.put(f"{folder}a", b"other")

    with pytest.raises(OSError, match="was replaced"):
        object_store.open_reader(f"{folder}a", etag=seen).read()


# ── inputs ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "compress",
    [
        pytest.param(lambda data: data, id="plain"),
        pytest.param(gzip.compress, id="gzip"),
        pytest.param(zstd.compress, id="zstd"),
    ],
)
def test_lines_of_an_object_are_those_of_a_file(folder: str, compress: Callable[[bytes], bytes]) -> None:
    """An object is read like a file: compression told by content, numbers, its URL as the source."""
    object_store.put(f"{folder}q.bin", compress(b"\xef\xbb\xbfa\r\n\nb"))

    lines = list(read.lines(f"{folder}q.bin", LIMIT))

    assert [(each.source, each.number, each.data) for each in lines] == [
        (f"{folder}q.bin", 1, b"a\r"),
        (f"{folder}q.bin", 3, b"b"),
    ]


@pytest.fixture
def inbox(folder: str) -> str:
    keys = ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "notes.txt", "a.results/part-00000.jsonl", "deep/d.jsonl")
    for key in (*keys, "out/part-00000.jsonl", "out/usage.json", "out/superseded-0a.jsonl", "out/part-of-mine.jsonl"):
        object_store.put(folder + key, b"{}\n")
    object_store.put(f"{folder}out/work/part-00000-00001-0a/part-00000.jsonl", b"{}\n")
    return folder


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        pytest.param("a.jsonl", ["a.jsonl"], id="object"),
        pytest.param("", ["a.jsonl", "b.jsonl.gz", "c.jsonl.zst"], id="prefix"),
        pytest.param("deep", ["deep/d.jsonl"], id="prefix without a slash"),
        pytest.param("*.jsonl*", ["a.jsonl", "b.jsonl.gz", "c.jsonl.zst"], id="glob"),
        pytest.param("**/*.jsonl", ["a.jsonl", "deep/d.jsonl", "out/part-of-mine.jsonl"], id="any depth"),
        pytest.param("out/", ["out/part-of-mine.jsonl"], id="the output itself"),
    ],
)
def test_urls_are_expanded_as_files_are(inbox: str, item: str, expected: list[str]) -> None:
    """A prefix stands for its JSONL objects; what this program writes is not taken for input."""
    assert read.sources([inbox + item], but=f"{inbox}out/") == [inbox + key for key in expected]


def test_several_inputs_are_each_read_once(inbox: str, tmp_path: Path) -> None:
    """Files and objects may be mixed; what is named twice is there once."""
    local = tmp_path / "local.jsonl"
    local.write_bytes(b"{}\n")

    found = read.sources([f"{inbox}a.jsonl", str(local), f"{inbox}a.jsonl"])

    assert found == [f"{inbox}a.jsonl", str(local)]


@pytest.mark.parametrize(
    ("item", "message"),
    [
        pytest.param("nix.jsonl", "does not exist", id="object"),
        pytest.param("nix/", "there is no", id="prefix"),
        pytest.param("nix*", "no object matches", id="glob"),
        pytest.param("a//b", "empty segment", id="empty segment"),
        pytest.param("a/../b", "empty segment", id="dots"),
    ],
)
def test_what_is_not_there_is_told_before_anything_is_sent(inbox: str, item: str, message: str) -> None:
    """A URL that stands for nothing is a usage error that names it."""
    with pytest.raises(UsageError, match=message) as told:
        read.sources([inbox + item])

    assert repr(inbox + item) in str(told.value)


# ── errors ────────────────────────────────────────────────────────────────────────────────────────────


def test_a_refusal_says_what_the_store_said_and_no_secret(bucket: Bucket) -> None:
    """A forbidden object is an error with URL, status and the store's words; the rest of its body may repeat keys."""
    bucket.gate.refuses = lambda method, key: True

    with pytest.raises(StorageError) as told:
        object_store.read(f"{bucket.url}a.jsonl")

    text = f"{told.value.message} {told.value.hint}"
    assert f"{bucket.url}a.jsonl" in text
    assert "403 Forbidden: AccessDenied: Access Denied" in text
    assert "AWS_ACCESS_KEY_ID" in text
    assert KEY not in text
    assert SECRET not in text


def test_a_bucket_that_does_not_exist_is_told(bucket: Bucket) -> None:
    """The store's own words tell a missing bucket from a missing object."""
    with pytest.raises(UsageError, match="NoSuchBucket"):
        read.sources(["s3://no-such-bucket/folder/"])


@pytest.mark.parametrize("url", ["s3://", "s3:///key", "gs://", "s3://key:secret@bucket/q.jsonl"])
def test_a_url_without_a_bucket_is_refused(url: str) -> None:
    """What names no bucket is a usage error, not a request to somebody."""
    with pytest.raises(UsageError, match="names no bucket"):
        read.sources([url])


def test_before_sending_errors_are_of_usage() -> None:
    """The same failure is a mistake of the command before anything was sent, and of storage later."""
    with pytest.raises(UsageError, match="down") as told, object_store.before_sending():
        raise StorageError("down", hint="wait")

    assert told.value.hint == "wait"


def test_without_the_extra_it_is_told_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where obstore is not installed, the error names the command that installs it."""
    monkeypatch.setitem(sys.modules, "obstore.store", None)

    with pytest.raises(PipelineError) as told:
        object_store.head("s3://bucket-without-a-library/q.jsonl")

    assert (told.value.exit_code, told.value.hint) == (2, "pip install 'pipeline[cloud]'")


def test_files_cost_no_import(tmp_path: Path) -> None:
    """Who reads files only never loads the library of stores."""
    (tmp_path / "q.jsonl").write_bytes(b'{"a": 1}\n')
    script = (
        "import sys; from pipeline.inputs import reader; "
        "print(list(reader.lines('q.jsonl', 99)) and 'obstore' in sys.modules)"
    )

    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, check=True, text=True)

    assert done.stdout == "False\n"
