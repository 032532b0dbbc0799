"""The steps of a run on an object store, where nothing is renamed: which steps are complete, and how steps are removed.

Orbax writes a step under its final name, and an object `commit_success.txt` in it last. A folder is a step only with
that object: an incomplete step does not have it yet, and deletion removes it first. The next owner of the run removes
what a killed process left. The manifest has the MD5 that the store keeps for each object, so a comparison reads no
data. (The store's crc32c is not usable: TensorStore's index files end with their own crc32c, which makes that of the
whole file the same number for any content.)
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from ctllm_jax import storage

log = logging.getLogger(__name__)
COMMITTED = "commit_success.txt"
"""Orbax writes this object last; on a disk, where steps are renamed, nothing reads it."""


def list_steps(directory: Path, *, finished: bool = True) -> list[int]:
    """The steps in a folder of steps, sorted; or with `finished=False` the remains of others.

    One listing, and one request per step, all in parallel.
    """
    steps = sorted(int(name) for name in storage.list_names(directory) if name.isdigit())
    committed = storage.read_small([directory / str(step) / COMMITTED for step in steps])
    return [step for step in steps if (directory / str(step) / COMMITTED in committed) == finished]


def discard(folder: Path) -> None:
    """Remove a step: first its marker object, then the others."""
    (folder / COMMITTED).unlink(missing_ok=True)
    storage.remove_tree(folder)


def sweep(directory: Path) -> None:
    """Remove remains of incomplete steps; only the owner of the run may do this, and not during a save."""
    for step in list_steps(directory, finished=False):
        storage.remove_tree(directory / str(step))


def quarantine(folder: Path, place: Path) -> None:
    """Move a damaged step, inside the store."""
    (folder / COMMITTED).unlink(missing_ok=True)
    storage.move_tree(folder, place)


def retain(directory: Path, steps: set[int], *, keep_last: int, keep_every: int | None) -> None:
    """Remove those of `steps` that are neither among the newest `keep_last` nor multiples of `keep_every`, also from
    the set, so that no later save checks them again."""
    for step in sorted(steps)[:-keep_last]:
        if not keep_every or step % keep_every:
            discard(directory / str(step))
            steps.discard(step)


def quietly(task: Callable[[], None], *, what: str) -> None:
    """Run an action that can be repeated later: an error of the store is logged, and does not end the run."""
    try:
        task()
    except OSError as error:
        log.warning("%s failed (%s): it will be retried after the next save", what, error)
