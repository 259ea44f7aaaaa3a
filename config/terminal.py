"""Text for terminals: characters that a terminal or an editor would act on are escaped as in JSON."""

import re

# DEL and C1 control characters, and marks that change the direction of text, which can make a name read as another.
_ACTED_ON = re.compile("[\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]")


def escaped_json(text: str) -> str:
    """Return JSON *text* with these characters as escapes; JSON escapes the other control characters itself."""
    return _ACTED_ON.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
