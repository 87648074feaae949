"""Who is held on one core, and for how long; and that all threads are meant."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.core import cpu_affinity
from pipeline.core.cpu_affinity import Use, is_contended, keep

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other systems cannot hold a program on a core")


class Over(Exception):
    """The end of the story that a test tells."""


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> list[set[int]]:
    """What would have been held, on a machine with the cores 0 to 3, of which the busiest thread runs on 2."""
    held: list[set[int]] = []
    monkeypatch.setattr(cpu_affinity, "hold", held.append)
    monkeypatch.setattr(cpu_affinity, "_busiest", lambda: 2)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    return held


def _use(wall: float, processor: float, waits: int) -> Use:
    return Use(wall=wall, processor=processor, waits=waits)


def _keep(looks: list[tuple[float, int]]) -> list[float]:
    """Let a program use, look by look, so much of a core and so many waits a second; return what was waited."""
    moments = iter([use for busy, waits in looks for use in (_use(0, 0, 0), _use(1, busy, waits))])
    waited: list[float] = []

    def use() -> Use:
        try:
            return next(moments)
        except StopIteration:
            raise Over from None

    with pytest.raises(Over):
        keep(waited.append, use)
    return waited


def test_a_program_that_hands_its_lock_around_is_held_and_let_go(held: list[set[int]]) -> None:
    """It is let go before each look: one that is held could not be told from one that need not be."""
    waited = _keep([(1.1, 13_000), (1.0, 9_000)] * 2)

    assert held == [{2}, {0, 1, 2, 3}] * 2
    assert waited == [cpu_affinity._LOOK_SECONDS, cpu_affinity._LOOK_SECONDS, cpu_affinity._HOLD_SECONDS] * 2


def test_one_look_alone_decides_nothing(held: list[set[int]]) -> None:
    """Work that begins looks like work whose threads fight, for a moment."""
    assert _keep([(1.1, 7_000), (1.25, 7_000)]) == [
        cpu_affinity._LOOK_SECONDS,
        cpu_affinity._LOOK_SECONDS,
        cpu_affinity._PAUSE_SECONDS,
    ]
    assert held == []


def test_without_proc_nothing_is_held(held: list[set[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread ends in silence, and the program runs as it would without it."""

    def current() -> int:
        raise FileNotFoundError

    monkeypatch.setattr(cpu_affinity, "_busiest", current)
    keep(lambda seconds: None, iter([_use(0, 0, 0), _use(1, 1.1, 13_000)] * 2).__next__)
    assert held == []


def test_what_is_held_is_let_go_come_what_may(held: list[set[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no more files can be opened for a while, the threads cannot be listed: it is tried until they can."""
    troubles = iter([None, OSError("Too many open files"), OSError("Too many open files"), None])

    def hold(wanted: set[int]) -> None:
        if trouble := next(troubles):
            raise trouble
        held.append(wanted)

    monkeypatch.setattr(cpu_affinity, "hold", hold)
    waited = _keep([(1.1, 13_000)] * 2)

    assert held == [{2}, {0, 1, 2, 3}]
    assert waited[2:] == [cpu_affinity._HOLD_SECONDS, cpu_affinity._PAUSE_SECONDS, cpu_affinity._PAUSE_SECONDS]


@pytest.mark.parametrize(
    ("busy", "waits"),
    [
        pytest.param(0.1, 200, id="waits for its provider"),
        pytest.param(0.4, 4_000, id="is not the limit"),
        pytest.param(1.0, 100, id="one thread works"),
        pytest.param(1.25, 8_000, id="threads unpack large answers side by side"),
        pytest.param(1.9, 500, id="threads work side by side"),
    ],
)
def test_others_are_left_alone(held: list[set[int]], busy: float, waits: int) -> None:
    """Who waits for answers, starts, or compresses and hashes in several threads, gains nothing by one core."""
    assert _keep([(busy, waits)]) == [cpu_affinity._LOOK_SECONDS, cpu_affinity._PAUSE_SECONDS]
    assert held == []


def test_a_clock_that_stands_still_proves_nothing() -> None:
    """Two looks at one moment are no measure."""
    assert not is_contended(_use(1, 1, 1), _use(1, 2, 9_999))


@pytest.fixture
def all_cores() -> Iterator[set[int]]:
    """The cores of this process, which it has again afterwards."""
    before = os.sched_getaffinity(0)
    yield before
    cpu_affinity.hold(before)


def test_all_threads_are_held(all_cores: set[int]) -> None:
    """A thread that began before is held, one that begins later inherits it, and all are let go."""
    done = threading.Event()
    seen: list[set[int]] = []

    def look() -> None:
        seen.append(os.sched_getaffinity(0))

    def look_when_done() -> None:
        done.wait()
        look()

    early = threading.Thread(target=look_when_done)
    early.start()
    core = cpu_affinity._busiest()
    cpu_affinity.hold({core})
    done.set()
    early.join()
    late = threading.Thread(target=look)
    late.start()
    late.join()
    look()
    cpu_affinity.hold(all_cores)
    look()

    assert seen == [{core}, {core}, {core}, all_cores]


def test_the_core_is_one_of_ours(all_cores: set[int]) -> None:
    """What proc(5) tells is where this process may run, whatever its name looks like there."""
    name = Path("/proc/self/comm").read_text()
    assert cpu_affinity._busiest() in all_cores
    Path("/proc/self/comm").write_text("a) b (c")
    assert cpu_affinity._busiest() in all_cores
    Path("/proc/self/comm").write_text(name)


def test_a_thread_that_ends_meanwhile_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Between the look and the hold a thread may be gone, or the core: the others are held."""
    (tmp_path / "4194305").mkdir()
    monkeypatch.setattr(cpu_affinity, "_TASKS", tmp_path)
    cpu_affinity.hold({0})
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "stat").write_text("1 (a) b) " + " ".join(map(str, range(3, 53))))
    assert cpu_affinity._busiest() == 39
