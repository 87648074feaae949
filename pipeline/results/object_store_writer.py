"""Results at an object store: a folder of parts, made from a local copy of the results on this machine.

    s3://bucket/answers/             part-00000.jsonl, part-00001.jsonl, …   result lines, each once over all parts
                                     superseded-….jsonl                      lines that newer ones replaced
                                     usage.json                              the totals of the last run
                                     old-1/                                  results that --fresh set aside

Objects cannot be appended to or locked. So results go to the local copy (the spool) first, which keeps all promises of
a results file. Once they are safe there, they are uploaded as the next part, with a put that succeeds only if the part
does not exist yet. The spool is always all parts in order, followed by results that are not uploaded yet. The manifest
beside it lists the parts and their state.

At a start, manifest, spool and store are compared. If they disagree, the store is right: the spool is rebuilt from the
parts, and lines that no part has stay at its end, to be uploaded. So a run can continue after a crash between put and
manifest, after the spool was lost, and on another machine.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import accumulate, count
from pathlib import Path
from typing import Any, BinaryIO

import anyio
import orjson
from anyio import to_thread

from pipeline.core import files, object_store
from pipeline.core.errors import PipelineError, StorageError, TryLaterError, UsageError
from pipeline.core.hashing import FingerprintMap, FingerprintSet, checksum
from pipeline.core.object_store import Found
from pipeline.results import codec
from pipeline.results.writer import ResultWriter, line_at

SPOOL = "results.jsonl"
_PART_BYTES = 8 * 1024 * 1024
_SECONDS = 10.0
_PATIENT_AFTER = 30  # so many parts of a run, and the next wait gets 10 s longer: a day makes some 700 parts
_PART = re.compile(r"part-(\d{5,})\.jsonl")
_OURS = re.compile(r"part-\d{5,}\.jsonl|superseded-[0-9a-f]+\.jsonl|usage\.json")
_OLD = re.compile(r"old-(\d+)/")


def folder_of(url: str) -> str:
    """Return the folder that an output at a store means: `s3://b/answers.jsonl` -> `s3://b/answers/`."""
    root, key = object_store.parted(url)
    return f"{root}{key.removesuffix('/').removesuffix('.jsonl')}/" if key else root


def output_place(output: str | os.PathLike[str]) -> str | Path:
    """Return where results go: a file, or the URL of a folder at an object store."""
    text = os.fspath(output)
    if object_store.is_url(text):
        return folder_of(text)
    return Path(text)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A part as this machine knows it: its state at the store, and how much of the spool it is."""

    name: str
    etag: str
    size: int
    checksum: str

    @property
    def number(self) -> int:
        match = _PART.fullmatch(self.name)
        return int(match[1]) if match else -1


def _part(name: str, etag: str, content: bytes) -> Part:
    return Part(name=name, etag=etag, size=len(content), checksum=checksum(content).hex())


