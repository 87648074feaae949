"""Both providers' batches as a client sees them, with one set of words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import httpx
import orjson

if TYPE_CHECKING:
    from .conftest import Wire

Requests = Sequence[tuple[str, Mapping[str, Any]]]
"""What is in a batch: `custom_id` and body of each request."""

ENDPOINT: Final = "/v1/chat/completions"


def jsonl(lines: Iterable[object]) -> bytes:
    """Encode a file."""
    return b"".join(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE) for line in lines)


def line(custom_id: Any, body: Any, **fields: Any) -> dict[str, Any]:
    """Return a line of OpenAI's input file; a field given as None is left out."""
    whole = {"custom_id": custom_id, "method": "POST", "url": ENDPOINT, "body": body, **fields}
    return {name: value for name, value in whole.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class Batching:
    """How one provider's batches are made and read."""

    wire: Wire

    @property
    def is_openai(self) -> bool:
        """Whether it is OpenAI's."""
        return self.wire.name == "openai"

    @property
    def path(self) -> str:
        """Where the batches are."""
        return "/v1/batches" if self.is_openai else "/v1/messages/batches"

    def requests(self, *texts: str, **fields: Any) -> Requests:
        """Return a request for each text, named by its number."""
        return [(f"r{number}", self.wire.body(text, **fields)) for number, text in enumerate(texts)]

    async def upload(self, client: httpx.AsyncClient, raw: bytes, purpose: str = "batch") -> httpx.Response:
        """Send a file to OpenAI."""
        files = {"file": ("in.jsonl", raw)}
        return await client.post("/v1/files", files=files, data={"purpose": purpose}, headers=self.wire.headers)

    async def create(self, client: httpx.AsyncClient, requests: Requests, **fields: Any) -> httpx.Response:
        """Begin a batch, for OpenAI after sending its file."""
        if not self.is_openai:
            inline = [{"custom_id": custom_id, "params": body} for custom_id, body in requests]
            return await self.post(client, "", {"requests": inline, **fields})
        file = await self.upload(client, jsonl(line(*request) for request in requests))
        return await self.begin(client, file.json()["id"], **fields)

    async def begin(self, client: httpx.AsyncClient, file_id: str, **fields: Any) -> httpx.Response:
        """Begin a batch of a file."""
        body = {"input_file_id": file_id, "endpoint": ENDPOINT, "completion_window": "24h", **fields}
        return await self.post(client, "", {name: value for name, value in body.items() if value is not None})

    async def made(self, client: httpx.AsyncClient, requests: Requests) -> dict[str, Any]:
        """Begin a batch and return it."""
        response = await self.create(client, requests)
        assert response.status_code == 200, response.text
        return dict(response.json())

    async def post(self, client: httpx.AsyncClient, path: str, body: object = None) -> httpx.Response:
        """Post to a path under the batches."""
        return await client.post(self.path + path, json=body, headers=self.wire.headers)

    async def cancel(self, client: httpx.AsyncClient, batch: Mapping[str, Any]) -> httpx.Response:
        """Cancel a batch."""
        return await self.post(client, f"/{batch['id']}/cancel")

    async def get(self, client: httpx.AsyncClient, path: str, **headers: str) -> httpx.Response:
        """Get any path."""
        return await client.get(path, headers={**self.wire.headers, **headers})

    async def poll(self, client: httpx.AsyncClient, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return a batch as it is now."""
        return dict((await self.get(client, f"{self.path}/{batch['id']}")).json())

    def status(self, batch: Mapping[str, Any]) -> str:
        """Return where a batch stands, in the provider's words."""
        return str(batch["status" if self.is_openai else "processing_status"])

    def result_paths(self, batch: Mapping[str, Any]) -> list[str]:
        """Return where the results of a batch are; none before its end."""
        if not self.is_openai:
            return [batch["results_url"]] if batch["results_url"] else []
        ids = (batch["output_file_id"], batch["error_file_id"])
        return [f"/v1/files/{id}/content" for id in ids if id]

    async def results(self, client: httpx.AsyncClient, batch: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return the results of a batch that is over, those of the error file last."""
        polled = await self.poll(client, batch)
        raw = [(await self.get(client, path)).content for path in self.result_paths(polled)]
        return [orjson.loads(each) for part in raw for each in part.splitlines()]

    async def outcomes(self, client: httpx.AsyncClient, batch: Mapping[str, Any]) -> dict[str, str]:
        """Return what became of each request that has a result, with Anthropic's words."""
        results = await self.results(client, batch)
        return {result["custom_id"]: self.outcome(result) for result in results}

    def outcome(self, result: Mapping[str, Any]) -> str:
        """Return what became of one request."""
        if not self.is_openai:
            return str(result["result"]["type"])
        if result["error"]:
            return {"batch_expired": "expired", "batch_cancelled": "canceled"}[result["error"]["code"]]
        return "succeeded" if result["response"]["status_code"] == 200 else "errored"

    def message(self, result: Mapping[str, Any]) -> dict[str, Any]:
        """Return the response of a request that succeeded."""
        return dict(result["response"]["body"] if self.is_openai else result["result"]["message"])

    def error(self, result: Mapping[str, Any]) -> dict[str, Any]:
        """Return the error of a request that errored."""
        return dict((result["response"]["body"] if self.is_openai else result["result"]["error"])["error"])


async def statistics(client: httpx.AsyncClient) -> dict[str, Any]:
    """Return what the simulator counted."""
    return dict((await client.get("/simulator/statistics")).json())
