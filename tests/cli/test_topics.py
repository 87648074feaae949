"""README and topics: complete, linked, short where they must be, and true to the program."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from pipeline.cli import help
from pipeline.cli.main import main
from pipeline.core import errors
from tests import settings_docs
from tests.test_layers import PACKAGE, ROOT, family

README = ROOT / "README.md"
TOPICS = PACKAGE / "cli" / "topics"
DOCUMENTS = [README, *sorted(TOPICS.glob("*.md"))]

_LINK = re.compile(r"\]\(([^)\s]+)\)")
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_SHELL_WORDS = ("|", ">", "&&", "#")


def commands_in(text: str) -> Iterator[list[str]]:
    """Yield the words of each `pipeline` command in the code blocks of a document."""
    for language, block in _BLOCK.findall(text):
        for line in block.splitlines():
            words = shell_words(line.removeprefix("$ ").strip())
            if "pipeline" in words and (line.startswith("$ ") or language in ("sh", "bash")):
                yield words[words.index("pipeline") + 1 :]


def shell_words(line: str) -> list[str]:
    """Return the words of a line's last command, up to a redirection, a pipe or a comment behind it."""
    words = [word.removeprefix(".venv/bin/") for word in shlex.split(line, comments=True)]
    if "pipeline" not in words:
        return []
    start = len(words) - 1 - words[::-1].index("pipeline")
    end = next((n for n in range(start, len(words)) if words[n] in _SHELL_WORDS), len(words))
    return words[start:end]


def parse(words: list[str]) -> None:
    """Parse a command as the program would, without doing anything. Raises click's error if it is wrong."""
    command: click.Command = main
    context = click.Context(main)
    while isinstance(command, click.Group):
        name, found, words = command.resolve_command(context, list(words))
        assert found is not None, name
        command = found
        context = click.Context(command, parent=context, info_name=name)
    command.parse_args(context, list(words))


def options_of(command: click.Command) -> Iterator[str]:
    """Yield the long options of a command and of its subcommands."""
    if isinstance(command, click.Group):
        for name in command.list_commands(click.Context(command)):
            child = command.get_command(click.Context(command), name)
            assert child is not None
            yield from options_of(child)
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            yield from (each for each in parameter.opts if each.startswith("--"))


def test_every_topic_is_listed_and_every_listed_one_is_there() -> None:
    """The list, the files, and the links in the README are the same."""
    linked = {Path(link).stem for link in _LINK.findall(README.read_text()) if "topics/" in link}

    assert {path.stem for path in TOPICS.glob("*.md")} == set(help.TOPICS) == linked
    assert all(f"  {topic} " in help.listing() for topic in help.TOPICS)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
