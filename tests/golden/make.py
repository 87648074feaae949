"""Make the files beside this one: what runs of an earlier version leave behind when they are interrupted.

    git worktree add /tmp/da9b3e0 da9b3e0
    python tests/golden/make.py /tmp/da9b3e0          # python: one with the extras `dev` and `s3`

Each file holds one folder, as JSON: the lines of each file in it under the file's name. A ledger is SQL, because
SQLite's own format is binary. Runs work in a temporary folder under relative names, so the only path of a machine is
the folder's own, which becomes `@FOLDER@`. No run stores the address of the simulator.
"""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import boto3  # type: ignore[import-untyped]
from moto.server import ThreadedMotoServer

COMMIT = "da9b3e0"
HERE = Path(__file__).parent
FOLDER = "@FOLDER@"
KEYS = {"OPENAI_API_KEY": "k", "ANTHROPIC_API_KEY": "k"}
S3 = {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s", "AWS_REGION": "us-east-1", "AWS_ALLOW_HTTP": "true"}
MODELS = {"openai": "gpt-6-luna", "anthropic": "claude-haiku-5-5"}

# Real workers need Ray and a cluster. These are the program's own workers in one process, which is then killed.
CLUSTER = """
import sys
from pathlib import Path
import anyio
from pipeline.cluster import driver
from pipeline.config import load
from tests.cluster.fakes import FakePool, drive
driver._SMALLEST_PART = 512
config = load(None).with_("sending", concurrency=2)
anyio.run(lambda: drive(["in.jsonl"], Path("answers.jsonl"), config, FakePool(2)))
"""


def main() -> None:
    """Make all files anew with the code in the folder that the command line names."""
    code = Path(sys.argv[1]).resolve()
    for name, make in (("live", live), ("batch", batch), ("store", store), ("cluster", cluster)):
        with tempfile.TemporaryDirectory() as directory:
            folder = Path(directory).resolve()
            write_questions(folder)
            make(folder, code)
            save(HERE / f"{name}.json", folder)


def write_questions(folder: Path) -> None:
    """Write 16 lines: 13 to be answered, one that fails, one invalid, one without an id."""
    lines: list[dict[str, Any]] = []
    for number in range(16):
        provider = "anthropic" if number % 3 else "openai"
        text = "[[status:400]]" if number == 2 else f"question {number}"
        message = {"role": "user", "content": text}
        line = {"custom_id": f"q-{number}", "model": MODELS[provider], "max_tokens": 40, "messages": [message]}
        lines.append(line)
    lines[1]["messages"] = []
    del lines[3]["custom_id"]
    (folder / "in.jsonl").write_bytes(b"".join(json.dumps(line).encode() + b"\n" for line in lines))


def live(folder: Path, code: Path) -> None:
    """Leave results, attempts log, index, totals and ledger of a finished run, and of one killed on its way."""
    with simulator(code, "--latency", "0.3") as url:
        words = ["run", "in.jsonl", "-o", "answers.jsonl", "--concurrency", "2"]
        run(code, folder, [*words, "--limit", "5"], url)
        run(code, folder, words, url, kill_when=lambda: lines_in(folder / "answers.jsonl") >= 9)


def batch(folder: Path, code: Path) -> None:
    """Leave one batch at each provider, with a run that did not wait for them."""
    with simulator(code, "--batch-seconds", "600") as url:
        run(code, folder, ["run", "in.jsonl", "-o", "answers.jsonl", "--lane", "batch", "--no-wait"], url)


def store(folder: Path, code: Path) -> None:
    """Leave a part at an object store, and a spool that is further than the part."""
    server = ThreadedMotoServer(port=0)
    server.start()
    try:
        host, port = server.get_host_and_port()
        s3 = {**S3, "AWS_ENDPOINT_URL": f"http://{host}:{port}"}
        client = boto3.client(
            "s3",
            endpoint_url=s3["AWS_ENDPOINT_URL"],
            region_name=s3["AWS_REGION"],
            aws_access_key_id=s3["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=s3["AWS_SECRET_ACCESS_KEY"],
        )
        client.create_bucket(Bucket="golden")
        with simulator(code, "--latency", "0.3") as url:
            words = ["run", "in.jsonl", "-o", "s3://golden/answers/", "--concurrency", "2"]
            run(code, folder, [*words, "--limit", "5"], url, s3)

            def is_further() -> bool:
                return any(lines_in(path) >= 9 for path in folder.glob("spool/*/results.jsonl"))

            run(code, folder, words, url, s3, kill_when=is_further)
        for key in ("part-00000.jsonl", "usage.json"):
            target = folder / "store" / "answers" / key
            target.parent.mkdir(parents=True, exist_ok=True)
            client.download_file("golden", f"answers/{key}", str(target))
    finally:
        server.stop()
    (spool,) = (folder / "spool").iterdir()
    spool.rename(folder / "spool" / "one")  # its name depends on the address of the store


def cluster(folder: Path, code: Path) -> None:
    """Leave the parts of two workers that were killed with their driver."""
    with simulator(code, "--latency", "0.3") as url:
        parts = folder / "answers.parts"

        def are_two_begun() -> bool:
            begun = [path for path in parts.glob("part-?????-?????.jsonl") if lines_in(path) >= 1]
            return len(begun) >= 2

        run(code, folder, ["-c", CLUSTER], url, kill_when=are_two_begun)


# ── runs ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def run(
    code: Path,
    folder: Path,
    words: Sequence[str],
    url: str,
    environ: Mapping[str, str] | None = None,
    *,
    kill_when: Callable[[], bool] | None = None,
) -> None:
    """Run a command of the old code to its end, or kill it as soon as something is true."""
    command = [sys.executable, *words] if words[0] == "-c" else [sys.executable, "-m", "pipeline", *words]
    variables = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(code),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PIPELINE_LEDGER": str(folder / "ledger.sqlite"),
        "OPENAI_BASE_URL": f"{url}/v1",
        "ANTHROPIC_BASE_URL": url,
        **KEYS,
        **(environ or {}),
    }
    with subprocess.Popen(command, cwd=folder, env=variables) as process:
        while process.poll() is None:
            if kill_when and kill_when():
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.005)
    if kill_when and process.returncode != -signal.SIGKILL:
        raise SystemExit(f"{command} ended with {process.returncode} before it could be killed")


