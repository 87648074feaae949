"""The command `pipeline`: parses, calls, prints. The only file that prints.

Imports that cost time stand inside the commands, so `pipeline --help` and completion stay fast.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NoReturn, cast

import click

from pipeline.core.errors import PipelineError, StorageError, UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from pipeline.cli.events import Screen
    from pipeline.core.config import Config
    from pipeline.core.types import Allowance
    from pipeline.dispatch.batch.manage import Listed
    from pipeline.runner.base import Progress
    from pipeline.runner.options import Options
    from pipeline.runner.summary import Summary

_ENDS_ALL = (5, 130, 143)  # exit codes of one input after which the others are not begun
_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class _Commands(click.Group):
    """The commands; Ctrl-C before one has begun is exit 130, not click's 1."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            sys.exit(130)


@click.group(cls=_Commands, context_settings=_CONTEXT)
@click.version_option(package_name="pipeline", message="%(prog)s %(version)s")
def main() -> None:
    """Run batches of LLM conversations against Anthropic, OpenAI and compatible servers.

    \b
    pipeline run questions.jsonl -o answers.jsonl      answer every line
    pipeline run questions.jsonl --simulate            rehearse, without key and network
    pipeline check questions.jsonl                     validate, send nothing
    pipeline estimate questions.jsonl                  what it would cost
    pipeline verify answers.jsonl                      prove that nothing is missing
    pipeline report --by model                         what all runs cost
    pipeline batches                                   what is with the providers' batch APIs
    """
    _fill_standard_files()


class _Pair(click.ParamType[tuple[str, str]]):
    """KEY=VALUE."""

    name = "KEY=VALUE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        key, separator, rest = str(value).partition("=")
        if not separator or not key:
            self.fail(f"{value!r} is not KEY=VALUE", param, ctx)
        return key, rest


_config_option = click.option(
    "-c", "--config", "config_path", metavar="FILE", help="Settings [default: ./config.yaml if present]."
)
_provider_option = click.option("--provider", metavar="NAME", help="Provider for lines that name none.")
_ledger_option = click.option(
    "--ledger", "ledger_file", metavar="FILE", help="Another ledger than that of the settings."
)
_model_option = click.option("--model", help="Model for lines that name none.")


@main.command(epilog="Example: pipeline run questions.jsonl -o answers.jsonl --max-tokens 500")
@click.argument("inputs", nargs=-1, required=True, metavar="INPUT...")
@click.option(
    "-o",
    "output",
    metavar="RESULTS",
    help="Results file, or s3://BUCKET/FOLDER/ [default, for one file: NAME.results.jsonl].",
)
@click.option("-d", "directory", metavar="DIR", help="Directory for one results file per input.")
@_config_option
@_provider_option
@_model_option
@click.option("--max-tokens", type=int, help="Longest answer, for lines that do not say.")
@click.option("--temperature", type=float, help="Temperature, for lines that do not say.")
@click.option("--system", help="System prompt, for lines without one.")
@click.option("--timeout", type=float, metavar="S", help="Seconds for one attempt, all in all.")
@click.option("--concurrency", type=int, metavar="N", help="Requests in flight at most.")
@click.option("--rpm", type=int, metavar="N", help="Cap of requests per minute and model.")
@click.option("--input-tpm", type=int, metavar="N", help="Cap of input tokens per minute and model.")
@click.option("--output-tpm", type=int, metavar="N", help="Cap of output tokens per minute and model.")
@click.option("--max-cost", type=float, metavar="USD", help="Stop before more is spent (exit 4).")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="First N lines only.")
@click.option(
    "--lane",
    type=click.Choice(["live", "batch", "auto"]),
    help="batch: the providers' batch APIs, at half the price; auto: what a batch does not answer goes live.",
)
@click.option("--deadline", metavar="TIME", help="With --lane auto: all answers within 6h, 90m, 1d.")
@click.option("--no-wait", is_flag=True, help="Do not wait for batches (exit 75); the same command collects them.")
@click.option("--ordered", is_flag=True, help="Put results in input order when the run ends.")
@click.option(
    "--format", "form", type=click.Choice(["native", "openai-batch", "anthropic-batch"]), help="Dialect of results."
)
@click.option(
    "--durability",
    type=click.Choice(["full", "fast"]),
    help="fast: leave syncing to the kernel.",
)
@click.option("--retry-failed", is_flag=True, help="Send again what failed before.")
@click.option("--dedupe", is_flag=True, help="Send equal requests once and copy the answer.")
@click.option("--fresh", is_flag=True, help="Set earlier results aside and start over.")
@click.option("--tag", "tags", multiple=True, type=_Pair(), help="Note for totals and reports; repeatable.")
@click.option("--echo-request", is_flag=True, help="Put the request as sent into its result line.")
@click.option("--simulate", is_flag=True, help="Rehearse against a built-in provider: no key, no network, no cost.")
@click.option("--ray", metavar="ADDRESS", help="Send from a Ray cluster: auto, HOST:PORT, ray://HOST:10001, or local.")
@click.option("--progress", type=click.Choice(["auto", "bar", "log", "none"]), help="How progress is shown.")
@click.option(
    "--log-format",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    help="json: what is said on stderr is one JSON object a line.",
)
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as one JSON object on stdout.")
def run(log_format: str, quiet: bool, **options: Any) -> None:
    """Answer every line of INPUT: files, globs, directories, s3://BUCKET/KEY (gs://, az://), or - for stdin.

    Running the same command again finishes what is missing and costs nothing for what is done.

    \b
    Exit codes: 0 all answered · 1 some lines failed · 2 usage, nothing sent · 3 stopped by the provider ·
    4 budget reached · 5 storage · 6 damaged results found · 75 try again later ·
    130/143 interrupted; repeat to go on.
    """
    screen = _screen(is_json=log_format == "json", is_quiet=quiet)
    _guarded(_run, screen, **options)


