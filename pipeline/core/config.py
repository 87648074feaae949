"""The settings: one frozen `Config`, validated by pydantic.

Every problem is reported at once, with its key, its line and, for a misspelt key, the nearest known one.

Keys are never part of it: an endpoint names the environment variable that holds its key (see `core.environment`).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from decimal import Decimal
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from pipeline.core.errors import ConfigError
from pipeline.core.protocols import PROTOCOLS, foreign_settings
from pipeline.core.types import OutputFormat, Protocol

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?)([smhd])")
_UNITS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}
_HEADER = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")

Seconds = Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]


def _exact(value: Any) -> Any:
    """Take a number exactly as written in the file: 0.1 is a tenth, not the nearest binary fraction."""
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        raise ValueError("must be a number")
    return Decimal(str(value))


Exact = Annotated[Decimal, BeforeValidator(_exact), Field(ge=0, le=1_000_000, decimal_places=9, allow_inf_nan=False)]


def _one_of(names: Iterable[str]) -> AfterValidator:
    """Return a validator that accepts these names only."""
    known = tuple(names)
    quoted = [repr(name) for name in known]
    listed = f"{', '.join(quoted[:-1])} or {quoted[-1]}"

    def check(value: str) -> str:
        if value not in known:
            raise ValueError(f"Input should be {listed}")
        return value

    return AfterValidator(check)


# The names come from one place each, so a new protocol or format needs no change here.
ProtocolName = Annotated[str, _one_of(each.value for each in Protocol)]
FormatName = Annotated[str, _one_of(each.value for each in OutputFormat)]


class Section(BaseModel):
    """A part of the configuration: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, hide_input_in_errors=True)


class Limits(Section):
    """Caps per minute; None: no cap."""

    rpm: Count | None = Field(default=None, description="requests")
    input_tpm: Count | None = Field(default=None, description="input tokens (OpenAI: all tokens)")
    output_tpm: Count | None = Field(default=None, description="output tokens")


class ModelLimits(Limits):
    """Caps for every model, and for single ones under `provider/model`."""

    models: dict[str, Limits] = Field(
        default_factory=dict, description='caps for single models, e.g. {"openai/gpt-6-luna": {rpm: 500}}'
    )

    def of(self, provider: str, model: str) -> Limits:
        """Return the caps of one model: each field is the model's own cap, else the common one."""
        own = self.models.get(f"{provider}/{model}", Limits())
        return Limits(
            rpm=own.rpm or self.rpm,
            input_tpm=own.input_tpm or self.input_tpm,
            output_tpm=own.output_tpm or self.output_tpm,
        )


class Price(Section):
    """What a model costs, in USD per million tokens; None: as a shorter write, else as input."""

    input: Exact = Field(description="input tokens")
    output: Exact = Field(description="output tokens")
    cache_read: Exact | None = Field(default=None, description="cached input tokens; null: as input")
    cache_write_5m: Exact | None = Field(
        default=None, description="tokens written to the cache for 5 minutes; null: as input"
    )
    cache_write_1h: Exact | None = Field(
        default=None, description="tokens written to the cache for an hour; null: as cache_write_5m"
    )
    batch_multiplier: Annotated[Exact, Field(le=1)] = Field(default=Decimal("0.5"), description="factor for batches")


