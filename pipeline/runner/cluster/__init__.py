"""The same job on many machines: parts of the input out to workers, their results back into one file.

    spans ─▶ scan ─▶ work ─▶ collect          each worker sends its spans with a `LocalExecutor`
             └── Worker ──┘  Driver           into a file of its own; the driver is the one writer of the results

`driver` hands out parts and collects results, `worker` sends one part, `quota` shares the rate limits,
`id_registry` keeps ids unique over all parts, `results.staging` holds the workers' files. Only `ray` knows Ray.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from anyio import to_thread

from pipeline.accounting.pricing import LIVE, Prices
from pipeline.accounting.run_ledger import RunLedger
from pipeline.core import config_file, environment, object_store
from pipeline.core.config import Config
from pipeline.core.errors import UsageError
from pipeline.inputs import reader
from pipeline.inputs.sources import can_be_read_again
from pipeline.results.object_store_writer import output_place
from pipeline.runner import rehearsal
from pipeline.runner.cluster.driver import Driver
from pipeline.runner.cluster.ray import LOCAL, Session
from pipeline.runner.context import RunContext
from pipeline.runner.options import Options
from pipeline.runner.run import Run, Watch, check
from pipeline.runner.summary import Summary

__all__ = ["Session", "run_batch"]


async def run_batch(
    inputs: Sequence[str | os.PathLike[str]],
    *,
    output: str | os.PathLike[str],
    ray: str | Session,
    config: Config | None = None,
    options: Options | None = None,
    watch: Watch | None = None,
    say: Callable[[str], None] = lambda message: None,
    handle_signals: bool = False,
) -> Summary:
    """Answer every line of the inputs on a Ray cluster: what `pipeline.run_batch` does here, and as resumable.

    `ray` is the address of a cluster (`auto`, `HOST:PORT`, `ray://HOST:10001`), or `local`, or a session for several
    runs. Output and inputs must be seen by all machines under the same names: on a shared file system, or at an object
    store. Raises `UsageError` also where Ray is not installed or of another version than the cluster's,
    `TryLaterError` where the cluster cannot be reached.
    """
    options = options or Options()
    config = config or config_file.load()
    session = ray if isinstance(ray, Session) else Session(ray)
    _refuse(config, options, session.address)
    place = output_place(output)
    place = place if isinstance(place, str) else place.absolute()
    sources = _sources([os.fspath(item) for item in inputs], place)
    with rehearsal.settings_for(config, options) as settings:
        ledger = RunLedger(environment.ledger_path(config))
        context = RunContext(sources, place, settings, options, Prices(config), ledger, say)
        warnings = check(context)
        if not session.is_open:
            here = session.address == LOCAL
            say("starting a Ray cluster on this machine" if here else f"joining the Ray cluster at {session.address}")
        pool = await to_thread.run_sync(session.pool, settings, context.run_id)
        try:
            run = Run(context, Driver(context, pool), watch=watch, warnings=warnings)
            return await run.execute(handle_signals=handle_signals)
        finally:
            await to_thread.run_sync(pool.close)
            if session is not ray:
                await to_thread.run_sync(session.close)


def _refuse(settings: Config, options: Options, ray: str) -> None:
    """Refuse what needs one machine."""
    if settings.lane != LIVE:
        reason = f"--ray sends live: --lane {settings.lane} needs no cluster, the provider does the work"
        raise UsageError(reason, hint="leave out --ray")
    if options.dedupe:
        reason = "--dedupe requires one machine: a worker does not see the requests of the others"
        raise UsageError(reason, hint="leave out --ray, or --dedupe")
    if options.simulate and ray != "local":
        raise UsageError(
            "--simulate with --ray requires --ray local: machines cannot reach the simulator inside this command",
            hint="start `pipeline simulate` where they can reach it, and set base_url of the providers to it",
        )


def _sources(inputs: Sequence[str], output: str | Path) -> list[str]:
    """Return the inputs as they are named on every machine."""
    sources = reader.sources(inputs, but=output)
    for source in sources:
        if not can_be_read_again(source):
            reason = f"--ray requires inputs that all machines can read, and {source!r} can be read only once, and here"
            raise UsageError(reason, hint="save it to a file that all machines can read, and use that file as input")
    return [source if object_store.is_url(source) else os.path.abspath(source) for source in sources]
