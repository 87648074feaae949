from __future__ import annotations

import gzip
import os
import subprocess
import sys
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.errors import UsageError
from pipeline.inputs import reader
from pipeline.inputs.reader import Line
from pipeline.results import writer

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

LIMIT = 1_000
MEGABYTE = 1024 * 1024
BOM = b"\xef\xbb\xbf"
GOOD = b'{"a":1}\n{"b":2}\n'
COMPRESSIONS = [
    pytest.param(gzip.compress, id="gzip"),
    pytest.param(zstd.compress, id="zstd"),
]


@pytest.fixture
def file(tmp_path: Path) -> Callable[[bytes], str]:
    """Write an input file and return its name."""

    def write(data: bytes, name: str = "q.jsonl") -> str:
        path = tmp_path / name
        path.write_bytes(data)
        return str(path)

    return write


def numbered(source: str, limit: int = LIMIT) -> list[tuple[int, bytes]]:
    return [(line.number, line.data) for line in reader.lines(source, limit)]


# ── lines ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        pytest.param(b"", [], id="empty file"),
        pytest.param(b"a\nb\n", [(1, b"a"), (2, b"b")], id="two lines"),
        pytest.param(b"a\nb", [(1, b"a"), (2, b"b")], id="no final newline"),
        pytest.param(b"\n \na\n\t\r\nb\n\n", [(3, b"a"), (5, b"b")], id="blank lines are counted"),
        pytest.param(b"a\r\nb\r\n", [(1, b"a\r"), (2, b"b\r")], id="CRLF"),
        pytest.param(
            "a\u2028b\n\u0085\n".encode(), [(1, "a\u2028b".encode()), (2, "\u0085".encode())], id="U+2028, U+0085"
        ),
        pytest.param(BOM + b"a\nb\n", [(1, b"a"), (2, b"b")], id="BOM at the start"),
        pytest.param(BOM, [], id="BOM alone"),
        pytest.param(BOM + b"\na\n", [(2, b"a")], id="BOM on a blank line"),
        pytest.param(b"a\n" + BOM + b"b\n", [(1, b"a"), (2, BOM + b"b")], id="BOM in the middle stays"),
        pytest.param(BOM + BOM + b"a\n", [(1, BOM + b"a")], id="second BOM stays"),
    ],
)
def test_lines_are_numbered_as_an_editor_numbers_them(
    file: Callable[[bytes], str], data: bytes, expected: list[tuple[int, bytes]]
) -> None:
    """Lines keep their bytes and numbers: blank ones are left out but counted, a BOM goes only from the start."""
    assert numbered(file(data)) == expected


def test_an_overlong_line_is_a_problem_and_the_next_is_not(file: Callable[[bytes], str]) -> None:
    """A line beyond the limit says how long it is and how to allow it; the lines around it are read."""
    source = file(b"a\n" + b"x" * 1_001 + b"\nb\n")

    first, long, last = reader.lines(source, LIMIT)

    assert (first.problem, last.problem) == (None, None)
    assert (last.number, last.data) == (3, b"b")
    assert long.problem == "longer than 1,000 bytes (1,001); raise input.max_line_bytes to allow it"


def test_a_line_of_exactly_the_limit_is_read(file: Callable[[bytes], str]) -> None:
    """The limit itself is allowed."""
    assert numbered(file(b"x" * LIMIT + b"\n")) == [(1, b"x" * LIMIT)]


@pytest.mark.parametrize("compress", COMPRESSIONS)
@pytest.mark.parametrize(
    "name",
    [
        pytest.param("q.jsonl", id="plain name"),
        pytest.param("q.jsonl.gz", id="gz"),
        pytest.param("q.jsonl.zst", id="zst"),
    ],
)
def test_compression_is_told_by_the_bytes(tmp_path: Path, compress: Callable[[bytes], bytes], name: str) -> None:
    """A compressed file is read whatever its name says."""
    (tmp_path / name).write_bytes(compress(BOM + GOOD))

    assert numbered(str(tmp_path / name)) == [(1, b'{"a":1}'), (2, b'{"b":2}')]


