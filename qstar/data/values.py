"""What a column may hold, text or a chat, and the sentence about what it holds instead."""

from __future__ import annotations

import reprlib
from typing import Any

MESSAGE = ("role", "content")


def found(value: Any) -> str:
    """A value in words, short."""
    match value:
        case None:
            return "null"
        case bool() | int() | float():
            return f"the number {value!r}" if not isinstance(value, bool) else repr(value)
        case str():
            return f"the text {reprlib.repr(value)}"
        case list():
            return f"the list {reprlib.repr(value)}"
        case dict():
            return f"the object {reprlib.repr(value)}"
    return f"{reprlib.repr(value)}, a {type(value).__name__}"


def is_chat(value: Any) -> bool:
    """Whether a value is a list of messages; :func:`checked` says whether they are whole."""
    return isinstance(value, list) and bool(value) and all(isinstance(each, dict) for each in value)


def checked(value: Any, column: str, place: str) -> str | list[dict[str, str]]:
    """A text, or a chat as a list of ``role`` and ``content`` alone.

    Raises:
        ValueError: it is neither; ``place`` and ``column`` say where.
    """
    if isinstance(value, str):
        return checked_text(value, column, place)
    if is_chat(value):
        return [_message(each, f"{place}, column {column!r}, message {i}") for i, each in enumerate(value, 1)]
    raise ValueError(
        f"{place}: column {column!r} holds {found(value)}, but it must hold text, or a chat: a list of messages with "
        "role and content"
    )


def checked_text(value: Any, column: str, place: str) -> str:
    """A text.

    Raises:
        ValueError: it is something else; ``place`` and ``column`` say where.
    """
    if not isinstance(value, str):
        raise ValueError(f"{place}: column {column!r} holds {found(value)}, but it must hold text")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            half = f"half of a surrogate pair at character {error.start + 1}"
            raise ValueError(f"{place}: column {column!r} holds {half}, but it must hold text") from None
    return value


def _message(message: dict[str, Any], place: str) -> dict[str, str]:
    for name in MESSAGE:
        if name not in message:
            raise ValueError(f"{place} has no {name!r}, but it must have role and content")
    for name, value in message.items():
        if name not in MESSAGE and value is not None:
            raise ValueError(f"{place} has {name!r}, but it may have role and content only")
    return {name: checked_text(message[name], name, place) for name in MESSAGE}
