"""Reads the optional fields of one object of a message; what cannot be read as it is sent is recorded."""

from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any

from consumer.contract import scalars
from consumer.contract.adjustments import Adjustments
from consumer.contract.metadata import clean_text
from consumer.contract.scalars import INVALID
from domains.run import BIGINT_MAX

Fields = Mapping[str, Any]


class OptionalFields:
    """Reads the optional fields of one object; a value that cannot be read becomes null and is recorded."""

    def __init__(self, fields: Fields, path: str, adjustments: Adjustments) -> None:
        self.fields = fields
        self._path = path
        self._adjustments = adjustments

    def adjusted(self, name: str, stored: object) -> None:
        """Record that *stored* replaces the value of *name*."""
        self._adjustments.add(self._path + name, self.fields.get(name), stored)

    def read(self, name: str, convert: Callable[[Any], object]) -> Any:  # noqa: ANN401 - what *convert* returns
        """Return the converted value of *name*; null if it is missing, null or invalid."""
        value = self.fields.get(name)
        if value is None:
            return None
        found = convert(value)
        if found is INVALID:
            self.adjusted(name, None)
            return None
        return found

    def text(self, name: str, most: int | None = None) -> str | None:
        """Return a string, or the digits of a number, truncated to *most* characters."""
        text: str | None = self.read(name, scalars.text_of)
        if text is None:
            return None
        kept = clean_text(text)[:most]
        if kept != text:
            self.adjusted(name, kept)
        return kept

    def error_code(self) -> str | None:
        """Return the error code, of any other text what it is made into."""
        text: str | None = self.read("error_code", scalars.text_of)
        if text is None:
            return None
        code = scalars.error_code_of(text)
        if code != text:
            self.adjusted("error_code", code)
        return code

    def tokens(self, name: str) -> int | None:
        """Return a number of tokens."""
        found: int | None = self.read(name, lambda value: scalars.integer_of(value, BIGINT_MAX))
        return found

    def cost(self) -> Decimal | None:
        """Return ``cost_usd``."""
        amount: Decimal | None = self.read("cost_usd", scalars.money_of)
        return amount
