"""The order of things on the disk and on the wire, read from a system call trace: what is synced before what.

A kill or a power cut only shows a wrong order when it strikes at the right moment; a trace shows it always.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.torture.jobs import Job, beside

CALLS = "openat,rename,write,writev,sendto,sendmsg,fdatasync,fsync"
_CALL = re.compile(r"(\d+)\s+(\w+)\((.*)", re.DOTALL)
_RESUMED = re.compile(r"(\d+)\s+<\.\.\. (\w+) resumed>")
_SENT = re.compile(r'\\"sent\\":\\"(q-\d+)\\"')
_RESULT = re.compile(r'\\"custom_id\\":\\"(q-\d+)\\"')
_REQUEST = re.compile(r"question (q-\d+) version")
_TOLD = re.compile(r'"(q-\d+) ')


@dataclass(slots=True)
class _File:
    """The ids that stand in a file: those written, and those of them that are on the disk."""

    written: set[str] = field(default_factory=set)
    synced: set[str] = field(default_factory=set)


def violations(job: Job, log: Iterable[str]) -> Iterator[str]:
    """Yield what came too early in a run of a job, from its `strace -f -y` log with the calls `CALLS`.

    An intent is on the disk before its call is made, a result before it is reported as done, and the names of both
    files before the first call.
    """
    directory, results, journal = job.output.parent, job.output, beside(job.output, ".attempts.jsonl")
    files: dict[Path, _File] = defaultdict(_File)
    syncing: dict[str, Path] = {}
    loose = {results, journal}
    for line in log:
        if resumed := _RESUMED.match(line):
            if resumed[2] in ("fdatasync", "fsync") and resumed[1] in syncing:
                _sync(files[syncing.pop(resumed[1])])
            continue
        if not (call := _CALL.match(line)):
            continue
        thread, name, rest = call.groups()
        path = Path(found[1]) if (found := re.match(r"\d+<([^>]*)>", rest)) else Path()
        if name == "openat" and f'"{results}"' in rest and "O_CREAT" in rest:
            loose.add(results)
        elif name == "rename" and f'"{journal}"' in rest:
            loose.add(journal)
        elif name in ("fdatasync", "fsync"):
            loose -= {results, journal} if path == directory else set()
            if "unfinished" in rest:
                syncing[thread] = path
            else:
                _sync(files[path])
        elif path in (results, journal):
            files[path].written.update((_SENT if path == journal else _RESULT).findall(rest))
        elif path == job.acknowledged:
            yield from (f"{each} was reported before it was safe" for each in _TOLD.findall(rest) if each not in
                        files[results].synced)
        elif "POST /" in rest:
            yield from (f"{each.name} is not in its directory for sure when a call is made" for each in loose)
            yield from (f"{each} was sent before its intent was safe" for each in _REQUEST.findall(rest) if each not in
                        files[journal].synced)


def _sync(file: _File) -> None:
    file.synced |= file.written
