"""The parts of a run, made from a configuration: what `job` (files) and `stream` (Python) have in common."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

from pipeline import providers
from pipeline.accounting.budget import Budget
from pipeline.accounting.pricing import LIVE, Prices
from pipeline.core import config as configuration
from pipeline.core import http as transport
from pipeline.core import money
from pipeline.core.clock import Clock
from pipeline.core.config import Config
from pipeline.core.errors import PipelineError, UsageError
from pipeline.core.redact import discreet
from pipeline.core.types import Cost, Request, Result, Usage
from pipeline.dispatch import retry
from pipeline.dispatch.batch.client import batch_client
from pipeline.dispatch.batch.coordinator import BatchLane, Input
from pipeline.dispatch.batch.lifecycle import Patience
from pipeline.dispatch.batch.store import Chunk, Chunks, Member
from pipeline.dispatch.live.model_queue import Lane
from pipeline.dispatch.live.rate_limiter import Gate
from pipeline.dispatch.live.sender import Recording, Sender
from pipeline.dispatch.live.shared_limits import Host, Leases, Lessor, quota_name
from pipeline.inputs.planner import Invalid, Planner
from pipeline.results.writer import Recorder

Ended = Mapping[tuple[str, str], PipelineError]
"""Why nothing more is sent to a model, by provider and model."""
# What an answer without a limit of its own is held for when money is set aside. It may be longer: then the cap is
# passed by that much, at most once for each call in flight.
_ASSUMED_OUTPUT_TOKENS = 8_192
# With a deadline, what a batch does not answer goes live early enough: at this pace, where no cap is told.
_ASSUMED_RPM = 1_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What a command adds to the configuration for one run.

    `provider` and `model` are for lines that do not say. `limit` takes the first lines only. `retry_failed` sends
    again what failed before; `fresh` sets earlier results aside. `dedupe` sends equal requests once and copies the
    result. `simulate` puts a simulator in the providers' place. `no_wait` leaves batches that go on to a later run.
    """

    provider: str | None = None
    model: str | None = None
    limit: int | None = None
    retry_failed: bool = False
    fresh: bool = False
    dedupe: bool = False
    simulate: bool = False
    no_wait: bool = False


class Pricing:
    """What calls of a run cost in one lane: `pricing.Pricing` over the price tables."""

    def __init__(self, prices: Prices, clock: Clock, lane: str = LIVE) -> None:
        self._lane = lane
        self._prices = prices
        self._clock = clock

    def cost(self, request: Request, model: str, usage: Usage) -> Cost:
        """Price an answer; the tier counts that the answer names."""
        rates = self._prices.rates(
            provider=request.provider,
            model=model,
            asked=request.model,
            tier=usage.service_tier,
            lane=self._lane,
            at=self._clock.moment(),
        )
        if rates is None:
            return Cost()
        is_cached = usage.cache_read_tokens or usage.cache_write_tokens
        return Cost(nanos=rates.cost(usage), saved=(rates.saved(usage) or 0) if is_cached else 0)

    def worst_case(self, request: Request) -> int:
        """Price a call before it is made: a token is a byte of the body at least, but for pictures and documents.

        Raises `UsageError` where no price is known.
        """
        most = self._prices.worst_case(
            request,
            input_tokens=max(len(request.body), 2 * request.estimated_input_tokens),
            max_output_tokens=request.max_output_tokens or _ASSUMED_OUTPUT_TOKENS,
            lane=self._lane,
            at=self._clock.moment(),
        )
        if most is None:
            raise UsageError(
                f"no price is known for {request.provider}/{request.model}, and with a budget nothing is sent whose "
                "price is unknown",
                hint="add a line for it under prices in config.yaml, or leave out --max-cost and budget",
            )
        return most


@contextmanager
def settings_for(settings: Config, options: Options) -> Iterator[Config]:
    """Yield the configuration to use; with `simulate` a simulator runs meanwhile and stands for every provider."""
    if not options.simulate:
        yield settings
        return
    from pipeline import simulator

    try:
        wanted = simulator.Options(**settings.simulator.model_dump())
    except ValueError as exc:
        raise UsageError(f"simulator: {exc}") from exc
    with simulator.serving(wanted) as server:
        yield configuration.simulated(settings, server.url)


def planner(settings: Config, options: Options) -> Planner:
    """Make the planner; what is rehearsed gets other digests than what is real."""
    salt = "simulated:" if options.simulate else ""
    return Planner(settings, provider=options.provider, model=options.model, salt=salt)


def budget(settings: Config, *, spent_today: int = 0, spent_this_month: int = 0) -> Budget | None:
    """Make the budget of a run, in nano-dollars: the tightest of the caps, less what other runs spent; None if none."""
    caps = settings.budget
    rooms = [
        int(cap * money.NANO) - spent
        for cap, spent in ((caps.per_run, 0), (caps.per_day, spent_today), (caps.per_month, spent_this_month))
        if cap is not None
    ]
    return Budget(max(0, min(rooms))) if rooms else None


