"""What a resumed run must share with its beginning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ctllm_jax.config.errors import UserError
from ctllm_jax.config.load import changeable_paths
from ctllm_jax.config.pretrain import PretrainConfig


def make_fingerprint(config: PretrainConfig, data: dict[str, Any]) -> dict[str, Any]:
    """What a resumed run must share with its beginning: data, and every key that is not marked changeable."""
    changeable = changeable_paths(type(config))

    def fixed(tree: Any, prefix: str = "") -> Any:
        if not isinstance(tree, dict):
            return tree
        return {name: fixed(entry, f"{prefix}{name}.") for name, entry in tree.items()
                if prefix + name not in changeable}

    kept = fixed(config.model_dump(mode="json"))
    # Paths may move; what the data is, its own fingerprint says.
    kept["data"] = {name: entry for name, entry in kept["data"].items() if name not in ("sources", "tokenizer")}
    return {"config": kept, "data": data}


def compare_fingerprints(kept: dict[str, Any], now: dict[str, Any], *, run_dir: Path) -> None:
    """Refuse to go on with a run under other data, tokenizer or config; a key that was not there yet counts as null.

    Raises:
      UserError: every difference, with both values.
    """
    kept, now = flatten(kept), flatten(json.loads(json.dumps(now)))
    differing = [f"{key}: {kept.get(key, 'absent')} in the checkpoint, {now.get(key, 'absent')} now"
                 for key in sorted({*kept, *now}) if kept.get(key) != now.get(key)]
    if differing:
        raise UserError("\n  ".join([f"{run_dir} cannot be resumed: it was begun with other values than it is to go on"
                                     " with:", *differing])
                        + "\ntake these back, or give another run.dir (init=MODEL takes its weights along)")


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one: `a.b.c` -> what stands there."""
    if isinstance(tree, dict):
        flat = {}
        for name, entry in tree.items():
            flat |= flatten(entry, f"{prefix}{name}.")
        return flat
    return {prefix[:-1]: tree}
