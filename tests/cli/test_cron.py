"""What cron and systemd need: runs that overlap, a bare environment, logs that can be read, a switch that is told."""

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
    """A drop folder, and the ways to run something in it as cron would."""

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
        """Write the configuration: a ledger of its own, few requests in flight, and more."""
        text = more if "sending:" in more else f"sending: {{concurrency: 4}}\n{more}"
        (self.path / "config.yaml").write_text(f"ledger: ledger.sqlite\n{text}")

    def start(self, *words: object, stderr: int | IO[bytes] = subprocess.PIPE) -> Process:
        """Start a command in this folder and in a group of its own."""
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
        """Start the sample."""
        return self.start("/bin/sh", DROP_FOLDER, self.path)

    def run(self, *words: object, shell: str = "") -> tuple[int, bytes, bytes]:
        """Run `pipeline` with the keys, and a piece of shell after it; return exit code, stdout, stderr."""
        command = f'. ./keys; umask 000; exec "$PIPELINE" {shlex.join(map(str, words))} {shell}'
        return _ended(self.start("/bin/sh", "-c", command))

    def answered(self) -> dict[str, list[str]]:
        """Return the ids that have an answer, file by file."""
        return {
            path.name.removesuffix(".results.jsonl"): sorted(result["custom_id"] for result in _lines(path))
            for path in sorted(self.outbox.glob("*.results.jsonl"))
        }

    def dropped(self) -> dict[str, list[str]]:
        """Return the ids that were asked, file by file."""
        return {path.stem: sorted(line["custom_id"] for line in _lines(path)) for path in sorted(self.inbox.iterdir())}


def _ended(process: Process) -> tuple[int, bytes, bytes]:
    stdout, stderr = process.communicate(timeout=50)
    return process.returncode, stdout or b"", stderr or b""


def _lines(path: Path) -> list[dict[str, Any]]:
    return [orjson.loads(line) for line in path.read_bytes().splitlines()]


@pytest.fixture
def server() -> Iterator[Server]:
    with serving(Options(latency=0.1)) as running:
        yield running


@pytest.fixture
def folder(tmp_path: Path, server: Server) -> Folder:
    return Folder(tmp_path, server)


# ── the drop folder ───────────────────────────────────────────────────────────────────────────────────


def test_each_new_file_is_answered_once(folder: Folder, server: Server) -> None:
    """The drop folder run again and again, also while a file grows: each line is billed once, nothing is mailed."""
    growing = _questions("a", 15)
    steps: list[dict[str, bytes]] = [
        {},
        {"a": growing[:777], "b": _questions("b", 10)},
        {},
        {"a": growing, "c": _questions("c", 10)},
        {},
    ]
    told = []
    for step in steps:
        for name, content in step.items():
            (folder.inbox / f"{name}.jsonl").write_bytes(content)
        told.append(_ended(folder.drop_folder()))

    # While the last line of `a` is half there, it is an invalid one.
    assert told == [(code, b"", b"") for code in (0, 1, 1, 0, 0)]
    assert folder.answered() == folder.dropped()
    assert (server.statistics()["answered"], server.statistics()["duplicates_paid"]) == (35, 0)
    assert (folder.path / "pipeline.log").stat().st_mode & 0o777 == 0o600


@pytest.mark.slow
def test_a_run_leaves_to_another_what_that_one_is_at(folder: Folder, server: Server) -> None:
    """Run while the first file is held by a run that stands still: the others are answered, exit 75, no mail; the
    held run then finds them done, exit 0. Every line was billed once."""
    for name in ("a", "b", "c"):
        (folder.inbox / f"{name}.jsonl").write_bytes(_questions(name))

    first = folder.drop_folder()
    while not server.statistics()["received"]:
        os.sched_yield()
    os.killpg(first.pid, signal.SIGSTOP)
    second = _ended(folder.drop_folder())
    between = folder.answered()
    os.killpg(first.pid, signal.SIGCONT)

    assert second == (75, b"", b"")
    assert (between["b"], between["c"]) == (folder.dropped()["b"], folder.dropped()["c"])
    assert between["a"] != folder.dropped()["a"]
    assert _ended(first) == (0, b"", b"")
    assert folder.answered() == folder.dropped()
    assert (server.statistics()["answered"], server.statistics()["duplicates_paid"]) == (3 * LINES, 0)


def test_runs_at_the_same_moment_share_the_work(folder: Folder, server: Server) -> None:
    """Three runs begun together: each ends with 0 or 75, one after them has nothing to do, each line is billed once."""
    for name in ("a", "b", "c", "d"):
        (folder.inbox / f"{name}.jsonl").write_bytes(_questions(name, 15))

    together = [folder.drop_folder() for _ in range(3)]
    codes = {_ended(each)[0] for each in together}
    last = _ended(folder.drop_folder())

    assert codes <= {0, 75}
    assert last == (0, b"", b"")
    assert folder.answered() == folder.dropped()
    assert (server.statistics()["answered"], server.statistics()["duplicates_paid"]) == (60, 0)


