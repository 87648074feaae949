from __future__ import annotations

import os
import pwd
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pipeline import providers
from pipeline.core import config, config_file, environment
from pipeline.core.config import Config, Endpoint
from pipeline.core.errors import ConfigError, UsageError
from pipeline.core.types import OutputFormat, Protocol

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "config.yaml"
OWN_SETTINGS = {
    "anthropic": {"version", "max_tokens"},
    "openai": {"organization", "project", "max_tokens_field", "store"},
}
CURRENT_MODELS = {"anthropic": "claude-haiku-5-5", "openai": "gpt-6-luna"}
Load = Callable[..., Config]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Load a configuration file with this content and these environment variables."""

    def write_and_load(content: str | bytes, **environ: str) -> Config:
        path = tmp_path / "config.yaml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return config_file.load(path, environ)

    return write_and_load


def endpoint(base_url: str, **settings: Any) -> Endpoint:
    data = {"providers": {"x": {"protocol": "openai", "base_url": base_url, **settings}}}
    return Config.model_validate(data).providers["x"]


# ── the shipped file ──────────────────────────────────────────────────────────────────────────────────


def without_models(settings: Config) -> dict[str, Any]:
    """Return the settings without the names of the default models."""
    data = settings.model_dump()
    for provider in data["providers"].values():
        del provider["model"]
    return data


def test_the_shipped_file_holds_the_defaults() -> None:
    """config.yaml equals the defaults of the code, but for the names of the two default models."""
    shipped = config_file.load(SHIPPED, {})

    assert without_models(shipped) == without_models(Config())
    assert {name: each.model for name, each in shipped.providers.items()} == CURRENT_MODELS


def settings_of(model: type[Any]) -> Iterator[tuple[str, ...]]:
    """Yield the path of every setting of a section, in the tree of the models."""
    for name, field in model.model_fields.items():
        yield (name,)
        if name != "providers" and hasattr(field.annotation, "model_fields"):
            yield from ((name, *rest) for rest in settings_of(field.annotation))


def paths_of(tree: Any) -> Iterator[tuple[str, ...]]:
    """Yield the path of every key in a YAML tree."""
    if isinstance(tree, dict):
        for name, value in tree.items():
            yield (name,)
            yield from ((name, *rest) for rest in paths_of(value))


def test_the_shipped_file_mentions_every_setting() -> None:
    """Every setting of the code stands in config.yaml and nothing else does; a provider's are those of its protocol."""
    written = set(paths_of(yaml.safe_load(SHIPPED.read_text())))

    expected = set(settings_of(Config))
    for name, foreign in (("anthropic", "openai"), ("openai", "anthropic")):
        own = Endpoint.model_fields.keys() - OWN_SETTINGS[foreign]
        expected |= {("providers", name)} | {("providers", name, setting) for setting in own}
    assert written == expected


def test_the_built_in_models_are_those_of_the_shipped_file() -> None:
    """Without a file the default models are current, as in config.yaml: the first command works in any folder."""
    shipped = yaml.safe_load(SHIPPED.read_text())["providers"]

    for name, endpoint in Config().providers.items():
        assert endpoint.model == shipped[name]["model"]
        assert providers.retirement(name, endpoint, endpoint.model or "") is None


def test_the_samples_are_valid() -> None:
    """The sample providers load as they are, built-in ones beside them."""
    sample = config_file.load(ROOT / "samples" / "providers.yaml", {})

    assert {"anthropic", "openai", "vllm", "ollama", "openrouter", "azure"} == set(sample.providers)
    assert sample.providers["vllm"].url == "http://localhost:8000/v1/chat/completions"


# ── where it comes from ───────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current directory with config.yaml and other.yaml, told apart by their progress setting."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text("progress: log")
    (tmp_path / "other.yaml").write_text("progress: bar")
    return tmp_path


