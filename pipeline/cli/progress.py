"""The progress of a run: a bar on a terminal, elsewhere a line per minute."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import anyio
import rich.console
from rich.live import Live
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pipeline.core.text import escape

if TYPE_CHECKING:
    from pipeline.cli.console import Console
    from pipeline.core.types import Allowance
    from pipeline.dispatch.batch.store import BatchRecord
    from pipeline.dispatch.live.model_queue import Statistics
    from pipeline.runner.run import Progress, Watch

    GetProgress = Callable[[], Progress]

LOG_SECONDS = 60.0
_REFRESH_SECONDS = 0.25
_THROUGHPUT_SECONDS = 10.0  # throughput is the mean of this time
_MAX_DETAILS = 6  # lines about models and batches


def watcher(console: Console, mode: str) -> Watch | None:
    """Return what shows the progress of a run, given a mode; None for none.

    The modes are `bar`, `log`, `none` and `auto`: a bar on a terminal, else a log. Nothing is shown when quiet, and
    never a bar among JSON lines.
    """
    if console.is_quiet or mode == "none":
        return None
    is_bar = mode == "bar" or (mode == "auto" and console.terminal.is_terminal)
    if is_bar and not console.is_json:
        return _Bar(console.terminal).watch
    return _Log(console).watch


@dataclass(frozen=True, slots=True)
class _Throughput:
    """Requests and tokens finished per second."""

    requests: float
    tokens: float


class _ThroughputMeter:
    """Measures the throughput of the last seconds."""

    def __init__(self) -> None:
        self._samples: list[tuple[float, int, int]] = []  # time, requests, tokens; the oldest first

    def measure(self, progress: Progress) -> _Throughput:
        now = progress.elapsed_s
        tokens = progress.run.tokens
        self._samples.append((now, progress.run.finished, tokens.input + tokens.output))
        # Two samples stay at least: without an older one there is nothing to compare with.
        while len(self._samples) > 2 and self._samples[0][0] < now - _THROUGHPUT_SECONDS:
            self._samples.pop(0)
        if len(self._samples) < 2:
            return _Throughput(0.0, 0.0)
        first_time, first_requests, first_tokens = self._samples[0]
        _, last_requests, last_tokens = self._samples[-1]
        seconds = max(now - first_time, 1e-9)
        return _Throughput((last_requests - first_requests) / seconds, (last_tokens - first_tokens) / seconds)


class _Bar:
    """A progress bar with details below it, redrawn a few times a second."""

    def __init__(self, terminal: rich.console.Console) -> None:
        self._terminal = terminal
        self._meter = _ThroughputMeter()

    async def watch(self, get_progress: GetProgress) -> None:
        with Live(console=self._terminal, auto_refresh=False, transient=True) as live:
            while True:
                live.update(self._draw(get_progress()), refresh=True)
                await anyio.sleep(_REFRESH_SECONDS)

    def _draw(self, progress: Progress) -> rich.console.RenderableType:
        is_counting = progress.total is None and not _done(progress)
        # A total of 0 would be a bar without an end.
        total = progress.total or progress.read or 1
        head = Table.grid(padding=(0, 1), expand=True)
        head.add_column(ratio=1)
        head.add_column(justify="right")
        head.add_row(
            ProgressBar(total=total, completed=_done(progress), pulse=is_counting),
            Text(_count(progress)),
        )
        facts = Text(_facts(progress, self._meter.measure(progress)))
        details = [Padding(Text(line, style="yellow"), (0, 0, 0, 2)) for line in _details(progress)]
        return rich.console.Group(head, facts, *details)


class _Log:
    """A line of progress per minute."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._meter = _ThroughputMeter()

    async def watch(self, get_progress: GetProgress) -> None:
        self._meter.measure(get_progress())
        while True:
            await anyio.sleep(LOG_SECONDS)
            progress = get_progress()
            throughput = self._meter.measure(progress)
            text = "; ".join([_count(progress), _facts(progress, throughput), *_details(progress)])
            self._console.emit("progress", text, **_fields(progress, throughput))


def _done(progress: Progress) -> int:
    return progress.run.finished + progress.reused


def _count(progress: Progress) -> str:
    """Return e.g. `32 of 900`, or `32 of 900+` while the input is still being read."""
    plus = "+" if progress.total is None else ""
    return f"{_done(progress):,} of {progress.read:,}{plus}"


def _retrying(progress: Progress) -> int:
    return sum(queue.retrying for queue in progress.sender.queues)


