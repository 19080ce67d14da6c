"""What is under a name is always whole, and an append survives the one that was torn before it."""

from __future__ import annotations

import os
import resource
import signal
from pathlib import Path

import pytest

from carmodels.files import append_line, user_path, write_atomic


@pytest.mark.parametrize("content", ["Bögen\r\nund Räder\n", "", b"\x00\xff\r\n"])
def test_what_is_written_is_what_is_read(tmp_path: Path, content: bytes | str) -> None:
    write_atomic(tmp_path / "file", content)
    expected = content.encode() if isinstance(content, str) else content
    assert (tmp_path / "file").read_bytes() == expected


def test_a_file_is_replaced_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    write_atomic(tmp_path / "file", "a long first version")
    write_atomic(tmp_path / "file", "second")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "second")]


def test_an_error_of_the_disk_names_the_file(tmp_path: Path) -> None:
    """What the system says of a full disk names none. A limit on file sizes does as well."""
    allowed = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, allowed[1]))
    try:
        with pytest.raises(OSError, match=r"File too large: '.*/file'"):
            write_atomic(tmp_path / "file", b"x" * 2000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, allowed)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list(tmp_path.iterdir())


def test_a_reader_that_opened_the_old_file_reads_it_to_its_end(tmp_path: Path) -> None:
    write_atomic(tmp_path / "file", "first version")
    with (tmp_path / "file").open("rb", buffering=0) as reader:
        assert reader.read(5) == b"first"
        write_atomic(tmp_path / "file", "second")
        assert reader.read() == b" version"


def test_a_write_that_fails_leaves_the_old_file_and_no_temporary_one(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "inside").touch()
    with pytest.raises(OSError, match="taken"):
        write_atomic(tmp_path / "taken", "a file cannot replace a folder")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_a_file_is_as_readable_by_others_as_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    write_atomic(tmp_path / "whole", "")
    assert (tmp_path / "whole").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_lines_are_appended_in_order(tmp_path: Path) -> None:
    for line in ("one", "zwölf", ""):
        append_line(tmp_path / "lines", line)
    assert (tmp_path / "lines").read_bytes() == "one\nzwölf\n\n".encode()


@pytest.mark.parametrize("kept", range(1, len("second\n") + 1))
def test_a_torn_line_does_not_swallow_the_next_one(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "lines"
    append_line(path, "first")
    append_line(path, "second")
    os.truncate(path, len("first\n") + kept)
    append_line(path, "third")
    assert path.read_text().splitlines() == ["first", "second"[:kept], "third"]


def test_a_line_with_a_newline_in_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'one\\ntwo'"):
        append_line(tmp_path / "lines", "one\ntwo")
    assert not (tmp_path / "lines").exists()


def test_a_circle_of_links_is_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a").symlink_to("b")
    Path("b").symlink_to("a")
    with pytest.raises(ValueError, match=r"^'a/c' is a circle of symbolic links: give a path without it$"):
        user_path("a/c")