@pytest.mark.parametrize(
    ("path", "environ", "expected"),
    [
        pytest.param(None, {}, "log", id="config.yaml"),
        pytest.param(None, {"PIPELINE_CONFIG": "other.yaml"}, "bar", id="PIPELINE_CONFIG"),
        pytest.param(None, {"PIPELINE_CONFIG": ""}, "log", id="PIPELINE_CONFIG is empty"),
        pytest.param("other.yaml", {"PIPELINE_CONFIG": "config.yaml"}, "bar", id="path"),
    ],
)
def test_the_nearest_word_chooses_the_file(
    folder: Path, path: str | None, environ: Mapping[str, str], expected: str
) -> None:
    """The given path wins over PIPELINE_CONFIG, and that over ./config.yaml."""
    assert config_file.load(path, environ).progress == expected


def test_without_a_file_the_defaults_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory without config.yaml is no error."""
    monkeypatch.chdir(tmp_path)

    assert config_file.load(None, {}) == Config()


@pytest.mark.parametrize(
    "content",
    [pytest.param("", id="empty"), pytest.param("# nothing\n", id="comment"), pytest.param("---\n...\n", id="null")],
)
def test_an_empty_file_holds_the_defaults(load: Load, content: str) -> None:
    """An empty file changes nothing."""
    assert load(content) == Config()


@pytest.mark.parametrize(
    ("provider", "variable", "url"),
    [
        pytest.param("anthropic", "ANTHROPIC_BASE_URL", "https://proxy.example/v1/messages", id="anthropic"),
        pytest.param("openai", "OPENAI_BASE_URL", "https://proxy.example/chat/completions", id="openai"),
    ],
)
def test_base_urls_of_the_environment_win(load: Load, provider: str, variable: str, url: str) -> None:
    """The variables of the official SDKs change the address over the file, and nothing else."""
    content = f"providers: {{{provider}: {{base_url: 'https://file.example', model: m}}}}"

    found = load(content, **{variable: "https://proxy.example/"}).providers[provider]

    assert (found.url, found.model) == (url, "m")
    assert found.protocol == provider


def test_a_field_of_a_built_in_provider_can_be_changed_alone(load: Load) -> None:
    """Two lines of YAML change one field of a built-in provider, the others stay."""
    found = load("providers:\n  openai: {organization: org-1}").providers["openai"]

    assert found == Config().providers["openai"].model_copy(update={"organization": "org-1"})


def test_another_protocol_starts_afresh(load: Load) -> None:
    """A built-in name with the other protocol inherits nothing of the built-in one."""
    found = load("providers: {openai: {protocol: anthropic, base_url: 'https://x.example'}}").providers["openai"]

    assert (found.url, found.api_key_env, found.store) == ("https://x.example/v1/messages", None, None)


# ── what is refused ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(
            "sending:\n  concurency: 5",
            ":2: sending.concurency: unknown setting; did you mean 'concurrency'?",
            id="typo",
        ),
        pytest.param("sendin: {}", ":1: sendin: unknown setting; did you mean 'sending'?", id="typo in a section"),
        pytest.param("provider: openai\nxyzzy: 1", ":2: xyzzy: unknown setting", id="nothing near"),
        pytest.param(
            "providers:\n  openai:\n    modle: x",
            ":3: providers.openai.modle: unknown setting; did you mean 'model'?",
            id="typo in a provider",
        ),
        pytest.param(
            "limits:\n  models:\n    a/b: {rmp: 5}",
            ":3: limits.models.a/b.rmp: unknown setting; did you mean 'rpm'?",
            id="typo in a model's limits",
        ),
        pytest.param("provider: nobody", "provider 'nobody' is not one of anthropic, openai", id="unknown provider"),
        pytest.param(
            "\nsending: {timeout: fast}", ":2: sending.timeout: Input should be a valid number", id="text for a number"
        ),
        pytest.param(
            "sending: {timeout: '60'}", ":1: sending.timeout: Input should be a valid number", id="quoted number"
        ),
        pytest.param(
            "sending: {concurrency: true}",
            ":1: sending.concurrency: Input should be a valid integer",
            id="true for a number",
        ),
        pytest.param("output: {ordered: 1}", ":1: output.ordered: Input should be a valid boolean", id="1 for true"),
        pytest.param("output: {format: xml}", ":1: output.format: Input should be 'native'", id="unknown choice"),
        pytest.param(
            "sending: {timeout: -1}", ":1: sending.timeout: Input should be greater than 0", id="negative seconds"
        ),
        pytest.param("sending: {timeout: .inf}", ":1: sending.timeout: Input should be", id="endless"),
        pytest.param("request: {temperature: .nan}", ":1: request.temperature: Input should be", id="NaN"),
        pytest.param(
            "limits: {rpm: 0}", ":1: limits.rpm: Input should be greater than or equal to 1", id="no requests at all"
        ),
        pytest.param(
            "limits: {rpm: -5}", ":1: limits.rpm: Input should be greater than or equal to 1", id="negative limit"
        ),
        pytest.param(
            "request: {max_tokens: 1.5}", ":1: request.max_tokens: Input should be a valid integer", id="half a token"
        ),
        pytest.param(
            "request: {temperature: 2.5}",
            ":1: request.temperature: Input should be less than or equal to 2",
            id="too hot",
        ),
        pytest.param(
            "simulator: {faults: {'529': 2}}",
            ":1: simulator.faults.529: Input should be less than or equal to 1",
            id="share over 1",
        ),
        pytest.param(
            "providers: {x: {base_url: 'https://x'}}", "providers.x.protocol: Field required", id="no protocol"
        ),
        pytest.param(
            "providers: {x: {protocol: gemini, base_url: 'https://x'}}",
            "providers.x.protocol: Input should be",
            id="unknown protocol",
        ),
        pytest.param("providers: {x: 5}", ":1: providers.x: Input should be", id="provider is a number"),
        pytest.param("providers: [x]", ":1: providers: Input should be", id="providers are a list"),
        pytest.param(
            "providers: {openai: {version: '1'}}",
            "version: not a setting of the openai protocol",
            id="other protocol's setting",
        ),
        pytest.param(
            "providers: {anthropic: {store: true}}",
            "store: not a setting of the anthropic protocol",
            id="other protocol's store",
        ),
        pytest.param(
            "prices:\n  m: {input: 1, output: 1, cached: 1}",
            ":2: prices.m.cached: unknown setting",
            id="typo in a price",
        ),
        pytest.param(
            "prices:\n  m: {input: 1, ouput: 1}", "did you mean 'output'?", id="typo in a price that has to be there"
        ),
        pytest.param(
            "prices:\n  openai/m: {input: 1}", ":2: prices.openai/m.output: Field required", id="half a price"
        ),
        pytest.param("prices: {m: 5}", ":1: prices.m: Input should be", id="a price is a number"),
        pytest.param("prices: {m: {input: '1', output: 1}}", ":1: prices.m.input: must be a number", id="quoted price"),
        pytest.param(
            "prices: {m: {input: true, output: 1}}", ":1: prices.m.input: must be a number", id="true dollars"
        ),
        pytest.param("prices: {m: {input: null, output: 1}}", ":1: prices.m.input: must be a number", id="no price"),
        pytest.param(
            "prices: {m: {input: -1, output: 1}}",
            ":1: prices.m.input: Input should be greater than or equal to 0",
            id="negative price",
        ),
        pytest.param(
            "prices: {m: {input: .inf, output: 1}}",
            ":1: prices.m.input: Input should be a finite number",
            id="endless price",
        ),
        pytest.param(
            "prices: {m: {input: .nan, output: 1}}",
            ":1: prices.m.input: Input should be a finite number",
            id="NaN dollars",
        ),
        pytest.param(
            "prices: {m: {input: 1.0e-10, output: 1}}",
            ":1: prices.m.input: Decimal input should have no more than 9 decimal places",
            id="price too fine",
        ),
        pytest.param(
            "prices: {m: {input: 1, output: 1, batch_multiplier: 2}}",
            ":1: prices.m.batch_multiplier: Input should be less than or equal to 1",
            id="a batch that costs more",
        ),
        pytest.param("[a, b]", "must contain settings", id="list"),
        pytest.param("just text", "must contain settings", id="text"),
        pytest.param("1: 2", "1: Keys should be strings", id="number as a key"),
    ],
)
def test_wrong_settings_are_named(load: Load, content: str, message: str) -> None:
    """A wrong setting is refused with its file, line and key, and the nearest known one for a misspelt key."""
    with pytest.raises(ConfigError) as caught:
        load(content)

    assert "config.yaml" in caught.value.message
    assert message in caught.value.message


def test_all_problems_are_told_at_once(load: Load) -> None:
    """Several mistakes come in one error, one line each."""
    with pytest.raises(ConfigError) as caught:
        load("sending:\n  timeout: -1\n  concurency: 5\nprogress: loud\n")

    lines = caught.value.message.splitlines()
    assert [line.split(": ")[0].rpartition(":")[2] + " " + line.split(": ")[1] for line in lines] == [
        "2 sending.timeout",
        "3 sending.concurency",
        "4 progress",
    ]


NESTED = "[" * 5_000 + "]" * 5_000
BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(BOMB, ":2: not valid YAML: aliases (*name) are not allowed", id="alias bomb"),
        pytest.param("request: &r {}\noutput: *r", ":2: not valid YAML: aliases", id="one alias"),
        pytest.param(
            "request: !!python/object:os.system {}",
            ":1: not valid YAML: could not determine a constructor",
            id="object",
        ),
        pytest.param(
            "request: !!python/object/apply:os.abort []",
            ":1: not valid YAML: could not determine a constructor",
            id="call",
        ),
        pytest.param("request: !mine {}", ":1: not valid YAML: could not determine a constructor", id="unknown tag"),
        pytest.param(f"tags: {NESTED}", ":1: not valid YAML: nested more than 20 deep", id="depth 5,000"),
        pytest.param("- " * 5_000, ":1: not valid YAML: nested more than 20 deep", id="depth 5,000 of blocks"),
        pytest.param("progress: log\nprogress: bar", ":2: not valid YAML: progress is given twice", id="key twice"),
        pytest.param(
            "sending:\n  timeout: 1\n  timeout: 2",
            ":3: not valid YAML: sending.timeout is given twice",
            id="key twice inside",
        ),
        pytest.param(
            "providers: {openai: {model: a}, openai: {}}",
            ":1: not valid YAML: providers.openai is given twice",
            id="provider twice",
        ),
        pytest.param("x" * 2_000_000, "larger than 1,000,000 bytes", id="2 MB"),
        pytest.param("a: [", ":1: not valid YAML", id="unclosed"),
        pytest.param("a: b: c", ":1: not valid YAML", id="two colons"),
        pytest.param("\ta: 1", ":1: not valid YAML", id="tab"),
        pytest.param(b"progress: \xff", "not valid YAML", id="invalid UTF-8"),
        pytest.param(b"progress: \0", "not valid YAML", id="NUL"),
        pytest.param("seed: 2023-99-99", "not valid YAML", id="impossible date"),
        pytest.param("? [a]\n: 1", ":1: not valid YAML", id="list as a key"),
        pytest.param("a: 1\n---\nb: 2", ":2: not valid YAML", id="two documents"),
    ],
)
def test_harmful_yaml_is_refused(load: Load, content: str | bytes, message: str) -> None:
    """YAML that explodes, runs code or hides a value is refused with its line, quickly and by a typed error."""
    with pytest.raises(ConfigError) as caught:
        load(content)

    assert message in caught.value.message


@given(st.text("ab:-[]{}&*!|>#'\"%@ \n\t\0\u00e9?,", max_size=30))
def test_any_text_is_a_configuration_or_a_config_error(tmp_path_factory: pytest.TempPathFactory, content: str) -> None:
    """No file raises anything but a ConfigError."""
    path = tmp_path_factory.mktemp("fuzz") / "config.yaml"
    path.write_text(content)

    with suppress(ConfigError):
        config_file.load(path, {"OPENAI_BASE_URL": "https://x.example"})


@pytest.mark.parametrize(
    "content",
    [
        pytest.param("providers: 5", id="providers"),
        pytest.param("providers: {openai: [x]}", id="provider"),
        pytest.param("providers: {openai: 5}", id="number"),
    ],
)
def test_wrong_types_meet_the_environment(load: Load, content: str) -> None:
    """A wrong type under a provider is a ConfigError also where the environment names its address."""
    with pytest.raises(ConfigError, match="Input should be"):
        load(content, OPENAI_BASE_URL="https://x.example")


@pytest.mark.parametrize("path", [pytest.param("missing.yaml", id="missing"), pytest.param(".", id="directory")])
def test_a_named_file_must_be_readable(tmp_path: Path, path: str) -> None:
    """A file that was named and cannot be read is an error, never the defaults."""
    with pytest.raises(ConfigError, match="cannot read the configuration"):
        config_file.load(tmp_path / path, {})


# ── addresses and secrets ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "base_url",
    [
        "http://localhost:8000/v1",
        "http://LOCALHOST/v1",
        "http://127.0.0.1:1/v1",
        "http://127.8.9.10/v1",
        "http://[::1]:8000/v1",
        "https://example.com/v1",
    ],
)
def test_safe_addresses_are_taken(base_url: str) -> None:
    """HTTPS goes anywhere, plain HTTP to this machine."""
    assert endpoint(base_url).url == f"{base_url}/chat/completions"


@pytest.mark.parametrize(
    ("base_url", "reason"),
    [
        pytest.param("http://example.com/v1", "unencrypted", id="plain http"),
        pytest.param("http://10.0.0.1/v1", "unencrypted", id="private network"),
        pytest.param("http://169.254.169.254/latest", "unencrypted", id="cloud metadata"),
        pytest.param("http://localhost.example.com/v1", "unencrypted", id="begins like localhost"),
        pytest.param("http://127.0.0.1.example.com/v1", "unencrypted", id="begins like loopback"),
        pytest.param("http://127.example.com/v1", "unencrypted", id="begins like 127"),
        pytest.param("http://0.0.0.0/v1", "unencrypted", id="any address"),
        pytest.param("http://[::2]/v1", "unencrypted", id="other IPv6"),
        pytest.param("https://user:secret@example.com", "must not contain a user", id="user and password"),
        pytest.param("https://user@example.com", "must not contain a user", id="user"),
        pytest.param("http://localhost@example.com", "must not contain a user", id="loopback as a user"),
        pytest.param("https://@example.com", "must not contain a user", id="empty user"),
        pytest.param("ftp://user:secret@example.com", "must not contain a user", id="password before scheme"),
        pytest.param("https://example.com/v1?key=secret", "must not contain a user", id="query"),
        pytest.param("https://example.com/v1#x", "must not contain a user", id="fragment"),
        pytest.param("file:///etc/passwd", "is not an http", id="file"),
        pytest.param("gopher://example.com", "is not an http", id="gopher"),
        pytest.param("example.com/v1", "is not an http", id="no scheme"),
        pytest.param("https://", "is not an http", id="no host"),
        pytest.param("https://example.com:99999", "[Pp]ort", id="impossible port"),
        pytest.param("https://[::1", "Invalid IPv6", id="unclosed bracket"),
        pytest.param("", "is not an http", id="empty"),
    ],
)
def test_unsafe_addresses_are_refused(load: Load, base_url: str, reason: str) -> None:
    """Keys and conversations never go unencrypted beyond this machine, and no secret stands in an address."""
    with pytest.raises(ConfigError, match=reason) as caught:
        load(f"providers: {{x: {{protocol: openai, base_url: '{base_url}'}}}}")

    assert "secret@" not in caught.value.message


def test_plain_http_can_be_allowed() -> None:
    """In a trusted network the user may say so."""
    assert endpoint("http://10.0.0.1/v1", allow_plain_http=True).url == "http://10.0.0.1/v1/chat/completions"


@pytest.mark.parametrize("name", ["Authorization", "authorization", "X-Api-Key", "api-key", "Cookie"])
def test_secrets_in_headers_are_refused(load: Load, name: str) -> None:
    """A header that holds a key cannot be written into the file, and the message does not repeat its value."""
    with pytest.raises(ConfigError, match=f"{name} would contain a secret") as caught:
        load(f"providers: {{openai: {{headers: {{{name}: sk-canary}}}}}}")

    assert "sk-canary" not in caught.value.message


def test_a_key_in_place_of_its_variable_is_refused(load: Load) -> None:
    """Who writes the key where its variable's name belongs is told so, without the key."""
    with pytest.raises(ConfigError, match="api_key_env must be the name") as caught:
        load("providers: {openai: {api_key_env: sk-canary-1}}")

    assert "canary" not in caught.value.message


