"""Send LLM requests to Anthropic, OpenAI and compatible servers: no result is lost, and none is paid for twice.

    summary = await pipeline.run_batch(["questions.jsonl"], output="answers.jsonl")
    async for result in pipeline.stream(requests): ...

Names are loaded on first use, so `pipeline --help` does not load an HTTP client.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.core.config import Config
    from pipeline.core.config_file import load
    from pipeline.core.errors import (
        AnthropicAPIError,
        BudgetReachedError,
        ConfigError,
        LineError,
        OpenAIAPIError,
        PipelineError,
        ProviderError,
        StorageError,
        TryLaterError,
        UsageError,
    )
    from pipeline.core.types import Completion, Failure, Request, Result, ToolCall, Usage
    from pipeline.runner.local import run_batch
    from pipeline.runner.options import Options
    from pipeline.runner.stream import stream

__all__ = [
    "AnthropicAPIError",
    "BudgetReachedError",
    "Completion",
    "Config",
    "ConfigError",
    "Failure",
    "LineError",
    "OpenAIAPIError",
    "Options",
    "PipelineError",
    "ProviderError",
    "Reply",
    "Request",
    "Result",
    "StorageError",
    "ToolCall",
    "TryLaterError",
    "Usage",
    "UsageError",
    "load",
    "run_batch",
    "stream",
]

_HOMES = {
    "pipeline.core.config": ("Config",),
    "pipeline.core.config_file": ("load",),
    "pipeline.runner.options": ("Options",),
    "pipeline.runner.local": ("run_batch",),
    "pipeline.runner.stream": ("stream",),
    "pipeline.core.types": ("Completion", "Failure", "Request", "Result", "ToolCall", "Usage"),
}
_HOME_OF: dict[str, str] = {}
for _home, _names in _HOMES.items():
    _HOME_OF.update(dict.fromkeys(_names, _home))

_OLD_NAMES = {"Reply": "Completion"}  # exported until 0.1.0 under the first name


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
    name = _OLD_NAMES.get(name, name)
    return getattr(import_module(_HOME_OF.get(name, "pipeline.core.errors")), name)
