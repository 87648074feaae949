"""`pipeline simulate`: a simulated provider on this machine."""

from __future__ import annotations

from dataclasses import dataclass

import click

from pipeline.cli import console
from pipeline.cli.options import Command, Heading, option, pass_options
from pipeline.core.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulateOptions:
    """The options of `pipeline simulate`."""

    port: int
    rpm: int | None
    input_tpm: int | None
    output_tpm: int | None
    burst: int | None
    latency: float
    batch_seconds: float
    faults: tuple[str, ...]
    seed: int
    no_rate_headers: bool


@click.command(cls=Command, epilog="Example: pipeline simulate --port 8080 --rpm 600 --fault 529=0.05")
@option(
    "--port",
    heading=Heading.SENDING,
    type=click.IntRange(0, 65_535),
    metavar="PORT",
    default=8080,
    show_default=True,
    help="Port to listen on; 0: any free port.",
)
@option(
    "--latency",
    heading=Heading.SENDING,
    type=float,
    default=0.05,
    show_default=True,
    metavar="S",
    help="Mean seconds per response.",
)
@option(
    "--fault",
    "faults",
    heading=Heading.SENDING,
    multiple=True,
    metavar="KIND=RATE",
    help="Share of requests that fail in this way, such as 529=0.05; repeatable.",
)
@option(
    "--seed",
    heading=Heading.SENDING,
    type=int,
    metavar="N",
    default=0,
    show_default=True,
    help="Seed of the responses; the same seed gives the same responses.",
)
@option("--rpm", heading=Heading.LIMITS, type=int, metavar="N", help="Requests per minute, for each key and model.")
@option("--input-tpm", heading=Heading.LIMITS, type=int, metavar="N", help="Input tokens per minute (OpenAI: all).")
@option("--output-tpm", heading=Heading.LIMITS, type=int, metavar="N", help="Output tokens per minute.")
@option(
    "--burst",
    heading=Heading.LIMITS,
    type=int,
    metavar="N",
    help="Requests accepted at once [default: as many as in a minute].",
)
@option(
    "--no-rate-headers",
    heading=Heading.LIMITS,
    is_flag=True,
    help="Send no rate-limit headers, like a self-hosted server.",
)
@option(
    "--batch-seconds",
    heading=Heading.BATCH,
    type=float,
    default=1.0,
    show_default=True,
    metavar="S",
    help="Seconds that a batch takes.",
)
@pass_options(SimulateOptions)
def simulate(options: SimulateOptions) -> None:
    """Serve a simulated provider on this machine.

    It speaks the APIs of Anthropic and OpenAI, live and batch, and enforces rate limits as they do.
    """
    console.exit_with_errors(lambda: _simulate(options))


def _simulate(options: SimulateOptions) -> int:
    from pipeline import simulator

    stderr = console.stderr_console()

    def announce(url: str) -> None:
        stderr.emit("message", f"simulating Anthropic and OpenAI on {url}; press Ctrl-C to stop")
        stderr.emit(
            "message",
            f"export ANTHROPIC_BASE_URL={url} OPENAI_BASE_URL={url}/v1 ANTHROPIC_API_KEY=any OPENAI_API_KEY=any",
        )

    try:
        simulator_options = simulator.Options(
            rpm=options.rpm,
            input_tpm=options.input_tpm,
            output_tpm=options.output_tpm,
            burst=options.burst,
            latency=options.latency,
            batch_seconds=options.batch_seconds,
            faults=dict(simulator.parse_fault(fault) for fault in options.faults),
            seed=options.seed,
            rate_headers=not options.no_rate_headers,
        )
    except ValueError as exc:
        raise UsageError(str(exc)) from exc
    # It accepts any key, so only this machine may reach it.
    try:
        simulator.serve_forever(simulator_options, "127.0.0.1", options.port, announce)
    except OSError as exc:
        raise UsageError(
            f"cannot listen on port {options.port}: {exc.strerror}", hint="--port 0 picks any free port"
        ) from exc
    return 0