# ── keys ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        pytest.param({"ANTHROPIC_API_KEY": "k-1"}, "k-1", id="upper case"),
        pytest.param({"anthropic_api_key": "k-2"}, "k-2", id="lower case, as the seed writes it"),
        pytest.param({"ANTHROPIC_API_KEY": "k-1", "anthropic_api_key": "k-2"}, "k-1", id="both"),
        pytest.param({"ANTHROPIC_API_KEY": "", "anthropic_api_key": "k-2"}, "k-2", id="empty counts as absent"),
        pytest.param({"ANTHROPIC_API_KEY": " k-1\n"}, "k-1", id="newline of a file"),
    ],
)
def test_keys_come_from_the_environment(environ: Mapping[str, str], expected: str) -> None:
    """A key is the value of its variable, in either case, without surrounding space."""
    assert environment.api_key("anthropic", Config().providers["anthropic"], environ) == expected


@pytest.mark.parametrize(
    ("provider", "variable", "place"),
    [
        pytest.param("anthropic", "ANTHROPIC_API_KEY", "console.anthropic.com", id="anthropic"),
        pytest.param("openai", "OPENAI_API_KEY", "platform.openai.com", id="openai"),
    ],
)
def test_a_missing_key_is_explained(provider: str, variable: str, place: str) -> None:
    """A missing key names the variable and where to get a key."""
    with pytest.raises(UsageError, match=variable) as caught:
        environment.api_key(provider, Config().providers[provider], {variable: "  "})

    assert caught.value.hint is not None
    assert place in caught.value.hint
    assert f"export {variable}=" in caught.value.hint


