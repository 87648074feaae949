"""Write config.yaml and the topic `settings` from the descriptions in `core.config`.

    python -m tests.settings_docs

Both files come from the same schema, so they cannot disagree. A test compares them with what this module returns.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import orjson

from pipeline.core.config import Config, Endpoint, Price, Section
from pipeline.core.protocols import foreign_settings

_WIDTH = 120
_COMMENT_COLUMN = 30
_PLAIN = re.compile(r"[A-Za-z/][A-Za-z0-9_./:*-]*")
_YAML_WORDS = {"null", "true", "false", "yes", "no", "on", "off", "~"}

_HEAD = """\
# Every setting with its default. Delete what you do not change; an unknown key is an error.
# Keys are never in this file: a provider names the environment variable that has its key.
# This file is generated: python -m tests.settings_docs
"""

_PRICE_EXAMPLE = """\
# Example:
#   "openai/gpt-6-luna": {input: 0.10, output: 0.50, cache_read: 0.01, cache_write_5m: 0.125, cache_write_1h: 0.25,
#                         batch_multiplier: 0.5}
"""

_TOPIC_HEAD = """\
# Settings

Settings come from `-c FILE` (`--config`), else from the file in `PIPELINE_CONFIG`, else from `./config.yaml`, else from
the defaults below. Options of the command override them. An unknown key is an error that suggests the nearest one.
`config.yaml` in the repository has every setting with its default. Defaults are in parentheses here.

Environment variables:

- `ANTHROPIC_API_KEY`, `OPENAI_API_KEY`: keys; they come from the environment only.
- `ANTHROPIC_BASE_URL`, `OPENAI_BASE_URL`: other addresses, as in the official SDKs: Anthropic's without `/v1`,
  OpenAI's with it.
- `PIPELINE_CONFIG`: the settings file.
- `PIPELINE_LEDGER`: the ledger; overrides `ledger`.

Compatible servers (vLLM, Ollama, OpenRouter, Azure, …) need a few lines of YAML each: see `samples/providers.yaml`.
"""


def config_yaml() -> str:
    """Return the text of config.yaml: every setting with its default and its description."""
    data = Config().model_dump()
    parts = [_HEAD]
    for name, field in Config.model_fields.items():
        value = data[name]
        description = field.description or ""
        if name == "providers":
            parts.append(_comment(description) + "providers:\n" + "".join(_endpoints(value)))
        elif isinstance(getattr(Config(), name), Section):
            section = "".join(_section(field.annotation, value, "  "))
            parts.append(_comment(description) + f"{name}:\n{section}")
        elif name == "prices":
            parts.append(_comment(description) + _PRICE_EXAMPLE + "prices: {}\n")
        else:
            parts.append(_line(name, value, description, ""))
    return "\n".join(parts)


def topic() -> str:
    """Return the Markdown text of the topic `settings`."""
    data = Config().model_dump()
    parts = [_TOPIC_HEAD, "## Top level\n\n" + _top_level(data)]
    for name, field in Config.model_fields.items():
        heading = f"## {name}\n\n{field.description}\n\n"
        if name == "providers":
            parts.append(heading + "".join(_providers_topic(data[name])))
        elif name == "prices":
            parts.append(heading + "".join(_topic_section(Price, {})))
        elif isinstance(getattr(Config(), name), Section):
            parts.append(heading + "".join(_topic_section(field.annotation, data[name])))
    return "\n".join(parts)


def _top_level(values: dict[str, Any]) -> str:
    """Return the settings that are neither sections nor described in a section of their own."""
    items = []
    for name, field in Config.model_fields.items():
        if name not in ("providers", "prices") and not isinstance(getattr(Config(), name), Section):
            items.append(_item(name, f"`{_scalar(values[name])}`", field.description))
    return "".join(items)


def _providers_topic(endpoints: dict[str, Any]) -> Iterator[str]:
    """Yield the settings of a provider, with the defaults of the built-in ones that have it."""
    for name, field in Endpoint.model_fields.items():
        defaults = [
            f"`{_scalar(endpoint[name])}`"
            for provider, endpoint in endpoints.items()
            if name in _own_settings(provider)
        ]
        yield _item(name, " and ".join(dict.fromkeys(defaults)), field.description)


def _topic_section(section: Any, values: dict[str, Any]) -> Iterator[str]:
    for name, field in section.model_fields.items():
        if name in values:
            default = f"`{_scalar(values[name])}`"
        elif field.is_required():
            default = "required"
        else:
            default = f"`{_scalar(field.default)}`"
        yield _item(name, default, field.description)


def _item(name: str, default: str, description: str | None) -> str:
    return f"- `{name}` ({default}): {description}\n"


def _endpoints(endpoints: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of the built-in providers. The second one repeats no description."""
    described: set[str] = set()
    for provider, endpoint in endpoints.items():
        yield f"  {provider}:\n"
        for name, field in Endpoint.model_fields.items():
            if name not in _own_settings(provider):
                continue
            description = "" if name in described else field.description or ""
            described.add(name)
            yield _line(name, endpoint[name], description, "    ")


def _own_settings(provider: str) -> set[str]:
    """Return the settings of a built-in provider: all except those of other protocols."""
    return Endpoint.model_fields.keys() - set(foreign_settings(provider))


def _section(section: Any, values: dict[str, Any], indent: str) -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield _line(name, values[name], field.description or "", indent)


def _line(name: str, value: Any, description: str, indent: str) -> str:
    """Return a setting with its description behind it, or in the lines above it if it is too long for that."""
    setting = f"{indent}{name}: {_scalar(value)}"
    if not description:
        return f"{setting}\n"
    line = f"{setting:<{_COMMENT_COLUMN + len(indent)}} # {description}\n"
    if len(line) <= _WIDTH:
        return line
    return _comment(description, indent) + f"{setting}\n"


def _comment(text: str, indent: str = "") -> str:
    lines = textwrap.wrap(text, _WIDTH - len(indent) - 2, break_long_words=False, break_on_hyphens=False)
    return "".join(f"{indent}# {line}\n" for line in lines)


def _scalar(value: Any) -> str:
    """Return a default as YAML in one line."""
    if isinstance(value, Decimal):
        return str(value)
    if isinstance(value, list):
        return "[" + ", ".join(_scalar(each) for each in value) + "]"
    if isinstance(value, str) and _PLAIN.fullmatch(value) and value not in _YAML_WORDS:
        return value
    return orjson.dumps(value).decode()


def _write() -> None:
    """Write both files into this checkout."""
    root = Path(__file__).resolve().parents[1]
    (root / "config.yaml").write_text(config_yaml(), encoding="utf-8")
    (root / "pipeline" / "cli" / "topics" / "settings.md").write_text(topic(), encoding="utf-8")


if __name__ == "__main__":
    _write()
