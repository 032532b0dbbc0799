"""The steps of a run on an object store, where nothing is renamed: what makes one whole, and how one goes away.

Orbax writes a step under its own name, and an object `commit_success.txt` in it last. Only with that object is it a
step: one that is half written has none yet, and one that goes away loses it first. What a killed process left of either
is removed by the next owner of the run. The manifest holds the MD5 that the store keeps of each object: comparing them
reads no data. (Not the store's crc32c: TensorStore's index files end in their own, which makes that of the whole file
the same number whatever is in it.)
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from ctllm_jax import storage

log = logging.getLogger(__name__)
COMMITTED = "commit_success.txt"
"""Orbax writes this one last, and nothing reads it on a disk that renames."""


def list_steps(directory: Path, *, finished: bool = True) -> list[int]:
    """The steps in a folder of steps, sorted; or with `finished=False` what is left of others.

    One list of names, and one request for each step, all at the same time.
    """
    steps = sorted(int(name) for name in storage.list_names(directory) if name.isdigit())
    committed = storage.read_small([directory / str(step) / COMMITTED for step in steps])
    return [step for step in steps if (directory / str(step) / COMMITTED in committed) == finished]


def discard(folder: Path) -> None:
    """Remove a step: no step any more at once, and its objects after that."""
    (folder / COMMITTED).unlink(missing_ok=True)
    storage.remove_tree(folder)


def sweep(directory: Path) -> None:
    """Remove what is left of steps that are none; only their run's owner may, while it saves nothing."""
    for step in list_steps(directory, finished=False):
        storage.remove_tree(directory / str(step))


def quarantine(folder: Path, place: Path) -> None:
    """Move a damaged step, inside the store."""
    (folder / COMMITTED).unlink(missing_ok=True)
    storage.move_tree(folder, place)


def retain(directory: Path, steps: set[int], *, keep_last: int, keep_every: int | None) -> None:
    """Remove those of `steps` that are neither among the newest `keep_last` nor multiples of `keep_every`, from the set
    too, so that no later save looks for them."""
    for step in sorted(steps)[:-keep_last]:
        if not keep_every or step % keep_every:
            discard(directory / str(step))
            steps.discard(step)


def quietly(task: Callable[[], None], *, what: str) -> None:
    """Do what can be done again later: a store that fails is told, and ends nothing."""
    try:
        task()
    except OSError as error:
        log.warning("%s failed (%s): it is tried again behind the next save", what, error)