@pytest.mark.parametrize(
    "key",
    [
        pytest.param("a b", id="space"),
        pytest.param("a\nb", id="newline"),
        pytest.param("a\x1bb", id="escape"),
        pytest.param("clé", id="not ASCII"),
    ],
)
def test_what_cannot_be_a_key_is_refused(key: str) -> None:
    """A key that would break a header is a usage error that does not show it."""
    with pytest.raises(UsageError, match="OPENAI_API_KEY does not hold a key") as caught:
        environment.api_key("openai", Config().providers["openai"], {"OPENAI_API_KEY": key})

    assert key not in caught.value.message


def test_some_endpoints_need_no_key() -> None:
    """An endpoint without a variable gets no key."""
    assert environment.api_key("x", endpoint("http://localhost:1/v1"), {"OPENAI_API_KEY": "k"}) is None


def test_keys_are_nowhere_in_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    """A configuration and its endpoints never show a key of the environment."""
    monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-canary-1")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-canary-2")

    settings = config_file.load()

    assert "canary" not in repr(settings) + str(settings) + settings.model_dump_json()


# ── changed copies ────────────────────────────────────────────────────────────────────────────────────


def test_with_changes_one_section() -> None:
    """A copy has the given fields of a section changed and all others as they were; None changes nothing."""
    settings = Config().with_("sending", timeout=5.0, concurrency=None)

    assert settings.sending.timeout == 5.0
    assert settings.model_dump(exclude={"sending": {"timeout"}}) == Config().model_dump(
        exclude={"sending": {"timeout"}}
    )


