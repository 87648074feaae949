"""Unattended runs under cron and systemd: overlapping runs, a minimal environment, logs, the ping URL."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import IO, Any, Literal

import orjson
import pytest

from pipeline.cli import main
from pipeline.simulator import Options, Server, serving

ROOT = Path(__file__).parents[2]
SAMPLES = ROOT / "samples"
DROP_FOLDER = SAMPLES / "drop-folder.sh"
BARE = {"PATH": "/usr/bin:/bin", "LANG": "C", "SHELL": "/bin/sh"}  # cron's, without even a HOME
LINES = 40
Process = subprocess.Popen[bytes]


def _questions(name: str, count: int = LINES) -> bytes:
    line = b'{"custom_id":"%s-%d","model":"gpt-6-luna","messages":[{"role":"user","content":"%s %d"}]}\n'
    return b"".join(line % (name.encode(), n, name.encode(), n) for n in range(count))


class Folder:
    """A drop folder, and ways to run commands in it as cron would."""

    def __init__(self, path: Path, server: Server) -> None:
        self.path = path
        self.inbox = path / "inbox"
        self.outbox = path / "outbox"
        self.inbox.mkdir()
        self.command = path / "pipeline"
        python = shlex.join([sys.executable, "-m", "pipeline"])
        self.command.write_text(f'#!/bin/sh\nPYTHONPATH={shlex.quote(str(ROOT))} exec {python} "$@"\n')
        self.command.chmod(0o700)
        keys = {
            "OPENAI_BASE_URL": f"{server.url}/v1",
            "ANTHROPIC_BASE_URL": server.url,
            "OPENAI_API_KEY": "sk-any",
            "ANTHROPIC_API_KEY": "sk-any",
        }
        (path / "keys").write_text("".join(f"export {name}={value}\n" for name, value in keys.items()))
        self.configure("")

    def configure(self, more: str) -> None:
        """Write the settings: a ledger in this folder, low concurrency, and `more`."""
        text = more if "sending:" in more else f"sending: {{concurrency: 4}}\n{more}"
        (self.path / "config.yaml").write_text(f"ledger: ledger.sqlite\n{text}")

    def start(self, *words: object, stderr: int | IO[bytes] = subprocess.PIPE) -> Process:
        """Start a command in this folder, in its own process group."""
        return subprocess.Popen(
            [str(word) for word in words],
            cwd=self.path,
            env=BARE | {"PIPELINE": str(self.command)},
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
        )

    def drop_folder(self) -> Process:
        """Start the sample script."""
        return self.start("/bin/sh", DROP_FOLDER, self.path)

    def run(self, *words: object, shell: str = "") -> tuple[int, bytes, bytes]:
        """Run `pipeline` with the keys and redirections (`shell`); return exit code, stdout, stderr."""
        command = f'. ./keys; umask 000; exec "$PIPELINE" {shlex.join(map(str, words))} {shell}'
        return _ended(self.start("/bin/sh", "-c", command))

    def result_ids(self) -> dict[str, list[str]]:
        """Return the ids in each results file."""
        return {path.name.removesuffix(".results.jsonl"): _ids(path) for path in self.outbox.glob("*.results.jsonl")}

    def input_ids(self) -> dict[str, list[str]]:
        """Return the ids in each input file."""
        return {path.stem: _ids(path) for path in self.inbox.iterdir()}


def _ended(process: Process) -> tuple[int, bytes, bytes]:
    stdout, stderr = process.communicate(timeout=50)
    return process.returncode, stdout or b"", stderr or b""


def _lines(path: Path) -> list[dict[str, Any]]:
    return [orjson.loads(line) for line in path.read_bytes().splitlines()]


def _ids(path: Path) -> list[str]:
    return sorted(line["custom_id"] for line in _lines(path))


@pytest.fixture
def server() -> Iterator[Server]:
    with serving(Options(latency=0.1)) as running:
        yield running


@pytest.fixture
def folder(tmp_path: Path, server: Server) -> Folder:
    return Folder(tmp_path, server)


# ── the drop folder ───────────────────────────────────────────────────────────────────────────────────


def test_each_line_of_a_new_file_is_paid_for_once(folder: Folder, server: Server) -> None:
    """Repeated runs of the drop folder, also while a file grows, pay for each line once; cron mails nothing."""
    growing = _questions("a", 15)
    steps: list[dict[str, bytes]] = [
        {},
        {"a": growing[:777], "b": _questions("b", 10)},
        {},
        {"a": growing, "c": _questions("c", 10)},
        {},
    ]
    ended = []
    for step in steps:
        for name, content in step.items():
            (folder.inbox / f"{name}.jsonl").write_bytes(content)
        ended.append(_ended(folder.drop_folder()))

    # While only half of the last line of `a` is there, that line is invalid: exit 1.
    assert ended == [(code, b"", b"") for code in (0, 1, 1, 0, 0)]
    assert folder.result_ids() == folder.input_ids()
    assert (server.statistics()["answered"], server.statistics()["duplicates_paid"]) == (35, 0)
    assert (folder.path / "pipeline.log").stat().st_mode & 0o777 == 0o600


@pytest.mark.slow
def test_a_run_skips_files_that_another_run_holds(folder: Folder, server: Server) -> None:
    """A run skips the file that a suspended run holds, does the others, and exits with 75; cron mails nothing.

    The suspended run then finds them done and exits with 0. Every line was billed once.
    """
    for name in ("a", "b", "c"):
        (folder.inbox / f"{name}.jsonl").write_bytes(_questions(name))

    first = folder.drop_folder()
    while not server.statistics()["received"]:
        os.sched_yield()
    os.killpg(first.pid, signal.SIGSTOP)
    second = _ended(folder.drop_folder())
    between = folder.result_ids()
    os.killpg(first.pid, signal.SIGCONT)

    assert second == (75, b"", b"")
    assert (between["b"], between["c"]) == (folder.input_ids()["b"], folder.input_ids()["c"])
    assert between["a"] != folder.input_ids()["a"]
    assert _ended(first) == (0, b"", b"")
    assert folder.result_ids() == folder.input_ids()
    assert (server.statistics()["answered"], server.statistics()["duplicates_paid"]) == (3 * LINES, 0)


def test_runs_at_the_same_moment_share_the_work(folder: Folder, server: Server) -> None:
    """Three runs started together exit with 0 or 75; a later one finds nothing to do. Each line is billed once."""
    for name in ("a", "b", "c", "d"):
        (folder.inbox / f"{name}.jsonl").write_bytes(_questions(name, 15))

    together = [folder.drop_folder() for _ in range(3)]
    codes = {_ended(each)[0] for each in together}
    last = _ended(folder.drop_folder())

    assert codes <= {0, 75}
    assert last == (0, b"", b"")
    assert folder.result_ids() == folder.input_ids()
    assert (server.statistics()["answered"], server.statistics()["duplicates_paid"]) == (60, 0)


def test_a_failing_input_does_not_stop_the_others(folder: Folder) -> None:
    """With -d an unusable output is an error with its own exit code; the other inputs are sent."""
    for name in ("a", "b"):
        (folder.inbox / f"{name}.jsonl").write_bytes(_questions(name, 3))
    (folder.outbox / "a.results.jsonl").mkdir(parents=True)

    code, stdout, stderr = folder.run("run", "inbox", "-d", "outbox", "--json")

    assert code == 2
    assert b"'outbox/a.results.jsonl' is a directory" in stderr
    assert [orjson.loads(line)["requests"]["succeeded"] for line in stdout.splitlines()] == [3]


@pytest.mark.parametrize("code", [0, 1, 2, 3, 4, 5, 6, 75, 130, 143])
def test_the_drop_folder_mails_only_what_needs_action(code: int, folder: Folder) -> None:
    """If repeating the run would not help, the script prints the code and the end of the log, and cron mails them."""
    folder.command.write_text(f"#!/bin/sh\necho the reason >&2\nexit {code}\n")

    ended, stdout, stderr = _ended(folder.drop_folder())

    mailed = f"pipeline: exit code {code} in {folder.path}; pipeline.log ends with:\nthe reason\n".encode()
    assert (ended, stderr) == (code, b"")
    assert stdout == (mailed if code in (2, 3, 4, 5, 6) else b"")


# ── a minimal environment ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "shell",
    [
        pytest.param("<&- >&- 2>&-", id="all closed"),
        pytest.param("2>&-", id="stderr closed"),
        pytest.param("2>/dev/full", id="log on a full disk"),
        pytest.param("--log-format json 2>/dev/full", id="JSON log on a full disk"),
    ],
)
def test_a_run_needs_no_standard_streams(shell: str, folder: Folder) -> None:
    """Without HOME, terminal and umask, and with closed or full standard streams: complete results, mode 0600."""
    (folder.inbox / "a.jsonl").write_bytes(_questions("a"))
    before = set(folder.path.iterdir())

    code, *_ = folder.run("run", "inbox/a.jsonl", "-d", "outbox", "--json", shell=shell)

    written = set(folder.path.iterdir()) - before - {folder.outbox}
    assert code == 0
    assert folder.result_ids() == folder.input_ids()
    assert folder.outbox.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in (*written, *folder.outbox.iterdir())} == {0o600}


def test_a_run_survives_the_reader_of_its_log(folder: Folder) -> None:
    """If the process that reads the log through a pipe dies, the run continues and its exit code is right."""
    (folder.inbox / "a.jsonl").write_bytes(_questions("a", 5))
    reader, writer = os.pipe()
    os.close(reader)
    command = '. ./keys; exec "$PIPELINE" run inbox -d outbox'

    with os.fdopen(writer, "wb") as log:
        code, *_ = _ended(folder.start("/bin/sh", "-c", command, stderr=log))

    assert code == 0
    assert folder.result_ids() == folder.input_ids()


def test_no_file_takes_the_number_of_a_closed_standard_stream(folder: Folder) -> None:
    """Closed standard streams become /dev/null, so nothing that is printed can end up in results."""
    (folder.path / "spy.py").write_text(
        "import os, stat, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from pipeline.cli.main import main\n"
        "try:\n    main(['check', 'inbox'])\n"
        "finally:\n"
        "    with open('seen', 'w') as file:\n"
        "        file.write(' '.join(str(os.path.samestat(os.fstat(fd), os.stat(os.devnull))) for fd in range(3)))\n"
    )
    (folder.inbox / "a.jsonl").write_bytes(_questions("a", 1))

    code, *_ = _ended(folder.start("/bin/sh", "-c", f"exec {shlex.quote(sys.executable)} spy.py <&- >&- 2>&-"))

    assert code == 0
    assert (folder.path / "seen").read_text() == "True True True"


# ── logs ──────────────────────────────────────────────────────────────────────────────────────────────

HOSTILE = {"custom_id": "x\x1b[2J\u202e", "model": "m\x9b31m", "messages": [{"role": "\x1b]0;", "content": "hi"}]}


@pytest.mark.parametrize("form", ["text", "json"])
def test_logs_contain_no_control_characters(form: str, folder: Folder) -> None:
    """Logs contain no control characters except line ends, whatever is in ids, models and messages."""
    (folder.inbox / "a.jsonl").write_bytes(_questions("a", 3) + orjson.dumps(HOSTILE))

    code, stdout, stderr = folder.run("run", "inbox", "-d", "outbox", "--log-format", form, "--progress", "log")

    assert (code, stdout) == (1, b"")
    assert re.search(r"[^\n -~\xa0-\u1fff\u2010-\u2027\u2030-\u205f\u2070-\uffff]", stderr.decode()) is None
    assert stderr.isascii() or form == "text"


def test_a_json_log_has_the_totals_as_fields(folder: Folder) -> None:
    """Each line of a JSON log has time, level, event and message; the summary has all fields of the totals file."""
    (folder.inbox / "a.jsonl").write_bytes(_questions("a", 3) + b"{\n")

    _, _, stderr = folder.run("run", "inbox", "-d", "outbox", "--log-format", "json")

    events = [orjson.loads(line) for line in stderr.splitlines()]
    heads = [(each["level"], each["event"]) for each in events]
    totals = orjson.loads((folder.outbox / "a.results.usage.json").read_bytes())
    assert heads == [("warning", "failure"), ("info", "summary")]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", each["time"]) for each in events)
    assert events[0]["message"].startswith("inbox/a.jsonl:4: not valid JSON")
    assert totals.items() <= events[1].items()


def test_errors_are_json_lines_too(folder: Folder) -> None:
    """An error before the run starts is a JSON line with its exit code, also when quiet."""
    code, _, stderr = folder.run("run", "absent", "-d", "outbox", "--log-format", "json", "-q")

    error, hint = [orjson.loads(line) for line in stderr.splitlines()]
    assert code == 2
    assert (error["event"], error["exit_code"], error["message"]) == ("error", 2, "the input 'absent' does not exist")
    assert (hint["event"], hint["level"]) == ("hint", "error")


# ── the ping URL ─────────────────────────────────────────────────────────────────────────────

Mood = Literal["fine", "failing", "redirecting", "closing", "silent"]


@contextmanager
def _ping_server(mood: Mood = "fine") -> Iterator[tuple[str, list[str]]]:
    """Serve a dead man's switch; yield its URL and the list of requested paths."""
    requested: list[str] = []
    is_over = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requested.append(self.path)
            if mood == "silent":
                is_over.wait(50)
            if mood in ("silent", "closing"):
                self.close_connection = True
                return
            self.send_response({"fine": 200, "failing": 500, "redirecting": 302}[mood])
            self.send_header("location", "/elsewhere")
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Print nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{http.server_address[1]}/check/", requested
        finally:
            is_over.set()
            http.shutdown()
            thread.join()


