"""Damaged results, from a whole run's point of view: what is readable is kept, the rest is done again and told."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.torture.jobs import Job, beside, judge, providing, whole_lines

COUNT = 12
DAMAGED = 5  # the line in the middle that is struck


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    """A job that is finished."""
    with providing(latency=0.0) as provider:
        finished = Job(folder=tmp_path, output=tmp_path / "out.jsonl", provider=provider, count=COUNT)
        assert finished.finish() == 0
        yield finished


def _repaired(job: Job, exit_code: int) -> None:
    """Run a job again: it ends as it should, the time after that with 0, and has every line once."""
    assert job.finish() == exit_code
    assert job.finish() == 0
    verdict = judge(job, stops=0, durable=[], exit_code=0)
    assert (verdict.lost, verdict.duplicates, verdict.torn, verdict.swapped, verdict.wrong_tokens) == (0, 0, 0, 0, 0)


@pytest.mark.parametrize(
    ("damage", "exit_code"),
    [
        pytest.param(lambda line: [bytes([line[0] ^ 1]) + line[1:]], 6, id="a bit that flipped"),
        pytest.param(lambda line: [line[:100] + b"\0" * 512 + line[612:]], 6, id="a block of NULs"),
        pytest.param(lambda line: [line[:-1] + b"\xff"], 6, id="a byte that is not UTF-8"),
        pytest.param(lambda line: [b"\0" * 4096], 6, id="nothing but NULs"),
        pytest.param(lambda line: [line[:50], line[50:]], 6, id="a line in two"),
        pytest.param(lambda line: [], 0, id="a line that is gone"),
        pytest.param(lambda line: [line, line], 0, id="a line twice"),
    ],
)
def test_damage_in_the_middle_costs_its_own_line_only(
    damage: Callable[[bytes], list[bytes]], exit_code: int, job: Job
) -> None:
    """The other lines stay to the byte, the damaged one is kept aside and done again, and the exit code tells."""
    lines = whole_lines(job.output)
    struck = damage(lines[DAMAGED])
    others = lines[:DAMAGED] + lines[DAMAGED + 1 :]
    job.output.write_bytes(b"".join(line + b"\n" for line in [*lines[:DAMAGED], *struck, *lines[DAMAGED + 1 :]]))

    _repaired(job, exit_code)

    kept = whole_lines(job.output)
    assert [line for line in kept if line in others] == others
    assert Counter(whole_lines(beside(job.output, ".superseded.jsonl"))) == Counter(struck) - Counter(kept)


@pytest.mark.parametrize("keeps", [0.0, 0.3, 0.6, 0.999])
@pytest.mark.parametrize("filling", [b"", b"\0" * 4000, b"\xc3"], ids=["cut", "NULs", "half a character"])
def test_a_torn_tail_costs_its_own_line_only(keeps: float, filling: bytes, job: Job) -> None:
    """After a crash in the middle of a line the next run keeps what is before it and does that one again."""
    *others, last = whole_lines(job.output)
    tail = last[: int(len(last) * keeps)] + filling
    job.output.write_bytes(b"".join(line + b"\n" for line in others) + tail)

    _repaired(job, 0)

    assert whole_lines(job.output)[:-1] == others


def test_separators_inside_an_answer_end_no_line(job: Job) -> None:
    """Only a newline ends a line: what other tools take for one stays inside its answer."""
    lines = whole_lines(job.output)
    special = lines[0].replace(b'"content":"sim:', '"content":"\u2028\u2029\u0085 sim:'.encode())
    job.output.write_bytes(b"".join(line + b"\n" for line in [special, *lines[1:]]))
    received = job.provider.statistics()["received"]

    assert job.finish() == 0
    assert whole_lines(job.output) == [special, *lines[1:]]
    assert job.provider.statistics()["received"] == received
