"""The command as a process: exit codes, messages, and what goes to stdout, stderr and files."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson
import pytest

from pipeline.simulator import Options, Server, serving

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "samples" / "conversations.jsonl"
BAD_SAMPLE = ROOT / "samples" / "with-bad-lines.jsonl"
COMMAND = [sys.executable, "-m", "pipeline"]


def _environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "PIPELINE_LEDGER")}
    return kept | {"PIPELINE_CONFIG": str(ROOT / "config.yaml"), "PYTHONPATH": str(ROOT)} | more


def _call(
    words: Sequence[object], cwd: Path, environ: Mapping[str, str] | None = None, stdin: bytes = b""
) -> subprocess.CompletedProcess[bytes]:
    """Run a command with a minimal environment, as cron does."""
    return subprocess.run(
        [*COMMAND, *map(str, words)],
        cwd=cwd,
        env=_environment(**(environ or {})),
        input=stdin,
        capture_output=True,
        timeout=50,
        check=False,
    )


@pytest.fixture
def server() -> Iterator[Server]:
    with serving(Options(latency=0.02)) as running:
        yield running


def _pointing_at(server: Server) -> dict[str, str]:
    return {
        "ANTHROPIC_BASE_URL": server.url,
        "OPENAI_BASE_URL": f"{server.url}/v1",
        "ANTHROPIC_API_KEY": "sk-ant-CANARY-1",
        "OPENAI_API_KEY": "sk-CANARY-2",
    }


def _lines(path: Path) -> list[dict[str, Any]]:
    return [orjson.loads(line) for line in path.read_bytes().splitlines()]


def test_the_sample_runs_without_key_and_network(tmp_path: Path) -> None:
    """The README's first command: one file with every line format and both providers; all lines succeed, exit 0."""
    done = _call(["run", SAMPLE, "-o", "answers.jsonl", "--simulate"], tmp_path)

    results = _lines(tmp_path / "answers.jsonl")
    assert done.returncode == 0, done.stderr
    assert len(results) == len(SAMPLE.read_bytes().splitlines())
    assert all(result["success"] for result in results)
    assert {result["provider"] for result in results} == {"anthropic", "openai"}
    assert b"SIMULATED" in done.stderr
    assert done.stdout == b""


def test_invalid_lines_are_reported_with_file_and_line(tmp_path: Path) -> None:
    """The README's second sample: valid lines succeed, invalid ones are reported by file:line, exit 1."""
    done = _call(["run", BAD_SAMPLE, "-o", "answers.jsonl", "--simulate"], tmp_path)

    results = _lines(tmp_path / "answers.jsonl")
    assert done.returncode == 1
    assert sorted(result["custom_id"] for result in results if result["success"]) == ["good-1", "good-2"]
    assert len(results) == len(BAD_SAMPLE.read_bytes().splitlines())
    assert f"{BAD_SAMPLE}:2: not valid JSON".encode() in done.stderr


def test_only_the_json_summary_goes_to_stdout(tmp_path: Path) -> None:
    """`--json -q` prints one JSON object on stdout, equal to the totals file, and nothing on stderr."""
    done = _call(["run", SAMPLE, "-o", "answers.jsonl", "--simulate", "--json", "-q", "--tag", "team=search"], tmp_path)

    summary = orjson.loads(done.stdout)
    assert (done.returncode, done.stderr) == (0, b"")
    assert summary["tags"] == {"team": "search"}
    assert summary == orjson.loads((tmp_path / "answers.usage.json").read_bytes())


def test_a_second_run_has_nothing_to_do(tmp_path: Path) -> None:
    """After completion the same command sends nothing, says so, and exits with 0."""
    command = ["run", SAMPLE, "-o", "answers.jsonl", "--simulate"]
    _call(command, tmp_path)

    done = _call([*command, "--json"], tmp_path)

    assert done.returncode == 0
    assert b"nothing to do" in done.stderr
    assert orjson.loads(done.stdout)["attempts"]["total"] == 0


