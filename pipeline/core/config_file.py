"""config.yaml -> `Config`.

The only module that reads YAML. Aliases, tags and deep nesting are refused: an alias bomb of 442 bytes passes a safe
loader and explodes when it is walked.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from pipeline.core import environment
from pipeline.core.config import Config, _validated
from pipeline.core.errors import ConfigError
from pipeline.core.protocols import PROTOCOLS

MAX_CONFIG_BYTES = 1_000_000
MAX_CONFIG_DEPTH = 20
MAX_CONFIG_PARTS = 10_000
DEFAULT_FILE = "config.yaml"


def load(path: str | os.PathLike[str] | None = None, environ: Mapping[str, str] | None = None) -> Config:
    """Read the configuration: `path`, else `PIPELINE_CONFIG`, else `./config.yaml` if present, else the defaults.

    Raises `ConfigError` naming every problem. `ANTHROPIC_BASE_URL` and `OPENAI_BASE_URL` win over the file, as they do
    in the official SDKs.
    """
    environ = environment.variables() if environ is None else environ
    chosen = path or environ.get("PIPELINE_CONFIG") or None
    if chosen is None and Path(DEFAULT_FILE).is_file():
        chosen = DEFAULT_FILE
    data, lines = _read(Path(chosen)) if chosen else ({}, {})
    for name, facts in PROTOCOLS.items():
        url = environ.get(facts.base_url_variable)
        if url:
            _override_base_url(data, name.value, url)
    return _validated(data, path=str(chosen) if chosen else None, lines=lines)


def _override_base_url(data: dict[str, Any], provider: str, url: str) -> None:
    """Set the address of a built-in provider. Settings of a wrong type stay as they are, to be reported later."""
    providers = data.get("providers") or {}
    if not isinstance(providers, dict):
        return
    own = providers.get(provider) or {}
    if isinstance(own, dict):
        data["providers"] = {**providers, provider: {**own, "base_url": url}}


class _Loader(yaml.SafeLoader):
    """YAML with unique keys and without aliases."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(problem="aliases (*name) are not allowed", problem_mark=event.start_mark)
        return super().compose_node(parent, index)


def _read(path: Path) -> tuple[dict[str, Any], dict[tuple[str, ...], int]]:
    """Return the tree of a YAML file and the line of each key in it."""
    try:
        with path.open("rb") as file:
            text = file.read(MAX_CONFIG_BYTES + 1)
    except OSError as exc:
        raise ConfigError(f"cannot read the configuration {str(path)!r}: {exc.strerror}") from exc
    if len(text) > MAX_CONFIG_BYTES:
        raise ConfigError(f"{path}: larger than {MAX_CONFIG_BYTES:,} bytes; this is not a configuration")
    try:
        _refuse_growth(text)
        loader = _Loader(text)
        node = loader.get_single_node()
        data = (loader.construct_document(node) if node else None) or {}
        lines = dict(_lines(node, ()))
    except (yaml.YAMLError, ValueError) as exc:
        mark = getattr(exc, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ConfigError(f"{where}: not valid YAML: {getattr(exc, 'problem', None) or exc}") from exc
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: must contain settings (key: value), not {type(data).__name__}")
    return data, lines


def _refuse_growth(text: bytes) -> None:
    """Refuse files that are too much for the composer: deep nesting (RecursionError) and many small parts (minutes)."""
    depth = 0
    for count, event in enumerate(yaml.parse(text, Loader=yaml.SafeLoader)):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_CONFIG_DEPTH or count > MAX_CONFIG_PARTS:
            problem = (
                f"nested more than {MAX_CONFIG_DEPTH} deep"
                if depth > MAX_CONFIG_DEPTH
                else f"more than {MAX_CONFIG_PARTS:,} keys and values; this is not a configuration"
            )
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)  # type: ignore[arg-type]


def _lines(node: yaml.Node | None, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], int]]:
    """Yield the line of every key; a key given twice is an error, as YAML would silently take the last."""
    if not isinstance(node, yaml.MappingNode):
        return
    seen: set[str] = set()
    for key, value in node.value:
        name = str(key.value)
        if name in seen:
            problem = f"{'.'.join((*path, name))} is given twice"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
        seen.add(name)
        yield (*path, name), key.start_mark.line + 1
        yield from _lines(value, (*path, name))
