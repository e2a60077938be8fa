"""A file that is written is whole or as it was, whatever stops the writing."""

from __future__ import annotations

from pathlib import Path

import pytest

from qstar.whole_file import write_whole


def test_a_text_is_written_in_utf_8_and_nothing_is_left_beside_it(tmp_path):
    write_whole(tmp_path / "file", "first")
    write_whole(tmp_path / "file", "ä 日本\n")
    assert (tmp_path / "file").read_bytes() == "ä 日本\n".encode()
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_bytes_are_written_as_they_are(tmp_path):
    write_whole(tmp_path / "file", b"\xff\x00\r\n")
    assert (tmp_path / "file").read_bytes() == b"\xff\x00\r\n"
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_what_was_there_stays_where_the_writing_is_cut(tmp_path, monkeypatch):
    write_whole(tmp_path / "file", "first")
    write = Path.write_text

    def cut(path, text, **options):
        write(path, text[:3], **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", cut)
    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "file", "second")
    assert (tmp_path / "file").read_text() == "first"