@main.command(epilog="Example: pipeline check questions.jsonl")
@click.argument("inputs", nargs=-1, required=True, metavar="INPUT...")
@_config_option
@_provider_option
@_model_option
@click.option("--json", "as_json", is_flag=True, help="Print the counts as one JSON object on stdout.")
def check(**options: Any) -> None:
    """Validate every line of INPUT and send nothing; exit 0 if all are valid, else 1."""
    _guarded(_check, **options)


@main.command(epilog="Example: pipeline estimate questions.jsonl --sample 20")
@click.argument("inputs", nargs=-1, required=True, metavar="INPUT...")
@click.option("-o", "output", metavar="RESULTS", help="Results of the run [default, for one file: NAME.results.jsonl].")
@click.option("--sample", type=click.IntRange(min=1), metavar="N", help="Send the first N lines, into RESULTS.")
@_config_option
@_provider_option
@_model_option
@click.option("--max-tokens", type=int, help="Longest answer, for lines that do not say.")
@click.option("--temperature", type=float, help="Temperature, for lines that do not say.")
@click.option("--system", help="System prompt, for lines without one.")
@click.option("--rpm", type=int, metavar="N", help="Cap of requests per minute and model.")
@click.option("--input-tpm", type=int, metavar="N", help="Cap of input tokens per minute and model.")
@click.option("--output-tpm", type=int, metavar="N", help="Cap of output tokens per minute and model.")
@click.option("--json", "as_json", is_flag=True, help="Print the estimate as one JSON object on stdout.")
def estimate(**options: Any) -> None:
    """Tell tokens, dollars (live and in a batch) and minutes of a run of INPUT before it; sends nothing.

    Give the options of the run. What RESULTS holds already is left out, and learned from. With --sample N the first N
    lines are sent and paid for; their answers stay in RESULTS, where a run finds them, so nothing is paid twice.

    Exit codes: 0 · 1 some lines are invalid · 2 usage; with --sample those of run, where it was stopped.
    """
    _guarded(_estimate, **options)


@main.command(epilog="Example: pipeline verify answers.jsonl --input questions.jsonl")
@click.argument("results", metavar="RESULTS")
@click.option("--input", "inputs", multiple=True, metavar="INPUT", help="What was answered; repeatable.")
@_config_option
@click.option("--json", "as_json", is_flag=True, help="Print what was found as one JSON object on stdout.")
def verify(**options: Any) -> None:
    """Prove from the files alone that RESULTS are whole: no line torn or twice, totals and ledger the sum of the lines.

    With --input also that every line of it has one result. Exit 0 if all is proven, 6 if results are damaged, else 1.
    """
    _guarded(_verify, **options)