def test_a_plain_file_may_be_called_gz(tmp_path: Path) -> None:
    """A file that is not compressed is read although its name says so."""
    (tmp_path / "q.jsonl.gz").write_bytes(GOOD)

    assert numbered(str(tmp_path / "q.jsonl.gz")) == [(1, b'{"a":1}'), (2, b'{"b":2}')]


@pytest.mark.parametrize("compress", COMPRESSIONS)
def test_archive_members_follow_each_other(file: Callable[[bytes], str], compress: Callable[[bytes], bytes]) -> None:
    """Concatenated archives are one input; a line may begin in one and end in the next."""
    source = file(compress(b"a\nb") + compress(b"c\n") + compress(b"d\n"))

    assert numbered(source) == [(1, b"a"), (2, b"bc"), (3, b"d")]


def damaged(compress: Callable[[bytes], bytes], harm: str) -> bytes:
    """Return an archive of 2,000 lines that cannot be read to its end."""
    lines = b"".join(b"%d %s\n" % (number, os.urandom(20).hex().encode()) for number in range(2_000))
    archive = compress(lines)
    harmed = {
        "truncated": archive[: len(archive) // 2],
        "one byte short": archive[:-1],
        "trailing garbage": archive + b"garbage",
        "corrupt": archive[:-6] + bytes([archive[-6] ^ 0xFF]) + archive[-5:],
    }
    return harmed[harm]


@pytest.mark.parametrize(
    ("compress", "harm"),
    [
        pytest.param(gzip.compress, "truncated", id="gzip truncated"),
        pytest.param(gzip.compress, "one byte short", id="gzip one byte short"),
        pytest.param(gzip.compress, "corrupt", id="gzip corrupt checksum"),
        pytest.param(gzip.compress, "trailing garbage", id="gzip trailing garbage"),
        pytest.param(zstd.compress, "truncated", id="zstd truncated"),
        pytest.param(zstd.compress, "one byte short", id="zstd one byte short"),
        pytest.param(zstd.compress, "trailing garbage", id="zstd trailing garbage"),
    ],
)
def test_a_damaged_archive_ends_with_a_problem(
    file: Callable[[bytes], str], compress: Callable[[bytes], bytes], harm: str
) -> None:
    """The lines before the damage are read, then one line says that the rest is missing: never a silent end."""
    *good, last = reader.lines(file(damaged(compress, harm)), LIMIT)

    assert [line.problem for line in good] == [None] * len(good)
    assert [int(line.data.split()[0]) for line in good] == list(range(len(good)))
    assert last.number == len(good) + 1
    assert last.problem is not None
    assert last.problem.startswith("the input cannot be read beyond this line: ")


def test_an_input_that_vanished_is_a_problem(tmp_path: Path) -> None:
    """A file that is gone when its turn comes is one line that says so, so the others go on."""
    (line,) = reader.lines(str(tmp_path / "gone.jsonl"), LIMIT)

    assert (line.number, line.problem) == (1, "the input cannot be read beyond this line: No such file or directory")


def test_files_are_closed(file: Callable[[bytes], str], recwarn: pytest.WarningsRecorder) -> None:
    """Reading leaves no file open, compressed or not, to the end or not."""
    before = os.listdir("/proc/self/fd")

    for data in (GOOD, gzip.compress(GOOD), zstd.compress(GOOD)):
        source = file(data)
        list(reader.lines(source, LIMIT))
        abandoned = reader.lines(source, LIMIT)
        next(abandoned)
        del abandoned

    assert os.listdir("/proc/self/fd") == before
    assert not [warning for warning in recwarn if warning.category is ResourceWarning]


@pytest.fixture
def peak() -> Iterator[Callable[[], int]]:
    """Return how many bytes of Python objects there were at most since the test began."""
    tracemalloc.start()
    yield lambda: tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()


@pytest.mark.parametrize("compress", [pytest.param(bytes, id="plain"), *COMPRESSIONS])
def test_memory_is_bounded_by_the_limit(
    file: Callable[[bytes], str], compress: Callable[[bytes], bytes], peak: Callable[[], int]
) -> None:
    """A line of 64 MB, a bomb or not, costs no more memory than the limit and a few blocks; the next line is read."""
    source = file(compress(b"x" * 64 * MEGABYTE + b"\ngood\n"))
    tracemalloc.reset_peak()

    long, good = reader.lines(source, MEGABYTE)

    assert (long.number, good.number, good.data) == (1, 2, b"good")
    assert long.problem is not None
    assert "(67,108,864)" in long.problem
    assert len(long.data) <= 4_096
    assert peak() < 8 * MEGABYTE


# ── stdin ─────────────────────────────────────────────────────────────────────────────────────────────

READ_STDIN = "from pipeline.inputs import reader\nfor line in reader.lines('-', 100): print(line.number, line.data)"


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(BOM + GOOD, id="plain"),
        pytest.param(gzip.compress(GOOD), id="gzip"),
        pytest.param(zstd.compress(GOOD), id="zstd"),
    ],
)
def test_stdin_is_an_input(data: bytes) -> None:
    """`-` reads standard input, compressed or not."""
    done = subprocess.run([sys.executable, "-c", READ_STDIN], input=data, capture_output=True, check=True)

    assert done.stdout.decode().splitlines() == ["1 b'{\"a\":1}'", "2 b'{\"b\":2}'"]