def test_one_input_that_cannot_be_done_does_not_end_the_others(folder: Folder) -> None:
    """With -d an output that cannot be used is told with its exit code; the other inputs are answered."""
    for name in ("a", "b"):
        (folder.inbox / f"{name}.jsonl").write_bytes(_questions(name, 3))
    (folder.outbox / "a.results.jsonl").mkdir(parents=True)

    code, stdout, stderr = folder.run("run", "inbox", "-d", "outbox", "--json")

    assert code == 2
    assert b"'outbox/a.results.jsonl' is a directory" in stderr
    assert [orjson.loads(line)["requests"]["succeeded"] for line in stdout.splitlines()] == [3]


@pytest.mark.parametrize("code", [0, 1, 2, 3, 4, 5, 6, 75, 130, 143])
def test_the_drop_folder_mails_what_somebody_must_act_on(code: int, folder: Folder) -> None:
    """The sample prints, for cron to mail, the code and the end of the log where waiting would mend nothing."""
    folder.command.write_text(f"#!/bin/sh\necho the reason >&2\nexit {code}\n")

    ended, stdout, stderr = _ended(folder.drop_folder())

    mailed = f"pipeline: exit code {code} in {folder.path}; pipeline.log ends with:\nthe reason\n".encode()
    assert (ended, stderr) == (code, b"")
    assert stdout == (mailed if code in (2, 3, 4, 5, 6) else b"")


# ── a bare environment ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "shell",
    [
        pytest.param("<&- >&- 2>&-", id="all closed"),
        pytest.param("2>&-", id="stderr closed"),
        pytest.param("2>/dev/full", id="log on a full disk"),
        pytest.param("--log-format json 2>/dev/full", id="JSON log on a full disk"),
    ],
)
def test_a_run_needs_no_standard_files(shell: str, folder: Folder) -> None:
    """Without HOME, terminal and umask, and with standard files closed or full: exit 0, whole results, all 0600."""
    (folder.inbox / "a.jsonl").write_bytes(_questions("a"))
    before = set(folder.path.iterdir())

    code, *_ = folder.run("run", "inbox/a.jsonl", "-d", "outbox", "--json", shell=shell)

    written = set(folder.path.iterdir()) - before - {folder.outbox}
    assert code == 0
    assert folder.answered() == folder.dropped()
    assert folder.outbox.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in (*written, *folder.outbox.iterdir())} == {0o600}


def test_a_reader_of_the_log_who_leaves_does_not_end_the_run(folder: Folder) -> None:
    """What reads the log through a pipe may die; the run goes on and its exit code is true."""
    (folder.inbox / "a.jsonl").write_bytes(_questions("a", 5))
    reader, writer = os.pipe()
    os.close(reader)
    command = '. ./keys; exec "$PIPELINE" run inbox -d outbox'

    with os.fdopen(writer, "wb") as gone:
        code, *_ = _ended(folder.start("/bin/sh", "-c", command, stderr=gone))

    assert code == 0
    assert folder.answered() == folder.dropped()


def test_no_file_takes_the_place_of_a_closed_standard_file(folder: Folder) -> None:
    """Closed standard files become /dev/null, so nothing that is printed can land in results."""
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
def test_nothing_in_a_log_acts(form: str, folder: Folder) -> None:
    """Logs hold no control character but line ends, whatever ids, models and messages hold."""
    (folder.inbox / "a.jsonl").write_bytes(_questions("a", 3) + orjson.dumps(HOSTILE))

    code, stdout, stderr = folder.run("run", "inbox", "-d", "outbox", "--log-format", form, "--progress", "log")

    assert (code, stdout) == (1, b"")
    assert re.search(r"[^\n -~\xa0-\u1fff\u2010-\u2027\u2030-\u205f\u2070-\uffff]", stderr.decode()) is None
    assert stderr.isascii() or form == "text"


def test_a_json_log_tells_the_numbers(folder: Folder) -> None:
    """Every line of a JSON log has time, level, event and message; the summary holds what the totals file does."""
    (folder.inbox / "a.jsonl").write_bytes(_questions("a", 3) + b"{\n")

    _, _, stderr = folder.run("run", "inbox", "-d", "outbox", "--log-format", "json")

    events = [orjson.loads(line) for line in stderr.splitlines()]
    heads = [(each["level"], each["event"]) for each in events]
    totals = orjson.loads((folder.outbox / "a.results.usage.json").read_bytes())
    assert heads == [("warning", "failure"), ("info", "summary")]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", each["time"]) for each in events)
    assert events[0]["message"].startswith("inbox/a.jsonl:4: not valid JSON")
    assert totals.items() <= events[1].items()