class ObjectStoreOutput:
    """The parts at a store, and the spool that they are made from; whoever holds the spool's lock owns it.

    Raises `StorageError` for the store and for the disk, `TryLaterError` where somebody else writes there, too.
    """

    def __init__(self, url: str, spool: Path) -> None:
        self.url = url
        self._spool = spool
        self._manifest = spool.with_name("manifest.json")
        self._parts: list[Part] = []

    @property
    def uploaded(self) -> int:
        """How many bytes of the spool, from its beginning, are in parts."""
        return sum(part.size for part in self._parts)

    # ── agreeing ──────────────────────────────────────────────────────────────────────────────────────────────────

    def reconcile(self) -> None:
        """Make spool and parts agree; raises `UsageError` where the parts are not results."""
        listed = parts_at(self.url)
        manifest = self._read_manifest()
        held = self._held(manifest)
        states = [(found.name, found.etag.strip('"')) for found in listed]
        if len(held) == len(manifest) and states == [(part.name, part.etag.strip('"')) for part in manifest]:
            self._parts = manifest
            return
        try:
            self._restore(listed, held)
        except OSError as exc:
            raise StorageError(f"cannot write {str(self._spool)!r}: {exc.strerror}") from exc

    def _read_manifest(self) -> list[Part]:
        """Return the parts that the manifest lists; none if it is missing or damaged."""
        with suppress(OSError, orjson.JSONDecodeError, TypeError, KeyError):
            return [Part(**each) for each in orjson.loads(self._manifest.read_bytes())["parts"]]
        return []

    def _write_manifest(self) -> None:
        value = {"url": self.url, "parts": [asdict(part) for part in self._parts]}
        files.write_file(self._manifest, orjson.dumps(value, option=orjson.OPT_INDENT_2))

    def _held(self, manifest: Sequence[Part]) -> dict[str, tuple[Part, int]]:
        """Return the parts whose bytes the spool still has, with their offsets."""
        held: dict[str, tuple[Part, int]] = {}
        with self._reading() as file:
            for part, start in zip(manifest, _starts(manifest), strict=True):
                if checksum(_bytes_at(file, start, part.size)).hex() == part.checksum:
                    held[part.name] = part, start
        return held

    def _restore(self, listed: Sequence[Found], held: Mapping[str, tuple[Part, int]]) -> None:
        """Make the spool anew: the parts as they are at the store, then what none of them holds.

        Bytes that were in a part which has changed since are not among that: who changed it kept them elsewhere.
        """
        names = {found.name for found in listed}
        settled = [(start, part.size) for name, (part, start) in held.items() if name in names]
        parts: list[Part] = []
        with self._reading() as old:
            gaps = _gaps(settled, os.fstat(old.fileno()).st_size)
            missing = {checksum(line) for line in _lines(old, gaps)}

            def content() -> Iterator[bytes]:
                for found in listed:
                    data, etag = self._content(found, held.get(found.name), old)
                    if missing:
                        missing.difference_update(map(checksum, _lines_with_offsets(data, 0)[1]))
                    parts.append(_part(found.name, etag, data))
                    yield data
                yield from (line for line in _lines(old, gaps) if checksum(line) in missing)

            os.close(files.replace(self._spool, content()))
        self._parts = parts
        self._write_manifest()

    def _content(self, found: Found, held: tuple[Part, int] | None, old: BinaryIO) -> tuple[bytes, str]:
        """Return the content of a part and its etag, from this disk where that has the same."""
        if held and object_store.is_same(held[0].etag, found.etag):
            return _bytes_at(old, held[1], held[0].size), found.etag
        data, etag = object_store.read(found.url)
        if data and not any(codec.decode_or_none(line) for line in data.split(b"\n")):
            raise UsageError(f"{found.url!r} exists and holds no results; choose another -o, or move it away")
        return (data if not data or data.endswith(b"\n") else data + b"\n"), etag

    def _reading(self) -> BinaryIO:
        """Open the spool; where there is none yet, nothing."""
        try:
            return self._spool.open("rb")
        except FileNotFoundError:
            return open(os.devnull, "rb")
        except OSError as exc:
            raise StorageError(f"cannot read {str(self._spool)!r}: {exc.strerror}") from exc

    # ── uploading ─────────────────────────────────────────────────────────────────────────────────────────────────

    def upload(self, safe_bytes: int, *, least: int = 1) -> None:
        """Make parts of what is safe on the disk and in none yet, as long as that is so much at least."""
        while safe_bytes - self.uploaded >= least:
            with self._reading() as file:
                file.seek(self.uploaded)
                data = file.read(min(_PART_BYTES, safe_bytes - self.uploaded))
                data = data[: data.rfind(b"\n") + 1] or data + file.readline()
            name = f"part-{max((part.number for part in self._parts), default=-1) + 1:05d}.jsonl"
            etag = object_store.create(self.url + name, data)
            self._parts.append(_part(name, self._own(name, data) if etag is None else etag, data))
            self._write_manifest()

    def _own(self, name: str, data: bytes) -> str:
        """Return the etag of an object that was not written as it is there, if it is what we would have written."""
        content, etag = object_store.read(self.url + name)
        if content != data:
            raise TryLaterError(
                f"somebody else writes to {self.url!r}, too: {name} is not of this run; its own results are safe in "
                f"{str(self._spool)!r}",
                hint="when the other run has ended, the same command continues with the results of both",
            )
        return etag

    def withdraw(self, leaving: Sequence[int]) -> list[Part]:
        """Remove lines, given by their offsets in the spool, from their parts. Return the parts after that.

        The lines are first stored as superseded. Afterwards, rewrite the spool in the same way and call `rewritten`.
        """
        parts: list[Part] = []
        with self._reading() as file:
            for data in _grouped(line_at(file, offset) for offset in leaving):
                object_store.create(f"{self.url}superseded-{checksum(data).hex()}.jsonl", data)  # is there: the same
            gone = set(leaving)
            for part, start in zip(self._parts, _starts(self._parts), strict=True):
                offsets, lines = _lines_with_offsets(_bytes_at(file, start, part.size), start)
                if gone.isdisjoint(offsets):
                    parts.append(part)
                    continue
                data = b"".join(line for at, line in zip(offsets, lines, strict=True) if at not in gone)
                etag = object_store.update(self.url + part.name, data, part.etag)
                parts.append(_part(part.name, self._own(part.name, data) if etag is None else etag, data))
        return parts

    def rewritten(self, parts: Sequence[Part]) -> None:
        """Note that the spool is now these parts."""
        self._parts = list(parts)
        self._write_manifest()

    def set_aside(self) -> str:
        """Move all that is at the store into a folder of its own under this one; return its URL."""
        old = [
            int(match[1])
            for each in object_store.listed_deep(self.url)
            if (match := _OLD.match(each.url, len(self.url)))
        ]
        aside = f"{self.url}old-{max(old, default=0) + 1}/"
        for found in object_store.listed(self.url):
            if _OURS.fullmatch(found.name):
                object_store.move(found.url, aside + found.name)
        self.rewritten([])
        return aside


