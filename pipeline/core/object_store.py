"""Object stores: S3, Google Cloud Storage, Azure and compatible servers. The only module that uses obstore.

An object is named by a URL: `s3://bucket/key`, `gs://bucket/key`, `az://container/key`; what follows the bucket is the
key as it is, nothing in it is encoded. `file:///path` and `memory://key` are stores, too, for tests. Credentials,
region and endpoint come from the environment, as obstore reads them, and appear in no message; it also does the
retrying.

All here blocks and belongs in a thread. Every failure is a `StorageError` that names the URL, says what the store said
and what to do; `before_sending` makes a `UsageError` of it. Only a reader raises `OSError`, as one of a file does.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

from pipeline.core.errors import StorageError, UsageError

if TYPE_CHECKING:
    from obstore.store import ObjectStore

_T = TypeVar("_T")

_URL = re.compile(r"(s3|gs|az|file|memory)://")
_ROOT = re.compile(r"(?:s3|gs|az)://[\w.-]+(?:/|$)|file:///|memory://", re.ASCII)
_MAGIC = re.compile(r"[*?\[]")
_BLOCK_BYTES = 4 * 1024 * 1024
_RETRIES = 6  # waits double from 0.1 s: short outages go unnoticed, and a wrong endpoint is reported after about 10 s

# Only a store's error code and message are shown: the rest of the body may repeat keys and signatures.
_STATUS = re.compile(r"status code: (\d{3}[A-Za-z -]*)")
_CODE = re.compile(r"<Code>([^<]{1,100})</Code>")
_MESSAGE = re.compile(r"<Message>([^<]{1,300})")
_HTTP_ERROR = re.compile(r"HTTP error: ([a-z ]+)")
_SYSTEM_ERROR = re.compile(r'(?:message|error): "([A-Za-z][^"\n]{1,100})"')  # of the connection, in obstore's details
_ADDRESS = re.compile(r"\b\w+://\S+")

_CREDENTIALS = (
    "credentials come from the environment: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_REGION; "
    "GOOGLE_APPLICATION_CREDENTIALS; AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """An object as it was at a moment; `etag` changes with its content."""

    url: str
    size: int
    etag: str

    @property
    def name(self) -> str:
        """The part of its URL after the last slash."""
        return self.url.rpartition("/")[2]


def is_url(text: object) -> bool:
    """Return True if this is the URL of an object store, not a file name."""
    return isinstance(text, str) and _URL.match(text) is not None


def parted(url: str) -> tuple[str, str]:
    """Return the store's own URL, which ends with a slash, and the key in it."""
    match = _ROOT.match(url)
    if not url.isascii() and url != url.encode(errors="replace").decode():
        raise UsageError(f"the URL {url!a} is not UTF-8")
    if match is None:
        raise UsageError(
            f"{url!r} names no bucket", hint="write s3://bucket/key, gs://bucket/key or az://container/key"
        )
    root = match.group()
    return (root if root.endswith("/") else f"{root}/"), url[match.end() :]


@contextmanager
def before_sending() -> Iterator[None]:
    """Turn a `StorageError` into a `UsageError`: before anything was sent, it is a mistake in the command."""
    try:
        yield
    except StorageError as exc:
        raise UsageError(exc.message, hint=exc.hint) from exc


# ── looking ───────────────────────────────────────────────────────────────────────────────────────────────────────


def head(url: str) -> Found | None:
    """Return size and etag of an object; None if it does not exist."""
    store, key = _at(url)
    if not key:
        return None
    import obstore

    try:
        meta = _do(url, "looked at", lambda: obstore.head(store, key))
    except StorageError as exc:
        if isinstance(exc.__cause__, FileNotFoundError):
            return None
        raise
    return Found(url=url, size=meta["size"], etag=meta["e_tag"] or "")


def listed(folder: str) -> list[Found]:
    """Return the objects directly under `s3://bucket/folder/`, sorted by name."""
    store, key = _at(folder)
    import obstore

    found = _do(folder, "listed", lambda: obstore.list_with_delimiter(store, key or None)["objects"])
    return _found(folder, key, found)


def listed_deep(folder: str) -> list[Found]:
    """Return all objects under `s3://bucket/folder/`, at any depth, sorted by name."""
    store, key = _at(folder)
    import obstore

    return _found(folder, key, _do(folder, "listed", lambda: obstore.list(store, key or None).collect()))


