"""The command `pipeline`: one group; each command has a file of its own."""

from __future__ import annotations

import sys
from typing import Any

import click

from pipeline.cli.batches import batches
from pipeline.cli.check import check
from pipeline.cli.console import open_missing_standard_streams
from pipeline.cli.estimate import estimate
from pipeline.cli.help import help_command
from pipeline.cli.report import report
from pipeline.cli.run import run
from pipeline.cli.simulate import simulate
from pipeline.cli.verify import verify

_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class _Commands(click.Group):
    """The commands, in the order in which a new user needs them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        # click would sort them by name.
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            # Ctrl-C before a command has begun; click would exit with 1.
            sys.exit(130)


@click.group(cls=_Commands, context_settings=_CONTEXT)
@click.version_option(package_name="pipeline", message="%(prog)s %(version)s")
def main() -> None:
    """Send JSONL files of LLM requests to Anthropic, OpenAI and compatible APIs.

    \b
    pipeline run questions.jsonl -o answers.jsonl
    pipeline run questions.jsonl --simulate         no key, no network, no cost
    """
    open_missing_standard_streams()


for _command in (run, check, estimate, verify, report, batches, simulate, help_command):
    main.add_command(_command)
