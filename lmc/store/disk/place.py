"""Where a store is: a folder that is nobody else's, and the file that says what it is.

Who may write to a folder may put links there that lead out of it. So a folder is used for writing
only if it belongs to this user or to root and nobody else may write to it, and what is in it is
named from its descriptor and never followed elsewhere.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
from pathlib import Path

import xxhash

from lmc.store.disk import header as fmt
from lmc.store.disk.segments import fsync_folder

FORMAT_FILE = "lmc-store.json"
_FORMAT_BYTES = 4096  # what is longer is none


def open_folder(root: Path, read_only: bool) -> int:
    """A descriptor of a folder, which is made when missing.

    Raises:
        ValueError: it is missing and nothing may be written.
        PermissionError: it is another user's, or others may write to it.
        OSError: it cannot be made or opened.
    """
    if not read_only:
        make_folder(root)
    try:
        fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        raise ValueError(f"got {root}, which holds no store") from None
    try:
        found = os.fstat(fd)
        if not read_only:
            _only_ours(root, found, "name one that is yours alone, or one in it that is not there")
    except BaseException:
        os.close(fd)
        raise
    return fd


def make_folder(path: Path) -> None:
    """Make a folder, and those it is in, whose names are durable."""
    if path.is_dir():
        return
    make_folder(path.parent)
    path.mkdir(mode=0o700, exist_ok=True)
    fsync_folder(path.parent)


def subfolder(root: Path, place: int, name: str, make: bool, read_only: bool) -> None:
    """See that there is a folder of this name, and no link to one.

    Raises:
        ValueError: it is something else.
        PermissionError: it is another user's, or others may write to it.
    """
    try:
        found = os.stat(name, dir_fd=place, follow_symlinks=False)
    except FileNotFoundError:
        if make:
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, 0o700, dir_fd=place)
            os.fsync(place)
        return
    _no_link(root, name, found)
    if not stat.S_ISDIR(found.st_mode):
        raise ValueError(f"got {root}, where {name} is no folder")
    if not read_only:
        _only_ours(root / name, found, "make it yours alone, with all that is in it")


def identity_in(root: Path, place: int) -> bytes | None:
    """The identity of the store in a folder, 16 bytes; None when its file must be written.

    Raises:
        ValueError: it is no store and not empty, or one of another format.
    """
    with os.scandir(place) as entries:
        names = sorted(entry.name for entry in entries)
    # Its new form may be there, of a crash or of another process that opens the folder just now;
    # and the locks of that one.
    names = [name for name in names if not name.startswith(f"{FORMAT_FILE}.")]
    if not [name for name in names if not name.endswith(".lock")]:
        return None
    if "segments" in names:
        _no_link(root, "segments", os.stat("segments", dir_fd=place, follow_symlinks=False))
    try:
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        fd = os.open(FORMAT_FILE, flags, dir_fd=place)
    except FileNotFoundError:
        if "segments" not in names:
            raise ValueError(
                f"got {root}, which is no store and not empty (it has {names[0]}); "
                "name a folder that is empty, missing or a store"
            ) from None
        return None
    except OSError as e:
        if e.errno == errno.ELOOP:
            raise ValueError(f"got {root}, where {FORMAT_FILE} is a link") from None
        raise
    try:
        text = json.loads(os.read(fd, _FORMAT_BYTES))
        version, identity = int(text["lmc_store_format"]), str(text.get("identity", ""))
        if text["xxh3_64"] != format_digest(version, identity):
            return None  # no lmc wrote this: the records say their format themselves
    except (ValueError, KeyError, TypeError, AttributeError, IsADirectoryError):
        return None
    finally:
        os.close(fd)
    if version != fmt.FORMAT:
        way = "newer" if version > fmt.FORMAT else "older"
        raise ValueError(
            f"{root} is a store of format {version}, which this version of lmc cannot read "
            f"(it reads format {fmt.FORMAT}): use another folder, or a lmc that is {way}"
        )
    return bytes.fromhex(identity) or None


def write_format(place: int, identity: bytes) -> None:
    """Say what a folder is."""
    text = {
        "lmc_store_format": fmt.FORMAT,
        "identity": identity.hex(),
        "xxh3_64": format_digest(fmt.FORMAT, identity.hex()),
    }
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        os.rmdir(FORMAT_FILE, dir_fd=place)  # only if there is nothing in it
    write_file(place, FORMAT_FILE, json.dumps(text).encode())


def write_file(place: int, name: str, data: bytes) -> None:
    """A file is there as a whole, or as it was; durable, and never through a link."""
    new = f"{name}.{os.urandom(8).hex()}"
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(new, flags, 0o600, dir_fd=place)
    try:
        try:
            os.write(fd, data)
            os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(new, name, src_dir_fd=place, dst_dir_fd=place)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(new, dir_fd=place)
        raise
    os.fsync(place)


def format_digest(version: int, identity: str) -> str:
    """By which a file of any version is known to be one."""
    return xxhash.xxh3_64(f"lmc-store {version}{identity}".encode()).hexdigest()


def _only_ours(folder: Path, found: os.stat_result, instead: str) -> None:
    if found.st_uid not in (os.geteuid(), 0):
        wrong = f"belongs to user {found.st_uid}, and this is user {os.geteuid()}"
    elif found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        wrong = f"may be written by others (its mode is {stat.S_IMODE(found.st_mode):03o})"
    else:
        return
    why = "whoever prepares a folder decides where its links lead"
    raise PermissionError(errno.EPERM, f"{folder} {wrong}: {why}; {instead}")


def _no_link(root: Path, name: str, found: os.stat_result) -> None:
    if stat.S_ISLNK(found.st_mode):
        raise ValueError(f"got {root}, where {name} is a link: nothing is written outside a store")
