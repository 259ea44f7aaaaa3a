"""The settings, read from the environment once and checked all together. Contract section 6.

A fault names the variable, what was found and what would be right; a secret's value is never part of it.
"""

import os
import re
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, ValidationError
from pydantic_core import PydanticUndefined

from config.secrets import read_secret
from config.setting_errors import in_words
from config.urls import CHECKING_MODES, checked_amqp_url, checked_database_url, parameters

_SECRETS = ("database_url", "amqp_url")
# Stands for a URL that a command does not need and nobody gave.
_UNSET = {"database_url": "postgresql://unset", "amqp_url": "amqp://unset"}

# A message's tenant_id (domains/run.py, which config does not import). A list split by anything but commas would name
# no tenant at all, and leave every run on the legacy path without a word.
_TENANT = re.compile(r"[A-Za-z0-9._-]{1,128}")


class SettingsError(Exception):
    """The environment is not as it must be; the text has one line a fault."""


def _words(value: object) -> object:
    if isinstance(value, str):
        return frozenset(word.strip() for word in value.split(",") if word.strip())
    return value


def _tenants(names: frozenset[str]) -> frozenset[str]:
    if not all(map(_TENANT.fullmatch, names)):
        raise ValueError("not tenant ids")
    return names


Names = Annotated[frozenset[str], BeforeValidator(_words)]


