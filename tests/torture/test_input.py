"""Hostile lines, ids and files: each has a verdict, nothing crashes, and nothing is sent that was not written."""

from __future__ import annotations

import gzip
import json
import math
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import orjson
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from pipeline.cli.main import main
from pipeline.core.config import Config
from pipeline.core.types import Request
from pipeline.inputs import check, reader
from pipeline.inputs.planner import Invalid, Planner
from pipeline.inputs.reader import Line
from tests.torture.fuzz import fuzz
from tests.torture.lines import LINES, NAMES, Case, Name, anthropic_line, exactly, openai_line
from tests.torture.listener import listening
from tests.torture.memory import checked, conversations

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

MEGABYTE = 1024 * 1024
GOOD = openai_line("good")


# ── lines, over the wire ────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a run made of a file: results by line, and what each body on the wire asked."""

    folder: Path
    code: int
    told: str
    results: dict[int, dict[str, Any]]
    sent: dict[str, list[bytes]]


def run(folder: Path, lines: list[bytes]) -> Outcome:
    """Run the command on some lines against a server that keeps what it gets."""
    (folder / "in.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\n".join(lines))
    with listening() as wire:
        environ = {"PATH": os.environ["PATH"], "PYTHONPATH": str(Path(__file__).parents[2]), **wire.environ}
        words = [sys.executable, "-m", "pipeline", "run", "in.jsonl", "-o", "out.jsonl", "--echo-request"]
        done = subprocess.run(words, cwd=folder, env=environ, capture_output=True, timeout=50, check=False)
    sent: dict[str, list[bytes]] = {}
    for body in wire.bodies:
        sent.setdefault(orjson.loads(body)["messages"][0]["content"], []).append(body)
    results = [orjson.loads(line) for line in (folder / "out.jsonl").read_bytes().split(b"\n")[:-1]]
    assert len({result["line"] for result in results}) == len(results)
    return Outcome(
        folder=folder,
        code=done.returncode,
        told=done.stderr.decode(),
        results={result["line"]: result for result in results},
        sent=sent,
    )