@main.command(epilog="Example: pipeline report --by model --since 30d --format html -o costs.html")
@click.argument("files", nargs=-1, metavar="[FILE]...")
@click.option(
    "--by", default="day", show_default=True, help="day, week, month, model, provider, lane, run or tag:NAME."
)
@click.option("--since", metavar="DAY", help="First day: 2026-11-26, or 30d for the last 30 days [default: all].")
@click.option("--until", metavar="DAY", help="Last day; 7d leaves out the last 7 days [default: today].")
@click.option(
    "--format",
    "form",
    type=click.Choice(["table", "json", "csv", "html", "prometheus"]),
    default="table",
    show_default=True,
    help="Form of the report; html is one page that works without a network.",
)
@click.option("-o", "output", metavar="FILE", help="Write it there instead of to stdout, whole or not at all.")
@click.option("--include-simulated", is_flag=True, help="Count simulated runs too.")
@_ledger_option
@click.option("--rebuild", is_flag=True, help="Instead: record the runs of these result FILEs anew, from them alone.")
@_config_option
def report(**options: Any) -> None:
    """Tell what all recorded runs cost, with the period before to compare; days are UTC."""
    _guarded(_report, **options)


@main.group(invoke_without_command=True, epilog="Example: pipeline batches cancel msgbatch_01Hk")
@click.pass_context
def batches(context: click.Context) -> None:
    """List the providers' batches of past runs (--lane batch, auto), ask how they get on, cancel them."""
    if context.invoked_subcommand is None:
        context.invoke(list_batches)


_ids = click.argument("ids", nargs=-1, required=True, metavar="ID...")
_json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object a batch on stdout.")


@batches.command("list", epilog="Example: pipeline batches list answers.jsonl")
@click.argument("files", nargs=-1, metavar="[RESULTS]...")
@_config_option
@_ledger_option
@_json_option
def list_batches(**options: Any) -> None:
    """Tell of all batches of recorded runs, or of RESULTS; asks nobody."""
    _guarded(_list_batches, **options)


@batches.command("status", epilog="Example: pipeline batches status batch_67f7")
@_ids
@_config_option
@_ledger_option
@_json_option
def batch_status(**options: Any) -> None:
    """Ask the providers how batches are getting on."""
    _guarded(_oversee, verb="status", **options)


@batches.command("cancel", epilog="Example: pipeline batches cancel msgbatch_01Hk")
@_ids
@click.option("--forget", is_flag=True, help="Give them up, whatever they answered: all is sent again.")
@_config_option
@_ledger_option
@_json_option
def cancel_batches(**options: Any) -> None:
    """Cancel batches. The next run collects what they have answered and sends the rest again.

    A batch whose provider knows it no more, or never ends it, is given up with --forget: the next run sends all of it
    again, and nothing of what it answered is collected.
    """
    _guarded(_oversee, verb="cancel", **options)


