"""Files and folders that a command writes: whether it can, before it works; and in words why a command failed."""

from __future__ import annotations

import errno
import os
import sys
import tempfile
import traceback
from pathlib import Path
from typing import NamedTuple

from ctllm_jax.config.base import Section
from ctllm_jax.config.control import visible
from ctllm_jax.config.errors import UserError
from ctllm_jax.config.statuses import FAILED, WRONG_INPUT
from ctllm_jax.storage import is_remote

_ADVICE = {
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "choose a path below a folder",
    errno.EISDIR: "give the path of a file",
    errno.EEXIST: "choose another path, or remove what is there",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "its links point at each other: correct them",
    errno.EACCES: "change its permissions, or choose a path that you may use",
    errno.EPERM: "change its owner or attributes, or choose a path that you may use",
    errno.EROFS: "choose a path on a file system that can be written",
    errno.ENOSPC: "free some space, or choose a path on another disk, and give the command again",
    errno.EDQUOT: "free some of your quota, or choose a path on another disk, and give the command again",
    errno.EMFILE: "raise the limit (ulimit -n), and give the command again",
}
_LASTING = frozenset(_ADVICE) - {errno.ENOSPC, errno.EDQUOT, errno.EMFILE}


_SHOWN = 500  # characters of the message of an unexpected error


class Output(NamedTuple):
    """A file or folder that a command writes, and the key that says where."""

    name: str
    path: str
    kind: str

    def __str__(self) -> str:
        return f"{self.name}={self.path}"


def outputs_of(config: Section, prefix: str = "") -> list[Output]:
    """Every output that a config names."""
    found = []
    for name, info in type(config).model_fields.items():
        value = getattr(config, name)
        if isinstance(value, Section):
            found += outputs_of(value, f"{prefix}{name}.")
        elif (kind := (info.json_schema_extra or {}).get("output")) and value:
            found.append(Output(prefix + name, value, kind))
    return found


def explain(error: OSError) -> tuple[str, int]:
    """(a sentence with the path and what to do, the exit status) of an error of a file."""
    names = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
    place = " -> ".join(names) or ", ".join(getattr(error, "__notes__", [])) or "a file"
    reason = error.strerror or str(error) or type(error).__name__
    advice = _ADVICE.get(error.errno, "check the disk or the connection, and give the command again")
    return f"{place}: {reason}: {advice}", WRONG_INPUT if error.errno in _LASTING else FAILED


def explain_unexpected(error: Exception) -> str:
    """A sentence with the type and message of an internal error, and the place of its traceback.

    The traceback is written to a new file that only this user can read. It is printed instead where the environment
    variable CTLLM_TRACEBACK is 1, or where no file can be written.
    """
    text = "".join(traceback.format_exception(error))
    said = " ".join(f"{type(error).__name__}: {error}".split())
    said = said if len(said) <= _SHOWN else said[:_SHOWN] + "…"
    if os.environ.get("CTLLM_TRACEBACK") != "1":
        try:
            number, path = tempfile.mkstemp(prefix="ctllm-traceback-", suffix=".txt")
            with open(number, "w", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)
            return f"{said} (unexpected: the traceback is in {path}; CTLLM_TRACEBACK=1 prints it here)"
        except OSError:
            pass
    print(visible(text), end="", file=sys.stderr)
    return f"{said} (unexpected: the traceback is above)"


def check_writable(path: str | os.PathLike, named: str, *, kind: str = "folder") -> None:
    """Whether a file or folder can be written, or made with all folders above it.

    Args:
      path: the output path; one on an object store is not checked.
      named: its name in the message.
      kind: "file" (replaced by a new one if it is there) or "folder".

    Raises:
      UserError: it cannot be written; the message gives the reason, and what to do.
    """
    if is_remote(path):
        return
    path = Path(path)
    try:
        if kind == "file" and path.is_dir():
            raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if kind == "file" and path.exists() and os.access(path, os.W_OK):
            return  # /dev/stdout, for example, which lies in a folder of the system
        place = path.parent if kind == "file" else path
        while not os.path.lexists(place) and place != place.parent:
            place = place.parent
        if not place.is_dir():
            raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(place))
        if not os.access(place, os.W_OK | os.X_OK):
            read_only = os.statvfs(place).f_flag & os.ST_RDONLY
            number = errno.EROFS if read_only else errno.EACCES
            raise OSError(number, os.strerror(number), str(place))
        found = os.statvfs(place)
        if found.f_blocks and not found.f_bavail:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(place))
    except OSError as error:
        raise UserError(f"{named} cannot be written: {explain(error)[0]}") from None
