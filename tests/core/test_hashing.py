from __future__ import annotations

import subprocess
import sys

from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.core.hashing import FingerprintMap, FingerprintSet, fingerprint

FINGERPRINTS = st.integers(1, 2**64 - 1) | st.integers(1, 50) | st.integers(1, 50).map(lambda n: n * 1024)
VALUES = st.integers(0, 2**64 - 1)


@given(st.lists(FINGERPRINTS), st.lists(FINGERPRINTS))
def test_a_set_is_a_set(added: list[int], asked: list[int]) -> None:
    """A fingerprint set answers as Python's own set does, colliding slots included."""
    found, expected = FingerprintSet(), set[int]()

    news = [found.add(item) for item in added]

    assert news == [item not in expected and not expected.add(item) for item in added]  # type: ignore[func-returns-value]
    assert len(found) == len(expected)
    assert [item in found for item in asked + added] == [item in expected for item in asked + added]


@given(st.lists(FINGERPRINTS), st.lists(FINGERPRINTS), st.lists(FINGERPRINTS))
def test_many_are_added_at_once(added: list[int], more: list[int], together: list[int]) -> None:
    """Very many are added as one by one; all of some only where each of them is new."""
    found, expected = FingerprintSet(), {*added, *more}
    for item in added:
        found.add(item)

    found.update(more)
    were_new = found.add_all(together)

    assert were_new == (len(expected | {*together}) == len(expected) + len(together))
    expected |= {*together} if were_new else set()
    assert len(found) == len(expected)
    assert [item in found for item in added + more + together] == [item in expected for item in added + more + together]


@given(st.lists(st.tuples(FINGERPRINTS, VALUES)), st.lists(FINGERPRINTS))
def test_a_map_is_a_dict(pairs: list[tuple[int, int]], asked: list[int]) -> None:
    """A fingerprint map answers as a dict does: the last value of a key counts."""
    found, expected = FingerprintMap(), dict(pairs)

    for item, value in pairs:
        found.put(item, value)

    assert len(found) == len(expected)
    assert [found.get(item) for item in [*asked, *expected]] == [expected.get(item) for item in [*asked, *expected]]
    assert [item in found for item in asked] == [item in expected for item in asked]


@settings(max_examples=5)
@given(st.integers(0, 2**32), st.integers(800, 20_000))
def test_tables_grow(start: int, count: int) -> None:
    """A set and a map keep all they hold while they grow over their first size, several times."""
    items = [fingerprint(str(start + number)) for number in range(count)]
    known, places, at_once = FingerprintSet(), FingerprintMap(), FingerprintSet()

    at_once.update(items)
    for place, item in enumerate(items):
        known.add(item)
        places.put(item, place)

    assert len(known) == len(places) == len(at_once) == count
    assert all(item in at_once for item in items)
    assert all(item in known for item in items)
    assert [places.get(item) for item in items] == list(range(count))
    assert fingerprint("other") not in known
    assert places.get(fingerprint("other")) is None


@given(st.lists(st.text(), min_size=1))
def test_a_fingerprint_is_64_bits_and_not_zero(parts: list[str]) -> None:
    """Every text has a fingerprint that a table can hold, and 0 stays the mark of a free slot."""
    assert 1 <= fingerprint(*parts) < 2**64


def test_fingerprints_are_the_same_in_every_process() -> None:
    """A later run finds what an earlier one did: the fingerprint does not depend on Python's hash seed."""
    script = "from pipeline.core.hashing import fingerprint; print(fingerprint('a', 'é'))"

    done = subprocess.run([sys.executable, "-c", script], env={"PYTHONHASHSEED": "7"}, capture_output=True, check=True)

    assert int(done.stdout) == fingerprint("a", "é")


def test_parts_are_told_apart() -> None:
    """The parts of a fingerprint do not run into each other, and lone surrogates have one, too."""
    marks = {fingerprint("ab", "c"), fingerprint("a", "bc"), fingerprint("abc"), fingerprint("\ud800")}

    assert len(marks) == 4