def test_closed_stdin_is_a_usage_error() -> None:
    """Under cron standard input may be closed: that is said, and nothing crashes."""
    script = (
        "from pipeline.inputs import reader; from pipeline.core import errors\n"
        "try: reader.sources(['-'])\nexcept errors.UsageError as exc: print(exc)"
    )

    done = subprocess.run(
        ["/bin/sh", "-c", f'exec "{sys.executable}" -c "$0" <&-', script], capture_output=True, check=True
    )

    assert done.stdout.decode().strip() == "the input '-' cannot be read: standard input is closed"


# ── sources ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current directory with some inputs in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for name in ("a.jsonl", "data/b.jsonl", "data/c.jsonl.gz", "data/d.jsonl.zst", "data/notes.txt"):
        (tmp_path / name).write_bytes(GOOD)
    return tmp_path


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        pytest.param(["a.jsonl"], ["a.jsonl"], id="file"),
        pytest.param(["data/notes.txt"], ["data/notes.txt"], id="file of any name"),
        pytest.param(["data"], ["data/b.jsonl", "data/c.jsonl.gz", "data/d.jsonl.zst"], id="directory"),
        pytest.param(["data/"], ["data/b.jsonl", "data/c.jsonl.gz", "data/d.jsonl.zst"], id="directory with slash"),
        pytest.param(["data/*.jsonl*"], ["data/b.jsonl", "data/c.jsonl.gz", "data/d.jsonl.zst"], id="glob"),
        pytest.param(["**/*.jsonl"], ["a.jsonl", "data/b.jsonl"], id="deep glob"),
        pytest.param(["-"], ["-"], id="stdin"),
        pytest.param(["data/b.jsonl", "a.jsonl"], ["data/b.jsonl", "a.jsonl"], id="given order"),
        pytest.param(["a.jsonl", "a.jsonl", "-", "-"], ["a.jsonl", "-"], id="each once"),
        pytest.param(["a.jsonl", "./a.jsonl"], ["a.jsonl"], id="each once under two spellings"),
    ],
)
def test_inputs_expand(here: Path, inputs: list[str], expected: list[str]) -> None:
    """Files, globs, directories and `-` become a list of inputs in a fixed order, each once."""
    assert reader.sources(inputs) == expected


def test_a_link_and_its_file_are_one_input(here: Path) -> None:
    """A file given twice, once by a symbolic link, is read once: nothing is paid twice."""
    (here / "link.jsonl").symlink_to("a.jsonl")

    assert reader.sources(["link.jsonl", "a.jsonl"]) == ["link.jsonl"]


