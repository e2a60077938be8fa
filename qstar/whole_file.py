"""Files that are whole or not there."""

from __future__ import annotations

from pathlib import Path


def write_whole(path: Path, content: str | bytes) -> None:
    """Write text, in UTF-8, or bytes beside ``path`` and rename it: a kill leaves what was there before, or all."""
    beside = path.with_name(f".{path.name}")
    if isinstance(content, str):
        beside.write_text(content, encoding="utf-8")
    else:
        beside.write_bytes(content)
    beside.replace(path)