def test_copies_keep_the_users_providers(load: Load) -> None:
    """A changed copy keeps what the file said about providers, a default model taken away included."""
    settings = load("providers:\n  openai: {model: null}\n  x: {protocol: openai, base_url: 'https://x.example'}")

    assert settings.replace(progress="none").with_("output", ordered=True).providers == settings.providers


def test_copies_are_checked() -> None:
    """A wrong value for a copy is a ConfigError that names its key, as in a file."""
    with pytest.raises(ConfigError, match=r"^sending\.timeout: Input should be greater than 0"):
        Config().with_("sending", timeout=-1.0)
    with pytest.raises(ConfigError, match="provider 'nobody' is not one of"):
        Config().replace(provider="nobody")
    with pytest.raises(ConfigError, match=r"limits\.rpm: (.|\n)*sending\.timeout: "):
        Config().override({"sending": {"timeout": -1.0}, "limits": {"rpm": 0}})


def test_overrides_are_validated_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Changes of several sections are laid over the settings together; None, and a section of None, change nothing."""
    settings = Config().override({"tags": {"team": "search"}})
    validated = []

    def count(data: Any, **where: Any) -> Config:
        validated.append(data)
        return Config(**data)

    monkeypatch.setattr(config, "_validated", count)

    changed = settings.override(
        {
            "lane": "batch",
            "provider": None,
            "sending": {"timeout": 5.0, "concurrency": None},
            "limits": {"rpm": None},
            "tags": {"user": "me"},
        }
    )

    assert len(validated) == 1
    assert (changed.lane, changed.provider, changed.tags) == ("batch", settings.provider, {"user": "me"})
    assert (changed.sending.timeout, changed.sending.concurrency) == (5.0, settings.sending.concurrency)
    assert changed.limits == settings.limits
    assert settings.override({"lane": None, "limits": {"rpm": None}}) is settings


def test_the_configuration_is_frozen() -> None:
    """Nothing changes a configuration once it is made."""
    with pytest.raises(ValueError, match="frozen"):
        Config().sending.timeout = 1.0


def test_limits_of_a_model_complete_the_common_ones(load: Load) -> None:
    """A model's own caps come first, field by field; the common ones fill the rest."""
    limits = load("limits: {rpm: 10, input_tpm: 100, models: {openai/m: {rpm: 5, output_tpm: 7}}}").limits

    assert limits.of("openai", "m").model_dump() == {"rpm": 5, "input_tpm": 100, "output_tpm": 7}
    assert limits.of("openai", "other").model_dump() == {"rpm": 10, "input_tpm": 100, "output_tpm": None}