@main.command(epilog="Example: pipeline simulate --port 8080 --rpm 600 --fault 529=0.05")
@click.option("--port", type=click.IntRange(0, 65_535), default=8080, show_default=True, help="0: any free port.")
@click.option("--rpm", type=int, help="Requests per minute, for each key and model.")
@click.option("--input-tpm", type=int, help="Input tokens per minute (OpenAI: all tokens).")
@click.option("--output-tpm", type=int, help="Output tokens per minute.")
@click.option("--burst", type=int, help="Requests at once [default: a minute's worth].")
@click.option("--latency", type=float, default=0.05, show_default=True, metavar="S", help="Mean seconds per answer.")
@click.option(
    "--batch-seconds", type=float, default=1.0, show_default=True, metavar="S", help="How long a batch takes."
)
@click.option(
    "--fault", "faults", multiple=True, metavar="KIND=RATE", help="Share of requests that fail so; repeatable."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Other seed, other answers.")
@click.option("--no-rate-headers", is_flag=True, help="Tell no limits in headers, as self-hosted servers.")
def simulate(**options: Any) -> None:
    """Be a provider on this machine that speaks both protocols, with true rate limits and faults."""
    _guarded(_simulate, **options)


# ── run ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """One results file and its inputs."""

    inputs: Sequence[str]
    output: str


def _run(
    *,
    screen: Screen,
    inputs: tuple[str, ...],
    output: str | None,
    directory: str | None,
    as_json: bool,
    progress: str | None,
    ray: str | None,
    **options: Any,
) -> int:
    settings, job_options = _settings(options)

    def work() -> int:
        jobs = _jobs(inputs, output, directory)
        codes, summaries = _run_jobs(jobs, settings, job_options, screen, progress or settings.progress, ray)
        if as_json:
            _print_json([summary.as_dict() for summary in summaries])
        return _worst(codes)

    code = work() if job_options.simulate else _between_pings(work, settings, screen)
    if any(each == "-" or Path(each).is_fifo() for each in inputs):
        _leave_now(code)
    return code


def _run_jobs(
    jobs: Sequence[_Job], settings: Config, options: Options, screen: Screen, mode: str, ray: str | None
) -> tuple[list[int], list[Summary]]:
    """Do one job after the other; what ends one does not end those after it, unless it would end them too."""
    from pipeline.cli.events import show_summary
    from pipeline.core import process
    from pipeline.runner import local

    codes: list[int] = []
    summaries: list[Summary] = []
    run_batch = local.run_batch
    end = ExitStack()
    if ray is not None:
        from pipeline.runner import cluster

        session = cluster.Session(ray)
        end.callback(session.close)
        run_batch = partial(cluster.run_batch, ray=session)

    async def work() -> None:
        for each in jobs:
            try:
                summary = await run_batch(
                    each.inputs,
                    output=each.output,
                    config=_with_rest_of_cap(settings, summaries),
                    options=options,
                    watch=screen.watcher(mode),
                    say=lambda message: screen.tell("message", message),
                    handle_signals=True,
                )
            except PipelineError as exc:
                _tell_error(screen, exc)
                codes.append(exc.exit_code)
            else:
                summaries.append(summary)
                codes.append(summary.exit_code)
                show_summary(screen, summary, _again(summary))
                if summary.ends_all:
                    break
            if codes[-1] in _ENDS_ALL:
                break

    if not jobs:
        screen.tell("message", "nothing to do: no inputs there")
    with end:
        process.run(work)
    if left := len(jobs) - len(codes):
        screen.tell("warning", f"{left:,} further inputs were not begun", not_begun=left)
    return codes, summaries


def _with_rest_of_cap(settings: Config, summaries: Sequence[Summary]) -> Config:
    """Return settings in which the cap on a run is what the inputs before left of it."""
    cap = settings.budget.per_run
    if cap is None:
        return settings
    used = sum(summary.cap_used for summary in summaries)
    return settings.with_("budget", per_run=max(Decimal(0), cap - Decimal(used).scaleb(-9)))


def _between_pings(work: Callable[[], int], settings: Config, screen: Screen) -> int:
    """Do the work and tell the dead man's switch, if there is one, that it begins and with which exit code it ends."""
    if settings.ping_url is None:
        return work()
    url = settings.ping_url.rstrip("/")
    _ping(f"{url}/start", settings, screen)
    code = 1  # of Python, when a bug ends the work
    try:
        code = work()
    except PipelineError as exc:
        code = exc.exit_code
        raise
    finally:
        _ping(f"{url}/{code}" if code else url, settings, screen)
    return code


def _ping(url: str, settings: Config, screen: Screen) -> None:
    """Ping, and take it easy where that fails; the address is not told, as who knows it can ping too."""
    from pipeline.core import http, process

    try:
        status = process.run(lambda: http.ping(url, settings.sending))
        problem = None if 200 <= status < 300 else f"HTTP {status}"
    except PipelineError as exc:
        problem = exc.message
    if problem:
        screen.tell("warning", f"a ping did not get through: {problem}")


def _settings(options: dict[str, Any]) -> tuple[Config, Options]:
    """Return the configuration with the command line laid over it, and the options of the run."""
    from pipeline.core import config_file
    from pipeline.runner.options import Options

    settings = config_file.load(options["config_path"])
    settings = settings.with_(
        "request",
        max_tokens=options["max_tokens"],
        temperature=options["temperature"],
        system=options["system"],
    )
    settings = settings.with_("sending", timeout=options["timeout"], concurrency=options["concurrency"])
    settings = settings.with_(
        "limits", rpm=options["rpm"], input_tpm=options["input_tpm"], output_tpm=options["output_tpm"]
    )
    settings = settings.with_(
        "output",
        format=options["form"],
        ordered=options["ordered"] or None,
        durability=options["durability"],
        echo_request=options["echo_request"] or None,
    )
    settings = settings.with_("budget", per_run=options["max_cost"])
    settings = settings.with_("batches", deadline=options["deadline"])
    settings = settings.replace(
        provider=options["provider"],
        lane=options["lane"],
        tags={**settings.tags, **dict(options["tags"])} if options["tags"] else None,
    )
    if options["deadline"] and settings.lane != "auto":
        raise UsageError("a deadline wants --lane auto: only there a request may go live when its batch is late")
    if options["no_wait"] and options["simulate"]:
        raise UsageError("--no-wait wants a provider that outlives the command: start `pipeline simulate` beside it")
    return settings, Options(
        provider=options["provider"],
        model=options["model"],
        limit=options["limit"],
        retry_failed=options["retry_failed"],
        fresh=options["fresh"],
        dedupe=options["dedupe"],
        simulate=options["simulate"],
        no_wait=options["no_wait"],
    )


def _jobs(inputs: Sequence[str], output: str | None, directory: str | None) -> list[_Job]:
    """Tell which results go where."""
    from pipeline.core import object_store
    from pipeline.inputs import reader
    from pipeline.inputs.sources import STDIN

    if output and directory:
        raise UsageError("-o and -d exclude each other: one results file, or one for each input")
    sources = reader.sources(inputs, may_be_empty=directory is not None, but=_target(output))
    if output:
        return [_Job(inputs=sources, output=output)]
    if directory:
        jobs = [_Job(inputs=[source], output=_output_in(directory, reader.stem(source))) for source in sources]
        names = [each.output for each in jobs]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise UsageError(f"two inputs would write {twice!r}: their names differ only in directory or suffix")
        if not object_store.is_url(directory):
            _make_directory(directory)
        return jobs
    if len(sources) > 1 or sources == [STDIN]:
        raise UsageError("say where results go: -o FILE for one file, or -d DIR for one file per input")
    [source] = sources
    beside = source.rpartition("/")[0] if object_store.is_url(source) else str(Path(source).parent)
    return [_Job(inputs=sources, output=_output_in(beside, reader.stem(source)))]


def _target(output: str | None) -> str | Path | None:
    """Return what an output means: a file, or the folder at a store."""
    from pipeline.core import object_store
    from pipeline.results import object_store_writer

    if not output:
        return None
    return object_store_writer.folder_of(output) if object_store.is_url(output) else Path(output)


def _output_in(directory: str, stem: str) -> str:
    from pipeline.core import object_store

    if object_store.is_url(directory):
        return f"{directory.removesuffix('/')}/{stem}.results/"
    return str(Path(directory) / f"{stem}.results.jsonl")


def _make_directory(directory: str) -> None:
    try:
        Path(directory).mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as exc:
        raise UsageError(f"-d {directory!r} cannot be made a directory: {exc.strerror}") from exc


def _again(summary: Summary) -> str | None:
    """Return the command that continues a run, if it can be continued."""
    if not summary.pending and summary.status == "completed":
        return None
    return shlex.join(["pipeline", *(word for word in sys.argv[1:] if word != "--fresh")])


def _worst(codes: Any) -> int:
    """Return the exit code of several runs: the one that asks for most attention."""
    order = [0, 1, 75, 6, 4, 3, 5, 2, 143, 130]
    return max(codes, key=order.index, default=0)


# ── estimate ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _estimate(
    *,
    inputs: tuple[str, ...],
    output: str | None,
    sample: int | None,
    config_path: str | None,
    provider: str | None,
    model: str | None,
    as_json: bool,
    max_tokens: int | None,
    temperature: float | None,
    system: str | None,
    **caps: int | None,
) -> int:
    from pipeline.accounting import estimate
    from pipeline.cli import estimate_table
    from pipeline.core import clock, config_file, environment
    from pipeline.inputs import reader
    from pipeline.inputs.sources import STDIN
    from pipeline.runner.options import Options

    settings = config_file.load(config_path).replace(provider=provider, lane="live")
    settings = settings.with_("request", max_tokens=max_tokens, temperature=temperature, system=system)
    settings = settings.with_("limits", **caps)
    sources = reader.sources(inputs, but=_target(output))
    has_default = len(sources) == 1 and STDIN not in sources
    results = _jobs(sources, output, None)[0].output if output or sample or has_default else None
    learned: dict[tuple[str, str], Sequence[Allowance]] = {}
    if sample and results:
        if STDIN in sources:
            raise UsageError("--sample wants files: stdin can be read only once")
        options = Options(provider=provider, model=model, limit=sample)
        summary, learned = _send_sample(_Job(inputs=sources, output=results), settings, options)
        if summary.exit_code not in (0, 1, 6):
            return summary.exit_code
    with _as_file(results) as path:
        quoted = estimate.estimate(
            sources,
            settings,
            provider=provider,
            model=model,
            path=path,
            called=results,
            ledger=environment.ledger_path(settings),
            learned=learned,
            at=clock.utc_now(),
        )
    if as_json:
        _print_json([quoted.as_dict()])
    else:
        estimate_table.show(_page(), quoted)
    return quoted.exit_code