@pytest.mark.parametrize(
    ("words", "environ", "message"),
    [
        pytest.param(["run", "absent.jsonl", "-o", "o.jsonl"], {}, "'absent.jsonl' does not exist", id="no input"),
        pytest.param(["run", "in.jsonl", "-o", "o.jsonl"], {}, "OPENAI_API_KEY", id="no key"),
        pytest.param(["run", "in.jsonl", "-o", "no/dir/o", "--simulate"], {}, "create it", id="no directory"),
        pytest.param(["run", "in.jsonl", "-o", "in.jsonl", "--simulate"], {}, "another -o", id="overwrite"),
        pytest.param(["run", "in.jsonl", "--simulate", "-c", "bad.yaml"], {}, "did you mean 'concurrency'", id="typo"),
        pytest.param(["run", "in.jsonl", "--simulate", "--timeout", "-1"], {}, "sending.timeout", id="bad value"),
        pytest.param(["run", "in.jsonl", "--simulate", "--provider", "nobody"], {}, "'nobody'", id="no such provider"),
        pytest.param(["run", "in.jsonl", "x.jsonl"], {}, "'x.jsonl' does not exist", id="second input missing"),
        pytest.param(["run"], {}, "Missing argument", id="no words"),
        pytest.param(["run", "in.jsonl"], {"OPENAI_BASE_URL": "http://example.com"}, "unencrypted", id="http"),
    ],
)  # fmt: skip
def test_usage_errors_are_one_message_and_exit_2(
    words: list[str], environ: Mapping[str, str], message: str, tmp_path: Path
) -> None:
    """Wrong usage or settings: exit 2, the message names the cause, and nothing is sent or written."""
    (tmp_path / "in.jsonl").write_bytes(b'{"model":"gpt-6-luna","messages":[{"role":"user","content":"hi"}]}\n')
    (tmp_path / "bad.yaml").write_text("sending:\n  concurency: 5\n")

    done = _call(words, tmp_path, environ)

    assert done.returncode == 2
    assert message in done.stderr.decode()
    assert b"Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.yaml", "in.jsonl"]


def test_check_validates_and_sends_nothing(tmp_path: Path) -> None:
    """`check` prints `file:line: reason` for each invalid line on stdout; exit 1, or 0 when all are valid."""
    bad = _call(["check", BAD_SAMPLE], tmp_path)
    good = _call(["check", SAMPLE], tmp_path)

    assert bad.returncode == 1
    assert bad.stdout.decode().splitlines()[0].startswith(f"{BAD_SAMPLE}:2: not valid JSON")
    assert (good.returncode, good.stdout) == (0, b"")


def test_an_estimate_is_printed_and_nothing_is_sent(server: Server, tmp_path: Path) -> None:
    """`estimate` prints a table or JSON on stdout and needs no key; it makes no call. Invalid lines: exit 1."""
    table = _call(["estimate", SAMPLE], tmp_path, _pointing_at(server) | {"PIPELINE_LEDGER": "absent.sqlite"})
    as_json = _call(["estimate", SAMPLE, "--json", "--max-tokens", 500, "--rpm", 8], tmp_path)
    bad = _call(["estimate", BAD_SAMPLE], tmp_path)

    estimate = orjson.loads(as_json.stdout)
    assert (table.returncode, table.stderr, as_json.returncode, as_json.stderr) == (0, b"", 0, b"")
    assert b"31 lines: 31 to send" in table.stdout
    assert b"the length of 31 answer(s) is unknown" in table.stdout
    assert (estimate["requests"], estimate["minutes"]) == (31, 2.0)
    assert estimate["live"]["at_most"] > estimate["batch"]["at_most"] > 0
    assert bad.returncode == 1
    assert b"11 invalid" in bad.stdout
    assert server.statistics()["received"] == 0
    assert list(tmp_path.iterdir()) == []