class Endpoint(Section):
    """A named provider: its protocol, address and key variable.

    `_fits_protocol` refuses fields of the other protocol, so that no setting is silently ignored.
    """

    protocol: ProtocolName = Field(description="API that the server speaks: anthropic or openai")
    base_url: str = Field(
        description="address; ANTHROPIC_BASE_URL and OPENAI_BASE_URL override it for these two providers"
    )
    path: str = Field(description="path of the endpoint below base_url")
    api_key_env: str | None = Field(default=None, description="environment variable with the key; null: send no key")
    api_key_header: str | None = Field(
        default=None, description="header for the key; null: the protocol's own (x-api-key, or Authorization: Bearer)"
    )
    headers: dict[str, str] = Field(default_factory=dict, description="additional headers, e.g. anthropic-beta")
    model: str | None = Field(default=None, description="model for lines without one")
    models: list[str] = Field(default_factory=list, description="patterns of model names that choose this provider")
    allow_plain_http: bool = Field(
        default=False, description="true: allow http:// beyond this machine, in a network that you trust"
    )
    # Anthropic
    version: str | None = Field(
        default=None, description="anthropic-version header; 2026-10-21 refuses temperature, top_p and top_k"
    )
    max_tokens: Count | None = Field(
        default=None, description="max_tokens for lines without it, because the API requires it"
    )
    # OpenAI
    organization: str | None = Field(default=None, description="OpenAI-Organization header")
    project: str | None = Field(default=None, description="OpenAI-Project header")
    max_tokens_field: Literal["auto", "max_tokens", "max_completion_tokens"] | None = Field(
        default=None, description="max_tokens, max_completion_tokens, or auto: chosen by the model's name"
    )
    store: bool | None = Field(default=None, description="sent with native lines to OpenAI's own host; null: not sent")

    @property
    def url(self) -> str:
        """The address that requests are posted to."""
        return self.base_url.rstrip("/") + "/" + self.path.lstrip("/")

    @model_validator(mode="after")
    def _has_safe_address(self) -> Self:
        if not self.url.isprintable() or " " in self.url:
            raise ValueError("base_url and path must not contain spaces or control characters")
        parts = urlsplit(self.base_url)
        if "@" in parts.netloc or parts.query or parts.fragment:
            raise ValueError(
                "base_url must not contain a user, password, query or fragment; use headers or api_key_env"
            )
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
            raise ValueError(f"base_url {self.base_url!r} is not an http(s) address")
        if parts.scheme == "http" and not is_loopback(parts.hostname) and not self.allow_plain_http:
            raise ValueError(
                f"base_url {self.base_url!r} would send key and conversations unencrypted; "
                "use https, or set allow_plain_http: true for a network that you trust"
            )
        return self

    @model_validator(mode="after")
    def _fits_protocol(self) -> Self:
        wrong = [name for name in foreign_settings(self.protocol) if getattr(self, name) is not None]
        if wrong:
            raise ValueError(f"{', '.join(wrong)}: not a setting of the {self.protocol} protocol")
        return self

    @model_validator(mode="after")
    def _keeps_keys_out(self) -> Self:
        if self.api_key_env not in (None, _SIMULATED_KEY_ENV) and not _VARIABLE.fullmatch(self.api_key_env):
            raise ValueError("api_key_env must be the name of an environment variable, never the key itself")
        for name in self.headers:
            if name.lower() in ("authorization", "x-api-key", "api-key", "cookie"):
                raise ValueError(
                    f"headers: {name} would contain a secret; set api_key_env to the variable that holds it instead"
                )
        return self

    @model_validator(mode="after")
    def _has_sendable_headers(self) -> Self:
        """Check names and values of headers. Messages do not show values: one may be a misplaced secret."""
        for name in (*self.headers, self.api_key_header or "x"):
            if not _HEADER.fullmatch(name):
                raise ValueError(f"{name!r} is not a valid header name")
        own = {"version": self.version, "organization": self.organization, "project": self.project}
        for name, value in (self.headers | own).items():
            if value is not None and not (value.isascii() and value.isprintable()):
                raise ValueError(f"the value of {name} has control characters or non-ASCII letters")
        return self


class RequestDefaults(Section):
    """Defaults for native lines that leave these fields out."""

    model: str | None = Field(default=None, description="model; null: the provider's own default model")
    max_tokens: Count | None = Field(
        default=None,
        description="longest answer in tokens; null: not sent (Anthropic requires it: see providers.anthropic)",
    )
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(
        default=None, description="0 to 1 for Anthropic, 0 to 2 for OpenAI; null: not sent"
    )
    system: str | None = Field(default=None, description="system prompt; null: none")