def test_prices_are_taken_as_they_are_written(load: Load) -> None:
    """A price is the decimal number that stands in the file, and stays it in copies."""
    row = "{input: 0.10, output: 3, cache_read: 0.07, cache_write_5m: null}"
    loaded = load(f'prices: {{"openai/gpt-6-luna": {row}}}')

    for settings in (loaded, loaded.with_("sending", concurrency=1), loaded.replace(progress="none")):
        price = settings.prices["openai/gpt-6-luna"]
        assert (price.input, price.output, price.cache_read) == (Decimal("0.1"), Decimal(3), Decimal("0.07"))
        assert (price.cache_write_5m, price.cache_write_1h, price.batch_multiplier) == (None, None, Decimal("0.5"))


def test_the_example_of_a_price_is_one(load: Load) -> None:
    """The row of prices that config.yaml shows in a comment can be taken as it stands."""
    lines = SHIPPED.read_text().splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith('#   "openai/gpt-6-luna"'))

    shown = load("prices:\n" + "\n".join(line.removeprefix("#") for line in lines[start : start + 2]))

    assert shown.prices["openai/gpt-6-luna"].cache_write_5m == Decimal("0.125")


def test_a_rehearsal_goes_to_the_simulator_only(load: Load) -> None:
    """With the simulator no provider keeps its address or needs a key."""
    settings = load("providers: {x: {protocol: openai, base_url: 'https://x.example', api_key_env: X_KEY}}")

    simulated = config.simulated(settings, "http://127.0.0.1:9")

    assert {name: each.url for name, each in simulated.providers.items()} == {
        "anthropic": "http://127.0.0.1:9/v1/messages",
        "openai": "http://127.0.0.1:9/v1/chat/completions",
        "x": "http://127.0.0.1:9/v1/chat/completions",
    }
    assert [environment.api_key(name, each, {}) for name, each in simulated.providers.items()] == ["simulated"] * 3


