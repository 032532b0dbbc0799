"""The values that a resumed run must share with its start."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ctllm_jax.config.errors import UserError
from ctllm_jax.config.load import changeable_paths
from ctllm_jax.config.pretrain import PretrainConfig
from ctllm_jax.config.types import fill_absent


def make_fingerprint(config: PretrainConfig, data: dict[str, Any]) -> dict[str, Any]:
    """The values that a resumed run must share with its start: data, and every key that is not marked changeable."""
    return {"config": _fixed_keys(type(config), config.model_dump(mode="json")), "data": data}


def _fixed_keys(schema: type[PretrainConfig], values: dict[str, Any]) -> dict[str, Any]:
    """The values of a config's keys that a resumed run may not change."""
    changeable = changeable_paths(schema)

    def fixed(tree: Any, prefix: str = "") -> Any:
        if not isinstance(tree, dict):
            return tree
        return {name: fixed(entry, f"{prefix}{name}.") for name, entry in tree.items()
                if prefix + name not in changeable}

    kept = fixed(values)
    # Paths may change; the data's own fingerprint identifies the content.
    kept["data"] = {name: entry for name, entry in kept.get("data", {}).items() if name not in ("sources", "tokenizer")}
    return kept


def describe_data(data: Any) -> dict[str, Any]:
    """The data properties that all processes of a run must share: order, content, and what was read."""
    return {"data": data.fingerprint, "read": getattr(data, "report", None)}


def compare_fingerprints(kept: dict[str, Any], now: dict[str, Any], *, schema: type[PretrainConfig],
                         run_dir: Path) -> None:
    """Refuse to resume a run under other data, another tokenizer or another config.

    A key of `schema` that did not exist when the checkpoint was written has the value that `fill_absent` gives it.

    Raises:
      UserError: lists every difference, with both values.
    """
    kept = {**kept, "config": _fixed_keys(schema, fill_absent(schema, kept["config"]))}
    kept, now = flatten(json.loads(json.dumps(kept))), flatten(json.loads(json.dumps(now)))
    differing = [f"{key}: {kept.get(key, 'absent')} in the checkpoint, {now.get(key, 'absent')} now"
                 for key in sorted({*kept, *now}) if kept.get(key) != now.get(key)]
    if differing:
        raise UserError("\n  ".join([f"{run_dir} cannot be resumed: its keys had other values when it was started"
                                     ":", *differing])
                        + "\ntake these back, or give another run.dir (init=MODEL takes its weights along)")


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten nested dicts: `a.b.c` -> value."""
    if isinstance(tree, dict):
        flat = {}
        for name, entry in tree.items():
            flat |= flatten(entry, f"{prefix}{name}.")
        return flat
    return {prefix[:-1]: tree}
