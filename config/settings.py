"""The settings, read from the environment once and validated together.

An error names the variable, what was found and what is expected; it never contains a secret.
"""

import os
import re
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, ValidationError
from pydantic_core import PydanticUndefined

from config.setting_errors import describe_fault
from config.urls import CHECKING_MODES, checked_amqp_url, checked_database_url, parameters

_SECRETS = ("database_url", "amqp_url")
# Placeholder for a URL that a command does not need and that is not set.
_UNSET = {"database_url": "postgresql://unset", "amqp_url": "amqp://unset"}

# The pattern of a message's tenant_id, as in domains/run.py, which config does not import. A list with other separators
# would name no tenant, and silently leave every run on the legacy path.
_TENANT = re.compile(r"[A-Za-z0-9._:@+~=-]{1,128}")


# Each is a Raft group of RabbitMQ, and a connection of every worker. One queue was never the limit on two cores.
INTAKE_QUEUES_MAX = 32


class SettingsError(Exception):
    """The environment is invalid; the text has one line per fault."""


def _names(value: object) -> object:
    if isinstance(value, str):
        return frozenset(name.strip() for name in value.split(",") if name.strip())
    return value


def _tenants(names: frozenset[str]) -> frozenset[str]:
    if not all(map(_TENANT.fullmatch, names)):
        raise ValueError("not tenant ids")
    return names


Names = Annotated[frozenset[str], BeforeValidator(_names)]