class ObjectStoreWriter(ResultWriter):
    """A writer whose results go to a store as well: it writes the spool, and uploads what is safe there.

    What keeps results from the store is no reason to stop answering, as they are safe: `on_trouble` hears of it, it is
    tried again, and `publish` returns it if it lasts. With somebody else who writes there it is for good.
    """

    def __init__(
        self, url: str, directory: Path, *, on_trouble: Callable[[PipelineError], None], **options: Any
    ) -> None:
        super().__init__(directory / SPOOL, **options)
        self.name = url
        self._folder = ObjectStoreOutput(url, self.path)
        self._on_trouble = on_trouble
        self._untidied: PipelineError | None = None
        self._gathered = anyio.Event()
        self._lock = -1

    @property
    def address(self) -> str:
        return self.name

    def open(self) -> None:
        """Lock the spool, bring it up to date with the store, and open it."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as exc:
            raise UsageError(f"cannot create the spool {str(self.path.parent)!r}: {exc.strerror}") from exc
        try:
            self._lock = files.open_locked(self.path.with_name("lock"))
        except TryLaterError as exc:
            raise TryLaterError(f"another run is writing {self.name!r}", hint=exc.hint) from exc
        with object_store.before_sending():
            self._folder.reconcile()
        super().open()

    def close(self) -> None:
        super().close()
        if self._lock >= 0:
            files.close(self._lock)
            self._lock = -1

    def set_aside(self) -> str | None:
        """Upload what is not uploaded, move all parts into a folder of their own, and start empty."""
        if not self.safe_bytes:
            return None
        with object_store.before_sending():
            self._folder.upload(self.safe_bytes)
            aside = self._folder.set_aside()
        super().set_aside()
        return aside

    async def run(self) -> None:
        async with anyio.create_task_group() as beside:
            beside.start_soon(self._keep_uploading)
            await super().run()
            beside.cancel_scope.cancel()

    async def _keep_uploading(self) -> None:
        reported = ""
        for turn in count():
            with anyio.move_on_after(_SECONDS * (1 + turn // _PATIENT_AFTER)) as waiting:
                await self._gathered.wait()
            self._gathered = anyio.Event()
            trouble = await to_thread.run_sync(self._upload, 1 if waiting.cancelled_caught else _PART_BYTES)
            if trouble and trouble.message != reported:
                reported = trouble.message
                self._on_trouble(trouble)
            if isinstance(trouble, TryLaterError):
                return

    async def _write_group(self) -> None:
        await super()._write_group()
        if self.safe_bytes - self._folder.uploaded >= _PART_BYTES:
            self._gathered.set()

    def _upload(self, least: int = 1) -> PipelineError | None:
        return self._trouble_of(lambda: self._folder.upload(self.safe_bytes, least=least))

    def _trouble_of(self, act: Callable[[], object]) -> PipelineError | None:
        """Do something at the store. Return the error, reworded to say that results are safe locally."""
        try:
            act()
        except TryLaterError as exc:
            return exc
        except StorageError as exc:
            text = f"{exc.message}; results are safe in {str(self.path)!r}, and the same command uploads them"
            return StorageError(text, hint=exc.hint)
        return None

    def tidy(self, positions: FingerprintMap, ids: FingerprintSet, *, ordered: bool) -> int:
        """Remove superseded lines from spool and parts. If the store refuses, a later run does it."""
        superseded: list[int] = []
        self._untidied = self._upload() or self._trouble_of(
            lambda: superseded.append(super(ObjectStoreWriter, self).tidy(positions, ids, ordered=ordered))
        )
        return sum(superseded)

    def _rewrite(self, staying: Sequence[int], leaving: Sequence[int]) -> None:
        parts = self._folder.withdraw(leaving)
        super()._rewrite(staying, leaving)
        self._folder.rewritten(parts)

    def publish(self, totals: bytes) -> PipelineError | None:
        """Upload the rest of the results, and the totals; return what kept any of it from the store."""
        return (
            self._untidied
            or self._upload()
            or self._trouble_of(lambda: object_store.put(f"{self.name}usage.json", totals))
        )


# ── elsewhere ─────────────────────────────────────────────────────────────────────────────────────────────────────


def parts_at(url: str) -> list[Found]:
    """Return the parts in a folder at a store, in order."""
    found = [(int(match[1]), each) for each in object_store.listed(url) if (match := _PART.fullmatch(each.name))]
    return [each for _, each in sorted(found, key=lambda pair: pair[0])]


def fetch(url: str, directory: Path) -> Path:
    """Copy results from a store into a directory, as a results file with what lies beside one; return its path.

    Where there are no results, there is no file.
    """
    path = directory / SPOOL
    with object_store.before_sending():
        listed = parts_at(url)
        if not listed:
            return path
        superseded = [each for each in object_store.listed(url) if each.name.startswith("superseded-")]
        for name, objects in ((path, listed), (files.beside(path, ".superseded.jsonl"), superseded)):
            with files.open_private(name) as file:
                file.writelines(object_store.read(each.url)[0] for each in objects)
        if object_store.head(f"{url}usage.json"):
            files.write_file(files.beside(path, ".usage.json"), object_store.read(f"{url}usage.json")[0])
    return path


# ── bytes ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _starts(parts: Iterable[Part]) -> list[int]:
    """Return where in the spool each part begins."""
    return list(accumulate((part.size for part in parts), initial=0))[:-1]


def _bytes_at(file: BinaryIO, start: int, size: int) -> bytes:
    file.seek(start)
    return file.read(size)


def _gaps(taken: Iterable[tuple[int, int]], size: int) -> list[tuple[int, int]]:
    """Return what of a file is in none of some ranges (start, size): where each gap begins and ends."""
    gaps: list[tuple[int, int]] = []
    end = 0
    for start, length in [*sorted(taken), (size, 0)]:
        if start > end:
            gaps.append((end, start))
        end = max(end, start + length)
    return gaps


def _lines(file: BinaryIO, ranges: Iterable[tuple[int, int]]) -> Iterator[bytes]:
    """Yield the lines of some ranges of a file, with their ends."""
    for start, end in ranges:
        while start < end:
            file.seek(start)
            line = file.readline(end - start)
            start += len(line)
            yield line


def _lines_with_offsets(data: bytes, start: int) -> tuple[list[int], list[bytes]]:
    lines = [line + b"\n" for line in data.split(b"\n")[:-1]]
    return list(accumulate(map(len, lines), initial=start))[:-1], lines


def _grouped(lines: Iterable[bytes]) -> Iterator[bytes]:
    """Put lines together to what is put in one go."""
    group: list[bytes] = []
    size = 0
    for line in lines:
        if group and size + len(line) > _PART_BYTES:
            yield b"".join(group)
            group, size = [], 0
        group.append(line)
        size += len(line)
    if group:
        yield b"".join(group)
