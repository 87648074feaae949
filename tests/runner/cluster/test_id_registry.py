"""Cut anywhere, planned in any order: ids and digests are what they are when one planner reads it all."""

from __future__ import annotations

import json
from itertools import accumulate, pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.config import Config
from pipeline.core.errors import TryLaterError
from pipeline.core.types import IdRange
from pipeline.inputs import reader
from pipeline.inputs.planner import Planner
from pipeline.inputs.reader import Line
from pipeline.inputs.sources import ByteRange, cut
from pipeline.runner.cluster.id_registry import NONE, IdRegistry, Scan
from pipeline.runner.cluster.worker import Worker
from pipeline.runner.options import Options

# Few ids and few texts, so that they meet again; and an id that looks like one that is made up.
_IDS = st.sampled_from([None, None, "a", "b", "line-made-up-2"])
_TEXTS = st.sampled_from(["same", "same", "other"])
_LINES = st.lists(st.tuples(_IDS, _TEXTS) | st.just("broken"), max_size=24)


def _bytes(item: tuple[str | None, str] | str) -> bytes:
    if isinstance(item, str):
        return item.encode()
    custom_id, text = item
    value = {"model": "gpt-6-luna", "messages": [{"role": "user", "content": text}]}
    return json.dumps(value | ({"custom_id": custom_id} if custom_id else {})).encode()


def _planned(lines: list[bytes], before: IdRange) -> tuple[list[tuple[str, str]], IdRange]:
    planner = Planner(Config())
    planner.claim(before)
    items = [planner.plan(Line(source="q.jsonl", number=1, data=data)) for data in lines]
    return [(item.custom_id, item.digest) for item in items], planner.take_claims()


@given(_LINES, st.lists(st.integers(0, 24), max_size=4))
def test_parts_are_planned_as_one(items: list[tuple[str | None, str] | str], cuts: list[int]) -> None:
    """Equal lines are counted over all parts, and an id that was used in one is used in all."""
    lines = [_bytes(item) for item in items]
    edges = sorted({0, len(lines), *(cut for cut in cuts if cut < len(lines))})
    register = IdRegistry()
    found: list[tuple[str, str]] = []

    for start, end in pairwise(edges):
        before: IdRange | None = NONE
        for _ in range(len(lines) + 2):
            assert before is not None
            names, claims = _planned(lines[start:end], before)
            before = register.settle(Scan(lines=end - start, keys=(), claims=claims, before=before))
            if before is None:
                break
        assert before is None, "it comes to an end"
        found += names

    assert found == _planned(lines, NONE)[0]


# ── spans ─────────────────────────────────────────────────────────────────────────────────────────────


@given(st.lists(st.binary(max_size=9).map(lambda data: data.replace(b"\n", b"")), max_size=30), st.integers(1, 40))
def test_spans_are_the_input_cut_at_line_ends(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], size: int
) -> None:
    """Together they are all of it, none is much larger than wanted, and each line is whole in one of them."""
    path = tmp_path_factory.mktemp("spans") / "in.jsonl"
    content = b"\n".join(lines)
    if content.startswith((b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"\xef\xbb\xbf")):
        return
    path.write_bytes(content)

    spans = list(cut(str(path), size))

    assert [(span.start, span.end) for span in spans] == list(pairwise([0, *(span.end or 0 for span in spans)]))
    assert b"".join(content[span.start : span.end] for span in spans) == content
    assert all(content[: span.end].endswith(b"\n") or span.end == len(content) for span in spans)
    counts = accumulate((content[span.start : span.end].count(b"\n") for span in spans), initial=1)
    numbered = [
        ByteRange(source=s.source, start=s.start, end=s.end, number=n) for s, n in zip(spans, counts, strict=False)
    ]
    assert [line for span in numbered for line in reader.lines(span, 100)] == list(reader.lines(str(path), 100))


def test_what_is_compressed_is_one_span(tmp_path: Path) -> None:
    """An archive cannot be read from its middle."""
    import gzip

    path = tmp_path / "in.jsonl.gz"
    path.write_bytes(gzip.compress(b"".join(b'{"n":%d}\n' % n for n in range(100_000))))

    (span,) = cut(str(path), 1_000)

    assert sum(1 for _ in reader.lines(span, 100)) == 100_000


async def test_a_changed_input_is_not_planned(tmp_path: Path) -> None:
    """A span is of the file that was cut, not of what is in its place now."""
    path = tmp_path / "in.jsonl"
    path.write_bytes(_bytes((None, "same")) + b"\n")
    (span,) = cut(str(path), 1_000)
    worker = Worker(Config(), Options(), run_id="r", broker=None, first_share=1.0)  # type: ignore[arg-type]
    assert (await worker.scan([span], NONE)).lines == 1

    path.write_bytes(_bytes((None, "other")) + b"\n\n")

    with pytest.raises(TryLaterError, match="was changed"):
        await worker.scan([span], NONE)


def test_a_file_that_changes_while_it_is_read_is_no_mixture(tmp_path: Path) -> None:
    """What was read until then stands; the rest is an error that says so, and not what has come in its place."""
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"".join(b'{"n":%07d}\n' % n for n in range(100_000)))
    (span,) = cut(str(path), 10**9)
    lines = reader.lines(span, 100)
    first = next(lines)

    path.write_bytes(b'{"other":1}\n' * 100_000)
    *rest, last = lines

    assert first.data == b'{"n":0000000}'
    assert all(line.data.startswith(b'{"n"') for line in rest)
    assert "was changed while it was being read" in (last.problem or "")
