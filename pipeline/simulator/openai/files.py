"""OpenAI's Files API, as far as batches need it: https://platform.openai.com/docs/api-reference/files (July 2026)."""

import re
from dataclasses import dataclass, field
from itertools import chain

import anyio
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from pipeline.simulator.batches import Batch, Outcome
from pipeline.simulator.openai.errors import invalid
from pipeline.simulator.operations import Call, json_reply
from pipeline.simulator.refusals import Refused
from pipeline.simulator.results import Results
from pipeline.simulator.state import State
from pipeline.simulator.store import Store
from pipeline.simulator.types import Problem, Reply

_MAX_BYTES = 200 * 1024 * 1024
_FORM_BYTES = 65_536  # for all of an upload that is not the file
_RANGE = re.compile(r"bytes=(\d+)-$")


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    """A file that was uploaded, or the output or errors of a batch that is over."""

    id: str
    key: str
    name: str
    purpose: str
    created: float
    raw: bytes = field(default=b"", repr=False)
    results: Results | None = None

    @property
    def size(self) -> int:
        """Its length in bytes."""
        return len(self.raw) if self.results is None else self.results.size


def _batch_id(file_id: str) -> str:
    """Return the id of the batch that a file would be of."""
    return f"batch_{file_id.rpartition('-')[2]}"


def _too_large(limit: int) -> Problem:
    return invalid(f"The file is too large: the maximum is {limit} bytes.", param="file", status=413)


class _InMemory(MultiPartParser):
    """Starlette's parser, without files on a disk and the threads that write them."""

    spool_max_size = 0


async def _read_form(call: Call) -> tuple[str, bytes]:
    """Return the name and the bytes of the file in a form."""
    try:
        form = await _InMemory(call.request.headers, call.request.stream()).parse()
    except (MultiPartException, KeyError) as exc:
        raise Refused(invalid("Could not parse multipart form data.")) from exc
    try:
        purpose, sent = form.get("purpose"), form.get("file")
        if purpose != "batch":
            raise Refused(invalid(f"'{purpose}' is not one of ['batch'] - 'purpose'", param="purpose"))
        if not isinstance(sent, UploadFile):
            raise Refused(invalid("'file' is a required property", param="file"))
        return sent.filename or "", await sent.read()
    finally:
        await form.close()


class Files:
    """The files of all keys. The output files of a batch are not stored, but made from it at each request."""

    def __init__(self, state: State, store: Store) -> None:
        self._state = state
        self._store = store
        self._files: dict[str, File] = {}
        self._made: dict[str, list[File]] = {}
        self._deleted: set[str] = set()

    def find(self, id: str, key: str) -> File:
        """Return a file of this key, or raise `Refused`."""
        file = self._files.get(id)
        if file is None:
            batch = self._store.find(_batch_id(id), key)
            if batch:
                file = next((each for each in self.of_batch(batch) if each.id == id), None)
        if file is None or file.key != key or id in self._deleted:
            raise Refused(invalid(f"No such File object: {id}", param="id", status=404))
        return file

    def of_batch(self, batch: Batch) -> list[File]:
        """Return the output and the error file of a batch that is over, as far as they are not empty."""
        if not batch.is_settled:
            return []
        if batch.id not in self._made:
            files = (
                self._of_batch(batch, "output", (Outcome.ANSWERED,)),
                self._of_batch(batch, "error", (Outcome.ERRORED, Outcome.EXPIRED, Outcome.CANCELLED)),
            )
            self._made[batch.id] = [file for file in files if file.size]
        return self._made[batch.id]

    def _of_batch(self, batch: Batch, name: str, outcomes: tuple[Outcome, ...]) -> File:
        return File(
            id=f"file-{name}-{batch.id.removeprefix('batch_')}",
            key=batch.key,
            name=f"{batch.id}_{name}.jsonl",
            purpose="batch_output",
            created=batch.end,
            results=Results(self._store, batch, batch.results(*outcomes)),
        )

    async def upload(self, call: Call) -> Reply:
        """Keep a file for a batch."""
        limit = min(self._state.options.batch_max_bytes or _MAX_BYTES, _MAX_BYTES)
        if int(call.headers.get(b"content-length", b"0")) > limit + _FORM_BYTES:
            await call.body(0)
            raise Refused(_too_large(limit))
        name, raw = await _read_form(call)
        if len(raw) > limit:
            raise Refused(_too_large(limit))
        file = File(
            id=f"file-{self._state.serial():022x}",
            key=call.key,
            name=name,
            purpose="batch",
            created=anyio.current_time(),
            raw=raw,
        )
        self._files[file.id] = file
        self._state.statistics.batches.uploads += 1
        return json_reply(self._encode(file))

    async def get(self, call: Call) -> Reply:
        """Describe a file."""
        return json_reply(self._encode(await self._look_up(call)))

    async def delete(self, call: Call) -> Reply:
        """Forget a file; a batch that was made of it goes on."""
        file = await self._look_up(call)
        self._files.pop(file.id, None)
        self._deleted.add(file.id)
        return json_reply({"id": file.id, "object": "file", "deleted": True})

    async def list(self, call: Call) -> Reply:
        """Describe all files, newest first; only `purpose` and `limit` are used."""
        await self._store.advance_all()
        purpose = call.request.query_params.get("purpose")
        own = [file for file in self._files.values() if file.key == call.key]
        made = chain.from_iterable(self.of_batch(batch) for batch in self._store.newest(call.key))
        newest_first = sorted([*own, *made], key=lambda file: file.created, reverse=True)
        files = []
        for file in newest_first:
            if file.id not in self._deleted and purpose in (None, file.purpose):
                files.append(self._encode(file))
        return json_reply({"object": "list", "data": files, "has_more": False})

    async def content(self, call: Call) -> Reply:
        """Return the bytes of a file, or those from `Range: bytes=N-` on."""
        file = await self._look_up(call)
        asked = _RANGE.match(call.headers.get(b"range", b"").decode("latin-1"))
        start = int(asked[1]) if asked else 0
        if asked and start >= file.size:
            ends = ((b"content-range", b"bytes */%d" % file.size),)
            raise Refused(invalid("The requested range is not satisfiable.", status=416), ends)
        return Reply(
            status=206 if asked else 200,
            body=file.raw[start:],
            content=file.results and file.results.since(start),
            content_type=b"application/octet-stream",
            headers=((b"content-range", b"bytes %d-%d/%d" % (start, file.size - 1, file.size)),) if asked else (),
        )

    async def _look_up(self, call: Call) -> File:
        batch = self._store.find(_batch_id(call.id), call.key)
        if batch:
            await self._store.advance(batch)
        return self.find(call.id, call.key)

    def _encode(self, file: File) -> dict[str, object]:
        return {
            "object": "file",
            "id": file.id,
            "purpose": file.purpose,
            "filename": file.name,
            "bytes": file.size,
            "created_at": int(self._state.wall(file.created)),
            "expires_at": None,
            "status": "processed",
            "status_details": None,
        }
