"""Reads one value of a message in any spelling that leaves no doubt: texts, numbers, ids, times, error codes.

Each function returns the value, or :data:`INVALID` if the value has another meaning or none.
"""

import re
from datetime import UTC, datetime, timedelta
from decimal import Decimal, InvalidOperation
from typing import Annotated, Final, Literal
from uuid import NAMESPACE_URL, UUID, uuid5

import msgspec

from consumer.contract.refusals import Numeral
from domains.run import TENANT_PATTERN

# Digits after the point. A double printed in full has up to 20 for the lowest token prices.
MAX_COST_DECIMALS = 40
# US dollars. A higher cost is a unit error, and PostgreSQL's numeric needs a bound.
MAX_COST_USD = Decimal(10) ** 12

INVALID: Final = object()

# asyncpg maps Python's first and last datetime to minus and plus infinity. One day of distance also covers offsets.
EARLIEST = datetime(1, 1, 2, tzinfo=UTC)
LATEST = datetime(9999, 12, 31, tzinfo=UTC)
_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}|[0-9a-f]{32}", re.IGNORECASE)
_PRINTABLE = re.compile(r"[\x21-\x7e]{1,200}")
_LEAP_SECOND = re.compile(r"(\d{4}-\d\d-\d\d[Tt ]\d\d:59:)60(.*)", re.DOTALL)
_NUMBER = re.compile(r"[+-]?\d{1,100}(\.\d{0,100})?([eE][+-]?\d{1,4})?")
_CODE_CHARACTERS = 64
_Aware = Annotated[datetime, msgspec.Meta(tz=True)]


def text_of(value: object) -> str | object:
    """Return a string unchanged, and a number as its digits."""
    if isinstance(value, str):  # a fraction is already a string: its digits
        return str(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value) if value.bit_length() <= 512 else INVALID  # Python refuses to print larger ones
    return INVALID


def integer_of(value: object, most: int) -> int | object:
    """Return a whole number from 0 to *most*, which may be written as ``1200.0`` or ``"1200"``."""
    number = decimal_of(value)
    if not isinstance(number, Decimal) or not 0 <= number <= most or number != number.to_integral_value():
        return INVALID
    return int(number)


def decimal_of(value: object) -> Decimal | object:
    """Return a finite number, which may be given as a string."""
    if isinstance(value, bool) or not isinstance(value, int | str):
        return INVALID
    if isinstance(value, int):
        return Decimal(value) if value.bit_length() <= 512 else INVALID  # larger than any limit
    if _NUMBER.fullmatch(value.strip()) is None:
        return INVALID
    try:
        return Decimal(value.strip())
    except InvalidOperation:
        return INVALID


def money_of(value: object) -> Decimal | object:
    """Return an amount from 0 to below ``MAX_COST_USD``, rounded to ``MAX_COST_DECIMALS`` digits after the point."""
    amount = decimal_of(value)
    if not isinstance(amount, Decimal) or not 0 <= amount < MAX_COST_USD:
        return INVALID
    exponent = amount.as_tuple().exponent
    if isinstance(exponent, int) and -exponent > MAX_COST_DECIMALS:
        return Decimal(f"{amount:.{MAX_COST_DECIMALS}f}")
    return amount


def milliseconds_of(value: object, most: int) -> int | float | object:
    """Return a number of milliseconds from 0 to *most*, whole or with a fraction."""
    number = decimal_of(value)
    if not isinstance(number, Decimal) or not 0 <= number <= most:
        return INVALID
    return int(number) if number == number.to_integral_value() else float(number)


def time_of(value: object) -> datetime | object:
    """Return a time in RFC 3339 with an offset; a leap second is the second after it, as PostgreSQL reads it."""
    if not isinstance(value, str) or isinstance(value, Numeral):
        return INVALID
    leap = _LEAP_SECOND.fullmatch(value)
    try:
        time = msgspec.convert(f"{leap[1]}59{leap[2]}" if leap else value, _Aware) + timedelta(seconds=bool(leap))
    except (msgspec.ValidationError, ValueError, OverflowError):
        return INVALID
    return time if EARLIEST <= time < LATEST else INVALID


def uuid_of(text: str) -> UUID | None:
    """Return the UUID in *text*: with or without hyphens, in braces or as a URN, in any case."""
    bare = text[1:-1] if text[:1] == "{" and text[-1:] == "}" else text
    if bare[:9].lower() == "urn:uuid:":
        bare = bare[9:]
    return UUID(bare) if _UUID.fullmatch(bare) else None


def is_tenant_id(text: str) -> bool:
    """Return whether *text* is a tenant's id."""
    return re.fullmatch(TENANT_PATTERN, text) is not None


def is_reference(text: str) -> bool:
    """Return whether *text* may be an id: 1 to 200 printable ASCII characters without spaces."""
    return _PRINTABLE.fullmatch(text) is not None


def derived_id(tenant_id: str, text: str) -> UUID:
    """Return the id under which *text*, an id that is not a UUID, is stored: a UUIDv5 in the tenant's namespace.

    The namespace is the UUIDv5 of ``urn:closeout:<tenant_id>`` under RFC 4122's namespace for URLs.
    """
    return uuid5(uuid5(NAMESPACE_URL, f"urn:closeout:{tenant_id}"), text)


def run_id_of(tenant_id: str, text: str) -> tuple[UUID, str | None] | None:
    """Return the stored id of the run that its runner calls *text*, and its ``run_ref``; ``None`` if it is no id."""
    found = uuid_of(text)
    if found is not None:
        return found, None
    return (derived_id(tenant_id, text), text) if is_reference(text) else None


def error_code_of(text: str) -> str | None:
    """Return *text* as an error code: upper case, other characters as ``_``; null for an empty string.

    A code begins with a letter, so ``E_`` is put before anything else.
    """
    code = re.sub(r"[^A-Za-z0-9_]", "_", text[: 2 * _CODE_CHARACTERS]).upper()
    if code and not code[0].isalpha():
        code = f"E_{code}"
    return code[:_CODE_CHARACTERS] or None


def folded(value: object, choices: tuple[str, ...]) -> str | Literal[False]:
    """Return which of *choices*, all lower case, *value* is in any case; false if none."""
    return value.lower() if isinstance(value, str) and value.lower() in choices else False