def matching(pattern: str) -> list[Found]:
    """Return the objects that match a glob, sorted by name. `*` stays within a folder, `**` does not."""
    root, key = parted(pattern)
    segments = key.split("/")
    fixed = next(n for n, each in enumerate([*segments, "*"]) if _MAGIC.search(each))
    folder = root + "".join(f"{each}/" for each in segments[:fixed])
    look = listed if fixed == len(segments) - 1 and "**" not in key else listed_deep
    return [each for each in look(folder) if _matches(each.url[len(root) :].split("/"), segments)]


def has_magic(url: str) -> bool:
    """Return True if a URL may be a glob."""
    return _MAGIC.search(url) is not None


# ── reading ───────────────────────────────────────────────────────────────────────────────────────────────────────


def open_reader(url: str, start: int = 0, end: int | None = None, *, etag: str | None = None) -> io.BufferedReader:
    """Open an object, or its bytes from `start` to before `end`, for reading in one pass; holds 4 MiB of it.

    All that is read is of one state of the object: that of `etag`, else as it is now. An object that is replaced
    meanwhile, and whatever else goes wrong later on, is an `OSError` of reading, as a broken disk is.
    """
    found = head(url)
    if found is None:
        raise _missing(url)
    end = found.size if end is None else min(end, found.size)
    return io.BufferedReader(_Object(url, start, end, etag or found.etag), 64 * 1024)


def read(url: str) -> tuple[bytes, str]:
    """Return the content of an object and its etag."""
    store, key = _at(url)
    import obstore

    def get() -> tuple[bytes, str]:
        result = obstore.get(store, key)
        return bytes(result.bytes()), result.meta["e_tag"] or ""

    return _do(url, "read", get)


class _Object(io.RawIOBase):
    """An object as a raw stream, fetched in blocks, so that no connection stays open between reads."""

    def __init__(self, url: str, start: int, end: int, etag: str) -> None:
        self._url = url
        self._store, self._key = _at(url)
        self._at = start
        self._end = end
        self._etag = etag
        self._block = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        if not self._block and self._at < self._end:
            self._block = memoryview(self._next_block())
            self._at += len(self._block)
        view = memoryview(buffer).cast("B")
        count = min(len(view), len(self._block))
        view[:count] = self._block[:count]
        self._block = self._block[count:]
        return count

    def _next_block(self) -> bytes:
        import obstore
        from obstore.exceptions import PreconditionError

        def get() -> bytes:
            wanted = (self._at, min(self._end, self._at + _BLOCK_BYTES))
            return bytes(obstore.get(self._store, self._key, options={"range": wanted, "if_match": self._etag}).bytes())

        try:
            return _do(self._url, "read", get)
        except StorageError as exc:
            if isinstance(exc.__cause__, PreconditionError):
                raise OSError(f"{self._url!r} was replaced while it was being read") from exc
            raise OSError(exc.message) from exc


# ── writing ───────────────────────────────────────────────────────────────────────────────────────────────────────


def create(url: str, data: bytes) -> str | None:
    """Put an object if none exists and return its etag; return None, and change nothing, if one exists.

    Of several who try at once, one succeeds. A retry that the store had heard already looks like somebody else's: who
    is told None compares contents.
    """
    return _conditional_put(url, data, "create")


def update(url: str, data: bytes, etag: str) -> str | None:
    """Replace an object if its etag is still `etag` and return the new etag; return None if it has changed."""
    store, key = _at(url)
    import obstore

    meta = _do(url, "looked at", lambda: obstore.head(store, key))
    if not is_same(meta["e_tag"] or "", etag):
        return None
    if url.startswith("file:"):  # only for tests; it does not support this condition
        return put(url, data)
    state = {name: meta[name] for name in ("e_tag", "version") if meta[name] is not None}
    return _conditional_put(url, data, state)


def put(url: str, data: bytes) -> str:
    """Put an object, replacing any earlier one, and return its etag."""
    store, key = _at(url)
    import obstore

    return _do(url, "written", lambda: obstore.put(store, key, data, use_multipart=False)["e_tag"] or "")


def move(url: str, to: str) -> None:
    """Copy an object within its bucket, at the store, and then delete it under its old name."""
    (store, key), (_, new) = _at(url), _at(to)
    import obstore

    _do(url, f"moved to {to!r}", lambda: obstore.rename(store, key, new))


def delete(url: str) -> None:
    """Delete an object. It is not an error if it does not exist."""
    store, key = _at(url)
    import obstore

    try:
        _do(url, "deleted", lambda: obstore.delete(store, key))
    except StorageError as exc:
        if not isinstance(exc.__cause__, FileNotFoundError):
            raise


def is_same(etag: str, other: str) -> bool:
    """Compare etags: some stores quote them in one place and not in another."""
    return etag.strip('"') == other.strip('"')


