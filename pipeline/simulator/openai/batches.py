"""OpenAI's Batch API: https://platform.openai.com/docs/guides/batch (July 2026)."""

from collections.abc import Mapping, Sequence
from typing import Any

from anyio.lowlevel import checkpoint

from pipeline.simulator.batches import Batch, Item, Outcome, Phase
from pipeline.simulator.openai import lines
from pipeline.simulator.openai.errors import UNREADABLE, invalid
from pipeline.simulator.openai.files import Files
from pipeline.simulator.openai.validation import ENDPOINTS, Error, Validated, error, validate
from pipeline.simulator.operations import Call, json_reply, page_limit
from pipeline.simulator.refusals import Refused, decode_object
from pipeline.simulator.state import State
from pipeline.simulator.store import AT_ONCE, Store
from pipeline.simulator.types import Body, Problem, Reply

_MAX_REQUESTS = 50_000
_MAX_PAIRS, _MAX_NAME, _MAX_VALUE = 16, 64, 512  # of metadata
_SUPPORTED = "/v1/chat/completions"


class OpenAIBatches:
    """The endpoints of batches; `files` are those of their inputs and outputs."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._store = Store(lines, state)
        self.files = Files(state, self._store)

    async def create(self, call: Call) -> Reply:
        """Begin a batch; what is wrong with its file shows when it has been validated."""
        body = decode_object(UNREADABLE, await call.request.body())
        if problem := _check(body):
            raise Refused(problem)
        file = self.files.find(body["input_file_id"], call.key)
        if file.purpose != "batch":
            raise Refused(invalid(f"The purpose of {file.id} is not 'batch'.", param="input_file_id"))
        most = min(self._state.options.batch_max_requests or _MAX_REQUESTS, _MAX_REQUESTS)
        validated = await validate(file.raw, body["endpoint"], most)
        tokens = 0 if validated.errors else await self._tokens(validated.items)
        requests = await self._store.sort(validated.items, call.headers)
        batch = self._store.create(
            key=call.key,
            headers=call.headers,
            requests=requests,
            details={
                "input_file_id": file.id,
                "endpoint": body["endpoint"],
                "metadata": body.get("metadata"),
                "model": validated.model,
            },
            failure=validated.errors or self._too_many_tokens(call.key, validated, tokens),
            tokens=tokens,
        )
        return json_reply(self._encode(batch, batch.created))

    async def _tokens(self, items: Sequence[Item]) -> int:
        """Count the input of a batch, if that is limited."""
        total = 0
        if self._state.options.batch_enqueued_tokens is not None:
            for count, item in enumerate(items, 1):
                prompt = self._store.read(item.raw, {})
                total += prompt.input_tokens if prompt else 0
                if count % AT_ONCE == 0:
                    await checkpoint()
        return total

    def _too_many_tokens(self, key: str, validated: Validated, tokens: int) -> list[Error]:
        limit, model = self._state.options.batch_enqueued_tokens, validated.model or ""
        if limit is None or self._store.enqueued_tokens(key, model) + tokens <= limit:
            return []
        message = (
            f"Enqueued token limit reached for {model} in organization org-simulator. Limit: {limit} enqueued tokens. "
            "Please try again once some in_progress batches have been completed."
        )
        return [error("token_limit_exceeded", message)]

    async def poll(self, call: Call) -> Reply:
        """Describe a batch."""
        batch = self._find(call)
        return json_reply(self._encode(batch, await self._store.advance(batch)))

    async def list(self, call: Call) -> Reply:
        """Describe some batches, newest first."""
        limit = page_limit(call, 100, invalid("Invalid 'limit': expected an integer from 1 to 100.", param="limit"))
        batches, after = self._store.newest(call.key), call.request.query_params.get("after")
        if after:
            ids = [batch.id for batch in batches]
            if after not in ids:
                raise Refused(invalid(f"No batch found with id '{after}'.", param="after", status=404))
            batches = batches[ids.index(after) + 1 :]
        data = [self._encode(batch, await self._store.advance(batch)) for batch in batches[:limit]]
        return json_reply(
            {
                "object": "list",
                "data": data,
                "first_id": data[0]["id"] if data else None,
                "last_id": data[-1]["id"] if data else None,
                "has_more": len(batches) > limit,
            }
        )

    async def cancel(self, call: Call) -> Reply:
        """Begin to cancel a batch; doing so again changes nothing."""
        batch = self._find(call)
        phase = await self._store.cancel(batch)
        if phase.is_last:
            raise Refused(invalid(f"Cannot cancel a batch with status '{phase.value}'.", status=409))
        return json_reply(self._encode(batch, batch.cancelled or 0.0))

    def _find(self, call: Call) -> Batch:
        batch = self._store.find(call.id, call.key)
        if batch is None:
            raise Refused(invalid(f"No batch found with id '{call.id}'.", status=404))
        return batch

    def _encode(self, batch: Batch, now: float) -> dict[str, Any]:
        phase = batch.phase(now)
        files = {file.name.rpartition("_")[2]: file.id for file in self.files.of_batch(batch)} if phase.is_last else {}
        nothing = "" if self._state.options.batch_empty_file_ids else None
        return {
            "id": batch.id,
            "object": "batch",
            "endpoint": batch.details["endpoint"],
            "model": batch.details["model"],
            "errors": {"object": "list", "data": batch.failure} if phase is Phase.FAILED else None,
            "input_file_id": batch.details["input_file_id"],
            "completion_window": "24h",
            "status": phase.value,
            "output_file_id": files.get("output.jsonl", nothing),
            "error_file_id": files.get("error.jsonl", nothing),
            **{name: None if at is None else int(self._state.wall(at)) for name, at in _times(batch, phase).items()},
            "request_counts": {
                "total": 0 if phase is Phase.VALIDATING else batch.total,
                "completed": batch.counts[Outcome.ANSWERED],
                "failed": batch.counts[Outcome.ERRORED],
            },
            "usage": _usage(batch),
            "metadata": batch.details["metadata"],
        }


def _times(batch: Batch, phase: Phase) -> Mapping[str, float | None]:
    """Tell when a batch came where it is; what has not happened has no time."""
    ended = batch.end if phase.is_last else None
    until = batch.end if batch.cancelled is None else batch.cancelled
    is_valid = phase not in (Phase.VALIDATING, Phase.FAILED) and batch.validated <= until
    is_worked = phase in (Phase.FINALIZING, Phase.COMPLETED)
    return {
        "created_at": batch.created,
        "in_progress_at": batch.validated if is_valid else None,
        "expires_at": batch.expires,
        "finalizing_at": batch.worked if is_worked else None,
        "completed_at": ended if phase is Phase.COMPLETED else None,
        "failed_at": ended if phase is Phase.FAILED else None,
        "expired_at": ended if phase is Phase.EXPIRED else None,
        "cancelling_at": batch.cancelled,
        "cancelled_at": ended if phase is Phase.CANCELLED else None,
    }


def _usage(batch: Batch) -> dict[str, object]:
    taken, cached, given, reasoning = batch.usages
    return {
        "input_tokens": taken,
        "input_tokens_details": {"cached_tokens": cached},
        "output_tokens": given,
        "output_tokens_details": {"reasoning_tokens": reasoning},
        "total_tokens": taken + given,
    }


def _check(body: Body) -> Problem | None:
    """Find the first thing wrong with a request for a batch."""
    for name in ("input_file_id", "endpoint", "completion_window"):
        if not isinstance(body.get(name), str):
            message = f"Missing required parameter: '{name}'."
            return invalid(message, param=name, code="missing_required_parameter")
    if body["endpoint"] not in ENDPOINTS:
        names = ", ".join(f"'{name}'" for name in ENDPOINTS)
        message = f"Invalid value: '{body['endpoint']}'. Supported values are: {names}."
        return invalid(message, param="endpoint", code="invalid_value")
    if body["endpoint"] != _SUPPORTED:
        return invalid(f"This simulator has only batches for {_SUPPORTED}.", param="endpoint", code="invalid_value")
    if body["completion_window"] != "24h":
        message = f"Invalid value: '{body['completion_window']}'. Value must be '24h'."
        return invalid(message, param="completion_window", code="invalid_value")
    return _check_metadata(body.get("metadata"))


def _check_metadata(metadata: object) -> Problem | None:
    if metadata is None:
        return None
    if not isinstance(metadata, dict):
        return invalid("Invalid type for 'metadata': expected an object.", param="metadata", code="invalid_type")
    if len(metadata) > _MAX_PAIRS:
        message = f"Invalid 'metadata': too many properties. Expected at most {_MAX_PAIRS}, but got {len(metadata)}."
        return invalid(message, param="metadata", code="object_above_max_properties")
    for name, value in metadata.items():
        if not isinstance(value, str):
            return invalid("Invalid type for 'metadata': expected strings.", param="metadata", code="invalid_type")
        if len(name) > _MAX_NAME or len(value) > _MAX_VALUE:
            message = f"Invalid 'metadata.{name}': string too long: {_MAX_NAME} for a key, {_MAX_VALUE} for a value."
            return invalid(message, param="metadata", code="string_above_max_length")
    return None