def test_check_and_estimate_report_a_retired_model(tmp_path: Path) -> None:
    """`check` warns and still exits with 0; `estimate` notes it; both name the line and the successor."""
    line = {"model": "claude-3-5-sonnet-20241022", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 9}
    (tmp_path / "in.jsonl").write_bytes(orjson.dumps(line) + b"\n")

    checked = _call(["check", "in.jsonl"], tmp_path)
    as_json = _call(["check", "in.jsonl", "--json"], tmp_path)
    estimated = _call(["estimate", "in.jsonl", "--json"], tmp_path)

    (warning,) = orjson.loads(as_json.stdout)["warnings"]
    assert warning.startswith("in.jsonl:1: model 'claude-3-5-sonnet-20241022' ")
    assert "use claude-sonnet-5-5 instead" in warning
    assert (checked.returncode, as_json.returncode, estimated.returncode) == (0, 0, 0)
    assert b"was retired on 2025-10-28" in checked.stderr
    assert b"1 lines, 0 invalid, 1 warning(s)" in checked.stderr
    assert warning in orjson.loads(estimated.stdout)["notes"]


def test_a_sample_is_paid_for_once(tmp_path: Path) -> None:
    """`--sample N` sends N lines, and a later run sends only the rest; the reported rate limits give the minutes."""
    body = b'{"custom_id":"q-%d","model":"gpt-6-luna","max_tokens":300,"messages":[{"role":"user","content":"%d"}]}\n'
    (tmp_path / "in.jsonl").write_bytes(b"".join(body % (n, n) for n in range(35)))
    with serving(Options(rpm=60)) as server:
        environ = _pointing_at(server)
        sampled = _call(["estimate", "in.jsonl", "--sample", 5, "--json"], tmp_path, environ)
        sent = server.statistics()["received"]
        again = _call(["estimate", "in.jsonl", "--sample", 5, "--json"], tmp_path, environ)
        run = _call(["run", "in.jsonl"], tmp_path, environ)
        statistics = server.statistics()

    estimate = orjson.loads(sampled.stdout)
    (row,) = estimate["by_model"]
    assert (sampled.returncode, sent, estimate["done"], estimate["requests"]) == (0, 5, 5, 30)
    assert row["basis"].startswith("this input: 5 answers, ")
    assert (row["minutes"], row["limit"]) == (0.5, {"kind": "requests", "per_minute": 60.0, "source": "told"})
    assert b"these results are kept" in sampled.stderr
    assert orjson.loads(again.stdout)["done"] == 5
    assert run.returncode == 0, run.stderr
    assert (statistics["received"], statistics["duplicates_paid"]) == (35, 0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        pytest.param(["-", "--sample", "3", "-o", "o.jsonl"], "stdin can be read only once", id="stdin"),
        pytest.param(["a.jsonl", "b.jsonl", "--sample", "3"], "say where results go", id="two files, no results"),
        pytest.param(["a.jsonl", "--sample", "3"], "OPENAI_API_KEY", id="no key"),
        pytest.param(["absent.jsonl"], "'absent.jsonl' does not exist", id="no input"),
    ],
)
def test_an_impossible_estimate_is_a_usage_error(words: list[str], message: str, tmp_path: Path) -> None:
    """If a sample cannot be sent, the command says why before it sends anything: exit 2."""
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_bytes(
            b'{"model":"gpt-6-luna","messages":[{"role":"user","content":"hi"}]}\n'
        )

    done = _call(["estimate", *words], tmp_path)

    assert (done.returncode, done.stdout) == (2, b"")
    assert message in done.stderr.decode()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl"]