@pytest.fixture(scope="module")
def listed(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """A run over all listed lines, each followed by a good one; the last has no end."""
    lines = [line for n, case in enumerate(LINES) for line in (case.data, openai_line(f"good {n}"))]
    return run(tmp_path_factory.mktemp("lines"), lines)


@pytest.mark.parametrize(("number", "case"), list(enumerate(LINES)), ids=[case.id for case in LINES])
def test_every_line_has_its_verdict(listed: Outcome, number: int, case: Case) -> None:
    """A line is sent with every value as written, or is a line error with file, line and reason and is not sent; the
    line after it is answered."""
    result = listed.results[2 * number + 1]

    if case.reason is None:
        written = exactly(case.data.strip())
        body = written["body" if b'"body"' in case.data else "params"]
        assert result["success"], result["error"]
        assert [exactly(sent) for sent in listed.sent[case.id]] == [body]
    else:
        assert (result["success"], result["error"]["type"]) == (False, "invalid_line")
        assert result["error"]["message"].startswith(f"in.jsonl:{2 * number + 1}: ")
        assert case.reason in result["error"]["message"]
        assert case.id not in listed.sent
    assert listed.results[2 * number + 2]["success"]
    assert len(listed.sent[f"good {number}"]) == 1


def test_bad_lines_do_not_end_a_run(listed: Outcome) -> None:
    """Every line has one result, and the exit code says that some are invalid."""
    assert listed.code == 1
    assert sorted(listed.results) == list(range(1, 2 * len(LINES) + 1))
    assert "Traceback" not in listed.told


# ── ids ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """A run over all listed ids, from a folder inside another."""
    folder = tmp_path_factory.mktemp("ids") / "a" / "b"
    folder.mkdir(parents=True)
    lines = [openai_line(f"line {n}").replace(b'"line %d"' % n, name.written, 1) for n, name in enumerate(NAMES, 1)]
    return run(folder, lines)


@pytest.mark.parametrize(("number", "name"), list(enumerate(NAMES, 1)), ids=[name.id for name in NAMES])
def test_every_id_has_its_verdict(named: Outcome, number: int, name: Name) -> None:
    """An id is kept as it is, whatever it would mean to a file system, or refused with a reason and not sent."""
    result = named.results[number]

    if name.custom_id is not None:
        assert (result["success"], result["custom_id"]) == (True, name.custom_id)
        assert len(named.sent[f"line {number}"]) == 1
    else:
        assert not result["success"]
        assert name.reason in result["error"]["message"]
        assert f"line {number}" not in named.sent


def test_no_id_has_two_answers(named: Outcome) -> None:
    """Under one id stands one answer at most."""
    answered = Counter(result["custom_id"] for result in named.results.values() if result["success"])

    assert set(answered.values()) == {1}
    assert len(answered) == sum(name.custom_id is not None for name in NAMES)


def test_ids_name_no_files(named: Outcome) -> None:
    """Nothing is written but the results and what belongs to them, wherever an id points."""
    files = sorted(path.name for path in named.folder.parents[1].rglob("*") if path.is_file())

    assert files == ["in.jsonl", "out.attempts.jsonl", "out.index", "out.jsonl", "out.usage.json"]


@pytest.mark.parametrize("source", ["listed", "named"])
def test_nothing_in_a_line_acts_on_the_screen(source: str, request: pytest.FixtureRequest) -> None:
    """Whatever stands in keys, values and ids, what `run` and `check` say of it is made of printable characters."""
    outcome: Outcome = request.getfixturevalue(source)
    checked_lines = CliRunner().invoke(main, ["check", str(outcome.folder / "in.jsonl")])

    said = outcome.told + checked_lines.output
    assert said.count("\n") > 10
    assert [char for char in said if not char.isprintable() and char != "\n"] == []


def test_ids_are_compared_over_dialects_and_files(tmp_path: Path) -> None:
    """An id that stands in two files, in two dialects, once as a number, is an error the second time."""
    (tmp_path / "a.jsonl").write_bytes(openai_line("7"))
    (tmp_path / "b.jsonl").write_bytes(anthropic_line("7").replace(b'"7"', b"7", 1))

    assert verdict(str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")) == (
        *(1, 1),
        "custom_id '7' was used before; each line needs its own id",
    )


def test_a_derived_id_never_meets_a_given_one() -> None:
    """Equal lines without ids are counted past an id that somebody gave to another line."""
    planner = Planner(Config())
    nameless = b'{"messages":[{"role":"user","content":"x"}]}'
    first = planner.plan(Line(source="q", number=1, data=nameless)).custom_id
    given = planner.plan(Line(source="q", number=2, data=openai_line(f"{first}-2"))).custom_id

    again = [planner.plan(Line(source="q", number=n, data=nameless)).custom_id for n in (3, 4)]

    assert [given, *again] == [f"{first}-2", f"{first}-3", f"{first}-4"]


# ── files ───────────────────────────────────────────────────────────────────────────────────────────────


def verdict(*sources: str, settings: Config | None = None) -> tuple[int, int, str]:
    """Return the number of valid lines, of invalid ones, and the reason of the first, without its place."""
    problems: list[str] = []
    report = check.check(sources, settings or Config(), on_problem=problems.append)
    reason = problems[0].split(": ", 1)[1] if problems else ""
    return report.lines - report.invalid, report.invalid, reason


def numbered(count: int) -> bytes:
    return b"".join(openai_line(str(number)) + b"\n" for number in range(count))


def with_window(log: int) -> bytes:
    """Return a zstd frame of one good line that asks for a window of 2^log bytes."""
    frame = zstd.compress(GOOD, options={zstd.CompressionParameter.content_size_flag: 0})
    assert frame[4] & 0b0010_0000 == 0, "a frame with a window of its own"
    return frame[:5] + bytes([(log - 10) << 3]) + frame[6:]


def corrupt_checksum() -> bytes:
    archive = gzip.compress(numbered(20))
    return archive[:-8] + bytes([archive[-8] ^ 1]) + archive[-7:]


FILES: dict[str, tuple[bytes, tuple[int, int, str]]] = {
    "empty": (b"", (0, 0, "")),
    "blank lines only": (b"\n \n\t\r\n", (0, 0, "")),
    "BOM only": (b"\xef\xbb\xbf", (0, 0, "")),
    "BOM, CRLF, no last end": (b"\xef\xbb\xbf\r\n" + GOOD + b"\r\n \n" + anthropic_line("b"), (2, 0, "")),
    "NUL tail of a crashed writer": (GOOD + b"\n" + b"\0" * 4096, (1, 1, "not valid JSON")),
    "UTF-16": ('{"a":1}\n{"b":2}\n'.encode("utf-16"), (0, 3, "not valid JSON")),
    "one JSON array over many lines": (b"[\n" + GOOD + b",\n" + GOOD + b"\n]\n", (1, 3, "not valid JSON")),
    "indented JSON": (b'{\n  "messages": []\n}\n', (0, 3, "not valid JSON")),
    "gzip": (gzip.compress(numbered(20)), (20, 0, "")),
    "gzip, two members": (gzip.compress(GOOD[:50]) + gzip.compress(GOOD[50:]), (1, 0, "")),
    "gzip, empty": (gzip.compress(b""), (0, 0, "")),
    "gzip, zeros after the end": (gzip.compress(numbered(3)) + b"\0" * 512, (3, 0, "")),
    "gzip, garbage after the end": (gzip.compress(numbered(3)) + b"x", (3, 1, "the input cannot be read beyond")),
    "gzip, cut": (gzip.compress(numbered(20))[:-9], (20, 1, "the input cannot be read beyond")),
    "gzip, header only": (gzip.compress(b"")[:10], (0, 1, "the input cannot be read beyond")),
    "gzip, wrong checksum": (corrupt_checksum(), (20, 1, "the input cannot be read beyond")),
    "zstd": (zstd.compress(numbered(20)), (20, 0, "")),
    "zstd, two frames": (zstd.compress(GOOD[:50]) + zstd.compress(GOOD[50:]), (1, 0, "")),
    "zstd, skippable frame first": (b"\x50\x2a\x4d\x18\x04\0\0\0abcd" + zstd.compress(numbered(3)), (3, 0, "")),
    "zstd, garbage after the end": (zstd.compress(numbered(3)) + b"x", (3, 1, "the input cannot be read beyond")),
    "zstd, cut": (zstd.compress(numbered(20))[:-5], (0, 1, "the input cannot be read beyond")),
    "zstd, window of 2 GB": (with_window(31), (0, 1, "the input cannot be read beyond")),
    "xz": (b"\xfd7zXZ\0\0\x04", (0, 1, "not valid JSON")),
}  # fmt: skip


@pytest.mark.parametrize("name", ["q.jsonl", "q.jsonl.gz", "q.jsonl.zst", "q"])
@pytest.mark.parametrize(("data", "expected"), list(FILES.values()), ids=list(FILES))
def test_every_file_has_its_verdict(tmp_path: Path, data: bytes, expected: tuple[int, int, str], name: str) -> None:
    """A file is read to its end, or as far as it can be and then a line says why, whatever it is called."""
    (tmp_path / name).write_bytes(data)

    valid, invalid, reason = verdict(str(tmp_path / name))

    assert (valid, invalid) == expected[:2], reason
    assert reason.startswith(expected[2])


def test_a_folder_of_mixed_files(tmp_path: Path) -> None:
    """A folder stands for its inputs: plain, compressed and linked ones once each, never other files or results."""
    (tmp_path / "a.jsonl").write_bytes(openai_line("a"))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(openai_line("b")))
    (tmp_path / "c.jsonl.zst").write_bytes(zstd.compress(openai_line("c")))
    (tmp_path / "d.jsonl").symlink_to("a.jsonl")
    for other in ("a.results.jsonl", "a.json", "notes.txt", ".a.jsonl.swp", "a.jsonl~"):
        (tmp_path / other).write_bytes(b"not for reading")
    (tmp_path / "folder").mkdir()

    assert verdict(str(tmp_path)) == (3, 0, "")