def test_every_link_resolves(document: Path) -> None:
    """Links to files lead to files of this repository."""
    links = [link for link in _LINK.findall(document.read_text()) if not link.startswith("https://")]

    assert [link for link in links if not (document.parent / link).is_file()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
def test_every_command_parses(document: Path) -> None:
    """Each `pipeline` command in a code block is one that the program accepts."""
    for words in commands_in(document.read_text()):
        parse(words)


def test_a_wrong_command_would_be_found() -> None:
    """The check above sees a wrong option, a wrong command and a wrong value."""
    for wrong in ("run a.jsonl --no-such-option", "no-such-command", "run a.jsonl --lane fast"):
        (words,) = commands_in(f"```sh\npipeline {wrong}\n```")
        with pytest.raises(click.UsageError):
            parse(words)


def test_every_option_is_documented() -> None:
    """Each long option of each command is in a topic or in the README."""
    text = "".join(path.read_text() for path in DOCUMENTS)

    undocumented = {option for option in options_of(main) if not re.search(rf"{option}(?![\w-])", text)}
    assert undocumented - {"--help", "--version"} == set()


def test_every_exit_code_is_documented() -> None:
    """The topic has each exit code of the error classes, and those of signals."""
    documented = {int(code) for code in re.findall(r"^\| (\d+) ", help.read("exit-codes"), re.MULTILINE)}

    codes = {cls.exit_code for cls in family(errors.PipelineError)}
    assert codes | {0, 1, 3, 6, 130, 143} == documented


def test_every_error_type_is_documented() -> None:
    """The topic has each `error.type` that the program gives itself, and those in its tables of provider errors."""
    own = re.compile(r"""\btype=["']([a-z_]+)["']|\btype: str = "([a-z_]+)"|\btypes=\(([^)]*)\)""")
    types: set[str] = set()
    for package in ("core", "dispatch", "inputs", "providers"):
        for path in (PACKAGE / package).rglob("*.py"):
            for found in own.findall(path.read_text()):
                types.update(re.findall(r"[a-z_]+", " ".join(found)))
    endings = re.findall(
        r'^            "(\w+)": \("the', (PACKAGE / "dispatch/batch/outcome.py").read_text(), re.MULTILINE
    )
    types.update(f"batch_{ending}" for ending in endings)

    assert {"invalid_line", "timeout", "redirect", "insufficient_quota", "batch_expired", "batch_abandoned"} <= types
    assert types - set(re.findall(r"`(\w+)`", help.read("errors"))) == set()


def test_code_blocks_of_topics_fit_80_columns() -> None:
    """A code block is not wrapped on a small terminal, where it has a margin of one column."""
    wide = [
        f"{topic}: {line}"
        for topic in help.TOPICS
        for _, block in _BLOCK.findall(help.read(topic))
        for line in block.splitlines()
        if len(line) > 79
    ]

    assert wide == []


def test_the_readme_is_short() -> None:
    """The README has at most 200 lines and 14 kB."""
    content = README.read_bytes()

    assert content.count(b"\n") <= 200
    assert len(content) <= 14_000


def test_the_readme_shows_the_packages() -> None:
    """The tree in the README lists the packages that exist."""
    shown = re.findall(r"^  (\w+)/ ", README.read_text(), re.MULTILINE)

    assert sorted(shown) == sorted(path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file())


@pytest.mark.parametrize(
    ("path", "generated"),
    [
        pytest.param(ROOT / "config.yaml", settings_docs.config_yaml, id="config.yaml"),
        pytest.param(TOPICS / "settings.md", settings_docs.topic, id="topic"),
    ],
)
def test_settings_are_documented_from_the_schema(path: Path, generated: object) -> None:
    """config.yaml and the topic are what the schema's descriptions make them."""
    assert callable(generated)
    assert path.read_text() == generated(), "run: python -m tests.settings_docs"


def test_help_lists_the_topics() -> None:
    """`pipeline help` prints one line for each topic."""
    result = CliRunner().invoke(main, ["help"])

    assert result.exit_code == 0
    assert result.stdout == help.listing() + "\n"


def test_the_list_fits_80_columns() -> None:
    """No line of the list is wider than a small terminal."""
    assert max(len(line) for line in help.listing().splitlines()) <= 80


def test_a_terminal_gets_a_topic_rendered(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """On a terminal the marks of Markdown are gone, and a link to a topic is its name."""
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("PAGER", "cat")

    help.show("resume")
    help.show("exit-codes")

    shown = capsys.readouterr().out
    assert "## After a crash" not in shown
    assert "After a crash" in shown
    assert ".md)" not in shown


def test_a_pipe_gets_the_text_of_a_topic() -> None:
    """Output that is not a terminal is the Markdown itself."""
    result = CliRunner().invoke(main, ["help", "resume"])

    assert result.stdout == (TOPICS / "resume.md").read_text()


def test_an_unknown_topic_is_a_mistake_with_a_suggestion() -> None:
    """A misspelled topic ends with exit code 2 and names the nearest one."""
    command = [sys.executable, "-m", "pipeline", "help", "inptu"]
    done = subprocess.run(command, capture_output=True, check=False, text=True)

    assert done.returncode == 2
    assert "there is no topic 'inptu'" in done.stderr
    assert "did you mean 'input'?" in done.stderr
    assert ", ".join(help.TOPICS) in done.stderr


def test_the_licence_is_part_of_the_package() -> None:
    """A wheel has the licence text: it is a file of the package."""
    assert (PACKAGE / "cli" / "LICENSE").read_text().startswith("MIT License")
