"""The keys and targets of each command that can be on an object store (gs://); others are refused by name before jax is
imported."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from ctllm_jax.config.errors import UserError
from ctllm_jax.config.stages import STAGES
from ctllm_jax.storage import is_remote, open_path

TARGET = "TARGET"
_EVERYTHING = r".*"
ALLOWED = {
    **{stage.name: stage.object_stores for stage in STAGES.values()},
    "checkpoint": TARGET, "report": rf"{TARGET}|output", "export-hf": TARGET, "generate": TARGET, "chat": TARGET,
    "serve": TARGET, "prepare": r"input\.\d+",
    # They read the config alone; `job gke` mounts the buckets.
    "plan": _EVERYTHING, "compile": _EVERYTHING, "doctor": _EVERYTHING, "job": _EVERYTHING,
}
"""By command, the paths that can be on an object store: keys, and TARGET for words without a key (a RUN, a MODEL)."""


def refuse_unsupported(command: str, config: Any, targets: list[str]) -> None:
    """Refuse gs:// paths that the command does not support.

    Raises:
      UserError: lists every such key or target, and what to do.
    """
    named = [(TARGET, target) for target in targets if is_remote(target)]
    named += [(key, text) for key, text in _texts(config.model_dump() if config is not None else {})
              if is_remote(text)]
    allowed = ALLOWED.get(command, "")
    problems = [f"{text if key == TARGET else f'{key}={text}'}" for key, text in named
                if not re.fullmatch(allowed, key)]
    run = getattr(config, "run", None)
    if allowed != _EVERYTHING and run is not None and is_remote(getattr(run, "dir", "")):
        if config.log.tensorboard:
            problems.append(f"log.tensorboard=true: its files are appended to, which {run.dir} cannot (report draws the"
                            " same curves)")
        if config.log.wandb_project is not None:
            problems.append(f"log.wandb_project={config.log.wandb_project}: it needs a run directory on a disk,"
                            f" and {run.dir} is not on a disk")
    if problems:
        raise UserError("\n  ".join([f"{command} needs a disk of this machine for:", *problems])
                        + "\ncopy it there (gcloud storage cp), or mount the bucket and give that path")
    if command != "prepare" and allowed != _EVERYTHING:
        for _, text in named:
            open_path(text.rpartition("@")[0] or text)  # checks the name, and that the required packages are installed


def refuse_everything(command: str, words: list[str]) -> None:
    """The same for a command that reads its words itself: either all or none of its paths can be on gs://."""
    if ALLOWED.get(command) != _EVERYTHING and (stores := [word for word in words if "gs://" in word]):
        raise UserError("\n  ".join([f"{command} needs a disk of this machine for:", *stores])
                        + "\ncopy it there (gcloud storage cp), or mount the bucket and give that path")


def _texts(tree: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(tree, dict | list):
        for name, entry in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _texts(entry, f"{prefix}{name}.")
    elif isinstance(tree, str):
        yield prefix[:-1], tree
