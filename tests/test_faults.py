"""A search that is killed and resumed loses nothing; `make soak` does the same over many random rounds."""

from __future__ import annotations

from pathlib import Path

import pytest
from soak import run


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Decoded pictures that the rounds share."""
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize(
    ("seed", "fault"), [(1, "command killed"), (2, "worker killed"), (3, "Ctrl-C twice"), (4, "Ray killed")]
)
def test_nothing_is_lost(seed: int, fault: str, tmp_path: Path, drawn: Path, cache: Path) -> None:
    run(seed, tmp_path, drawn, cache, fault)
