"""A small file system of its own, which can be full."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Disk:
    """A mounted file system. Raises PermissionError where mounting is not permitted."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self.mount("size=2g", "-t", "tmpfs", "tmpfs")

    def mount(self, options: str, *source: str) -> None:
        done = subprocess.run(
            ["mount", "-o", options, *source, str(self.folder)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise PermissionError(f"mounting is not permitted here: {done.stderr.strip()}")

    def fill(self, spare: int = 0) -> None:
        """Leave room for so many bytes."""
        found = os.statvfs(self.folder)
        used = (found.f_blocks - found.f_bfree) * found.f_frsize
        self.mount(f"remount,size={used + spare}")

    def empty(self) -> None:
        self.mount("remount,size=2g")


@contextmanager
def mounted(folder: Path) -> Iterator[Disk]:
    """A disk at a folder that does not exist yet, taken away afterwards."""
    if os.geteuid():
        raise PermissionError("needs root, to mount a file system of its own")
    disk = Disk(folder)
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
