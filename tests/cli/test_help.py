"""`--help` of every command on a terminal of 80 columns."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator

import click
import pytest
from click.testing import CliRunner

from pipeline.cli import main
from pipeline.cli.options import Heading

COLUMNS = 80


def _commands(command: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Yield a command and all below it, each with the words that call it."""
    yield path, command
    if isinstance(command, click.Group):
        for name, child in command.commands.items():
            yield from _commands(child, (*path, name))


COMMANDS = dict(_commands(main.main))
every_command = pytest.mark.parametrize("path", COMMANDS, ids=lambda path: " ".join(path) or "pipeline")


def _help(path: tuple[str, ...]) -> str:
    done = CliRunner(env={"COLUMNS": str(COLUMNS)}).invoke(main.main, [*path, "--help"], prog_name="pipeline")
    assert done.exit_code == 0, done.output
    return done.output


def _words(text: str) -> str:
    return " ".join(text.split())


def _sections(text: str) -> dict[str, str]:
    """Return the text under each heading."""
    parts = re.split(r"^(\S[^\n]*):\n", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@every_command
def test_help_fits_80_columns(path: tuple[str, ...]) -> None:
    """No line of `--help` is longer than the terminal is wide."""
    assert [line for line in _help(path).splitlines() if len(line) > COLUMNS] == []


@every_command
def test_help_is_printed_whole(path: tuple[str, ...]) -> None:
    """The help of each option, argument and subcommand is there to its last word; nothing ends in an ellipsis."""
    command = COMMANDS[path]
    printed = _words(_help(path))
    texts = [parameter.help for parameter in command.params if isinstance(parameter, click.Option | click.Argument)]
    if isinstance(command, click.Group):
        texts += [child.get_short_help_str(limit=1_000) for child in command.commands.values()]

    assert [text for text in texts if not text or _words(text) not in printed] == []
    assert re.search(r"(\.\.\.|…)( |$)", re.sub(r"(INPUT|RESULTS\]?|ID|ARGS\])\.\.\.", "", printed)) is None


@every_command
def test_each_option_is_under_a_heading(path: tuple[str, ...]) -> None:
    """Options stand once each, under their own heading; headings come in one order, and none is empty."""
    command = COMMANDS[path]
    sections = _sections(_help(path))
    options = [parameter for parameter in command.params if isinstance(parameter, click.Option)]
    if isinstance(command, click.Group):
        assert next(iter(sections)) == "Options"
        return

    headings = [name for name in sections if name != "Positional arguments"]
    assert headings == [heading for heading in Heading if heading in headings]
    assert set(headings) == {*(option.heading for option in options), Heading.OUTPUT}  # type: ignore[attr-defined]
    for option in options:
        found = [
            name for name in headings if re.search(rf"^  (-\w, )?{option.opts[-1]}\b", sections[name], re.MULTILINE)
        ]
        assert found == [option.heading]  # type: ignore[attr-defined]


def test_run_has_options_under_every_heading() -> None:
    """`run` uses all headings: input, sending, limits, batch, results, money, output."""
    assert [name for name in _sections(_help(("run",))) if name != "Positional arguments"] == list(Heading)


@every_command
def test_help_shows_an_example(path: tuple[str, ...]) -> None:
    """`--help` of each command shows how it is called."""
    assert " ".join(("pipeline", *path)) in _help(path).partition("\n")[2]


def test_help_loads_nothing_heavy() -> None:
    """Help is quick: until a command does its work, no library but click is loaded, and no settings or values."""
    heavy = ["anyio", "httpx", "obstore", "orjson", "pydantic", "pyreqwest", "rich", "yaml"]
    heavy += ["pipeline.core.config", "pipeline.core.types", "importlib.resources"]
    script = f"import sys, pipeline.cli.main; print([name for name in {heavy} if name in sys.modules])"

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, text=True)

    assert done.stdout == "[]\n"
