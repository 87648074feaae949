"""The order of things on the disk and on the wire, read from a system call trace: what is synced before what.

A kill or a power cut only shows a wrong order when it strikes at the right moment; a trace shows it always.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from tests.torture.jobs import Job, beside

CALLS = "rename,write,writev,sendto,sendmsg,fdatasync,fsync"
_SYNCS = ("fdatasync", "fsync")
_CALL = re.compile(r"(\d+)\s+(\w+)\((.*)", re.DOTALL)
_RESUMED = re.compile(r"(\d+)\s+<\.\.\. (\w+) resumed>")
_FD = re.compile(r"\d+<([^>]*)>")
_NAMES = re.compile(r'"([^"]*)"')
_SENT = re.compile(r'\\"sent\\":\\"(q-\d+)\\"')
_RESULT = re.compile(r'\\"custom_id\\":\\"(q-\d+)\\"')
_REQUEST = re.compile(r"question (q-\d+) version")
_TOLD = re.compile(r'"(q-\d+) ')


@dataclass(slots=True)
class _File:
    """What stands in a file: the ids that were written, those that are on the disk, and whether anything is not."""

    written: set[str] = field(default_factory=set)
    synced: set[str] = field(default_factory=set)
    is_dirty: bool = False

    def write(self, ids: Iterable[str]) -> None:
        self.written.update(ids)
        self.is_dirty = True

    def sync(self) -> None:
        self.synced |= self.written
        self.is_dirty = False


class Observer:
    """Goes through the `strace -f -y` log of a run with the calls `CALLS` and notes what came too early.

    An intent is on the disk before its call is made, a result before it is reported as done, the names of both files
    before the first call, and what a new file holds before it takes the place of an old one.
    """

    def __init__(self, job: Job) -> None:
        self.violations: list[str] = []
        self._told = job.acknowledged
        self._directory = job.output.parent
        self._results = job.output
        self._journal = beside(job.output, ".attempts.jsonl")
        self._files: dict[Path, _File] = defaultdict(_File)
        self._syncing: dict[str, Path] = {}
        self._loose = {self._results, self._journal}

    def see(self, line: str) -> None:
        """Take in one line of the log."""
        if resumed := _RESUMED.match(line):
            if resumed[2] in _SYNCS and resumed[1] in self._syncing:
                self._sync(self._syncing.pop(resumed[1]))
        elif call := _CALL.match(line):
            thread, name, rest = call.groups()
            path = Path(found[1]) if (found := _FD.match(rest)) else Path()
            if name == "rename":
                self._rename(*map(Path, _NAMES.findall(rest)))
            elif name in _SYNCS and "unfinished" in rest:
                self._syncing[thread] = path
            elif name in _SYNCS:
                self._sync(path)
            elif "POST /" in rest:
                self._call(_REQUEST.findall(rest))
            else:
                self._write(path, rest)

    def _rename(self, old: Path, new: Path) -> None:
        if self._files[old].is_dirty:
            self.violations.append(f"{new.name} was replaced before its new content was safe")
        self._loose |= {new} & {self._results, self._journal}
        self._files.pop(old)

    def _sync(self, path: Path) -> None:
        self._files[path].sync()
        if path == self._directory:
            self._loose.clear()

    def _call(self, ids: Iterable[str]) -> None:
        self.violations += [f"the name of {path.name} was not safe when a call was made" for path in self._loose]
        early = set(ids) - self._files[self._journal].synced
        self.violations += [f"{each} was sent before its intent was safe" for each in early]

    def _write(self, path: Path, content: str) -> None:
        if path == self._told:
            early = set(_TOLD.findall(content)) - self._files[self._results].synced
            self.violations += [f"{each} was reported before it was safe" for each in early]
        else:
            self._files[path].write([*_SENT.findall(content), *_RESULT.findall(content)])