def test_a_pipe_is_read_once(tmp_path: Path) -> None:
    """A named pipe is an input like a file, up to where its writer closes it."""
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(numbered(500),))
    writer.start()

    found = verdict(str(tmp_path / "pipe"))

    writer.join()
    assert found == (500, 0, "")


def test_a_device_without_end_is_given_up() -> None:
    """What never ends its line is given up as one error: it cannot keep a run for ever."""
    assert verdict("/dev/zero") == (
        *(0, 1),
        "the input cannot be read beyond this line: no line ends within 1,073,741,824 bytes",
    )


def test_a_null_device_is_empty() -> None:
    """The null device is an input without lines."""
    assert verdict(os.devnull) == (0, 0, "")


_LINE_BYTES = len(openai_line("00000000")) + 1


def cut(path: Path) -> None:
    os.truncate(path, 7_000 * _LINE_BYTES + 50)


def grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(openai_line("late") + b"\n")


def replace(path: Path) -> None:
    path.with_name("new").write_bytes(GOOD)
    path.with_name("new").rename(path)


@pytest.mark.parametrize(
    ("change", "valid", "invalid"),
    [
        pytest.param(cut, 7_000, 1, id="cut: the line at the cut is torn"),
        pytest.param(grow, 20_001, 0, id="appended: the new line is read"),
        pytest.param(replace, 20_000, 0, id="replaced: the old file is read to its end"),
        pytest.param(Path.unlink, 20_000, 0, id="deleted: read to its end"),
    ],
)
def test_files_may_change_while_they_are_read(
    tmp_path: Path, change: Callable[[Path], None], valid: int, invalid: int
) -> None:
    """What changes in a file while it is read changes which lines there are and no other line."""
    path = tmp_path / "q.jsonl"
    path.write_bytes(b"".join(openai_line(f"{number:08}") + b"\n" for number in range(20_000)))
    planner = Planner(Config())
    lines = reader.lines(str(path), MEGABYTE)
    items = [planner.plan(next(lines))]

    change(path)
    items += map(planner.plan, lines)

    bad = [item.failure.message for item in items if isinstance(item, Invalid)]
    assert (len(items) - len(bad), len(bad)) == (valid, invalid)
    assert all("not valid JSON" in message for message in bad)
    assert [item.line for item in items if isinstance(item, Request)] == list(range(1, valid + 1))