def _prepare_two(folder: Folder) -> None:
    for name in ("a", "b"):
        (folder.inbox / f"{name}.jsonl").write_bytes(_questions(name, 3))


def _prepare_a_bad_line(folder: Folder) -> None:
    (folder.inbox / "a.jsonl").write_bytes(b"{\n")


def _prepare_a_directory_as_output(folder: Folder) -> None:
    (folder.inbox / "a.jsonl").write_bytes(_questions("a", 1))
    (folder.outbox / "a.results.jsonl").mkdir(parents=True)


@pytest.mark.parametrize(
    ("prepare", "words", "requested"),
    [
        pytest.param(_prepare_two, ["inbox"], ["/check/start", "/check"], id="exit 0, two inputs"),
        pytest.param(lambda folder: None, ["inbox"], ["/check/start", "/check"], id="exit 0, no inputs"),
        pytest.param(_prepare_a_bad_line, ["inbox"], ["/check/start", "/check/1"], id="exit 1"),
        pytest.param(_prepare_two, ["absent"], ["/check/start", "/check/2"], id="exit 2 before any input"),
        pytest.param(_prepare_a_directory_as_output, ["inbox"], ["/check/start", "/check/2"], id="exit 2 of an input"),
        pytest.param(_prepare_two, ["inbox", "--simulate"], [], id="simulated"),
    ],
)
def test_a_command_pings_at_start_and_end(
    prepare: Callable[[Folder], None], words: list[str], requested: list[str], folder: Folder
) -> None:
    """A command pings URL/start, and at the end the URL itself after exit 0, otherwise URL/CODE."""
    prepare(folder)

    with _ping_server() as (url, pinged):
        folder.configure(f"ping_url: {url}")
        folder.run("run", *words, "-d", "outbox")

    assert pinged == requested


