"""The checkpoints of a run that an evaluation goes through, and which of them have its results already."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ctllm_jax.config.errors import UserError


def choose_checkpoints(run: str, wanted: Sequence[str]) -> list[str]:
    """RUN@STEP of each checkpoint that is meant, oldest first.

    Raises:
      UserError: a step that there is not, or no milestone.
    """
    from ctllm_jax.training.checkpoints.checkpoint import list_checkpoints

    kept = list_checkpoints(Path(run))
    steps = sorted({checkpoint.step for checkpoint in kept})
    if not steps:
        raise UserError(f"{run} has no checkpoint yet")
    if list(wanted) == ["milestones"]:
        steps = sorted({checkpoint.step for checkpoint in kept if checkpoint.kind == "milestone"})
        if not steps:
            raise UserError(f"{run} has no milestones (checkpoint.milestones of its config); checkpoints=all takes "
                            "what it has")
    elif list(wanted) != ["all"]:
        missing = [step for step in map(int, wanted) if step not in steps]
        if missing:
            raise UserError(f"{run} has no step {missing[0]}; it has {', '.join(map(str, steps))}")
        steps = sorted(set(map(int, wanted)))
    return [f"{run}@{step}" for step in steps]


def is_measured(model: str, files: Sequence[Sequence[Path]], identity: Any) -> bool:
    """Whether each of `files` exists with the settings `identity`, for this checkpoint."""
    checkpoint = origin(model)
    for choices in files:
        there = [path for path in choices if path.is_file()]
        if not any(path.suffix == ".jsonl" or _is_of(path, checkpoint, identity) for path in there):
            return False
    return True


def origin(name: str) -> dict[str, Any]:
    """The checkpoint's meta: its training tokens, and its run."""
    from ctllm_jax.training.checkpoints.checkpoint import find_checkpoint, identify_model

    _, kept = find_checkpoint(name)
    known = {"tokens": kept.meta.get("tokens")}
    return known | (identify_model(kept) if "fingerprint" in kept.meta else {})


def _is_of(path: Path, checkpoint: dict[str, Any], identity: Any) -> bool:
    try:
        ours = json.loads(path.read_text(encoding="utf-8"))["ctllm_jax"]
        return ours["asked"] == identity and all(ours["checkpoint"].get(key) == value
                                                 for key, value in checkpoint.items())
    except (ValueError, KeyError, TypeError):
        return False