# ── an output that is an input ──────────────────────────────────────────────────────────────────────────


def by_path(folder: Path) -> tuple[str, str]:
    return "in.jsonl", "in.jsonl"


def by_detour(folder: Path) -> tuple[str, str]:
    return "in.jsonl", "../" + folder.name + "/./in.jsonl"


def by_link(folder: Path) -> tuple[str, str]:
    (folder / "link").symlink_to("in.jsonl")
    return "in.jsonl", "link"


def by_link_of_a_link(folder: Path) -> tuple[str, str]:
    (folder / "one").symlink_to("in.jsonl")
    (folder / "two").symlink_to("one")
    return "two", "one"


def by_linked_folder(folder: Path) -> tuple[str, str]:
    (folder / "here").symlink_to(".")
    return "in.jsonl", "here/in.jsonl"


def by_hard_link(folder: Path) -> tuple[str, str]:
    os.link(folder / "in.jsonl", folder / "twin.jsonl")
    return "in.jsonl", "twin.jsonl"


def by_glob(folder: Path) -> tuple[str, str]:
    return "*.jsonl", "in.jsonl"


def by_folder(folder: Path) -> tuple[str, str]:
    return ".", "in.jsonl"


def by_open_file(folder: Path) -> tuple[str, str]:
    return "-", "in.jsonl"