@contextmanager
def simulator(code: Path, *options: str) -> Iterator[str]:
    """Run the old simulator; yield its address."""
    command = [sys.executable, "-m", "pipeline", "simulate", "--port", "8765", *options]
    environ = {"PATH": os.environ["PATH"], "PYTHONPATH": str(code), "PYTHONDONTWRITEBYTECODE": "1"}
    with subprocess.Popen(command, cwd="/", env=environ, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        process.stderr.readline()  # it says its address when it listens
        yield "http://127.0.0.1:8765"
        process.terminate()


def lines_in(path: Path) -> int:
    """Return the number of whole lines of a file, 0 where there is none."""
    return path.read_bytes().count(b"\n") if path.is_file() else 0


# ── saving ────────────────────────────────────────────────────────────────────────────────────────────────────────


def save(target: Path, folder: Path) -> None:
    """Write a folder as JSON."""
    files: dict[str, list[str]] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if name.startswith(("ledger.sqlite-", "limits.sqlite")) or path.suffix == ".lock":
            continue
        if name == "ledger.sqlite":
            files["ledger.sql"] = [line.replace(str(folder), FOLDER) for line in dump(path)]
        else:
            text = path.read_bytes().decode("latin-1")  # the index is partly binary; this loses nothing
            files[name] = text.replace(str(folder), FOLDER).splitlines(keepends=True)
    target.write_text(json.dumps({"made_by": COMMIT, "files": files}, indent=1) + "\n")


def dump(ledger: Path) -> list[str]:
    """Return the SQL that makes a ledger; SQLite's own dump leaves out the version of the schema."""
    with closing(sqlite3.connect(ledger)) as connection:
        pragmas = [
            f"PRAGMA {name}={connection.execute(f'PRAGMA {name}').fetchone()[0]};"
            for name in ("user_version", "application_id")
        ]
        return [*connection.iterdump(), *pragmas]


if __name__ == "__main__":
    main()