class Input(Section):
    """How input files are read."""

    max_line_bytes: Count = Field(default=16 * 1024 * 1024, description="a longer line is invalid")
    read_ahead_bytes: Count = Field(default=4 * 1024 * 1024, description="bytes of input to read ahead of sending")


class Sending(Section):
    """How requests are sent and retried."""

    concurrency: Annotated[int, Field(ge=1, le=20_000)] = Field(default=100, description="requests in flight, at most")
    timeout: Seconds = Field(default=60.0, description="seconds for one attempt, from connecting to the last byte")
    connect_timeout: Seconds = Field(default=10.0, description="seconds to connect")
    max_attempts: Annotated[int, Field(ge=1, le=100)] = Field(
        default=6,
        description="attempts for failures that may be due to the request (500, timeouts); "
        "429, 503, 529 and failed connects do not count",
    )
    backoff_initial: Seconds = Field(
        default=1.0, description="seconds before the first retry; doubles with each attempt, with full jitter"
    )
    backoff_max: Seconds = Field(default=60.0, description="longest backoff in seconds")
    max_retry_after: Seconds = Field(
        default=120.0,
        description="seconds; if a provider asks for a longer pause, the run gives up on that model (exit code 75)",
    )
    stall_timeout: Seconds = Field(
        default=600.0,
        description=(
            "seconds without a finished request after which the run stops (exit code 75); never less than twice the "
            "timeout, or than max_retry_after plus one timeout"
        ),
    )
    max_response_bytes: Count = Field(
        default=32 * 1024 * 1024, description="size of a decompressed response; a larger one is a failure"
    )
    drain_timeout: Seconds = Field(default=60.0, description="seconds that Ctrl-C waits for calls in flight")
    share_limits: bool = Field(
        default=True, description="share rate limits with runs on this machine that use the same key and model"
    )
    use_env_proxy: bool = Field(default=False, description="use HTTP_PROXY, HTTPS_PROXY and NO_PROXY")
    ca_file: str | None = Field(default=None, description="additional certificates to trust (PEM)")
    http2: bool = Field(default=False, description="use HTTP/2")

    @field_validator("ca_file")
    @classmethod
    def _holds_certificates(cls, path: str | None) -> str | None:
        """Check the file now: otherwise only failing connections would show that it has no certificates."""
        try:
            if path is not None and b"CERTIFICATE-----" not in Path(path).read_bytes():
                raise ValueError(f"{path!r} contains no PEM certificates")
        except OSError as exc:
            raise ValueError(f"cannot read {path!r}: {exc.strerror}") from exc
        return path