def _conditional_put(url: str, data: bytes, mode: Any) -> str | None:
    store, key = _at(url)
    import obstore
    from obstore.exceptions import AlreadyExistsError, PreconditionError

    try:
        # Not in several parts: conditions hold for a whole put only.
        return _do(url, "written", lambda: obstore.put(store, key, data, mode=mode, use_multipart=False)["e_tag"] or "")
    except StorageError as exc:
        if isinstance(exc.__cause__, AlreadyExistsError | PreconditionError):
            return None
        raise


# ── the library ───────────────────────────────────────────────────────────────────────────────────────────────────


def _at(url: str) -> tuple[ObjectStore, str]:
    root, key = parted(url)
    if any(each in ("", ".", "..") for each in key.removesuffix("/").split("/")) and key:
        raise UsageError(f"{url!r} has an empty segment, '.' or '..', which pipeline does not support in object names")
    return _store(root), key


@cache  # it holds the connections
def _store(root: str) -> ObjectStore:
    try:
        from obstore.store import from_url
    except ModuleNotFoundError as exc:
        hint = "pip install 'pipeline[cloud]'"
        raise UsageError(f"{root!r} is in an object store, but obstore is not installed", hint=hint) from exc
    if root.startswith("memory"):
        return from_url(root)
    if root.startswith("file"):
        return from_url(root, mkdir=True)
    try:
        # The client's options come from the environment only (AWS_ALLOW_HTTP, AWS_TIMEOUT, …): any that were given here
        # would replace all of those.
        return from_url(root, retry_config={"max_retries": _RETRIES})
    except Exception as exc:  # obstore's errors and ValueError, for invalid settings in the environment
        raise UsageError(f"{root!r} cannot be used: {_told(exc)}", hint=_CREDENTIALS) from exc


def _do(url: str, done: str, act: Callable[[], _T]) -> _T:
    """Call the store. Raises `StorageError`, caused by the error that obstore raised."""
    from obstore.exceptions import BaseError

    try:
        return act()
    except FileNotFoundError as exc:
        raise _missing(url, _told(exc)) from exc
    except (BaseError, OSError, ValueError) as exc:
        raise StorageError(f"{url!r} cannot be {done}: {_told(exc)}", hint=_hint(exc)) from exc


def _missing(url: str, told: str = "") -> StorageError:
    details = f" ({told})" if told else ""
    return StorageError(f"{url!r} does not exist{details}", hint="check the bucket and the object name in the URL")


def _hint(exc: Exception) -> str | None:
    from obstore.exceptions import PermissionDeniedError, UnauthenticatedError

    text = str(exc)
    if "169.254.169.254" in text or "metadata.google" in text:
        return f"no credentials were found; {_CREDENTIALS}"
    if isinstance(exc, PermissionDeniedError | UnauthenticatedError):
        return f"grant the key this permission, or use another key; {_CREDENTIALS}"
    if "builder error" in text:
        return "an endpoint without TLS requires AWS_ALLOW_HTTP=true"
    if "HTTP error" in text:
        return (
            "check that the store is reachable, and its address in AWS_ENDPOINT_URL (or the variable of your provider)"
        )
    return None


def _told(exc: Exception) -> str:
    """Return the store's message without possible secrets: addresses may contain signatures, and bodies keys."""
    text, _, details = str(exc).partition("\n\nDebug source")
    found = [pattern.search(text) for pattern in (_STATUS, _CODE, _MESSAGE, _HTTP_ERROR)]
    if found[-1]:
        found.append(_SYSTEM_ERROR.search(details))
    said = [match[1].strip() for match in found if match]
    if said:
        return ": ".join(said)
    return _ADDRESS.sub("…", text.partition("\n")[0])[:300] or type(exc).__name__


def _found(folder: str, key: str, metas: Sequence[Any]) -> list[Found]:
    base = folder[: len(folder) - len(key)]
    base = base if base.endswith("/") else f"{base}/"
    found = (Found(url=base + meta["path"], size=meta["size"], etag=meta["e_tag"] or "") for meta in metas)
    return sorted(found, key=lambda each: each.url)


def _matches(names: Sequence[str], patterns: Sequence[str]) -> bool:
    """Return True if a key matches a pattern, both split at their slashes."""
    if not patterns or not names:
        return not patterns and not names
    if patterns[0] == "**":
        return _matches(names, patterns[1:]) or _matches(names[1:], patterns)
    return fnmatchcase(names[0], patterns[0]) and _matches(names[1:], patterns[1:])