@contextmanager
def _as_file(results: str | None) -> Iterator[Path | None]:
    """Give results as a file: a temporary copy, where they are at an object store."""
    from pipeline.core import object_store
    from pipeline.results import object_store_writer

    if not results or not object_store.is_url(results):
        yield Path(results) if results else None
        return
    with tempfile.TemporaryDirectory() as directory:
        yield object_store_writer.fetch(object_store_writer.folder_of(results), Path(directory))


def _send_sample(
    sample: _Job, settings: Config, options: Options
) -> tuple[Summary, dict[tuple[str, str], Sequence[Allowance]]]:
    """Run the first lines; return also the allowances of each model that their answers told."""
    import anyio

    from pipeline.cli.events import show_summary
    from pipeline.core import process
    from pipeline.runner import local

    screen = _screen()
    learned: dict[tuple[str, str], Sequence[Allowance]] = {}

    async def watch(get: Callable[[], Progress]) -> None:
        try:
            await anyio.sleep_forever()
        finally:
            learned.update({(lane.provider, lane.model): lane.allowances for lane in get().sender.lanes})

    async def work() -> Summary:
        return await local.run_batch(
            sample.inputs,
            output=sample.output,
            config=settings,
            options=options,
            watch=watch,
            say=lambda message: screen.tell("message", message),
            handle_signals=True,
        )

    summary = process.run(work)
    show_summary(screen, summary, None)
    if summary.run.succeeded:
        text = "these answers are kept: a run of the same input, with the same options, takes them from there"
        screen.tell("message", text)
    return summary, learned


