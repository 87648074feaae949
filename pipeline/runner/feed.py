"""From lines to requests: what of the inputs is still to be sent, and what is known of it already.

Lines are read in batches. A batch whose lines all have results is known by its checksum (`index`) and passed over; the
lines of the others are planned, and each is looked up by its identity in what the results file holds.
"""

from __future__ import annotations

from array import array
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from itertools import chain, islice

from anyio import to_thread

from pipeline.core.clock import Clock
from pipeline.core.config import Config
from pipeline.core.errors import UsageError
from pipeline.core.hashing import FingerprintMap, FingerprintSet, checksum
from pipeline.core.types import IdRange, Request, Result
from pipeline.inputs import planner, reader
from pipeline.inputs.planner import Invalid
from pipeline.inputs.reader import Batch, Line
from pipeline.inputs.retired_models import RetiredModels
from pipeline.inputs.sources import ByteRange, can_be_read_again
from pipeline.results import writer
from pipeline.results.resume_index import InputRange, PendingRanges
from pipeline.results.writer import Done, ResultWriter
from pipeline.runner import factory
from pipeline.runner.dedupe import Deduper, copies
from pipeline.runner.options import Options

PREVIEW_LINES = 2_000
# What is read in one go: a thread hop pays only for many lines.
_READ_LINES = 256
_READ_BYTES = 512 * 1024


