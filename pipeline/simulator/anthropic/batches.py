"""Anthropic's Message Batches: https://docs.claude.com/en/api/creating-message-batches (August 2026)."""

import re
from datetime import UTC, datetime
from typing import Any

import orjson
from anyio.lowlevel import checkpoint

from pipeline.simulator.anthropic import lines
from pipeline.simulator.anthropic.errors import UNREADABLE, invalid, problem
from pipeline.simulator.anthropic.requests import check_version
from pipeline.simulator.batches import Batch, Item, Outcome, Phase
from pipeline.simulator.operations import Call, json_reply, page_limit
from pipeline.simulator.refusals import Refused, decode_object
from pipeline.simulator.results import Results
from pipeline.simulator.state import State
from pipeline.simulator.store import Store
from pipeline.simulator.types import Problem, Reply

_MAX_REQUESTS = 100_000
_MAX_BYTES = 256 * 1024 * 1024
_CUSTOM_ID = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_AT_ONCE = 1_000
_STATUS = {Phase.VALIDATING: "in_progress", Phase.WORKING: "in_progress", Phase.FINALIZING: "in_progress"}
_COUNTS = {
    "succeeded": Outcome.ANSWERED,
    "errored": Outcome.ERRORED,
    "canceled": Outcome.CANCELLED,
    "expired": Outcome.EXPIRED,
}


class AnthropicBatches:
    """The endpoints of batches."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._store = Store(lines, state)

    async def create(self, call: Call) -> Reply:
        """Begin a batch; what is wrong with its params shows when they are processed."""
        raw = await call.body(min(self._state.options.batch_max_bytes or _MAX_BYTES, _MAX_BYTES))
        if raw is None:
            raise Refused(problem(413))
        _demand_version(call)
        items = await self._items(decode_object(UNREADABLE, raw).get("requests"))
        requests = await self._store.sort(items, call.headers)
        batch = self._store.create(key=call.key, headers=call.headers, requests=requests, details={})
        return json_reply(self._encode(batch, batch.created, call))

    async def _items(self, requests: object) -> list[Item]:
        most = min(self._state.options.batch_max_requests or _MAX_REQUESTS, _MAX_REQUESTS)
        if not isinstance(requests, list):
            raise Refused(invalid("requests: Input should be a valid list"))
        if not 1 <= len(requests) <= most:
            bound = f"at most {most} items" if requests else "at least 1 item"
            raise Refused(invalid(f"requests: List should have {bound} after validation, not {len(requests)}"))
        items, seen = list[Item](), set[str]()
        for number, request in enumerate(requests):
            if wrong := _check_request(number, request, seen):
                raise Refused(wrong)
            items.append(Item(number=number, custom_id=request["custom_id"], raw=orjson.dumps(request["params"])))
            if number % _AT_ONCE == 0:
                await checkpoint()
        return items

    async def poll(self, call: Call) -> Reply:
        """Describe a batch."""
        batch = self._find(call)
        return json_reply(self._encode(batch, await self._store.advance(batch), call))

    async def list(self, call: Call) -> Reply:
        """Describe some batches, newest first."""
        _demand_version(call)
        limit = page_limit(call, 1_000, invalid("limit: Input should be an integer from 1 to 1000"))
        batches, query = self._store.newest(call.key), call.request.query_params
        ids = [batch.id for batch in batches]
        after, before = query.get("after_id"), query.get("before_id")
        if after and before:
            raise Refused(invalid("Only one of after_id and before_id can be given"))
        wanted = after or before
        if wanted and wanted not in ids:
            raise Refused(invalid(f"Batch {wanted} not found"))
        if before:
            rest = batches[: ids.index(before)]
            page = rest[-limit:]
        else:
            rest = batches[ids.index(after) + 1 :] if after else batches
            page = rest[:limit]
        return json_reply(
            {
                "data": [self._encode(batch, await self._store.advance(batch), call) for batch in page],
                "has_more": len(rest) > limit,
                "first_id": page[0].id if page else None,
                "last_id": page[-1].id if page else None,
            }
        )

    async def results(self, call: Call) -> Reply:
        """Return the results of a batch that has ended."""
        batch = self._find(call)
        if not batch.phase(await self._store.advance(batch)).is_last:
            raise Refused(invalid(f"Batch {batch.id} has no available results: it has not ended."))
        results = Results(self._store, batch, batch.results(*Outcome))
        return Reply(status=200, content=results, content_type=b"application/x-jsonl")

    async def cancel(self, call: Call) -> Reply:
        """Begin to cancel a batch; doing so again changes nothing."""
        batch = self._find(call)
        if (await self._store.cancel(batch)).is_last:
            raise Refused(invalid(f"Batch {batch.id} cannot be canceled: it has already ended."))
        return json_reply(self._encode(batch, batch.cancelled or 0.0, call))

    async def delete(self, call: Call) -> Reply:
        """Forget a batch that has ended."""
        batch = self._find(call)
        if not batch.phase(await self._store.advance(batch)).is_last:
            raise Refused(invalid(f"Batch {batch.id} cannot be deleted: cancel it first."))
        self._store.delete(batch)
        return json_reply({"id": batch.id, "type": "message_batch_deleted"})

    def _find(self, call: Call) -> Batch:
        _demand_version(call)
        batch = self._store.find(call.id, call.key)
        if batch is None:
            raise Refused(Problem(status=404, type="not_found_error", message=f"Batch {call.id} not found"))
        return batch

    def _encode(self, batch: Batch, now: float, call: Call) -> dict[str, Any]:
        phase = batch.phase(now)
        status = "canceling" if phase is Phase.CANCELLING else _STATUS.get(phase, "ended")
        is_over = phase.is_last
        counts = {name: batch.counts[outcome] if is_over else 0 for name, outcome in _COUNTS.items()}
        return {
            "id": batch.id,
            "type": "message_batch",
            "processing_status": status,
            "request_counts": {"processing": 0 if is_over else batch.total, **counts},
            "created_at": self._rfc3339(batch.created),
            "expires_at": self._rfc3339(batch.expires),
            "ended_at": self._rfc3339(batch.end) if is_over else None,
            "cancel_initiated_at": None if batch.cancelled is None else self._rfc3339(batch.cancelled),
            "archived_at": None,
            "results_url": f"{call.url}/v1/messages/batches/{batch.id}/results" if is_over else None,
        }

    def _rfc3339(self, moment: float) -> str:
        return datetime.fromtimestamp(self._state.wall(moment), UTC).isoformat()


def _demand_version(call: Call) -> None:
    if wrong := check_version(call.headers):
        raise Refused(wrong)


def _check_request(number: int, request: object, seen: set[str]) -> Problem | None:
    """Find the first thing wrong with a request apart from its params, which are checked when it is processed."""
    place = f"requests.{number}"
    if not isinstance(request, dict):
        return invalid(f"{place}: Input should be a valid dictionary or object to extract fields from")
    custom_id = request.get("custom_id")
    if not isinstance(custom_id, str) or not _CUSTOM_ID.fullmatch(custom_id):
        return invalid(f"{place}.custom_id: String should match pattern '^[a-zA-Z0-9_-]{{1,64}}$'")
    if custom_id in seen:
        return invalid(f"{place}.custom_id: {custom_id!r} is used more than once")
    seen.add(custom_id)
    if not isinstance(request.get("params"), dict):
        return invalid(f"{place}.params: Field required")
    return None
