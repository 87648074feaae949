"""The parts of a run, made from a configuration: what `job` (files) and `stream` (Python) have in common."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from pipeline import config as configuration
from pipeline import providers, retry, transport
from pipeline.clock import Clock
from pipeline.config import Config
from pipeline.errors import PipelineError, UsageError
from pipeline.lane import Lane
from pipeline.limits import Gate
from pipeline.plan import Invalid, Planner
from pipeline.send import Recording, Sender
from pipeline.types import Request, Result


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What a command adds to the configuration for one run.

    `provider` and `model` are for lines that do not say. `limit` takes the first lines only. `retry_failed` sends
    again what failed before; `fresh` sets earlier results aside. `simulate` puts a simulator in the providers' place.
    """

    provider: str | None = None
    model: str | None = None
    limit: int | None = None
    retry_failed: bool = False
    fresh: bool = False
    simulate: bool = False


@contextmanager
def settings_for(config: Config | None, options: Options) -> Iterator[Config]:
    """Yield the configuration to use; with `simulate` a simulator runs meanwhile and stands for every provider."""
    settings = config or configuration.load()
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


def patience(settings: Config) -> float:
    """Return how many seconds without a finished request are too many: never fewer than one may honestly take."""
    sending = settings.sending
    return max(sending.stall_timeout, 2 * sending.timeout, sending.max_retry_after + sending.timeout)


def planner(settings: Config, options: Options) -> Planner:
    """Make the planner; what is rehearsed gets other digests than what is real."""
    salt = "simulated:" if options.simulate else ""
    return Planner(settings, provider=options.provider, model=options.model, salt=salt)


def sender(settings: Config, client: transport.Client, clock: Clock, recording: Recording) -> Sender:
    """Make the sender; lanes are opened when their model is first seen."""

    def open_lane(request: Request) -> Lane:
        """Make the lane of a model: address, headers with the key, codec, gate."""
        endpoint = settings.providers[request.provider]
        codec = providers.codec(configuration.protocol(endpoint))
        key = configuration.api_key(request.provider, endpoint)
        return Lane(
            provider=request.provider,
            model=request.model,
            post=client.post_to(endpoint.url, codec.headers(endpoint, key)),
            codec=codec,
            gate=Gate(settings.limits.of(request.provider, request.model)),
            concurrency=settings.sending.concurrency,
        )

    return Sender(
        concurrency=settings.sending.concurrency,
        read_ahead_bytes=settings.input.read_ahead_bytes,
        policy=retry.Policy(settings.sending),
        clock=clock,
        open_lane=open_lane,
        recording=recording,
    )


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


def stop_reasons(sender: Sender) -> list[PipelineError]:
    """Return why the run or some of its models ended early, the most far-reaching reason first."""
    stopped = [sender.stopped] if sender.stopped else []
    return stopped + [lane.ended for lane in sender.ended_lanes if lane.ended]