def test_a_stopped_run_pings_its_exit_code(folder: Folder, server: Server) -> None:
    """SIGTERM first ends the run; then the exit code is pinged."""
    (folder.inbox / "a.jsonl").write_bytes(_questions("a"))

    with _ping_server() as (url, pinged):
        folder.configure(f"ping_url: {url}")
        process = folder.start("/bin/sh", "-c", '. ./keys; exec "$PIPELINE" run inbox -d outbox')
        while not server.statistics()["received"]:
            os.sched_yield()
        process.terminate()
        code, *_ = _ended(process)

    assert code == 143
    assert pinged == ["/check/start", "/check/143"]


@pytest.mark.parametrize(
    "mood", ["failing", "redirecting", "closing", pytest.param("silent", marks=pytest.mark.slow), "absent"]
)
def test_a_failing_ping_does_no_harm(mood: Any, folder: Folder) -> None:
    """Whatever happens to pings, the run is the same; warnings say that they failed and keep the URL secret."""
    (folder.inbox / "a.jsonl").write_bytes(_questions("a", 3))

    with _ping_server("fine" if mood == "absent" else mood) as (url, pinged):
        if mood == "absent":
            url = "http://127.0.0.1:1/check"
        folder.configure(f"ping_url: {url}\nsending: {{timeout: 2.0}}")
        code, stdout, stderr = folder.run("run", "inbox", "-d", "outbox")
        quiet = folder.run("run", "inbox", "-d", "outbox", "-q")

    assert (code, stdout) == (0, b"")
    assert folder.result_ids() == folder.input_ids()
    assert stderr.count(b"! ping failed (ping_url)") == 2
    assert b"/check" not in stderr
    assert "/elsewhere" not in pinged
    assert quiet == (0, b"", b"")