def test_choices_are_those_of_the_types() -> None:
    """The settings accept every value of the enumerations that the program works with, and no other."""
    for form in OutputFormat:
        assert config.output_format(Config().with_("output", format=form.value)) is form
    for protocol in Protocol:
        endpoint = {"protocol": protocol.value, "base_url": "https://x.example"}
        assert config.protocol(Config.model_validate({"providers": {"x": endpoint}}).providers["x"]) is protocol

    with pytest.raises(ConfigError, match="Input should be 'native', 'openai-batch' or 'anthropic-batch'"):
        Config().with_("output", format="xml")


LOAD_DEEP = """
import sys
from pipeline.core import config_file
from pipeline.core import errors
sys.setrecursionlimit(150)
try:
    config_file.load(sys.argv[1])
except errors.ConfigError:
    print("refused")
"""


def test_a_deep_file_costs_no_stack(tmp_path: Path) -> None:
    """Deep nesting is refused in a process of its own with little stack and memory."""
    (tmp_path / "c.yaml").write_text(f"tags: {NESTED}")

    done = subprocess.run([sys.executable, "-c", LOAD_DEEP, str(tmp_path / "c.yaml")], capture_output=True, check=True)

    assert done.stdout == b"refused\n"


# ── the ledger ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("setting", "environ", "expected"),
    [
        pytest.param(None, {"HOME": "/h"}, "/h/.local/share/pipeline/ledger.sqlite", id="home"),
        pytest.param(None, {"HOME": "/h", "XDG_DATA_HOME": "/d"}, "/d/pipeline/ledger.sqlite", id="XDG_DATA_HOME"),
        pytest.param(
            None, {"HOME": "/h", "XDG_DATA_HOME": "d"}, "/h/.local/share/pipeline/ledger.sqlite", id="relative"
        ),
        pytest.param("l.sqlite", {"HOME": "/h", "XDG_DATA_HOME": "/d"}, "l.sqlite", id="setting"),
        pytest.param("l.sqlite", {"PIPELINE_LEDGER": "/x/l"}, "/x/l", id="PIPELINE_LEDGER"),
        pytest.param("l.sqlite", {"PIPELINE_LEDGER": ""}, "l.sqlite", id="PIPELINE_LEDGER is empty"),
    ],
)
def test_the_nearest_word_names_the_ledger(setting: str | None, environ: Mapping[str, str], expected: str) -> None:
    """PIPELINE_LEDGER wins over the setting, and that over the user's data directory."""
    assert environment.ledger_path(Config(ledger=setting), environ) == Path(expected)