@pytest.mark.parametrize(
    "disguise",
    [
        *(by_path, by_detour, by_link, by_link_of_a_link, by_linked_folder, by_hard_link),
        *(by_glob, by_folder, by_open_file),
    ],
)
def test_an_input_is_never_written(tmp_path: Path, disguise: Callable[[Path], tuple[str, str]]) -> None:
    """An output that is an input under another name is refused with exit 2, and the input keeps every byte."""
    (tmp_path / "in.jsonl").write_bytes(GOOD + b"\n")
    source, output = disguise(tmp_path)
    words = [sys.executable, "-m", "pipeline", "run", source, "-o", output, "--simulate"]

    with (tmp_path / "in.jsonl").open("rb") as stdin:
        environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        done = subprocess.run(words, cwd=tmp_path, env=environ, stdin=stdin, capture_output=True, check=False)

    assert done.returncode == 2, done.stderr
    assert (tmp_path / "in.jsonl").read_bytes() == GOOD + b"\n"
    assert not (tmp_path / "in.usage.json").exists()


# ── properties ──────────────────────────────────────────────────────────────────────────────────────────

_LETTERS = st.sampled_from('":\\{}[],eE-+.0aé\u2028\x7f\U0001f642')
_TEXTS = st.text(max_size=5) | st.text(_LETTERS, max_size=8)
_DIGITS = st.text("0123456789", min_size=1, max_size=30)
_NUMBERS = st.one_of(
    st.integers().map(str),
    st.integers(-(10**300), 10**300).map(str),
    st.floats(allow_nan=False, allow_infinity=False).map(repr),
    st.builds("{}{}.{}".format, st.sampled_from(["", "-"]), st.integers(0, 10**20), _DIGITS),
    st.builds("{}.{}e{}".format, st.integers(0, 9), _DIGITS, st.integers(-330, 310)),
)
_SPACES = st.sampled_from(["", "", "", " ", "\t", " \r "])


def _spelled(text: str) -> str:
    """Return a JSON string, with an escape for every third letter."""
    return '"' + "".join(
        f"\\u{ord(letter):04x}" if (n % 3 == 1 and ord(letter) < 0x10000) else orjson.dumps(letter).decode()[1:-1]
        for n, letter in enumerate(text)
    ) + '"'  # fmt: skip


def _array(items: list[str], space: str) -> str:
    return f"[{space}" + f"{space},".join(items) + "]"


def _object(pairs: dict[str, str], space: str) -> str:
    return "{" + f",{space}".join(f"{_spelled(key)}{space}:{value}" for key, value in pairs.items()) + f"{space}}}"


_JSON = st.recursive(
    st.sampled_from(["null", "true", "false"]) | _NUMBERS | _TEXTS.map(_spelled),
    lambda children: (
        st.builds(_array, st.lists(children, max_size=4), _SPACES)
        | st.builds(_object, st.dictionaries(_TEXTS, children, max_size=4), _SPACES)
    ),
    max_leaves=10,
)


def _is_lost(data: bytes) -> bool:
    """Tell a value with a number that no double can hold: it would arrive as 0 or as infinity."""
    numbers: list[str] = []
    json.loads(data, parse_float=numbers.append)
    return any(Decimal(number) != 0 and float(number) in (0.0, math.inf, -math.inf) for number in numbers)


