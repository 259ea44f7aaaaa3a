"""A real browser for tests and screenshots: Debian's Chromium, driven by playwright."""

from chromium.chromium import ARGUMENTS, find_chromium

__all__ = ["ARGUMENTS", "find_chromium"]
