"""Text of a model or of a stranger, shown and never executed.

A terminal obeys escape sequences, and both terminals and browsers turn text around at a right-to-left override. What
neither shows has a sign in its place: a picture for control characters of ASCII (␛, ␊), else the number (``<U+202E>``).
"""

from __future__ import annotations

import unicodedata

PICTURES, DELETE = 0x2400, "\x7f"
SPACE, NOTHING = "␣", "·"  # for tokens that would not be seen
HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")  # control, format, half of a pair, and separators of lines and paragraphs


def visible(text: str) -> str:
    """``text`` with a sign in the place of every character that would do something else than be seen."""
    return text if text.isprintable() else "".join(map(_shown, text))


def visible_token(token: str) -> str:
    """One token, so that it is seen even where it is nothing but space, or a part of a character."""
    return visible(token.replace(" ", SPACE) if token.isspace() else token) or NOTHING


def _shown(character: str) -> str:
    if character < " ":
        return chr(PICTURES + ord(character))
    if character == DELETE:
        return "␡"
    return f"<U+{ord(character):04X}>" if unicodedata.category(character) in HIDDEN else character