@pytest.mark.parametrize("write", [openai_line, anthropic_line])
@given(value=_JSON)
def test_what_is_sent_is_what_was_written(write: Callable[[str, bytes], bytes], value: str) -> None:
    """A body in a provider's own dialect goes out with every key in its place and every number with its value; what
    no double can hold is refused."""
    data = write("q", value.encode())

    item = Planner(Config()).plan(Line(source="q", number=1, data=data))

    if _is_lost(data):
        assert isinstance(item, Invalid)
    else:
        assert isinstance(item, Request), item.failure.message
        written = exactly(data)
        assert exactly(item.body) == written["body" if write is openai_line else "params"]


@given(value=_JSON, key=_TEXTS, others=st.dictionaries(_TEXTS, _JSON, max_size=3), again=_JSON, escape=st.booleans())
def test_no_key_is_lost(value: str, key: str, others: dict[str, str], again: str, escape: bool) -> None:
    """A key that stands twice in one object is refused, however it is spelled and whatever stands around it."""
    pairs = [(key, value), *((name, item) for name, item in others.items() if name != key), (key, again)]
    spell: Callable[[str], str] = _spelled if escape else lambda name: orjson.dumps(name).decode()
    written = "{" + ",".join(f"{spell(name) if n else _spelled(name)}:{item}" for n, (name, item) in enumerate(pairs))

    item = Planner(Config()).plan(Line(source="q", number=1, data=openai_line("q", written.encode() + b"}")))

    assert isinstance(item, Invalid)


def test_mutated_inputs_raise_typed_errors_only(tmp_path: Path) -> None:
    """Of 20,000 harmed lines, results, answers, headers, archives and settings each is read or refused by a typed
    error. (The long form: `python -m tests.torture.fuzz --inputs 10000000`.)"""
    counts, finds = fuzz(20_000, 1, tmp_path)

    assert finds == []
    assert sum(counts.values()) == 20_000
    assert {name for name, _ in counts} == {name for name, is_accepted in counts if is_accepted}


# ── pace and memory ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("sign", [b"", b"-"])
@pytest.mark.parametrize("write", [openai_line, anthropic_line])
def test_absurd_token_limits_can_be_reckoned_with(write: Callable[[str, bytes], bytes], sign: bytes) -> None:
    """A body may ask for any number of tokens, as its provider is the judge; nobody here stumbles over it."""
    fields = b'1,"max_tokens":%s%s,"n":%s' % (sign, b"9" * 300, b"9" * 300)
    data = write("q", fields).replace(b'"max_tokens":5,', b"")

    item = Planner(Config()).plan(Line(source="q", number=1, data=data))

    assert isinstance(item, Request)
    assert item.max_output_tokens in (None, 10**9)


needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")


def long_line(pack: Callable[[bytes], bytes]) -> Iterator[bytes]:
    """Yield a good line, one of 200 MB, and another good one."""
    yield pack(openai_line("before") + b"\n")
    yield pack(b'{"messages":"')
    for _ in range(200):
        yield pack(b"x" * MEGABYTE)
    yield pack(b'"}\n' + openai_line("after") + b"\n")


@needs_proc
@pytest.mark.parametrize("pack", [pytest.param(bytes, id="plain"), gzip.compress, zstd.compress])
def test_a_long_line_costs_no_memory(pack: Callable[[bytes], bytes]) -> None:
    """A line of 200 MB, also one that hides in an archive of 200 kB, is refused with less than 64 MB."""
    without = checked([pack(openai_line("before") + b"\n")])

    found = checked(long_line(pack))

    assert (found.lines, found.invalid) == (3, 1)
    assert found.peak_kb - without.peak_kb < 64 * 1024


@pytest.mark.slow
@needs_proc
def test_memory_does_not_follow_the_lines() -> None:
    """Of each line only a fingerprint of its id is kept: 150,000 more cost some 3 MB. (The long form:
    `python -m tests.torture.memory --lines 1000000`.)"""
    few, many = checked(conversations(50_000)), checked(conversations(200_000))

    assert (few.invalid, many.invalid, many.lines) == (0, 0, 200_000)
    assert many.peak_kb - few.peak_kb < 5 * 1024
