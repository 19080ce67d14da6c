"""Where `--out` may write, and what becomes of a link."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest

from carmodels.files import write_atomic
from tune.cli.options import out_file


def test_out_writes_to_what_a_link_names(tmp_path: Path) -> None:
    link, target = tmp_path / "link.csv", tmp_path / "target.csv"
    link.symlink_to(target.name)
    found = out_file(Namespace(out=link))
    assert found == target
    write_atomic(target, "answers")
    assert link.is_symlink()


@pytest.mark.parametrize("path", ["/dev/stdout", "/dev/fd/1", "/dev/null", "/dev/new.csv", "/proc/self/fd/1"])
def test_out_is_no_stream_whatever_that_is_a_link_to(path: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Under `capfd` standard output is a file, as with `> FILE`: to write atomically would replace a link."""
    with pytest.raises(ValueError, match=f"--out {path} must name a file in a folder that exists"):
        out_file(Namespace(out=Path(path)))