def test_a_stopped_sample_gives_no_estimate(server: Server, tmp_path: Path) -> None:
    """If the provider stops the sample, the command prints no estimate and exits with the code of the run."""
    environ = _pointing_at(server) | {"OPENAI_BASE_URL": f"{server.url}/nowhere"}
    (tmp_path / "in.jsonl").write_bytes(b'{"model":"gpt-6-luna","messages":[{"role":"user","content":"hi"}]}\n')

    done = _call(["estimate", "in.jsonl", "--sample", "1", "--json"], tmp_path, environ)

    assert (done.returncode, done.stdout) == (3, b"")
    assert b"stopped: " in done.stderr


def test_stdin_is_an_input(tmp_path: Path) -> None:
    """`-` reads stdin and requires `-o`."""
    done = _call(["run", "-", "-o", "o.jsonl", "--simulate"], tmp_path, stdin=SAMPLE.read_bytes())
    nowhere = _call(["run", "-", "--simulate"], tmp_path, stdin=b"")

    assert done.returncode == 0, done.stderr
    assert len(_lines(tmp_path / "o.jsonl")) == len(SAMPLE.read_bytes().splitlines())
    assert nowhere.returncode == 2


def test_a_directory_gets_one_results_file_per_input(tmp_path: Path) -> None:
    """`-d` writes one results file per input; the repeated command sends nothing."""
    inbox = tmp_path / "inbox"
    inbox.mkdir()
    for name in ("a", "b"):
        (inbox / f"{name}.jsonl").write_bytes(SAMPLE.read_bytes())

    first = _call(["run", "inbox", "-d", "outbox", "--simulate"], tmp_path)
    again = _call(["run", "inbox", "-d", "outbox", "--simulate", "--json", "-q"], tmp_path)

    assert first.returncode == 0, first.stderr
    assert sorted(path.name for path in (tmp_path / "outbox").glob("*.jsonl")) == [
        "a.results.attempts.jsonl",
        "a.results.jsonl",
        "b.results.attempts.jsonl",
        "b.results.jsonl",
    ]
    assert [orjson.loads(line)["attempts"]["total"] for line in again.stdout.splitlines()] == [0, 0]