def sender(
    settings: Config,
    client: transport.Client,
    clock: Clock,
    recording: Recording,
    pricing: Pricing,
    budget: Budget | None = None,
    *,
    gate_of: Callable[[str, str], Gate],
    ended: Ended,
) -> Sender:
    """Make the sender; lanes are opened when their model is first seen.

    `gate_of` returns the gate of a provider and model, `ended` tells which of these are given up already.
    """

    def open_lane(request: Request) -> Lane:
        """Make the lane of a model: address, headers with the key, codec, gate."""
        endpoint = settings.providers[request.provider]
        codec = providers.codec(configuration.protocol(endpoint))
        key = configuration.api_key(request.provider, endpoint)
        lane = Lane(
            provider=request.provider,
            model=request.model,
            post=discreet(client.post_to(endpoint.url, codec.headers(endpoint, key)), key),
            codec=codec,
            gate=gate_of(request.provider, request.model),
            concurrency=settings.sending.concurrency,
            quota=quota_name(endpoint.url, key, request.model) if settings.sending.share_limits else "",
        )
        lane.ended = ended.get((request.provider, request.model))
        return lane

    return Sender(
        concurrency=settings.sending.concurrency,
        read_ahead_bytes=settings.input.read_ahead_bytes,
        policy=retry.Policy(settings.sending),
        clock=clock,
        open_lane=open_lane,
        recording=recording,
        pricing=pricing,
        budget=budget,
    )


def gate(settings: Config, provider: str, model: str) -> Gate:
    """Make the gate of a model."""
    return Gate(settings.limits.of(provider, model))


def lessor(settings: Config, run_id: str) -> Lessor:
    """Make what shares limits with the other runs of this machine; its file lies beside the ledger."""
    return Host(Leases(configuration.ledger_path(settings).with_name("limits.sqlite"), run_id))


def batch_lane(
    settings: Config,
    client: transport.Client,
    clock: Clock,
    chunks: Chunks,
    recording: Recorder,
    pricing: Pricing,
    budget: Budget | None,
    options: Options,
    *,
    run_id: str,
    input: Input,
    say: Callable[[str], None],
    resend: Callable[[Sequence[Member]], Awaitable[None]] | None,
) -> BatchLane:
    """Make the batch lane of a run; with `resend` what batches do not answer goes there."""
    seconds = settings.batches.deadline if settings.lane == "auto" else None
    deadline = clock.moment() + timedelta(seconds=seconds) if seconds else None
    return BatchLane(
        chunks=chunks,
        run_id=run_id,
        is_simulated=options.simulate,
        retries_failed=options.retry_failed,
        settings=settings.batches,
        max_attempts=settings.sending.max_attempts,
        patience=Patience(
            poll_interval=settings.batches.poll_interval,
            call=settings.sending.timeout,
            rounds=settings.sending.max_attempts,
            live_seconds=partial(_live_seconds, settings, chunks) if resend else None,
            deadline=deadline,
        ),
        open_courier=partial(batch_client, settings, client, say),
        recording=recording,
        pricing=pricing,
        budget=budget,
        clock=clock,
        say=say,
        input=input,
        waits=settings.lane != LIVE and not options.no_wait,
        deadline=deadline,
        resend=resend,
    )


def _live_seconds(settings: Config, chunks: Chunks, chunk: Chunk) -> float:
    """Return how long the requests of a batch may take live, with those of all batches that share its limits."""
    requests = sum(each.requests for each in chunks.still_open if each.group == chunk.group)
    limits = settings.limits
    models = [name.partition("/")[2] for name in limits.models if name.partition("/")[0] == chunk.provider]
    caps = [limits.of(chunk.provider, model).rpm for model in ([chunk.model] if chunk.model else ["", *models])]
    return 60 * requests / min((cap for cap in caps if cap), default=_ASSUMED_RPM) + settings.sending.timeout


def invalid_result(item: Invalid, clock: Clock) -> Result:
    """Make the result of a line that cannot become a request."""
    return Result(
        custom_id=item.custom_id,
        line=item.line.number,
        source=item.line.source,
        digest=item.digest,
        attempts=0,
        completed_at=clock.utc(),
        failure=item.failure,
    )


def stop_reasons(sender: Sender, batches: BatchLane | None = None) -> list[PipelineError]:
    """Return why the run or some of its models ended early, the most far-reaching reason first."""
    stopped = [sender.stopped] if sender.stopped else []
    live = stopped + [lane.ended for lane in sender.ended_lanes if lane.ended]
    return live + (batches.reasons if batches else [])