@pytest.mark.parametrize("item", [pytest.param("data", id="directory"), pytest.param("data/*", id="glob")])
@pytest.mark.parametrize(
    "name",
    [
        "b.results.jsonl",
        "b.results.jsonl.gz",
        "b.results.superseded.jsonl",
        "b.results.attempts.jsonl",
        "b.results.old-1.jsonl",
        "b.results.tmp.jsonl",
    ],
)
def test_our_own_files_are_no_inputs(here: Path, item: str, name: str) -> None:
    """A directory or a glob never takes files that this program wrote for questions."""
    before = reader.sources([item])

    (here / "data" / name).write_bytes(GOOD)

    assert reader.sources([item]) == before


@pytest.mark.parametrize("item", [pytest.param("data", id="directory"), pytest.param("data/*", id="glob")])
@pytest.mark.parametrize("suffix", [".jsonl", ".old-1.jsonl", ".jsonl.tmp", *writer.SIDE_FILES])
def test_the_output_may_lie_among_the_inputs(here: Path, item: str, suffix: str) -> None:
    """A directory or a glob never takes the output or what lies beside it, so the same command can be repeated."""
    output = Path("data/answers.jsonl")
    before = reader.sources([item], but=output)

    (here / "data" / f"answers{suffix}").write_bytes(GOOD)

    assert reader.sources([item], but=output) == before
    assert reader.sources([f"data/answers{suffix}"], but=output) == [f"data/answers{suffix}"]


def test_an_output_behind_a_link_may_lie_among_the_inputs(here: Path) -> None:
    """The output is known under its name, and under that of the file behind it."""
    before = reader.sources(["data"])
    (here / "data" / "real.jsonl").write_bytes(GOOD)
    (here / "data" / "answers.jsonl").symlink_to("real.jsonl")

    assert reader.sources(["data"], but=Path("data/answers.jsonl")) == before


def test_our_own_files_are_inputs_by_name(here: Path) -> None:
    """A file that is named is read, whatever it is called."""
    (here / "x.results.jsonl").write_bytes(GOOD)

    assert reader.sources(["x.results.jsonl"]) == ["x.results.jsonl"]


def test_an_existing_file_is_no_glob(here: Path) -> None:
    """A name with brackets that exists is that file."""
    (here / "a[1].jsonl").write_bytes(GOOD)

    assert reader.sources(["a[1].jsonl"]) == ["a[1].jsonl"]


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        pytest.param("missing.jsonl", "does not exist", id="missing"),
        pytest.param("missing/*.jsonl", "no file matches", id="empty glob"),
        pytest.param("empty", "contains no", id="empty directory"),
        pytest.param("dangling.jsonl", "does not exist", id="dangling link"),
        pytest.param("loop.jsonl", "does not exist", id="loop of links"),
        pytest.param("links", "does not exist", id="dangling link in a directory"),
        pytest.param("folders", "it is a directory", id="directory that is called like a file"),
        pytest.param("x" * 300, "does not exist", id="name too long"),
        pytest.param('{"messages":[' + '{"role":"user"},' * 30 + "]}", "no file matches", id="JSON in place of a file"),
        pytest.param("a\0b", "does not exist", id="NUL"),
        pytest.param("", "holds no|does not exist", id="empty name"),
        pytest.param("caf\udce9.jsonl", "is not UTF-8", id="name not in UTF-8"),
    ],
)
def test_unusable_inputs_are_refused_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, item: str, reason: str
) -> None:
    """What cannot be read is a usage error that names it, for every kind of obstacle."""
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "links", "folders", "folders/a.jsonl"):
        Path(name).mkdir()
    for link, target in (("dangling.jsonl", "gone"), ("loop.jsonl", "loop.jsonl"), ("links/a.jsonl", "gone")):
        Path(link).symlink_to(target)
    Path("caf\udce9.jsonl").write_bytes(GOOD)

    with pytest.raises(UsageError, match=reason):
        reader.sources([item])