def test_results_may_be_in_the_directory_of_the_inputs(tmp_path: Path) -> None:
    """`run data -o data/answers.jsonl` can be repeated and verified: the results are not read as input."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "q.jsonl").write_bytes(SAMPLE.read_bytes())
    command = ["run", "data", "-o", "data/answers.jsonl", "--simulate"]

    first = _call(command, tmp_path)
    again = _call([*command, "--json"], tmp_path)
    proof = _call(["verify", "data/answers.jsonl", "--input", "data"], tmp_path)

    assert first.returncode == 0, first.stderr
    assert (again.returncode, proof.returncode) == (0, 0), again.stderr + proof.stdout
    assert orjson.loads(again.stdout)["requests"]["reused"] == len(SAMPLE.read_bytes().splitlines())


@pytest.mark.parametrize("form", ["openai-batch", "anthropic-batch"])
def test_results_can_be_in_a_providers_batch_format(form: str, tmp_path: Path) -> None:
    """In both batch formats every line has a result, and a repeated command recognizes them."""
    command = ["run", SAMPLE, "-o", "o.jsonl", "--simulate", "--format", form]
    first = _call(command, tmp_path)
    again = _call([*command, "--json"], tmp_path)

    key = "response" if form == "openai-batch" else "result"
    assert first.returncode == 0, first.stderr
    assert all(key in result for result in _lines(tmp_path / "o.jsonl"))
    assert orjson.loads(again.stdout)["requests"]["reused"] == len(SAMPLE.read_bytes().splitlines())


def test_keys_are_never_printed_or_written(server: Server, tmp_path: Path) -> None:
    """Keys appear in no output and no file."""
    done = _call(["run", SAMPLE, "-o", "o.jsonl", "--json", "--echo-request"], tmp_path, _pointing_at(server))

    written = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert done.returncode == 0, done.stderr
    assert b"CANARY" not in done.stdout + done.stderr + written


def test_files_are_readable_by_the_owner_only(tmp_path: Path) -> None:
    """Results and totals contain conversations: their mode is 0600 whatever the umask."""
    before = os.umask(0)
    try:
        _call(["run", SAMPLE, "-o", "o.jsonl", "--simulate"], tmp_path)
    finally:
        os.umask(before)

    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}


@pytest.mark.slow
def test_terminated_runs_can_be_continued(server: Server, tmp_path: Path) -> None:
    """SIGTERM during a run: exit 143 and the command to continue; repeated, it sends only the rest."""
    body = b'{"custom_id":"q-%d","model":"gpt-6-luna","messages":[{"role":"user","content":"%d"}]}\n'
    (tmp_path / "in.jsonl").write_bytes(b"".join(body % (n, n) for n in range(400)))
    words = [*COMMAND, "run", "in.jsonl", "-o", "o.jsonl", "--concurrency", "4"]
    environ = _environment(**_pointing_at(server))

    with subprocess.Popen(words, cwd=tmp_path, env=environ, stderr=subprocess.PIPE) as process:
        while server.statistics()["answered"] < 40:
            os.sched_yield()
        process.send_signal(signal.SIGTERM)
        stderr = process.communicate(timeout=30)[1]
    interrupted = server.statistics()["answered"]
    again = subprocess.run(words, cwd=tmp_path, env=environ, capture_output=True, timeout=50, check=False)

    assert process.returncode == 143
    assert b"to continue: pipeline run in.jsonl" in stderr
    assert again.returncode == 0, again.stderr
    assert interrupted < 400
    assert (server.statistics()["answered"], server.statistics()["duplicates_paid"]) == (400, 0)


def test_control_characters_do_not_reach_the_terminal(tmp_path: Path) -> None:
    """Control characters and markup in ids, models and messages are printed as visible text."""
    line = {"custom_id": "x", "model": "m\x1b]0;owned\x07[red]", "messages": [{"role": "\x1b[2Jrobot", "content": "x"}]}
    (tmp_path / "in.jsonl").write_bytes(orjson.dumps(line) + b"\n")

    done = _call(["run", "in.jsonl", "-o", "o.jsonl", "--simulate"], tmp_path)

    assert done.returncode == 1
    assert b"\x1b" not in done.stderr
    assert b"\x07" not in done.stderr


def test_few_open_files_mean_fewer_connections(tmp_path: Path) -> None:
    """With a low limit of open files, the run lowers the concurrency, says so, and succeeds."""
    command = ["run", str(SAMPLE), "-o", "o.jsonl", "--simulate", "--concurrency", "500"]
    words = shlex.join([*COMMAND, *command])

    done = subprocess.run(
        ["bash", "-c", f"ulimit -n 80; exec {words}"],
        cwd=tmp_path,
        env=_environment(),
        capture_output=True,
        timeout=50,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert b"16 requests in flight instead of 500" in done.stderr


def test_a_cost_cap_covers_all_inputs_of_a_command(server: Server, tmp_path: Path) -> None:
    """With -d the inputs share one --max-cost; the command spends at most that and exits with 4."""
    inbox = tmp_path / "inbox"
    inbox.mkdir()
    message = {"role": "user", "content": "hi"}
    for name in "abc":
        line = {"model": "gpt-6-luna", "max_tokens": 100, "messages": [message]}
        lines = [orjson.dumps({"custom_id": f"{name}-{n}", **line}) + b"\n" for n in range(40)]
        (inbox / f"{name}.jsonl").write_bytes(b"".join(lines))

    words = ["run", "inbox", "-d", "outbox", "--max-cost", "0.001", "-q"]
    done = _call(words, tmp_path, _pointing_at(server))

    costs = []
    for path in (tmp_path / "outbox").glob("?.results.jsonl"):
        costs += [line["cost_usd"] for line in _lines(path)]
    assert done.returncode == 4, done.stderr
    assert 0.0005 < sum(costs) <= 0.001