class Settings(BaseModel):
    """All settings; each field is the variable of the same name in upper case."""

    model_config = ConfigDict(frozen=True, extra="ignore", hide_input_in_errors=True)

    database_url: Annotated[SecretStr, AfterValidator(checked_database_url)] = Field(
        description="PostgreSQL, as libpq writes it; or DATABASE_URL_FILE, a mounted secret"
    )
    amqp_url: Annotated[SecretStr, AfterValidator(checked_amqp_url)] = Field(
        description="RabbitMQ, amqp:// or amqps://; or AMQP_URL_FILE, a mounted secret"
    )
    transaction_coordinator_enabled: bool = Field(False, description="atomic transactions; set it to true")
    transaction_coordinator_tenants: Annotated[Names, AfterValidator(_tenants)] = Field(
        frozenset(), description="gradual rollout: these tenants are atomic, the rest legacy; empty: all"
    )
    legacy_fallback_enabled: bool = Field(
        False, description="after a failed transaction, fall back to the legacy non-atomic writes"
    )
    # AMQP writes it in 16 bits, and its 0 means no limit. At the worst each has MESSAGE_MAX_BYTES.
    prefetch_count: int = Field(600, ge=1, le=65_535, description="deliveries a worker holds at once")
    # One bad run rolls back the whole batch, and its runs go again.
    batch_max_runs: int = Field(200, ge=1, le=5_000, description="runs a transaction, at most")
    # Each holds a connection, and PostgreSQL has 100 unless told otherwise.
    max_concurrent_transactions: int = Field(2, ge=1, le=100, description="transactions at once")
    # Ten seconds apart (consumer/amqp/topology.py): 1,000 tries are three hours.
    delivery_max_attempts: int = Field(
        5, ge=1, le=1_000, description="tries at a message that fails for a reason of its own, before it is parked"
    )
    # RabbitMQ itself refuses more than 128 MiB (4.x: 16 MiB unless raised).
    message_max_bytes: int = Field(1_048_576, ge=1_024, le=134_217_728, description="bytes of a message's body")
    trusted_publishers: Names = Field(
        frozenset(), description="broker users whose verified user_id is accepted; empty: any"
    )
    require_event_subscribers: bool = Field(
        False, description="an event that no queue takes stays in the outbox instead of counting as published"
    )
    http_host: str = Field("0.0.0.0", description="where /metrics, /livez, /readyz and the console are served")
    http_port: int = Field(9464, ge=0, le=65_535, description="0: any free port")
    # Orchestrators kill far sooner than after an hour; without a bound, inf would be a number too.
    shutdown_grace_seconds: float = Field(
        25.0, gt=0, le=3_600, description="seconds to finish what was taken, on SIGTERM"
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field("INFO", description="the least that is logged")
    log_format: Literal["json", "console"] = Field("json", description="console for people")
    # What is allowed and probably not meant; filled by load_settings.
    warnings: tuple[str, ...] = Field((), exclude=True, repr=False)
    # The paths of mounted secrets by field; filled by load_settings.
    files: Mapping[str, str] = Field({}, exclude=True, repr=False)

    def database_url_now(self) -> str:
        """Return the URL as it is now, for one connection: a mounted file may hold another password since.

        Raises :class:`SettingsError`, also where a file that the URL names for TLS is not as it must be.
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

    A command that talks to one server only says which it does not need; a stand-in takes the place of that URL where
    none is given. An empty variable counts as not set, as deployment templates often write it.
    """
    settings, faults = _read(environ, {"database_url": need_database, "amqp_url": need_amqp})
    if faults:
        raise SettingsError("\n".join(faults.values()))
    return settings


def examine_settings(environ: Mapping[str, str] | None = None) -> tuple[Settings, dict[str, str]]:
    """Return the settings with a default or a stand-in for each faulty one, and the faults by field; never raises."""
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
            faults.setdefault(name, in_words(name, fault_found, secret=name in _SECRETS))
        sound = {name: value for name, value in values.items() if name not in faults}
        settings = Settings.model_validate(_UNSET | sound)
    files = {name: path for name in _SECRETS if (path := environ.get(f"{name.upper()}_FILE"))}
    return settings.model_copy(update={"warnings": _warnings(settings, environ), "files": files}), faults


def describe() -> list[tuple[str, str, str]]:
    """Return variable, default and meaning of each setting, for the README."""
    return [(name.upper(), _default(name), Settings.model_fields[name].description or "") for name in _VARIABLES]


def _default(name: str) -> str:
    default = Settings.model_fields[name].default
    if default is PydanticUndefined:
        return "required"
    if isinstance(default, bool):
        return str(default).lower()
    return "empty" if default == frozenset() else f"{default:g}" if isinstance(default, float) else str(default)


def _take_secret(name: str, environ: Mapping[str, str], values: dict[str, Any]) -> str | None:
    """Take the secret from the file that ``<NAME>_FILE`` names, if it does; return what is wrong with that."""
    variable = f"{name.upper()}_FILE"
    path = environ.get(variable)
    if not path:
        return None
    if name in values and "://" not in path:
        return f"{name.upper()}: set, and {variable} too; set one of them"
    secret, fault = read_secret(variable, path)
    if not fault:
        values[name] = secret
    return fault


def _warnings(settings: Settings, environ: Mapping[str, str]) -> tuple[str, ...]:
    found = []
    if settings.batch_max_runs > settings.prefetch_count:
        found.append(
            f"BATCH_MAX_RUNS={settings.batch_max_runs} is never reached: PREFETCH_COUNT is {settings.prefetch_count}"
        )
    found += _unchecked(settings)
    found += [
        f"{name.upper()} is set and names nobody: that means all"
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


def _unchecked(settings: Settings) -> list[str]:
    """Return whom a URL's authority does not protect though its writer thought so."""
    given = parameters(settings.database_url.get_secret_value())
    mode = given.get("sslmode", "prefer")
    if given.get("sslrootcert") and mode not in CHECKING_MODES:
        return [f"DATABASE_URL: with sslmode={mode} nobody looks at sslrootcert; write sslmode=verify-full"]
    return []


def _meant(variable: str, known: set[str]) -> str | None:
    """Return the setting that *variable* nearly spells or begins: TRANSACTION_COORDINATOR=true must not pass unseen."""
    if len(variable) <= 8:  # short names belong to others too often
        return None
    near = get_close_matches(variable, known, n=1, cutoff=0.9)
    begun = [name for name in sorted(known) if len(variable) > 12 and name.startswith(f"{variable}_")]
    return next(iter(near + begun), None)