def _fields(progress: Progress, throughput: _Throughput) -> dict[str, Any]:
    """Return the progress as JSON fields; `total` is null until the whole input was read."""
    sender = progress.sender
    return {
        "elapsed_s": round(progress.elapsed_s, 3),
        "read": progress.read,
        "total": progress.total,
        "reused": progress.reused,
        "succeeded": progress.run.succeeded,
        "failed": progress.run.failed,
        "invalid": progress.run.invalid,
        "retrying": _retrying(progress),
        "in_flight": sender.in_flight,
        "rate_limited": sender.rate_limited,
        "requests_per_s": round(throughput.requests, 3),
        "tokens_per_s": round(throughput.tokens, 3),
        "tokens": progress.run.tokens.as_dict(),
        "is_draining": progress.is_draining,
        "lanes": [asdict(queue) for queue in sender.queues],
        "batches": [batch.as_dict() for batch in progress.batches if batch.is_open],
    }


def _facts(progress: Progress, throughput: _Throughput) -> str:
    """Return one line: failures, throughput, what is in flight, and how long the rest will take."""
    sender = progress.sender
    facts = [
        f"{progress.run.failed + progress.run.invalid:,} failed",
        f"{_retrying(progress):,} retrying",
        f"{throughput.requests:,.1f} req/s",
        f"{throughput.tokens:,.0f} tok/s",
        f"{sender.in_flight:,} in flight",
    ]
    if sender.rate_limited:
        facts.append(f"{sender.rate_limited:,} × 429")
    if progress.total is not None and throughput.requests:
        left = progress.total - _done(progress)
        facts.append(f"ETA {timedelta(seconds=round(left / throughput.requests))}")
    if progress.is_draining:
        facts.append("stopping: waiting for requests in flight")
    return " · ".join(facts)


def _details(progress: Progress) -> list[str]:
    """Return a line for each model, with its limits and what it waits for, and one for each open batch."""
    lines = [_model(queue) for queue in progress.sender.queues if queue.ended or queue.waiting or queue.in_flight]
    lines += [_batch(batch) for batch in progress.batches if batch.is_open]
    hidden = len(lines) - _MAX_DETAILS
    if hidden > 0:
        return [*lines[:_MAX_DETAILS], f"and {hidden:,} more"]
    return lines


def _model(queue: Statistics) -> str:
    """Return e.g. `openai/gpt-6-luna: 27 of 100 in flight, requests 98% of 1,000/min`."""
    name = escape(f"{queue.provider}/{queue.model}", 60)
    if queue.ended:
        return f"{name}: stopped: {escape(queue.ended, 160)}"
    parts = [f"{queue.in_flight:,} of {queue.window:,} in flight"]
    for limit in queue.allowances:
        # Providers report many limits; those that are hardly used say nothing.
        if limit.source != "told" or limit.used > 0.01:
            parts.append(_limit(limit))
    if queue.rate_limited:
        parts.append(f"{queue.rate_limited:,} × 429")
    if queue.cooldown_s:
        parts.append(f"waiting {queue.cooldown_s:,.0f} s: {escape(queue.trouble or 'rate limit', 80)}")
    elif queue.waiting_for:
        parts.append(f"waiting for {queue.waiting_for}")
    return f"{name}: {', '.join(parts)}"


def _batch(batch: BatchRecord) -> str:
    """Return e.g. `openai/gpt-6-luna: batch batch_67f: in_progress, 1,200 of 50,000 answered, 3 failed`."""
    name = escape(batch.group, 60)
    if batch.batch_id is None:
        return f"{name}: submitting {batch.requests:,} requests as a batch: {batch.step.value}"
    parts = [escape(batch.status, 40)]
    if batch.succeeded is None:
        parts.append(f"{batch.requests:,} requests")
    else:
        parts.append(f"{batch.succeeded:,} of {batch.requests:,} answered")
    if batch.failed:
        parts.append(f"{batch.failed:,} failed")
    return f"{name}: batch {escape(batch.batch_id, 80)}: {', '.join(parts)}"


def _limit(limit: Allowance) -> str:
    """Return e.g. `requests 98% of 1,000/min`."""
    kind = limit.kind.replace("_", " ")
    return f"{kind} {limit.used:.0%} of {limit_prefix(limit)}{limit.per_minute:,.0f}/min"


def limit_prefix(limit: Allowance) -> str:
    """Return what to print before a limit: `~` if it is inferred, `your ` if the user set it."""
    return {"cap": "your ", "found": "~"}.get(limit.source, "")