# ── check, verify, simulate ───────────────────────────────────────────────────────────────────────────────────────


def _check(
    *, inputs: tuple[str, ...], config_path: str | None, provider: str | None, model: str | None, as_json: bool
) -> int:
    from pipeline.core import config_file, text
    from pipeline.inputs import check

    settings = config_file.load(config_path).replace(provider=provider)
    screen = _screen()

    def tell(problem: str) -> None:
        screen.tell("failure", problem) if as_json else print(text.escape(problem))

    report = check.check(inputs, settings, provider=provider, model=model, on_problem=tell)
    for warning in report.warnings:
        screen.tell("warning", warning)
    if as_json:
        _print_json([report.as_dict()])
    else:
        for name, count in report.by_model.items():
            screen.tell("message", f"{count:,} × {name}")
        warnings = f", {len(report.warnings):,} warning(s)" if report.warnings else ""
        screen.tell("message", f"{report.lines:,} lines, {report.invalid:,} invalid{warnings}")
    return int(report.invalid > 0)


def _verify(*, results: str, inputs: tuple[str, ...], config_path: str | None, as_json: bool) -> int:
    from pipeline.accounting import verify
    from pipeline.core import config_file, environment
    from pipeline.core.text import escape

    settings = config_file.load(config_path)
    name = _target(results)
    with _as_file(results) as path:
        assert path is not None
        report = verify.verify(path, inputs, settings, ledger=environment.ledger_path(settings), name=name)
    if as_json:
        _print_json([report.as_dict()])
        return report.exit_code
    for problem in report.shown:
        print(f"✗ {escape(problem)}")
    if hidden := report.problems.total() - len(report.shown):
        print(f"✗ … and {hidden:,} more")
    for note in report.notes:
        print(f"! {escape(note)}")
    verdict = "NOT PROVEN" if report.exit_code else "proven"
    looked = f"{report.results:,} results" + (f", {report.inputs:,} input lines" if inputs else "")
    print(f"{verdict}: {looked}" + ("" if inputs else "; without --input nobody knows whether lines are missing"))
    return report.exit_code


