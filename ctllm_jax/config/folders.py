"""The files below a folder, including those of linked folders."""

from __future__ import annotations

import functools
import heapq
import logging
import os
from pathlib import Path
from typing import Literal

from ctllm_jax.config.errors import UserError

Links = Literal["follow", "skip"]
_NAMED = 8
logger = logging.getLogger(__name__)


def files_below(folder: Path, *, links: Links = "follow") -> list[Path]:
    """The files below `folder`, sorted by the parts of their path, without hidden files and folders.

    `links="follow"` reads linked files and folders, each folder once: under its own path if it is below `folder`, else
    under the path of the first link. `links="skip"` leaves out every link, for untrusted folders. A warning names the
    linked folders and everything that is left out.
    """
    files: list[Path] = []
    linked: list[Path] = []
    skipped: dict[str, list[Path]] = {}
    seen = {_identity(folder)}

    def visit(start: Path) -> None:
        waiting = [start]
        while waiting:
            for entry in _entries(waiting.pop()):
                path = Path(entry.path)
                if entry.is_symlink():
                    heapq.heappush(linked, path)
                elif entry.is_file():
                    files.append(path)
                elif entry.is_dir() and _identity(path) not in seen:
                    seen.add(_identity(path))
                    waiting.append(path)

    visit(folder)
    followed: list[Path] = []
    while linked:
        # In order, so that the same tree gives the same paths; a linked folder may contain further links.
        path = heapq.heappop(linked)
        if links == "skip":
            skipped.setdefault("links=skip says so", []).append(path)
        elif path.is_file():
            files.append(path)
        elif not path.is_dir():
            skipped.setdefault("they lead nowhere", []).append(path)
        elif _identity(path) in seen:
            skipped.setdefault("their folder is read already", []).append(path)
        else:
            seen.add(_identity(path))
            followed.append(path)
            visit(path)
    if followed:
        _warn_once(f"{folder}: linked folders are read too: {_names(followed, folder)}")
    for reason, paths in skipped.items():
        _warn_once(f"{folder}: links that are left out because {reason}: {_names(paths, folder)}")
    return sorted(files)


def _entries(folder: Path) -> list[os.DirEntry]:
    try:
        return [entry for entry in os.scandir(folder) if not entry.name.startswith(".")]
    except OSError as error:
        raise UserError(f"{folder} cannot be listed: {error.strerror}") from None


def _identity(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_dev, found.st_ino


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)


def _names(paths: list[Path], folder: Path) -> str:
    shown = [f"{path.relative_to(folder)} -> {os.readlink(path)}" for path in paths[:_NAMED]]
    return ", ".join(shown) + (f" and {len(paths) - _NAMED:,} more" if len(paths) > _NAMED else "")