def test_without_home_the_user_database_tells_it() -> None:
    """cron may set no HOME; the ledger is in the same place all the same."""
    home = Path(pwd.getpwuid(os.getuid()).pw_dir)

    assert environment.ledger_path(Config(), {}) == home / ".local" / "share" / "pipeline" / "ledger.sqlite"
    assert environment.ledger_path(Config(ledger="~/l.sqlite"), {}).is_absolute()


def test_a_home_that_is_not_there_is_told() -> None:
    """A home directory that nobody knows is an error that says how to name the ledger."""
    with pytest.raises(UsageError, match="no home directory") as caught:
        environment.ledger_path(Config(ledger="~nobody-is-called-so/l.sqlite"), {})

    assert "PIPELINE_LEDGER" in (caught.value.hint or "")


# ── the dead man's switch ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "url",
    [
        pytest.param("http://example.com/x", id="not encrypted"),
        pytest.param("http://localhost.example.com/x", id="begins like localhost"),
        pytest.param("ftp://example.com/x", id="not HTTP"),
        pytest.param("https://me:secret-word@example.com/x", id="password"),
        pytest.param("https://example.com/secret-word?create=1", id="query"),
        pytest.param("https://example.com/secret-word#1", id="fragment"),
        pytest.param("https:///secret-word", id="no host"),
        pytest.param("https://example.com:99999/secret-word", id="no port"),
        pytest.param("https://[::1/secret-word", id="half an address"),
        pytest.param("https://example.com/secret word", id="space"),
        pytest.param("", id="empty"),
    ],
)
def test_the_address_to_ping_is_a_safe_one(url: str, load: Load) -> None:
    """It is https, or http on this machine, to which a path can be added; errors do not show it."""
    with pytest.raises(ConfigError, match=r"config.yaml:1: ping_url: ") as caught:
        load(f"ping_url: '{url}'")

    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("url", ["https://hc-ping.com/a-secret", "http://127.0.0.1:8000/ping/a-secret"])
def test_who_sees_the_settings_cannot_ping(url: str, load: Load) -> None:
    """A good address is kept, but stands in no repr: who knows it can tell lies about the job."""
    settings = load(f"ping_url: {url}")

    assert settings.ping_url == url
    assert "a-secret" not in repr(settings)