# ── the other samples ─────────────────────────────────────────────────────────────────────────────────


def _commands(text: str) -> list[list[str]]:
    """Return the words of each `pipeline` command in a text, without redirections."""
    found = re.findall(r"(?:^|[ /=])pipeline ((?:run|report) [^;&|\n]*)", text, flags=re.MULTILINE)
    commands = []
    for each in found:
        commands.append([word for word in shlex.split(each) if not word.startswith("2>>")])
    return commands


@pytest.mark.parametrize(("name", "count"), [("crontab", 5), ("pipeline.service", 1)])
def test_commands_in_samples_are_valid(name: str, count: int) -> None:
    """The program accepts the options of every command in the samples."""
    commands = _commands((SAMPLES / name).read_text())

    for command, *words in commands:
        main.main.commands[command].make_context(command, words)
    assert len(commands) == count


def test_cron_can_read_the_crontab() -> None:
    """Each line is a comment, a variable, or five fields and a command; none has a bare %, where cron would cut it."""
    lines = [line for line in (SAMPLES / "crontab").read_text().splitlines() if line and not line.startswith("#")]

    jobs = [line for line in lines if not re.match(r"[A-Z]+=", line)]
    assert all(re.match(r"([0-9*/,-]+ +){5}\S", job) for job in jobs)
    assert not any(re.search(r"(?<!\\)%", job) for job in jobs)


def test_the_drop_folder_is_plain_sh() -> None:
    """The sample script is valid for sh, and executable."""
    done = subprocess.run(["/bin/sh", "-n", DROP_FOLDER], capture_output=True, check=False)

    assert (done.returncode, done.stderr) == (0, b"")
    assert os.access(DROP_FOLDER, os.X_OK)
