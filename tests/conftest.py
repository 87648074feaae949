"""What every test stands on: no settings or keys of the person who runs them, and examples without time limits."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator

import pytest
from hypothesis import settings

from tests import tools
from tests.bucket import bucket, s3_server
from tests.virtual import creeping_clock, no_threads

__all__ = ["bucket", "creeping_clock", "no_threads", "s3_server"]

# Else pytest-asyncio makes a loop of its own on Python < 3.12 and never closes it: a warning, so an error.
asyncio.set_event_loop(None)

# A shell that starts the tests in the background has them ignore these, and so would every run that they start.
for _number, _default in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _default)

settings.register_profile("pipeline", deadline=None, database=None, max_examples=60)
settings.load_profile("pipeline")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--require-tools", action="store_true", help="fail tests whose tools could be installed")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Use one process more than there are cores: tests often wait for a process they started, or for the disk."""
    return (os.cpu_count() or 1) + 1


def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark in item.iter_markers("needs"):
        tools.require(*mark.args, is_strict=item.config.getoption("--require-tools"))


_VARIABLES = (
    "ANTHROPIC_API_KEY",
    "OPENAI_API_KEY",
    "ANTHROPIC_BASE_URL",
    "OPENAI_BASE_URL",
    "PIPELINE_CONFIG",
    "PIPELINE_LEDGER",
)


@pytest.fixture(scope="session", autouse=True)
def _no_settings_of_the_user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Hide the user's settings and keys, and use a ledger of the tests, also in fixtures of modules."""
    ledger = tmp_path_factory.mktemp("ledger") / "ledger.sqlite"
    with pytest.MonkeyPatch.context() as patch:
        for variable in _VARIABLES:
            patch.delenv(variable, raising=False)
            patch.delenv(variable.lower(), raising=False)
        patch.setenv("PIPELINE_LEDGER", str(ledger))
        yield