def _simulate(*, port: int, faults: tuple[str, ...], no_rate_headers: bool, **options: Any) -> int:
    from pipeline import simulator

    screen = _screen()
    try:
        wanted = simulator.Options(
            faults=dict(simulator.parse_fault(fault) for fault in faults), rate_headers=not no_rate_headers, **options
        )
    except ValueError as exc:
        raise UsageError(str(exc)) from exc

    def announce(url: str) -> None:
        screen.tell("message", f"simulating Anthropic and OpenAI on {url}; Ctrl-C ends it")
        screen.tell(
            "message",
            f"export ANTHROPIC_BASE_URL={url} OPENAI_BASE_URL={url}/v1 ANTHROPIC_API_KEY=any OPENAI_API_KEY=any",
        )

    try:
        simulator.serve_forever(wanted, "127.0.0.1", port, announce)
    except OSError as exc:
        raise UsageError(f"cannot listen on port {port}: {exc.strerror}", hint="--port 0 takes any free one") from exc
    return 0


# ── report ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _report(
    *,
    files: tuple[str, ...],
    rebuild: bool,
    config_path: str | None,
    ledger_file: str | None,
    form: str,
    output: str | None,
    **options: Any,
) -> int:
    from pipeline.accounting import report
    from pipeline.core import clock, config_file, environment, object_store

    ledger = Path(ledger_file) if ledger_file else environment.ledger_path(config_file.load(config_path))
    if rebuild != bool(files):
        raise UsageError("--rebuild wants result files, and they want --rebuild: pipeline report --rebuild RESULTS...")
    if url := next((file for file in files if object_store.is_url(file)), None):
        hint = "copy its parts into one file, and give that"
        raise UsageError(f"--rebuild wants files, and {url!r} is at an object store", hint=hint)
    if rebuild:
        rebuilt = report.rebuild(ledger, [Path(file) for file in files])
        _screen().tell("message", f"{rebuilt} recorded in {str(ledger)!r}")
        return 6 if rebuilt.damaged else 0
    content = report.render(
        report.load(ledger, **options, form=form, now=clock.utc_now()),
        form,
        width=shutil.get_terminal_size((120, 24)).columns,
        is_colored=sys.stdout.isatty() and not output,
    )
    if output:
        report.write(Path(output), content, form=form, ledger=ledger)
    else:
        _write(content)
    return 0


# ── batches ───────────────────────────────────────────────────────────────────────────────────────────────────────


def _list_batches(
    *,
    files: tuple[str, ...] = (),
    config_path: str | None = None,
    ledger_file: str | None = None,
    as_json: bool = False,
) -> int:
    _, found = _batches(config_path, ledger_file, files)
    if not found and not as_json:
        _screen().tell("message", "no run recorded a batch")
        return 0
    _show_batches(sorted(found, key=lambda each: each.chunk.is_open) if not as_json else found, as_json=as_json)
    return 0


