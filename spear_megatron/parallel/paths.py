"""Paths that users give: checks before the work starts, and the operating system's errors in words."""

from __future__ import annotations

import errno
import os
from pathlib import Path

# What an error number says of the file, and what to do.
_PROBLEMS = {
    errno.ENOENT: "does not exist: check the path",
    errno.EEXIST: "exists already: name another, or remove it",
    errno.ENOTDIR: "is not a folder, or lies below a file: check the path",
    errno.EISDIR: "is a folder where a file is wanted: check the path",
    errno.ENOTEMPTY: "is a folder that is not empty: name another, or remove it",
    errno.EACCES: "cannot be used, permission denied: change its permissions, or name another",
    errno.EPERM: "cannot be used, operation not permitted: change its permissions, or name another",
    errno.EROFS: "lies on a read-only file system: name another place",
    errno.ELOOP: "is a symbolic link that leads back to itself: repair the link",
    errno.ENAMETOOLONG: "is too long for a file name: shorten it",
    errno.ENOSPC: "cannot be written, the disk is full: free some space, or name another place",
    errno.EDQUOT: "cannot be written, the quota is used up: free some space, or name another place",
}
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_NAME_SHOWN = 200


def os_error_text(error: OSError) -> str | None:
    """The file, what is wrong with it and what to do, in one sentence; None if the error tells no file and number.

    Writing to an open file knows its name no more: of a full disk it is told without.
    """
    name = error.filename2 if error.filename2 is not None else error.filename
    problem = _PROBLEMS.get(error.errno or 0)
    if name is None and error.errno in NO_ROOM:
        return f"an output {problem}"
    if problem is None or not isinstance(name, (str, bytes, os.PathLike)):
        return None
    text = os.fsdecode(name)
    return f"{text if len(text) <= _NAME_SHOWN else text[:_NAME_SHOWN] + '...'} {problem}"


def check_input_folder(path: str | Path, wanted: str) -> Path:
    """``path`` as a Path if it is a folder.

    Args:
        wanted: what to give instead, such as ``give a run directory``.

    Raises:
        ValueError: it is none; says whether something else is there.
        OSError: it cannot be looked at.
    """
    if not str(path):
        raise ValueError(f"the path of a folder is empty: {wanted}")
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"{path} {'is not a folder' if os.path.lexists(folder) else 'does not exist'}: {wanted}")
    return folder


def check_output_folder(path: str | Path, key: str, *, new: bool = False) -> None:
    """Whether a folder at ``path`` is there to be written into, or can be made. Nothing is written.

    Args:
        key: configuration key or option that named it.
        new: it must not exist yet.

    Raises:
        ValueError: it cannot; names ``key``, the path and the remedy.
        OSError: it cannot be looked at.
    """
    if not str(path):
        raise ValueError(f"{key} is empty: name a folder")
    folder = Path(os.path.abspath(path))
    if new and os.path.lexists(folder):
        raise ValueError(f"{key}: {path} exists: name a new folder, or remove it")
    there = next(place for place in (folder, *folder.parents) if _exists(place))
    if not there.is_dir():
        raise ValueError(f"{key}={path} cannot be a folder, {there} is a file or a broken link: name another place")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{key}={path} cannot be written, {there} gives no permission or is read-only: name another")


def _exists(path: Path) -> bool:
    """Whether something is there, a broken link too. Raises OSError for a name that nothing can have."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True