class InputFeed:
    """The inputs of one run.

    `lines` counts what was read, `reused` the lines among them with a result of an earlier run, `reused_failed` those
    of them that failed; `retired` holds a warning for each retired
    model in the preview.
    """

    def __init__(
        self,
        sources: Sequence[str | ByteRange],
        settings: Config,
        options: Options,
        result_writer: ResultWriter,
        clock: Clock,
        say: Callable[[str], None],
    ) -> None:
        if options.dedupe and not all(map(_is_file, sources)):
            raise UsageError("--dedupe requires files: a pipe can be read only once")
        self.lines = 0
        self.reused = 0
        self.reused_failed = 0
        self._is_all_read = False
        self.retired: list[str] = []
        self._sources = sources
        self._settings = settings
        self._options = options
        self._writer = result_writer
        self._clock = clock
        self._say = say
        self._planner = factory.planner(settings, options)
        self._retired = RetiredModels(settings, model=options.model, today=clock.moment().date())
        self._basis = self._planner.basis()
        self._pending = PendingRanges()
        self._done = Done()
        self._originals = Deduper() if options.dedupe else None
        self._positions: FingerprintMap | None = None
        self._previewed = array("Q")
        self._held = FingerprintSet()
        self._held_seen = FingerprintSet()
        self._brought = array("Q")

    @property
    def is_all_read(self) -> bool:
        """Return True once the end of the inputs was reached; `lines` is their total then."""
        return self._is_all_read

    # ── before ────────────────────────────────────────────────────────────────────────────────────────────────────

    def preview(self) -> dict[tuple[str, str], Request]:
        """Plan the first lines of files; return a request for each provider and model among them."""
        planner = factory.planner(self._settings, self._options)
        found: dict[tuple[str, str], Request] = {}
        files = [source for source in self._sources if _is_file(source)]
        for line in islice(self._lines_of(files), min(PREVIEW_LINES, self._options.limit or PREVIEW_LINES)):
            item = planner.plan(line)
            if isinstance(item, Request):
                found.setdefault((item.provider, item.model), item)
                self._previewed.append(writer.key(item.custom_id, item.digest))
                notice = self._retired.notice(line, item)
                if notice:
                    self.retired.append(notice)
        return found

    def learn(self, done: Done) -> None:
        """Take what the results file holds."""
        self._done = done
        if self._originals:
            with self._writer.path.open("rb") as file:
                self._originals.read(file, answered_only=self._options.retry_failed)
        may_tidy = done.lines or done.damaged or self._settings.output.ordered
        if may_tidy and not all(map(_is_file, self._sources)):
            self._positions = FingerprintMap()  # what can be read only once tells its places now or never

    def notice(self) -> str | None:
        """Return what should be said of the results, and of what is in batches, before anything is spent."""
        done, held = self._done, self._held
        known = sum(done.outcome(request) is not None or request in held for request in self._previewed)
        if not (done.lines or len(held)) or known == len(self._previewed):
            return None
        where = "have results or are in batches" if len(held) else "have results"
        return (
            f"{known:,} of the first {len(self._previewed):,} requests {where}; the others are sent: "
            "they are not done yet, or new, also by a changed line, model or setting"
        )

    def skip_in_batch(self, requests: Iterable[Request]) -> None:
        """Skip requests that are in batches of earlier runs; with `dedupe` also requests that are equal to them."""
        keys = array("Q")
        for request in requests:
            keys.append(writer.key(request.custom_id, request.digest))
            if self._originals:
                self._originals.add(request.digest)
        self._held.update(keys)

    def outcome(self, custom_id: str, digest: str) -> bool | None:
        """Return True when the results of earlier runs hold an answer, False when they hold a failure, None if none."""
        return self._done.outcome(writer.key(custom_id, digest))

    def is_wanted(self, custom_id: str, digest: str) -> bool:
        """Return True if the input has a request that is in a batch of an earlier run; known once all is read."""
        return writer.key(custom_id, digest) in self._held_seen

    @property
    def extra(self) -> int:
        """How many results came from batches of earlier runs for requests that the input has no more."""
        return sum(request not in self._held_seen for request in self._brought)

    # ── lines that are planned elsewhere ──────────────────────────────────────────────────────────────────────────

    def claim(self, claims: IdRange) -> None:
        """Note what lines left behind that come before these and are planned elsewhere."""
        self._planner.claim(claims)

    def skip_done(self, requests: Iterable[int]) -> None:
        """Skip requests that have results elsewhere, given by their keys."""
        for request in requests:
            self._done.add(request, success=True)

    def count_planned(self, requests: Sequence[int]) -> list[int]:
        """Count lines that were planned elsewhere, given by their keys; return those with results of earlier runs."""
        self.lines += len(requests)
        return [request for request in requests if self._earlier_outcome(request) is not None]

    def end(self) -> None:
        """Note that the end of the inputs was reached."""
        self._is_all_read = True

    # ── feeding ───────────────────────────────────────────────────────────────────────────────────────────────────

    async def feed(self, submit: Callable[[Sequence[Request]], Awaitable[None]]) -> None:
        """Plan every line and submit what is not done yet; the lines that cannot be requests are recorded."""
        self._done.sort()  # here and now: beside other tables, and in their thread, it takes a third less memory
        sizes = self._writer.range_sizes()
        batches = reader.batches(self._sources, self._settings.input.max_line_bytes, sizes)
        while not self._is_limit_reached():
            known = await to_thread.run_sync(self._read_on, batches, abandon_on_cancel=True)
            if not known:
                break
            for batch, mark, input_range in known:
                if not (input_range and self._pass_over(input_range)):
                    await submit(await self._plan(batch, mark))
        self.end()

    def finished(self, result: Result) -> None:
        """Note that a line has its result now, so that its batch may be passed over by later runs."""
        request = writer.key(result.custom_id, result.digest)
        if request in self._held:  # its line may stand elsewhere by now
            self._brought.append(request)
            return
        failed = request if result.failure else None
        if input_range := self._pending.finished(result.source, result.line, failed):
            self._writer.mark_range_done(input_range)

    def copies(self, run_id: str) -> Iterator[list[bytes]]:
        """Yield, in groups, result lines for requests that were not sent as an equal one was; none without `dedupe`."""
        if self._originals is None:
            return
        lines = islice(self._lines_of(self._sources), self.lines)
        planner = factory.planner(self._settings, self._options)
        with self._writer.path.open("rb") as file:
            copied = copies(
                file,
                lines,
                planner,
                run_id=run_id,
                at=self._clock.utc(),
                retry_failed=self._options.retry_failed,
            )
            while group := list(islice(copied, _READ_LINES)):
                yield group

    def _lines_of(self, sources: Sequence[str | ByteRange]) -> Iterator[Line]:
        return chain.from_iterable(reader.lines(each, self._settings.input.max_line_bytes) for each in sources)

    def _read_on(self, batches: Iterator[Batch]) -> list[tuple[Batch, bytes, InputRange | None]]:
        """Return some batches, each with its checksum and what is known of it."""
        known: list[tuple[Batch, bytes, InputRange | None]] = []
        lines = size = 0
        while lines < _READ_LINES and size < _READ_BYTES:
            batch = next(batches, None)
            if batch is None:
                break
            mark = checksum(self._basis, batch.content)
            input_range = self._writer.find_range(mark, checksum(batch.first_line()))
            known.append((batch, mark, input_range))
            size += len(batch.content)
            lines += 0 if input_range else batch.count
        return known

    def _is_limit_reached(self) -> bool:
        return self._options.limit is not None and self.lines >= self._options.limit

    def _pass_over(self, input_range: InputRange) -> bool:
        """Count the lines of a finished range as done without planning them, if planning would find the same."""
        limit = self._options.limit
        outcomes = [self._done.outcome(request) for request in input_range.failed]
        if (
            self._positions is not None
            or (limit is not None and self.lines + input_range.lines > limit)
            or None in outcomes
            or (self._options.retry_failed and False in outcomes)
            or any(request in self._held for request in input_range.failed)
            or not self._planner.claim(input_range.claims)
        ):
            return False
        self.lines += input_range.lines
        self.reused += input_range.lines
        self.reused_failed += outcomes.count(False)
        return True

    async def _plan(self, batch: Batch, mark: bytes) -> list[Request]:
        """Return the requests of a batch that are to be sent; record the lines that cannot be."""
        wanted: list[Request] = []
        invalid: list[Result] = []
        failed = array("Q")
        copied = held = 0
        lines = batch.lines()
        for line in lines:
            if self._is_limit_reached():
                break
            self.lines += 1
            item = self._planner.plan(line)
            request = writer.key(item.custom_id, item.digest)
            outcome = self._earlier_outcome(request)
            if outcome is not None:
                if not outcome:
                    failed.append(request)
            elif request in self._held:
                held += 1
                self._held_seen.add(request)
            elif isinstance(item, Invalid):
                invalid.append(planner.invalid_result(item, self._clock))
            elif self._originals is None or self._originals.add(item.digest):
                wanted.append(item)
                notice = self._retired.notice(line, item)
                if notice:  # its first use is beyond the preview; nothing was sent for it yet
                    self._say(notice)
            else:
                copied += 1
        else:
            waiting = len(wanted) + len(invalid) + copied
            self._follow(batch, mark, len(lines), failed, waiting=waiting, is_known=not held)
        if invalid:
            await self._writer.append(*invalid)
        return wanted

    def _earlier_outcome(self, request: int) -> bool | None:
        """Return whether a line was answered by an earlier run, and count it as reused; None where it is to be done."""
        if self._positions is not None:
            self._positions.put(request, len(self._positions))
        outcome = self._done.outcome(request)
        if outcome is None or (outcome is False and (self._options.retry_failed or request in self._held)):
            return None
        self.reused += 1
        self.reused_failed += not outcome
        return outcome

    def _follow(
        self, batch: Batch, mark: bytes, lines: int, failed: array[int], *, waiting: int, is_known: bool
    ) -> None:
        """Add the batch to the index as a finished range, once all its lines have results.

        Where it is not `is_known` how many are to come, a later run will tell.
        """
        claims = self._planner.take_claims()
        if batch.problem or not is_known or not claims.is_alone:
            return
        start = checksum(batch.first_line())
        input_range = InputRange(
            mark=mark, start=start, size=len(batch.content), lines=lines, claims=claims, failed=failed
        )
        if waiting:
            self._pending.add(input_range, batch.source, range(batch.number, batch.number + batch.count), waiting)
        else:
            self._writer.mark_range_done(input_range)

    # ── after ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def wants_tidying(self) -> bool:
        """Return True if the results may hold lines that others replaced or that are out of order, and all is known."""
        has_leftovers = self._done.lines != self.reused or self._done.damaged > 0 or self.extra > 0
        return self.is_all_read and self._options.limit is None and (has_leftovers or self._settings.output.ordered)

    def places(self) -> tuple[FingerprintMap, FingerprintSet]:
        """Return the place of each request in the inputs, and the ids in them.

        Files are read once more for it, as they are now: places are seldom wanted, and take 20 bytes a line.
        """
        if self._positions is not None:
            return self._positions, self._planner.ids
        positions = FingerprintMap()
        planner = factory.planner(self._settings, self._options)
        for line in self._lines_of(self._sources):
            item = planner.plan(line)
            positions.put(writer.key(item.custom_id, item.digest), len(positions))
            planner.take_claims()
        return positions, planner.ids


def _is_file(source: str | ByteRange) -> bool:
    return can_be_read_again(str(source))