def _oversee(
    *,
    verb: str,
    ids: tuple[str, ...],
    config_path: str | None,
    ledger_file: str | None,
    as_json: bool,
    forget: bool = False,
) -> int:
    from pipeline.core import process
    from pipeline.dispatch.batch import manage

    settings, found = _batches(config_path, ledger_file, ())
    wanted = manage.chosen(found, ids)
    if forget:
        told = [manage.give_up(each) for each in wanted]
        requests = sum(each.chunk.requests for each in told if each.chunk.batch_id)
        if requests:
            _screen().tell("warning", f"what the provider did of {requests:,} requests may be billed all the same")
    else:
        ask = manage.cancel if verb == "cancel" else manage.status
        told = process.run(lambda: ask(settings, wanted))
    _show_batches(told, as_json=as_json)
    return 0


def _batches(config_path: str | None, ledger_file: str | None, files: Sequence[str]) -> tuple[Config, list[Listed]]:
    from pipeline.core import config_file, environment
    from pipeline.dispatch.batch import manage

    settings = config_file.load(config_path)
    ledger = Path(ledger_file) if ledger_file else environment.ledger_path(settings)
    return settings, manage.listed(ledger, settings, files)


def _show_batches(found: Sequence[Listed], *, as_json: bool) -> None:
    from pipeline.cli import batches_table

    if as_json:
        _print_json([each.as_dict() for each in found])
    else:
        batches_table.show(_page(), found)


# ── printing ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _guarded(command: Callable[..., int], screen: Screen | None = None, **options: Any) -> NoReturn:
    """Call a command and leave with its exit code; errors of ours become one message."""
    if screen:
        options["screen"] = screen
    try:
        sys.exit(command(**options))
    except PipelineError as exc:
        _tell_error(screen or _screen(), exc)
        sys.exit(exc.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


def _tell_error(screen: Screen, error: PipelineError) -> None:
    for line in error.message.splitlines():
        screen.tell("error", line, exit_code=error.exit_code)
    if error.hint:
        screen.tell("hint", error.hint)


def _screen(*, is_json: bool = False, is_quiet: bool = False) -> Screen:
    from rich.console import Console

    from pipeline.cli.events import Screen

    console = Console(file=cast(IO[str], _Steady()), highlight=False, markup=False, emoji=False)
    return Screen(console, is_json=is_json, is_quiet=is_quiet)


def _page() -> Console:
    """Return stdout, as wide as a table wants it where it is no terminal."""
    from rich.console import Console

    width = shutil.get_terminal_size((120, 24)).columns if sys.stdout.isatty() else 1_000
    return Console(width=width, highlight=False, markup=False, emoji=False)


def _print_json(objects: list[dict[str, Any]]) -> None:
    """Print one object, or one for each line where there are several."""
    import orjson

    _write(b"".join(orjson.dumps(each, option=orjson.OPT_APPEND_NEWLINE) for each in objects))


def _write(data: bytes) -> None:
    """Write to stdout and leave nothing in a buffer: Python would try again at its end, and change the exit code."""
    from pipeline.core import files

    try:
        files.write_all(sys.stdout.fileno(), data)
    except OSError as exc:
        raise StorageError(f"cannot write to standard output: {exc.strerror}") from exc


class _Steady:
    """stderr, whose end is not the end of a run: the log's disk is full, its reader or the terminal is gone.

    Nothing is buffered: what cannot be written would be tried again when Python ends, and make its exit code 120.
    """

    def write(self, text: str) -> int:
        buffer = sys.stderr.buffer
        with suppress(OSError):
            getattr(buffer, "raw", buffer).write(text.encode(sys.stderr.encoding, "backslashreplace"))
        return len(text)

    def flush(self) -> None:
        """Do nothing: nothing is buffered."""

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)


def _fill_standard_files() -> None:
    """Put /dev/null where stdin, stdout or stderr was closed: else the next file that is opened takes its number.

    That may be the results, and what a library prints to stderr would stand among them.
    """
    while (null := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    sys.stdout = sys.stdout or open(null, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(null, "w", closefd=False)  # noqa: SIM115


def _leave_now(code: int) -> NoReturn:
    """Leave although a thread may still wait for a pipe; everything is on the disk."""
    sys.stdout.flush()
    os._exit(code)
