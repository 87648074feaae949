"""Makes the parts of a run from its settings, for runs over files (`local`) and for Python streams (`stream`)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from datetime import timedelta
from functools import partial

from pipeline import providers
from pipeline.accounting.budget import Budget
from pipeline.accounting.pricing import LIVE, Pricing
from pipeline.core import config, environment, http
from pipeline.core.clock import Clock
from pipeline.core.config import Config
from pipeline.core.errors import PipelineError
from pipeline.core.text import redacted_post
from pipeline.core.types import Request
from pipeline.dispatch import retry
from pipeline.dispatch.batch.client import batch_client
from pipeline.dispatch.batch.coordinator import BatchCoordinator, Input
from pipeline.dispatch.batch.lifecycle import PollPolicy
from pipeline.dispatch.batch.store import BatchItem, BatchRecord, BatchStore
from pipeline.dispatch.live.model_queue import ModelQueue
from pipeline.dispatch.live.rate_limiter import RateLimiter
from pipeline.dispatch.live.sender import Sender
from pipeline.dispatch.live.shared_limits import quota_name
from pipeline.dispatch.results import ResultSink
from pipeline.inputs.planner import Planner
from pipeline.results.writer import ResultWriter
from pipeline.runner.options import Ended, Options

# Requests that a batch does not answer before the deadline go live. This pace is assumed where no limit is set.
_ASSUMED_RPM = 1_000


def planner(settings: Config, options: Options) -> Planner:
    """Make the planner. Simulated requests get other digests, so that a real run does not take them as done."""
    salt = "simulated:" if options.simulate else ""
    return Planner(settings, provider=options.provider, model=options.model, salt=salt)


def sender(
    settings: Config,
    client: http.Client,
    clock: Clock,
    recording: ResultSink,
    pricing: Pricing,
    budget: Budget | None = None,
    *,
    rate_limiter_of: Callable[[str, str], RateLimiter],
    ended: Ended,
) -> Sender:
    """Make the sender; a queue is opened when its model is first seen.

    `rate_limiter_of` returns the rate limiter of a model; `ended` holds the models that are given up already.
    """

    def open_queue(request: Request) -> ModelQueue:
        """Make the queue of a model: address, headers with the key, codec, rate limiter."""
        endpoint = settings.providers[request.provider]
        codec = providers.codec(config.protocol(endpoint), request.endpoint)
        url = codec.url(endpoint)
        key = environment.api_key(request.provider, endpoint)
        lane = ModelQueue(
            provider=request.provider,
            model=request.model,
            post=redacted_post(client.post_to(url, codec.headers(endpoint, key)), key),
            codec=codec,
            rate_limiter=rate_limiter_of(request.provider, request.model),
            concurrency=settings.sending.concurrency,
            quota=quota_name(url, key, request.model) if settings.sending.share_limits else "",
        )
        lane.ended = ended.get((request.provider, request.model))
        return lane

    return Sender(
        concurrency=settings.sending.concurrency,
        read_ahead_bytes=settings.input.read_ahead_bytes,
        policy=retry.Policy(settings.sending),
        clock=clock,
        open_queue=open_queue,
        results=recording,
        pricing=pricing,
        budget=budget,
    )


def rate_limiter(settings: Config, provider: str, model: str) -> RateLimiter:
    """Make the rate limiter of a model."""
    return RateLimiter(settings.limits.of(provider, model))


def batch_lane(
    settings: Config,
    client: http.Client,
    clock: Clock,
    store: BatchStore,
    recording: ResultWriter,
    pricing: Pricing,
    budget: Budget | None,
    options: Options,
    *,
    run_id: str,
    input: Input,
    say: Callable[[str], None],
    send_live: Callable[[Sequence[BatchItem]], Awaitable[None]] | None,
) -> BatchCoordinator:
    """Make the batch lane of a run; `send_live` takes what batches do not answer."""
    seconds = settings.batches.deadline if settings.lane == "auto" else None
    deadline = clock.moment() + timedelta(seconds=seconds) if seconds else None
    return BatchCoordinator(
        store=store,
        run_id=run_id,
        is_simulated=options.simulate,
        retries_failed=options.retry_failed,
        settings=settings.batches,
        max_attempts=settings.sending.max_attempts,
        poll_policy=PollPolicy(
            poll_interval=settings.batches.poll_interval,
            call=settings.sending.timeout,
            rounds=settings.sending.max_attempts,
            live_seconds=partial(_live_seconds, settings, store) if send_live else None,
            deadline=deadline,
        ),
        open_client=partial(batch_client, settings, client, say),
        results=recording,
        pricing=pricing,
        budget=budget,
        clock=clock,
        notify=say,
        input=input,
        waits=settings.lane != LIVE and not options.no_wait,
        deadline=deadline,
        send_live=send_live,
    )


def _live_seconds(settings: Config, store: BatchStore, record: BatchRecord) -> float:
    """Return how long the requests of a batch may take live, with those of all batches that share its limits."""
    requests = sum(each.requests for each in store.still_open if each.group == record.group)
    limits = settings.limits
    models = [name.partition("/")[2] for name in limits.models if name.partition("/")[0] == record.provider]
    caps = [limits.of(record.provider, model).rpm for model in ([record.model] if record.model else ["", *models])]
    return 60 * requests / min((cap for cap in caps if cap), default=_ASSUMED_RPM) + settings.sending.timeout


def stop_reasons(sender: Sender, batches: BatchCoordinator | None = None) -> list[PipelineError]:
    """Return why the run or some of its models ended early, the most far-reaching reason first."""
    stopped = [sender.stopped] if sender.stopped else []
    live = stopped + [lane.ended for lane in sender.ended_queues if lane.ended]
    return live + (batches.reasons if batches else [])