def test_errors_are_json_too(folder: Folder) -> None:
    """What keeps a run from beginning is told in the log's form, with its exit code, also when quiet."""
    code, _, stderr = folder.run("run", "absent", "-d", "outbox", "--log-format", "json", "-q")

    error, hint = [orjson.loads(line) for line in stderr.splitlines()]
    assert code == 2
    assert (error["event"], error["exit_code"], error["message"]) == ("error", 2, "the input 'absent' does not exist")
    assert (hint["event"], hint["level"]) == ("hint", "error")


# ── the dead man's switch ─────────────────────────────────────────────────────────────────────────────

Mood = Literal["fine", "failing", "redirecting", "closing", "silent"]


@contextmanager
def _switch(mood: Mood = "fine") -> Iterator[tuple[str, list[str]]]:
    """Serve a dead man's switch; yields its address and the paths that it was asked for."""
    asked: list[str] = []
    is_over = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
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
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{http.server_address[1]}/check/", asked
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
    ("prepare", "words", "asked"),
    [
        pytest.param(_prepare_two, ["inbox"], ["/check/start", "/check"], id="exit 0, two inputs"),
        pytest.param(lambda folder: None, ["inbox"], ["/check/start", "/check"], id="exit 0, no inputs"),
        pytest.param(_prepare_a_bad_line, ["inbox"], ["/check/start", "/check/1"], id="exit 1"),
        pytest.param(_prepare_two, ["absent"], ["/check/start", "/check/2"], id="exit 2 at the beginning"),
        pytest.param(_prepare_a_directory_as_output, ["inbox"], ["/check/start", "/check/2"], id="exit 2 of an input"),
        pytest.param(_prepare_two, ["inbox", "--simulate"], [], id="simulated"),
    ],
)
def test_the_switch_is_told_the_beginning_and_the_end(
    prepare: Callable[[Folder], None], words: list[str], asked: list[str], folder: Folder
) -> None:
    """One pair of pings for a command: /start, then the address itself after exit 0, else with the exit code."""
    prepare(folder)

    with _switch() as (url, pinged):
        folder.configure(f"ping_url: {url}")
        folder.run("run", *words, "-d", "outbox")

    assert pinged == asked


def test_the_switch_is_told_of_a_run_that_was_stopped(folder: Folder, server: Server) -> None:
    """SIGTERM ends the run first; then the switch is told its exit code."""
    (folder.inbox / "a.jsonl").write_bytes(_questions("a"))

    with _switch() as (url, pinged):
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
def test_a_broken_switch_harms_nothing(mood: Any, folder: Folder) -> None:
    """Whatever the switch does, the run ends as without it; that it was not reached is told, its address is not."""
    (folder.inbox / "a.jsonl").write_bytes(_questions("a", 3))

    with _switch("fine" if mood == "absent" else mood) as (url, pinged):
        if mood == "absent":
            url = "http://127.0.0.1:1/check"
        folder.configure(f"ping_url: {url}\nsending: {{timeout: 2.0}}")
        code, stdout, stderr = folder.run("run", "inbox", "-d", "outbox")
        quiet = folder.run("run", "inbox", "-d", "outbox", "-q")

    assert (code, stdout) == (0, b"")
    assert folder.answered() == folder.dropped()
    assert stderr.count(b"! ping failed (ping_url)") == 2
    assert b"/check" not in stderr
    assert "/elsewhere" not in pinged
    assert quiet == (0, b"", b"")


# ── the other samples ─────────────────────────────────────────────────────────────────────────────────


def _commands(text: str) -> list[list[str]]:
    """Return the words of every `pipeline` command in a text, without those of the shell."""
    found = re.findall(r"(?:^|[ /=])pipeline ((?:run|report) [^;&|\n]*)", text, flags=re.MULTILINE)
    return [[word for word in shlex.split(each) if not word.startswith("2>>")] for each in found]


@pytest.mark.parametrize(("name", "count"), [("crontab", 5), ("pipeline.service", 1)])
def test_samples_hold_commands_that_exist(name: str, count: int) -> None:
    """Every command of the samples has options that the program knows."""
    commands = _commands((SAMPLES / name).read_text())

    for command, *words in commands:
        main.main.commands[command].make_context(command, words)
    assert len(commands) == count


def test_the_crontab_is_one_that_cron_reads() -> None:
    """Every line is a comment, a variable, or five fields and a command without a bare %, which cron would cut off."""
    lines = [line for line in (SAMPLES / "crontab").read_text().splitlines() if line and not line.startswith("#")]

    jobs = [line for line in lines if not re.match(r"[A-Z]+=", line)]
    assert all(re.match(r"([0-9*/,-]+ +){5}\S", job) for job in jobs)
    assert not any(re.search(r"(?<!\\)%", job) for job in jobs)


def test_the_drop_folder_is_plain_sh() -> None:
    """The sample script is one that sh can read, and may be executed."""
    done = subprocess.run(["/bin/sh", "-n", DROP_FOLDER], capture_output=True, check=False)

    assert (done.returncode, done.stderr) == (0, b"")
    assert os.access(DROP_FOLDER, os.X_OK)
