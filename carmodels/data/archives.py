"""Unpacks zip files into the cache, safely: no paths outside the folder, no links, no zip bombs."""

from __future__ import annotations

import errno
import hashlib
import lzma
import shutil
import stat
import zipfile
import zlib
from pathlib import Path, PureWindowsPath

from filelock import FileLock

from carmodels.data.digests import file_digests
from carmodels.formatting import one_line

_BOMB_RATIO = 100  # unpacked over packed bytes; photographs stay below 2, deflate cannot exceed 1032
_BOMB_MIN_BYTES = 100 << 20  # smaller contents pass, whatever their ratio

# What zipfile and its decompressors raise on corrupt bytes.
_BAD_ZIP = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError, UnicodeDecodeError)

# OSErrors that the archive causes, not the machine: bz2 sets no number, a wrong offset gives EINVAL, the rest
# come from names that cannot be files.
_ARCHIVE_ERRNOS = (None, errno.EINVAL, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG)


def unpack_once(archive: Path, cache_dir: Path) -> Path:
    """The folder in `cache_dir` with the content of `archive`. One process unpacks it, others wait."""
    [digest] = file_digests(
        [archive], cache_dir / "digests" / f"{hashlib.sha256(str(archive).encode()).hexdigest()[:12]}.json"
    )
    if not digest:
        raise ValueError(f"{str(archive)!r} cannot be read: look at its rights, or fetch it again")
    folder = cache_dir / "unpacked" / digest[:16]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            unfinished = folder.with_name(f"{folder.name}.tmp")
            shutil.rmtree(unfinished, ignore_errors=True)
            try:
                _unpack(archive, unfinished, nested=True)
                unfinished.rename(folder)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _unpack(archive: Path, folder: Path, *, nested: bool) -> None:
    """Unpack `archive` into `folder`. With `nested`, also unpack the zips in it, each where it lies."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with zipfile.ZipFile(archive) as packed:
            _check_members(packed, archive, folder)
            _check_size(packed, archive, folder)
            packed.extractall(folder, [n for n in packed.namelist() if not n.startswith("__MACOSX/")])
    except _BAD_ZIP as error:
        raise ValueError(f"{archive.name!r} is damaged: {one_line(error)}; fetch it again") from None
    except OSError as error:
        if error.errno not in _ARCHIVE_ERRNOS:
            raise
        reason = error.strerror or one_line(error)
        raise ValueError(f"{archive.name!r} cannot be unpacked: {reason}; fetch it again") from None
    for inner in sorted(path for path in folder.rglob("*.zip") if path.is_file()) if nested else []:
        _unpack(inner, inner.parent, nested=False)
        inner.unlink()


def _check_members(packed: zipfile.ZipFile, archive: Path, folder: Path) -> None:
    for member in packed.infolist():
        if not member.filename:
            raise ValueError(f"{archive.name!r} holds a file without a name: fetch it again")
        path = PureWindowsPath(member.filename)  # understands both kinds of slashes, and drives
        if path.anchor or ".." in path.parts:
            raise ValueError(
                f"{archive.name!r} names {member.filename!r}, outside its folder: it is not safe to unpack"
            )
        if stat.S_ISLNK(member.external_attr >> 16):
            raise ValueError(f"{archive.name!r} holds the link {member.filename!r}: pack the file itself")
        if member.flag_bits & 1:
            raise ValueError(f"{archive.name!r} is encrypted: unpack it and give the folder")
        if not member.is_dir() and (folder / member.filename).exists():
            raise ValueError(
                f"{archive.name!r} would overwrite {member.filename!r}, which lies beside it or came from "
                "another zip: unpack them into folders of their own and give the folder"
            )


def _check_size(packed: zipfile.ZipFile, archive: Path, folder: Path) -> None:
    size = sum(member.file_size for member in packed.infolist())
    if size > max(_BOMB_MIN_BYTES, _BOMB_RATIO * archive.stat().st_size):
        raise ValueError(
            f"{archive.name!r} would unpack to {size:,} bytes, over {_BOMB_RATIO} times its own size"
        )
    free = shutil.disk_usage(folder).free
    if size > free:
        raise ValueError(
            f"{archive.name!r} needs {size:,} bytes in {str(folder.parent)!r}, {free:,} are free"
        )