def _seconds(value: Any) -> float:
    """Read a duration: seconds as a number, or `90s`, `45m`, `6h`, `1d`."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value
    if match := _DURATION.fullmatch(str(value)):
        return float(match[1]) * _UNITS[match[2]]
    raise ValueError(f"{value!r} is not a duration: write 90s, 45m, 6h or 1d")


Duration = Annotated[float, BeforeValidator(_seconds), Field(gt=0, le=30 * 86_400, allow_inf_nan=False)]


class Batches(Section):
    """How the providers' batch APIs are used; None: the provider's own limit of one batch."""

    max_requests: Count | None = Field(
        default=None,
        description="requests per batch; null: as many as the provider allows (OpenAI 50,000, Anthropic 100,000)",
    )
    max_bytes: Count | None = Field(
        default=None, description="bytes per batch; null: as many as the provider allows (200 MB, 256 MB)"
    )
    poll_interval: Seconds = Field(
        default=60.0,
        description="longest time between two checks of a batch, in seconds; the first checks are more frequent",
    )
    deadline: Duration | None = Field(
        default=None,
        description=(
            "with lane auto: time from the start of the command until all lines must be answered, e.g. 6h (--deadline)"
        ),
    )


class Cluster(Section):
    """Runs with --ray: the number of workers; None: one per processor of the cluster."""

    workers: Count | None = Field(
        default=None, description="processes that send; null: one per processor of the cluster"
    )


class Output(Section):
    """The format of result lines, and whether they are synced before they count as done."""

    format: FormatName = Field(default="native", description="native, openai-batch or anthropic-batch")
    ordered: bool = Field(default=False, description="sort results into input order when the run ends")
    echo_request: bool = Field(default=False, description="add the request as sent to its result line")
    durability: Literal["full", "fast"] = Field(
        default="full",
        description="full: a result is synced to disk before it counts as done; fast: left to the kernel",
    )


class BudgetCaps(Section):
    """Spending caps in USD: for one run, and for all runs of a day or a month (UTC) that the ledger records."""

    per_run: Exact | None = Field(default=None, description="one run of the command (--max-cost)")
    per_day: Exact | None = Field(default=None, description="all runs of a day (UTC), as recorded in the ledger")
    per_month: Exact | None = Field(default=None, description="all runs of a month (UTC)")


class Simulator(Section):
    """The provider that `--simulate` starts: its limits per minute, latency and faults."""

    rpm: Count | None = Field(default=None, description="requests per minute and model; null: no limit")
    input_tpm: Count | None = Field(default=None, description="input tokens per minute and model")
    output_tpm: Count | None = Field(default=None, description="output tokens per minute and model")
    latency: Annotated[float, Field(ge=0, le=600)] = Field(default=0.05, description="mean seconds per answer")
    batch_seconds: Annotated[float, Field(ge=0, le=86_400)] = Field(
        default=1.0, description="seconds that a batch takes"
    )
    faults: dict[str, Annotated[float, Field(ge=0, le=1)]] = Field(
        default_factory=dict,
        description='kinds of faults and their share of requests, e.g. {"529": 0.05, timeout: 0.001}',
    )
    seed: int = Field(default=0, description="the same seed gives the same answers")


_SIMULATED_KEY_ENV = "(simulated)"  # not a valid name, so it cannot clash with a real variable


class Config(Section):
    """The whole configuration. config.yaml documents the defaults."""

    providers: dict[str, Endpoint] = Field(
        default_factory=dict,
        validate_default=True,
        description="Named endpoints. These two are built in; samples/providers.yaml adds more in a few lines each.",
    )
    provider: str = Field(
        default="anthropic", description="Provider for lines that name none and whose model matches no provider."
    )
    request: RequestDefaults = Field(
        default=RequestDefaults(),
        description="Defaults for native lines. Lines in a provider's own dialect are sent as written.",
    )
    limits: ModelLimits = Field(
        default=ModelLimits(), description="Your own caps per minute, for each model. null: no cap."
    )
    prices: dict[str, Price] = Field(
        default_factory=dict,
        description=(
            "Your prices in USD per million tokens, if they differ from list prices (which come from genai-prices, "
            "offline). Keys are provider/model or model and may contain *; the first match applies, whatever the "
            "service tier."
        ),
    )
    input: Input = Field(default=Input(), description="How input is read.")
    sending: Sending = Field(default=Sending(), description="How requests are sent and retried.")
    lane: Literal["live", "batch", "auto"] = Field(
        default="live",
        description=(
            "live (now), batch (the providers' batch APIs: half the price, within a day), or auto (batches first, "
            "then live calls for requests that they did not answer)."
        ),
    )
    batches: Batches = Field(default=Batches(), description="How batch APIs are used.")
    cluster: Cluster = Field(default=Cluster(), description="Runs on a Ray cluster (--ray).")
    output: Output = Field(default=Output(), description="Result lines.")
    budget: BudgetCaps = Field(
        default=BudgetCaps(),
        description=(
            "Spending caps in USD. null: no cap. Each call reserves its worst case before it is sent, so a cap holds"
            " if requests have max_tokens. Nothing is sent if its price is unknown. Daily and monthly caps count what"
            " other runs had spent when this run began, or half a minute earlier."
        ),
    )
    simulator: Simulator = Field(default=Simulator(), description="The provider that --simulate starts.")
    progress: Literal["auto", "bar", "log", "none"] = Field(
        default="auto", description="auto (a bar on a terminal, else a line per minute), bar, log or none"
    )
    tags: dict[str, str] = Field(default_factory=dict, description="labels for totals and reports, e.g. {team: search}")
    ledger: str | None = Field(
        default=None,
        description=(
            "where runs are recorded; null: ~/.local/share/pipeline/ledger.sqlite (or below XDG_DATA_HOME); "
            "PIPELINE_LEDGER overrides it"
        ),
    )
    # Not in `repr`: anyone who knows the address can report for the job.
    ping_url: str | None = Field(
        default=None,
        repr=False,
        description=(
            "dead man's switch (healthchecks.io or similar) for `pipeline run`: GET URL/start when it begins, URL "
            "after exit code 0, else URL/EXIT_CODE; never with --simulate"
        ),
    )

    @model_validator(mode="before")
    @classmethod
    def _add_built_in_providers(cls, data: Any) -> Any:
        """Merge the user's providers into the built-in ones, so two lines of YAML can change one field.

        An empty section (`request:` with no line below it) gets its defaults.
        """
        if isinstance(data, dict):
            data = {name: value for name, value in data.items() if value is not None}
        if not isinstance(data, dict) or not isinstance(data.get("providers", {}) or {}, dict):
            return data
        given = dict(data.get("providers") or {})
        merged: dict[str, Any] = {name.value: dict(facts.built_in) for name, facts in PROTOCOLS.items()}
        for name, fields in given.items():
            if not isinstance(fields, dict):
                merged[name] = fields
                continue
            base = merged.get(name, {})
            if base.get("protocol") != fields.get("protocol", base.get("protocol")):
                base = {}
            merged[name] = {**base, **fields}
            protocol = merged[name].get("protocol")
            if protocol in set(Protocol):
                merged[name].setdefault("path", PROTOCOLS[protocol].default_path)
        return {**data, "providers": merged}

    @field_validator("provider")
    @classmethod
    def _is_known(cls, name: str, info: ValidationInfo) -> str:
        _require_provider(name, info)
        return name

    @field_validator("limits")
    @classmethod
    def _limits_known_providers(cls, limits: ModelLimits, info: ValidationInfo) -> ModelLimits:
        """Refuse a cap that would apply to nothing."""
        for name in limits.models:
            provider, _, model = name.partition("/")
            if not model:
                raise ValueError(f"models: {name!r} must be PROVIDER/MODEL")
            _require_provider(provider, info)
        return limits

    @field_validator("ping_url")
    @classmethod
    def _is_safe_to_ping(cls, url: str | None) -> str | None:
        if url is None:
            return None
        parts = urlsplit(url)
        is_private = parts.scheme == "https" or (parts.scheme == "http" and is_loopback(parts.hostname or ""))
        has_more = "@" in parts.netloc or parts.query or parts.fragment or not url.isprintable() or " " in url
        if not parts.hostname or parts.port == 0 or not is_private or has_more:
            raise ValueError(
                "must be an https address (or http on this machine) without user, password, query or fragment"
            )
        return url

    def override(self, changes: Mapping[str, Any]) -> Config:
        """Return a copy with some settings changed, validated once; `ConfigError` names each wrong one.

        `changes` has the shape of the settings file: `{"lane": "batch", "sending": {"timeout": 5.0}}`. Settings that
        it does not name, or names as None, stay as they are.
        """
        given: dict[str, Any] = {}
        for name, value in changes.items():
            if isinstance(getattr(self, name, None), Section):
                section = {key: each for key, each in value.items() if each is not None}
                if section:
                    given[name] = getattr(self, name).model_dump() | section
            elif value is not None:
                given[name] = value
        if not given:
            return self
        return _validated(self.model_dump() | given, path=None, lines={})

    def with_(self, section: str, **changes: Any) -> Config:
        """Return a copy with some fields of one section changed; values of None change nothing."""
        return self.override({section: changes})

    def replace(self, **changes: Any) -> Config:
        """Return a copy with some top-level fields changed; values of None change nothing."""
        return self.override(changes)


def _require_provider(name: str, info: ValidationInfo) -> None:
    """Refuse the name of an unknown provider; if the providers themselves are wrong, only their error is reported."""
    known = info.data.get("providers")
    if known is not None and name not in known:
        raise ValueError(f"provider {name!r} is not one of {', '.join(sorted(known))}")


def simulated(settings: Config, url: str) -> Config:
    """Return a configuration in which a simulator at `url` stands for every provider; no key is needed."""
    providers = {
        name: {
            **endpoint.model_dump(),
            "base_url": f"{url}{PROTOCOLS[protocol(endpoint)].simulated_path}",
            "path": PROTOCOLS[protocol(endpoint)].default_path,
            "api_key_env": _SIMULATED_KEY_ENV,
            "api_key_header": None,
        }
        for name, endpoint in settings.providers.items()
    }
    return settings.replace(providers=providers)


def output_format(config: Config) -> OutputFormat:
    """Return the dialect of result lines."""
    return OutputFormat(config.output.format)


def protocol(endpoint: Endpoint) -> Protocol:
    """Return the wire protocol of an endpoint."""
    return Protocol(endpoint.protocol)


def is_loopback(host: str) -> bool:
    """Return True for this machine's own addresses, not for names that begin like one (`localhost.example.com`)."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