class Settings(BaseModel):
    """All settings; a field's variable is its name in upper case."""

    model_config = ConfigDict(frozen=True, extra="ignore", hide_input_in_errors=True)

    database_url: Annotated[SecretStr, AfterValidator(checked_database_url)] = Field(
        description="PostgreSQL URL in libpq's form; or DATABASE_URL_FILE, a mounted secret"
    )
    amqp_url: Annotated[SecretStr, AfterValidator(checked_amqp_url)] = Field(
        description="RabbitMQ, amqp:// or amqps://; or AMQP_URL_FILE, a mounted secret"
    )
    transaction_coordinator_enabled: bool = Field(False, description="atomic transactions; set it to true")
    transaction_coordinator_tenants: Annotated[Names, AfterValidator(_tenants)] = Field(
        frozenset(), description="gradual rollout: these tenants are atomic, the rest legacy; empty: all"
    )
    legacy_fallback_enabled: bool = Field(
        False,
        description="after a failed transaction, fall back to legacy, non-atomic writes; a run whose write is refused "
        "is then parked and partly stored",
    )
    # AMQP has 16 bits for it, and 0 means no limit. At worst each delivery has MESSAGE_MAX_BYTES.
    prefetch_count: int = Field(600, ge=1, le=65_535, description="deliveries that a worker holds at once")
    # One bad run rolls back its batch, and the batch is retried in halves.
    batch_max_runs: int = Field(200, ge=1, le=5_000, description="maximum number of runs per transaction")
    # Each holds a connection, and PostgreSQL has 100 by default.
    max_concurrent_transactions: int = Field(2, ge=1, le=100, description="concurrent transactions")
    # Ten seconds apart (consumer/amqp/topology.py): 1,000 attempts take three hours.
    delivery_max_attempts: int = Field(
        5, ge=1, le=1_000, description="attempts at a run that fails repeatedly, before its message is parked"
    )
    # RabbitMQ itself refuses more than 128 MiB (4.x: 16 MiB unless raised).
    message_max_bytes: int = Field(
        1_048_576, ge=1_024, le=134_217_728, description="maximum size of a message body, in bytes"
    )
    trusted_publishers: Names = Field(
        frozenset(), description="broker users whose verified user_id is accepted; empty: any"
    )
    require_event_subscribers: bool = Field(
        False, description="an unroutable event stays in the outbox instead of counting as published"
    )
    intake_queues: int = Field(
        1,
        ge=1,
        le=INTAKE_QUEUES_MAX,
        description="queues that runs are spread over by message id; above 1 RabbitMQ needs a plugin "
        "(deploy/README.md), and topology and workers the same value",
    )
    http_host: str = Field("0.0.0.0", description="address of /metrics, /livez, /readyz and the console")
    http_port: int = Field(9464, ge=0, le=65_535, description="0: any free port")
    # Orchestrators kill far sooner than after an hour; the bound also excludes inf.
    shutdown_grace_seconds: float = Field(
        25.0, gt=0, le=3_600, description="seconds to finish deliveries in progress after SIGTERM"
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field("INFO", description="lowest level to log")
    log_format: Literal["json", "console"] = Field("json", description="json, or console for human-readable lines")
    # Allowed but probably unintended settings; filled by load_settings.
    warnings: tuple[str, ...] = Field((), exclude=True, repr=False)
    # The paths of mounted secrets by field; filled by load_settings.
    files: Mapping[str, str] = Field({}, exclude=True, repr=False)

    def database_url_now(self) -> str:
        """Return the current URL for a new connection: a mounted file may contain a new password.

        Raises :class:`SettingsError`, also if a TLS file in the URL is invalid.
        """
        return self._now("database_url", self.database_url)

    def amqp_url_now(self) -> str:
        """Return the URL as :meth:`database_url_now` does."""
        return self._now("amqp_url", self.amqp_url)

    def _now(self, name: str, at_start: SecretStr) -> str:
        path = self.files.get(name)
        variable = name.upper()
        given = {f"{variable}_FILE": path} if path else {variable: at_start.get_secret_value()}
        settings, faults = _read(given, dict.fromkeys(_SECRETS, False))
        if name in faults:
            raise SettingsError(faults[name])
        url: SecretStr = getattr(settings, name)
        return url.get_secret_value()


_VARIABLES = tuple(name for name in Settings.model_fields if name not in {"warnings", "files"})


def load_settings(
    environ: Mapping[str, str] | None = None, *, need_amqp: bool = True, need_database: bool = True
) -> Settings:
    """Return the settings that *environ* (by default the process's) describes; raise :class:`SettingsError`.

    With *need_amqp* or *need_database* false, a placeholder replaces the other URL if it is not set. An empty
    variable counts as not set, because deployment templates often write unset variables this way.
    """
    settings, faults = _read(environ, {"database_url": need_database, "amqp_url": need_amqp})
    if faults:
        raise SettingsError("\n".join(faults.values()))
    return settings


def examine_settings(environ: Mapping[str, str] | None = None) -> tuple[Settings, dict[str, str]]:
    """Return the settings, with a default for each invalid one, and the faults by field; never raises."""
    return _read(environ, {"database_url": True, "amqp_url": True})


def _read(environ: Mapping[str, str] | None, needed: Mapping[str, bool]) -> tuple[Settings, dict[str, str]]:
    environ = os.environ if environ is None else environ
    values: dict[str, Any] = {name: environ[name.upper()] for name in _VARIABLES if environ.get(name.upper())}
    faults: dict[str, str] = {}
    for name in _SECRETS:
        fault = _take_secret(name, environ, values)
        if fault:
            faults[name] = fault
        if name not in values and (fault or not needed[name]):
            values[name] = _UNSET[name]
    try:
        settings = Settings.model_validate(values)
    except ValidationError as error:
        for fault_found in error.errors(include_url=False):
            name = str(fault_found["loc"][0])
            faults.setdefault(name, describe_fault(name, fault_found, secret=name in _SECRETS))
        valid = {name: value for name, value in values.items() if name not in faults}
        settings = Settings.model_validate(_UNSET | valid)
    files = {name: path for name in _SECRETS if (path := environ.get(f"{name.upper()}_FILE"))}
    return settings.model_copy(update={"warnings": _warnings(settings, environ), "files": files}), faults


def describe() -> list[tuple[str, str, str]]:
    """Return variable, default and meaning of each setting, for the guide."""
    return [(name.upper(), _default(name), Settings.model_fields[name].description or "") for name in _VARIABLES]


def _default(name: str) -> str:
    default = Settings.model_fields[name].default
    if default is PydanticUndefined:
        return "required"
    if isinstance(default, bool):
        return str(default).lower()
    return "empty" if default == frozenset() else f"{default:g}" if isinstance(default, float) else str(default)


def _take_secret(name: str, environ: Mapping[str, str], values: dict[str, Any]) -> str | None:
    """Read the secret from the file that ``<NAME>_FILE`` names, if it is set; return a fault or ``None``."""
    variable = f"{name.upper()}_FILE"
    path = environ.get(variable)
    if not path:
        return None
    if "://" in path:  # the URL itself, with its password
        return f"{variable}: found a URL; expected the path of a file that contains it"
    if name in values:
        return f"{name.upper()}: {variable} is also set; set only one of them"
    try:
        secret = Path(path).read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:  # ValueError: not UTF-8
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        return f"{variable}: cannot read {path}: {reason}; expected a file that contains only the URL"
    if not secret:
        return f"{variable}: {path} is empty; expected a file that contains the URL"
    values[name] = secret
    return None


def _warnings(settings: Settings, environ: Mapping[str, str]) -> tuple[str, ...]:
    found = []
    if settings.batch_max_runs > settings.prefetch_count:
        found.append(
            f"BATCH_MAX_RUNS={settings.batch_max_runs} is never reached: PREFETCH_COUNT is {settings.prefetch_count}"
        )
    consumed = settings.intake_queues + 1
    if settings.intake_queues > 1 and settings.prefetch_count < consumed:
        found.append(
            f"PREFETCH_COUNT={settings.prefetch_count} is exceeded: each of the {consumed} queues of "
            f"INTAKE_QUEUES={settings.intake_queues} needs at least 1"
        )
    given = parameters(settings.database_url.get_secret_value())
    mode = given.get("sslmode", "prefer")
    if given.get("sslrootcert") and mode not in CHECKING_MODES:
        found.append(f"DATABASE_URL: sslrootcert has no effect with sslmode={mode}; use sslmode=verify-full")
    found += [
        f"{name.upper()} is set but empty: an empty list means all"
        for name in ("transaction_coordinator_tenants", "trusted_publishers")
        if environ.get(name.upper()) and not getattr(settings, name)
    ]
    known = {name.upper() for name in _VARIABLES} | {f"{name.upper()}_FILE" for name in _SECRETS}
    found += [
        f"{variable} is not a setting; did you mean {meant}?"
        for variable in sorted(set(environ) - known)
        if (meant := _meant(variable.upper(), known))
    ]
    return tuple(found)


def _meant(variable: str, known: set[str]) -> str | None:
    """Return the setting that *variable* resembles, so that a misspelled TRANSACTION_COORDINATOR=true is reported."""
    if len(variable) <= 8:  # short names often belong to other programs
        return None
    near = get_close_matches(variable, known, n=1, cutoff=0.9)
    prefixed = [name for name in sorted(known) if len(variable) > 12 and name.startswith(f"{variable}_")]
    return next(iter(near + prefixed), None)
