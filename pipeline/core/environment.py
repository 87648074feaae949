"""Environment variables: API keys, credentials of object stores, and the paths that depend on them.

The only module that reads or sets environment variables.
"""

from __future__ import annotations

import os
import pwd
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path

from pipeline.core.config import _SIMULATED_KEY_ENV, Config, Endpoint
from pipeline.core.errors import UsageError
from pipeline.core.protocols import PROTOCOLS

# Variables that, besides its URL, decide where an object is; the names are obstore's.
_STORES = (
    *("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT"),
    *("AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"),
)


def variables() -> Mapping[str, str]:
    """Return the environment of this process."""
    return os.environ


def api_key(name: str, endpoint: Endpoint, environ: Mapping[str, str] | None = None) -> str | None:
    """Return the key of an endpoint, None if it needs none. Raises `UsageError`, with a hint, if it is missing."""
    if endpoint.api_key_env is None:
        return None
    if endpoint.api_key_env == _SIMULATED_KEY_ENV:
        return "simulated"
    environ = variables() if environ is None else environ
    variable = endpoint.api_key_env
    key = (environ.get(variable) or environ.get(variable.lower()) or "").strip()
    if not key:
        sources = {facts.built_in["api_key_env"]: facts.key_source for facts in PROTOCOLS.values()}
        where = sources.get(variable, "the operator of this endpoint")
        raise UsageError(
            f"provider {name!r} needs a key, but the environment variable {variable} is not set",
            hint=f"get a key from {where}, then: export {variable}=…  (or rehearse without one: --simulate)",
        )
    if not key.isascii() or not key.isprintable() or " " in key:
        raise UsageError(
            f"the environment variable {variable} does not hold a key: "
            "it has spaces, control characters or non-ASCII letters"
        )
    return key


def variables_of(settings: Config, environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment variables that a worker elsewhere needs: keys, trusted certificates, object stores."""
    environ = variables() if environ is None else environ
    names = {endpoint.api_key_env for endpoint in settings.providers.values() if endpoint.api_key_env}
    names |= {name.lower() for name in names} | {"SSL_CERT_FILE", "SSL_CERT_DIR"}
    names |= {name for name in environ if name.startswith(("AWS_", "AZURE_", "GOOGLE_"))}
    return {name: environ[name] for name in sorted(names) if name in environ}


def default_variable(name: str, value: str) -> str:
    """Set an environment variable unless it is set; return its value."""
    return os.environ.setdefault(name, value)


def take_variables(values: Mapping[str, str]) -> None:
    """Set environment variables that `variables_of` returned on another machine."""
    os.environ.update(values)


def ledger_path(settings: Config, environ: Mapping[str, str] | None = None) -> Path:
    """Return where the ledger is: `PIPELINE_LEDGER`, else the setting, else the user's data directory.

    cron may set no HOME; the home directory then comes from the user database.
    """
    environ = variables() if environ is None else environ
    try:
        named = environ.get("PIPELINE_LEDGER") or settings.ledger
        if named:
            return Path(named).expanduser()
        data = environ.get("XDG_DATA_HOME", "")
        home = environ.get("HOME") or pwd.getpwuid(os.getuid()).pw_dir
    except (KeyError, RuntimeError) as exc:
        hint = "name the file: --ledger FILE, PIPELINE_LEDGER, or ledger: in the configuration"
        raise UsageError("no home directory was found for the ledger", hint=hint) from exc
    base = Path(data) if os.path.isabs(data) else Path(home) / ".local" / "share"
    return base / "pipeline" / "ledger.sqlite"


def spool_path(settings: Config, url: str, environ: Mapping[str, str] | None = None) -> Path:
    """Return the spool directory for an output in an object store: beside the ledger, one name per URL.

    Which store a URL means, its endpoint or account in the environment tells.
    """
    environ = variables() if environ is None else environ
    store = [environ.get(name, "") for name in _STORES]
    return ledger_path(settings, environ).parent / "spool" / sha256("\n".join([url, *store]).encode()).hexdigest()[:32]