# ── reading YAML ──────────────────────────────────────────────────────────────────────────────────────────────────


def _validated(data: Mapping[str, Any], *, path: str | None, lines: Mapping[tuple[str, ...], int]) -> Config:
    try:
        return Config.model_validate(data)
    except ValidationError as exc:
        problems = [_explain(error, path, lines) for error in exc.errors(include_url=False)]
        raise ConfigError("\n".join(problems)) from None


def _explain(error: Any, path: str | None, lines: Mapping[tuple[str, ...], int]) -> str:
    """Return a problem on one line: file:line: key: what is wrong (did you mean …?)."""
    keys = tuple(str(part) for part in error["loc"])
    # A missing setting has no line of its own: then the nearest section around it has one.
    line = next((lines[keys[:n]] for n in range(len(keys), 0, -1) if keys[:n] in lines), None)
    where = ""
    if path:
        where = f"{path}:{line}: " if line else f"{path}: "
    name = ".".join(keys) or "configuration"
    if error["type"] != "extra_forbidden":
        return f"{where}{name}: {error['msg'].removeprefix('Value error, ')}"
    problem = f"{where}{name}: unknown setting"
    near = difflib.get_close_matches(keys[-1], _known_keys(keys[:-1]), n=1)
    if near:
        problem += f"; did you mean {near[0]!r}?"
    return problem


def _known_keys(path: tuple[str, ...]) -> list[str]:
    """Return the names of the settings at this path in the tree."""
    if path[:1] == ("providers",):
        return list(Endpoint.model_fields)
    if path[:1] == ("prices",):
        return list(Price.model_fields)
    if path[:2] == ("limits", "models"):
        return list(Limits.model_fields)
    section: Any = Config
    for part in path:
        section = section.model_fields[part].annotation
    return list(section.model_fields)


def poll_policy(settings: Config) -> float:
    """Return after how many seconds without a finished request a run stops: never less than one request may take."""
    sending = settings.sending
    return max(sending.stall_timeout, 2 * sending.timeout, sending.max_retry_after + sending.timeout)