def test_a_drop_folder_may_be_empty(tmp_path: Path) -> None:
    """Where that is said, a directory without inputs stands for none; one that does not exist is refused still."""
    assert reader.sources([str(tmp_path)], may_be_empty=True) == []
    with pytest.raises(UsageError, match="does not exist"):
        reader.sources([str(tmp_path / "absent")], may_be_empty=True)


@contextmanager
def as_an_ordinary_user() -> Iterator[None]:
    """Act as another user if the tests run as root, who may read every file."""
    if os.geteuid() != 0:
        yield
        return
    os.setresuid(65534, 65534, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


def test_an_unreadable_file_is_refused() -> None:
    """A file without read permission is a usage error before anything is sent."""
    # Not in `tmp_path`, which lies in a folder that only its owner may enter.
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        (Path(folder) / "a.jsonl").touch(mode=0)

        with as_an_ordinary_user(), pytest.raises(UsageError, match="permission denied"):
            reader.sources([f"{folder}/a.jsonl"])


# ── batches and names ─────────────────────────────────────────────────────────────────────────────────


@given(st.lists(st.integers(1, 40), max_size=4), st.integers(0, 700))
def test_batches_hold_every_line_once(tmp_path_factory: pytest.TempPathFactory, counts: list[int], more: int) -> None:
    """Batches over several inputs hold every line once and in order, at most 256 at a time."""
    folder = tmp_path_factory.mktemp("inputs")
    sources = [str(folder / f"{index}.jsonl") for index in range(len(counts))]
    for source, count in zip(sources, counts, strict=True):
        Path(source).write_bytes(b"x\n" * (count + more))

    batches = list(reader.batches(sources, LIMIT))

    expected = [
        (source, number) for source, count in zip(sources, counts, strict=True) for number in range(1, count + more + 1)
    ]
    assert [(line.source, line.number) for batch in batches for line in batch.lines()] == expected
    assert all(1 <= batch.count <= 256 for batch in batches)


def test_batches_are_bounded_in_bytes(file: Callable[[bytes], str]) -> None:
    """A batch of large lines ends when it has a megabyte, so memory does not follow the count of lines."""
    source = file((b"x" * 400_000 + b"\n") * 7)

    assert [batch.count for batch in reader.batches([source], MEGABYTE)] == [3, 3, 1]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        pytest.param("data/q.jsonl", "q", id="jsonl"),
        pytest.param("data/q.jsonl.gz", "q", id="gz"),
        pytest.param("q.jsonl.zst", "q", id="zst"),
        pytest.param("q.v2.jsonl", "q.v2", id="inner dot"),
        pytest.param("q.txt", "q.txt", id="other suffix"),
        pytest.param("-", "stdin", id="stdin"),
    ],
)
def test_stem_is_the_name_without_suffixes(source: str, expected: str) -> None:
    """Names of results are made from the input's name without its suffixes."""
    assert reader.stem(source) == expected


def test_lines_are_values() -> None:
    """A line is a value: equal by content, and frozen."""
    line = Line(source="a", number=1, data=b"x")

    assert line == Line(source="a", number=1, data=b"x", problem=None)
    with pytest.raises(AttributeError):
        line.number = 2  # type: ignore[misc]


@pytest.mark.parametrize("kept", [12, 30, 60])
def test_an_archive_that_is_cut_in_its_first_line_ends_with_a_problem(kept: int, file: Callable[[bytes], str]) -> None:
    """Where not one line is whole, the first is the one that tells of the damage."""
    archive = gzip.compress(b'{"messages":[{"role":"user","content":"' + os.urandom(500).hex().encode() + b'"}]}\n')

    (line,) = reader.lines(file(archive[:kept]), LIMIT)

    assert line.number == 1
    assert "cannot be read beyond this line" in (line.problem or "")


def test_parts_of_a_run_on_a_cluster_are_no_inputs(here: Path) -> None:
    """A glob of any depth leaves alone what workers have in work."""
    before = reader.sources(["**/*.jsonl"])
    (here / "data" / "answers.parts").mkdir()
    (here / "data" / "answers.parts" / "part-00003-00007.jsonl").write_bytes(GOOD)

    assert reader.sources(["**/*.jsonl"]) == before
