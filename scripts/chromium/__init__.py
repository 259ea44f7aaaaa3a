"""Chromium from Debian, which playwright drives in tests and screenshots."""

from chromium.chromium import ARGUMENTS, find_chromium

__all__ = ["ARGUMENTS", "find_chromium"]
