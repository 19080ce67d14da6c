"""Checks of a machine. Each finding is one line with its remedy."""

from __future__ import annotations

import math
import os
import re
import resource
import shutil
import socket
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

GB = 1e9
SHARED_MEMORY = 0.3 * GB  # bytes that Ray wants
FEWEST_FILES = 1024  # open files per process
LEAST_ADDRESSES = 8 * GB  # of a process; to import torch takes 5 GB of them
REPORT_ADDRESSES = 70 * GB  # V8, which vl-convert starts for a report's charts, dies with less
LONGEST_SOCKET = 107 if sys.platform == "linux" else 103  # bytes of a socket's path
ANSWER_SECONDS = 10.0  # for a cluster's head
_SETTINGS = 4  # type of the frame with which a gRPC server, as Ray's, begins (RFC 9113)
_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, _SETTINGS, 0, 0, 0, 0, 0])
_SOCKET = "/ray/session_2026-12-31_23-59-59_123456_1234567/sockets/plasma_store"  # in Ray's folder for files


@dataclass(frozen=True)
class Finding:
    """One line; `fatal` if the search would fail."""

    words: str
    fatal: bool = False


def start_findings() -> list[Finding]:
    """What keeps Ray from starting on this machine."""
    return [*home_findings(), *temporary_folder_findings()]


def address_space_findings(*, report: bool = False) -> list[Finding]:
    """Too few addresses for what is imported; with `report` also for the charts of a report."""
    needed, by = (REPORT_ADDRESSES, "the report needs") if report else (LEAST_ADDRESSES, "torch and Ray need")
    allowed, most = resource.getrlimit(resource.RLIMIT_AS)
    if allowed == resource.RLIM_INFINITY or allowed >= needed:
        return []
    more = most == resource.RLIM_INFINITY or most >= needed
    remedy = f"ulimit -v {'unlimited' if most == resource.RLIM_INFINITY else most // 1024}"
    return [
        Finding(
            f"a process may have {allowed / GB:.1f} GB of addresses, {by} {needed / GB:.0f} GB: "
            f"{remedy if more else 'ask the administrator for more'}",
            fatal=True,
        )
    ]


def home_findings() -> list[Finding]:
    """Ray writes a token to the home folder, unless one is given otherwise."""
    given = {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys()
    if given or os.environ.get("RAY_AUTH_MODE", "token") != "token":
        return []
    try:
        folder = Path.home() / ".ray"
    except RuntimeError:
        return [Finding("HOME is not set: export HOME=FOLDER, where Ray writes its token", fatal=True)]
    if (folder / "auth_token").is_file() or not (trouble := _trouble_writing(folder)):
        return []
    words = f"HOME {folder.parent}: no writing there ({trouble}), as Ray needs for its token"
    return [Finding(f"{words}; export HOME=FOLDER of your own", fatal=True)]


def temporary_folder_findings() -> list[Finding]:
    """Ray keeps its sockets and logs in a folder for temporary files."""
    name = "RAY_TMPDIR" if "RAY_TMPDIR" in os.environ or sys.platform != "linux" else "TMPDIR"
    folder = os.environ.get(name, "/tmp")
    most = LONGEST_SOCKET - len(_SOCKET)
    if not os.path.isabs(folder):
        words = "must be an absolute path"
    elif len(os.fsencode(folder)) > most:
        words = f"is longer than the {most} bytes that Ray's sockets leave"
    else:
        return folder_findings({name: Path(folder)})
    return [Finding(f"{name} {folder!r} {words}: export RAY_TMPDIR=/tmp", fatal=True)]


def head_findings(address: str) -> list[Finding]:
    """What keeps this machine from joining the cluster at `address`."""
    wrong = _wrong_head(address)
    return [Finding(f"--address {address}{wrong}", fatal=True)] if wrong else []


def _wrong_head(address: str) -> str:
    host, _, port = address.rpartition(":")
    if not re.fullmatch(r"[\w.-]+|\[[\w:.%]+\]", host) or not (port.isdecimal() and 0 < int(port) < 65536):
        return " must be HOST:PORT of the cluster's head, as `ray start --head` prints it"
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_SECONDS) as connection:
            connection.sendall(_GREETING)
            answer = connection.recv(4)
    except OSError as error:
        trouble = error.strerror or error
        return f": no cluster answers there ({trouble}); give what `ray start --head` printed on its head"
    if answer[3:] != bytes([_SETTINGS]) and os.environ.get("RAY_USE_TLS", "0") == "0":
        return ": what answers there is no Ray head; give what `ray start --head` printed on the head"
    return ""


def folder_findings(wanted: Mapping[str, Path]) -> list[Finding]:
    return [
        Finding(f"{option} {folder}: no writing there ({trouble}); give a folder of your own", fatal=True)
        for option, folder in wanted.items()
        if (trouble := _trouble_writing(folder))
    ]


def _trouble_writing(folder: Path) -> str:
    if folder.is_symlink() and not folder.exists():
        return "a link to what is not there"
    try:
        with tempfile.TemporaryFile(dir=nearest_existing(folder)):
            return ""
    except OSError as error:
        return str(error.strerror or error)


def nearest_existing(folder: Path) -> Path:
    return folder if folder.exists() or folder == folder.parent else nearest_existing(folder.parent)


def shared_memory_findings(loaded: float = 0.0) -> list[Finding]:
    folder = Path("/dev/shm")
    free = shutil.disk_usage(folder).free if folder.is_dir() else float("inf")
    if free < loaded:
        enough = math.ceil((SHARED_MEMORY + 2 * loaded) / GB)
        return [
            Finding(
                f"/dev/shm has {free / GB:.2f} GB free, loader processes hand over images there and need "
                f"{loaded / GB:.2f} GB; in a container: --shm-size={enough}g",
                fatal=True,
            )
        ]
    if free >= SHARED_MEMORY:
        return []
    return [
        Finding(
            f"/dev/shm has {free / GB:.2f} GB free, Ray wants {SHARED_MEMORY / GB:.1f} GB and will use the "
            "disk instead; in a container: --shm-size=1g"
        )
    ]


def file_handle_findings() -> list[Finding]:
    allowed, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if allowed == resource.RLIM_INFINITY or allowed >= FEWEST_FILES:
        return []
    more = most == resource.RLIM_INFINITY or most >= FEWEST_FILES
    remedy = f"ulimit -n {FEWEST_FILES}" if more else "ask the administrator for more"
    return [Finding(f"{allowed} files may be open at a time, Ray needs {FEWEST_FILES}: {remedy}", fatal=True)]
