"""`pipeline help`: list the topics, or show one."""

from __future__ import annotations

import re
import sys

import click

from pipeline.cli import console
from pipeline.cli.options import Command
from pipeline.core.errors import UsageError

TOPICS = (
    "input",
    "results",
    "resume",
    "batch",
    "limits",
    "errors",
    "object-stores",
    "cluster",
    "cron",
    "exit-codes",
    "settings",
    "cost-reports",
    "reliability",
    "speed",
    "security",
    "simulator",
    "python",
    "changes",
)
"""In the order in which they are listed: what a new user needs comes first."""

_SUMMARIES = {
    "input": "files, line formats, ids, and how a provider is chosen",
    "results": "result lines, totals, and the files beside them",
    "resume": "what a repeated command sends, also after a crash",
    "batch": "the batch lane: half the price, answers within a day",
    "limits": "how a run follows rate limits, alone or with others",
    "errors": "error types, retries, and what to do",
    "object-stores": "inputs and results at S3, Google Cloud Storage or Azure",
    "cluster": "one run on many machines with Ray",
    "cron": "unattended runs: cron, systemd, logs, dead man's switch",
    "exit-codes": "what each exit code means",
    "settings": "every setting with its default",
    "cost-reports": "estimates, spending caps, reports, the ledger",
    "reliability": "promises, how each is proven, and their limits",
    "speed": "measurements, and how to repeat them",
    "security": "keys, network, files, untrusted text",
    "simulator": "a local provider to rehearse against",
    "python": "the Python API",
    "changes": "what is new",
}

# A link to another topic: on a terminal its name is enough.
_TOPIC_LINK = re.compile(r"\[([^\]]+)\]\([a-z-]+\.md\)")


@click.command("help", cls=Command, epilog="Example: pipeline help input")
@click.argument("topic", required=False, metavar="[TOPIC]", help="Topic to show; without it, all topics are listed.")
def help_command(topic: str | None) -> None:
    """List the help topics, or show one."""
    console.exit_with_errors(lambda: show(topic))


def read(topic: str) -> str:
    """Return the Markdown text of a topic. Raise `UsageError` if there is none of that name."""
    import difflib
    from importlib import resources

    if topic not in TOPICS:
        near = difflib.get_close_matches(topic, TOPICS, n=1)
        listed = f"the topics are {', '.join(TOPICS)}"
        hint = f"did you mean {near[0]!r}? {listed}" if near else listed
        raise UsageError(f"there is no topic {topic!r}", hint=hint)
    return resources.files("pipeline.cli").joinpath("topics", f"{topic}.md").read_text(encoding="utf-8")


def listing() -> str:
    """Return the topics with one line each, as plain text."""
    width = max(len(topic) for topic in TOPICS)
    lines = [f"  {topic:<{width}}  {_SUMMARIES[topic]}" for topic in TOPICS]
    return "\n".join(
        (
            "Topics:",
            *lines,
            "",
            "`pipeline help TOPIC` shows a topic.",
            "`pipeline COMMAND --help` lists the options of a command.",
        )
    )


def show(topic: str | None) -> int:
    """Print a topic, or the list of topics, and return the exit code.

    A terminal gets the topic rendered, in a pager if it is long. A pipe gets the Markdown text.
    """
    if topic is None:
        print(listing())
        return 0
    text = read(topic)
    if not sys.stdout.isatty():
        print(text, end="")
        return 0
    from rich.console import Console
    from rich.markdown import Markdown

    # Wider lines are hard to read.
    screen = Console(width=min(Console().width, 100))
    with screen.capture() as capture:
        screen.print(Markdown(_TOPIC_LINK.sub(r"**\1**", text), hyperlinks=False))
    rendered = capture.get()
    if rendered.count("\n") < screen.height:
        print(rendered, end="")
    else:
        click.echo_via_pager(rendered)
    return 0
