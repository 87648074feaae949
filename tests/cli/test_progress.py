"""What is told, event by event, as text and as JSON lines."""

from __future__ import annotations

import io
import re
from typing import get_args

import anyio
import orjson
import pytest
from rich.console import Console

from pipeline.cli.events import LOG_SECONDS, Event, Screen
from pipeline.core.types import Allowance, Usage
from pipeline.dispatch.live import model_queue
from pipeline.dispatch.live.sender import Statistics
from pipeline.results.codec import StoredResult
from pipeline.results.totals import Totals
from pipeline.runner.base import Progress

LANE = model_queue.Statistics(
    provider="openai",
    model="m",
    waiting=7,
    retrying=2,
    in_flight=3,
    window=4,
    rate_limited=1,
    cooldown_s=12.0,
    waiting_for="cooldown",
    trouble="slow down",
    allowances=(Allowance(kind="requests", per_minute=1000.0, used=0.5, source="told"),),
    ended=None,
)


def _screen(**how: bool) -> tuple[Screen, io.StringIO]:
    told = io.StringIO()
    return Screen(Console(file=told, width=40, markup=False, highlight=False), **how), told


def test_an_event_is_one_line_in_either_form() -> None:
    """Text has a mark and no fields; JSON has level and fields; neither is wrapped, marked up, or lets a text act."""
    text = "[red]\x1b[2J" + "a long text " * 5
    shown = "[red]\\x1b[2J" + "a long text " * 5

    as_text, text_told = _screen()
    as_text.tell("warning", text, left=2)
    as_json, json_told = _screen(is_json=True)
    as_json.tell("warning", text, left=2)

    assert text_told.getvalue() == f"! {shown}\n"
    event = orjson.loads(json_told.getvalue())
    assert (event["level"], event["event"], event["message"], event["left"]) == ("warning", "warning", shown, 2)


def test_fields_of_an_event_cannot_act() -> None:
    """JSON lines are ASCII: C1 controls, direction marks and lone surrogates in a field are escaped."""
    screen, told = _screen(is_json=True)

    screen.tell("message", "x", name="\x9b31m\u202e\ud800é")

    assert told.getvalue().isascii()
    assert '"name": "\\u009b31m\\u202e\\ud800\\u00e9"' in told.getvalue()


@pytest.mark.parametrize("is_json", [False, True])
def test_quiet_tells_errors_only(is_json: bool) -> None:
    """A quiet screen tells errors, hints, and what stopped a run; it shows no progress."""
    screen, told = _screen(is_json=is_json, is_quiet=True)

    for event in get_args(Event):
        screen.tell(event, f"this is {event}")

    assert re.findall(r"this is (\w+)", told.getvalue()) == ["stopped", "error", "hint"]
    assert screen.watcher("log") is None


class Run:
    """A run in which a request is answered every two seconds, of twenty tokens."""

    def __init__(self) -> None:
        self.start = anyio.current_time()

    def progress(self) -> Progress:
        seconds = round(anyio.current_time() - self.start)
        totals = Totals(failed=1)
        for _ in range(seconds // 2):
            usage = Usage(input_tokens=15, output_tokens=5)
            totals.add(StoredResult(custom_id="q", digest="d", success=True, provider="openai", model="m", usage=usage))
        lanes = (LANE,)
        sender = Statistics(
            in_flight=3, attempts=5, billed=2, rate_limited=1, failed=1, unknown=0, dropped=0, lanes=lanes
        )
        return Progress(
            elapsed_s=seconds,
            read=900,
            total=None,
            reused=1,
            run=totals,
            sender=sender,
            batches=(),
            is_draining=False,
        )


async def _told_of_a_run(screen: Screen, told: io.StringIO) -> list[str]:
    """Return the lines that are told in two and a half minutes."""
    watch = screen.watcher("auto")
    assert watch
    with anyio.move_on_after(2.5 * LOG_SECONDS):
        await watch(Run().progress)
    return told.getvalue().splitlines()


@pytest.mark.looptime
@pytest.mark.usefixtures("creeping_clock")
async def test_a_log_tells_the_progress_once_a_minute() -> None:
    """Without a terminal there is one line a minute with counts, pace, and what each model waits for."""
    lines = await _told_of_a_run(*_screen())

    assert lines == [
        "32 of 900+; 1 failed · 2 retrying · 0.5 req/s · 10 tok/s · 3 in flight · 1 × 429; "
        "openai/m: 3 of 4 in flight, requests 50% of 1,000/min, 1 × 429, waits 12 s: slow down",
        "62 of 900+; 1 failed · 2 retrying · 0.5 req/s · 10 tok/s · 3 in flight · 1 × 429; "
        "openai/m: 3 of 4 in flight, requests 50% of 1,000/min, 1 × 429, waits 12 s: slow down",
    ]


@pytest.mark.looptime
@pytest.mark.usefixtures("creeping_clock")
async def test_a_json_log_tells_the_progress_in_numbers() -> None:
    """The same in JSON: the counts, the pace, and each model, as fields."""
    lines = await _told_of_a_run(*_screen(is_json=True))

    first, second = (orjson.loads(line) for line in lines)
    assert (first["event"], first["elapsed_s"], second["elapsed_s"]) == ("progress", 60, 120)
    assert (second["succeeded"], second["failed"], second["reused"]) == (60, 1, 1)
    assert (second["requests_per_s"], second["tokens_per_s"]) == (0.5, 10.0)
    assert (second["read"], second["total"], second["in_flight"], second["retrying"]) == (900, None, 3, 2)
    assert [(each["model"], each["cooldown_s"]) for each in second["lanes"]] == [("m", 12.0)]
