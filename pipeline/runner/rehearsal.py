"""A simulator in place of the providers, for `--simulate`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.core import config
from pipeline.core.config import Config
from pipeline.core.errors import UsageError
from pipeline.runner.options import Options


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
        yield config.simulated(settings, server.url)
