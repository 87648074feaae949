"""Events and the progress of a run, as text and as JSON lines."""

from __future__ import annotations

import io
import re
from typing import get_args

import anyio
import orjson
import pytest
import rich.console

from pipeline.cli.console import Console, Event
from pipeline.cli.progress import LOG_SECONDS, watcher
from pipeline.core.types import Allowance, Usage
from pipeline.dispatch.live import model_queue
from pipeline.dispatch.live.sender import Statistics
from pipeline.results.codec import StoredResult
from pipeline.results.totals import Totals
from pipeline.runner.run import Progress

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


def _console(**how: bool) -> tuple[Console, io.StringIO]:
    """Return a console that prints into memory, as on a narrow terminal."""
    output = io.StringIO()
    terminal = rich.console.Console(file=output, width=40, markup=False, highlight=False)
    return Console(terminal, **how), output


def test_an_event_is_one_line_as_text_and_as_json() -> None:
    """Text has a prefix, JSON has level and fields; neither is wrapped, parsed as markup, or left unescaped."""
    text = "[red]\x1b[2J" + "a long text " * 5
    escaped = "[red]\\x1b[2J" + "a long text " * 5

    text_console, text_output = _console()
    text_console.emit("warning", text, left=2)
    json_console, json_output = _console(is_json=True)
    json_console.emit("warning", text, left=2)

    assert text_output.getvalue() == f"! {escaped}\n"
    event = orjson.loads(json_output.getvalue())
    assert (event["level"], event["event"], event["message"], event["left"]) == ("warning", "warning", escaped, 2)


def test_json_escapes_control_characters_in_fields() -> None:
    """JSON lines are ASCII: C1 controls, direction marks and lone surrogates in a field are escaped."""
    console, output = _console(is_json=True)

    console.emit("message", "x", name="\x9b31m\u202e\ud800é")

    assert output.getvalue().isascii()
    assert '"name": "\\u009b31m\\u202e\\ud800\\u00e9"' in output.getvalue()


def test_a_terminal_wraps_messages_between_words_but_not_commands() -> None:
    """On a terminal a long message is wrapped at spaces; the command to continue stays one line, to be copied."""
    output = io.StringIO()
    terminal = rich.console.Console(file=output, width=20, force_terminal=True, color_system=None)
    console = Console(terminal)

    console.emit("message", "no word of this is broken")
    console.emit("resume", "pipeline run questions.jsonl")

    assert output.getvalue().splitlines() == [
        "no word of this is ",
        "broken",
        "to continue: pipeline run questions.jsonl",
    ]


@pytest.mark.parametrize("is_json", [False, True])
def test_a_quiet_console_prints_only_errors(is_json: bool) -> None:
    """A quiet console prints errors, hints, and why a run stopped; it shows no progress."""
    console, output = _console(is_json=is_json, is_quiet=True)

    for event in get_args(Event):
        console.emit(event, f"this is {event}")

    assert re.findall(r"this is (\w+)", output.getvalue()) == ["stopped", "error", "hint"]
    assert watcher(console, "log") is None


class Run:
    """A run in which a request of twenty tokens succeeds every two seconds."""

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
            in_flight=3, attempts=5, billed=2, rate_limited=1, failed=1, unknown=0, dropped=0, queues=lanes
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


async def _log_lines(console: Console, output: io.StringIO) -> list[str]:
    """Return the lines that are printed in two and a half minutes of a run."""
    watch = watcher(console, "auto")
    assert watch
    with anyio.move_on_after(2.5 * LOG_SECONDS):
        await watch(Run().progress)
    return output.getvalue().splitlines()


@pytest.mark.looptime
@pytest.mark.usefixtures("creeping_clock")
async def test_a_log_has_a_line_of_progress_per_minute() -> None:
    """Without a terminal there is one line per minute with counts, throughput, and what each model waits for."""
    lines = await _log_lines(*_console())

    rest = (
        "1 failed · 2 retrying · 0.5 req/s · 10 tok/s · 3 in flight · 1 × 429; "
        "openai/m: 3 of 4 in flight, requests 50% of 1,000/min, 1 × 429, waiting 12 s: slow down"
    )
    assert lines == [f"32 of 900+; {rest}", f"62 of 900+; {rest}"]


@pytest.mark.looptime
@pytest.mark.usefixtures("creeping_clock")
async def test_a_json_log_has_the_progress_as_fields() -> None:
    """The same in JSON: the counts, the throughput, and each model, as fields."""
    lines = await _log_lines(*_console(is_json=True))

    first, second = (orjson.loads(line) for line in lines)
    assert (first["event"], first["elapsed_s"], second["elapsed_s"]) == ("progress", 60, 120)
    assert (second["succeeded"], second["failed"], second["reused"]) == (60, 1, 1)
    assert (second["requests_per_s"], second["tokens_per_s"]) == (0.5, 10.0)
    assert (second["read"], second["total"], second["in_flight"], second["retrying"]) == (900, None, 3, 2)
    assert [(each["model"], each["cooldown_s"]) for each in second["lanes"]] == [("m", 12.0)]
