"""What the commands share: options under headings, and the typed values that options become.

Commands are listed and completed often, so this module and those of the commands load only click and the standard
library; what does the work is imported inside the functions that need it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

Function = TypeVar("Function", bound=Callable[..., Any])
Options = TypeVar("Options")


class Heading(StrEnum):
    """The headings of `--help`, in their order."""

    INPUT = "Input"
    SENDING = "Sending"
    LIMITS = "Limits"
    BATCH = "Batch"
    RESULTS = "Results"
    MONEY = "Money"
    OUTPUT = "Output"


class Option(click.Option):
    """An option that `--help` lists under a heading."""

    def __init__(self, *args: Any, heading: Heading, **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        self.heading = heading


class Command(click.Command):
    """A command whose `--help` groups options under headings; click lists all of them under one."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows: dict[Heading, list[tuple[str, str]]] = {heading: [] for heading in Heading}
        for parameter in self.get_params(ctx):
            row = parameter.get_help_record(ctx)
            if row is None or isinstance(parameter, click.Argument):
                continue
            # click itself makes `--help`, without a heading.
            heading = parameter.heading if isinstance(parameter, Option) else Heading.OUTPUT
            rows[heading].append(row)
        for heading, options in rows.items():
            if options:
                with formatter.section(heading):
                    formatter.write_dl(options)


def option(*names: str, heading: Heading, **attributes: Any) -> Callable[[Function], Function]:
    """Declare an option under a heading; the rest is as in `click.option`."""
    return click.option(*names, cls=Option, heading=heading, **attributes)


def pass_options(options_type: type[Options]) -> Callable[[Callable[[Options], None]], Callable[..., None]]:
    """Call a command with one value of this type, made of its arguments and options, instead of keywords."""

    def decorate(command: Callable[[Options], None]) -> Callable[..., None]:
        @functools.wraps(command)
        def call(**values: Any) -> None:
            command(options_type(**values))

        return call

    return decorate


class KeyValue(click.ParamType[tuple[str, str]]):
    """KEY=VALUE."""

    name = "KEY=VALUE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        key, separator, rest = str(value).partition("=")
        if not separator or not key:
            self.fail(f"{value!r} is not KEY=VALUE", param, ctx)
        return key, rest


class LazyChoice(click.ParamType[str]):
    """A choice whose values are loaded when an option needs them, so that declaring the option loads nothing."""

    name = "choice"

    def __init__(self, load: Callable[[], Iterable[str]]) -> None:
        self._load = load

    def _choice(self) -> click.Choice[str]:
        return click.Choice(list(self._load()))

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str | None:
        return self._choice().get_metavar(param, ctx)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return self._choice().convert(value, param, ctx)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return self._choice().shell_complete(ctx, param, incomplete)


# ── options of several commands ───────────────────────────────────────────────────────────────────────────────────

inputs_argument = click.argument(
    "inputs",
    nargs=-1,
    required=True,
    metavar="INPUT...",
    help="Files, globs, directories, s3://BUCKET/KEY (gs://, az://), or - for stdin.",
)
config_option = option(
    "-c",
    "--config",
    "config_path",
    heading=Heading.INPUT,
    metavar="FILE",
    help="Settings file [default: ./config.yaml if present].",
)
provider_option = option("--provider", heading=Heading.INPUT, metavar="NAME", help="Provider for lines that name none.")
model_option = option("--model", heading=Heading.INPUT, metavar="NAME", help="Model for lines that name none.")
max_tokens_option = option(
    "--max-tokens",
    heading=Heading.INPUT,
    type=int,
    metavar="N",
    help="Maximum output tokens for lines that set none.",
)
temperature_option = option(
    "--temperature",
    heading=Heading.INPUT,
    type=float,
    metavar="T",
    help="Temperature for lines that set none.",
)
system_option = option("--system", heading=Heading.INPUT, metavar="TEXT", help="System prompt for lines without one.")
rpm_option = option(
    "--rpm", heading=Heading.LIMITS, type=int, metavar="N", help="Maximum requests per minute and model."
)
input_tpm_option = option(
    "--input-tpm", heading=Heading.LIMITS, type=int, metavar="N", help="Maximum input tokens per minute and model."
)
output_tpm_option = option(
    "--output-tpm", heading=Heading.LIMITS, type=int, metavar="N", help="Maximum output tokens per minute and model."
)
ledger_option = option(
    "--ledger",
    "ledger_file",
    heading=Heading.INPUT,
    metavar="FILE",
    help="Ledger to read instead of the one in the settings.",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class InputOptions:
    """Which lines to read, and the provider and model for lines that name none."""

    inputs: tuple[str, ...]
    config_path: str | None
    provider: str | None
    model: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOptions(InputOptions):
    """Also the defaults of requests and the rate limits: what `run` and `estimate` have in common."""

    max_tokens: int | None
    temperature: float | None
    system: str | None
    rpm: int | None
    input_tpm: int | None
    output_tpm: int | None

    def overrides(self) -> dict[str, Any]:
        """Return the settings that these options change, in the shape of the settings file; None: unchanged."""
        return {
            "provider": self.provider,
            "request": {
                "max_tokens": self.max_tokens,
                "temperature": self.temperature,
                "system": self.system,
            },
            "limits": {
                "rpm": self.rpm,
                "input_tpm": self.input_tpm,
                "output_tpm": self.output_tpm,
            },
        }
