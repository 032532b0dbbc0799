"""The arrays of a checkpoint, one at a time: shapes and dtypes, readability, and differences between two
checkpoints."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from ctllm_jax.config.errors import UserError
from ctllm_jax.storage import absolute, is_remote
from ctllm_jax.training.checkpoints.files import STEP_METADATA


@dataclass(frozen=True)
class Difference:
    """Comparison of two arrays of the same name in two checkpoints.

    Attributes:
      there, here: shape and dtype in the first and the second; None if it has no such array.
      norms: norms of both, in float64; None unless the shapes are equal.
      largest: the largest absolute difference of two elements, NaN if one of them is NaN; or None.
      same: equal bit for bit.
    """

    name: str
    there: str | None
    here: str | None
    norms: tuple[float, float] | None = None
    largest: float | None = None
    same: bool = False


def list_arrays(item: Path) -> dict[str, Any]:
    """`name -> Orbax's metadata (shape, dtype)` of every array of an item (`STEP/params`, `STEP/trainer`)."""
    return _flatten(ocp.PyTreeCheckpointHandler().metadata(absolute(item)).tree)


def read_array(item: Path, name: str) -> np.ndarray:
    """Read one array in its stored dtype."""
    stored = {"driver": "zarr", "kvstore": {**_store(item), "path": f"{name}/"}}
    return np.asarray(ts.open(stored, open=True).result().read().result())


def find_structural_damage(step: Path, *, read: bool = True) -> list[str]:
    """Return the detectable problems of a step without a manifest, one line each.

    Its parts must exist, and with `read` every array must have the shape and dtype of Orbax's metadata. A flipped bit
    inside an array cannot be detected.
    """
    problems = []
    try:
        json.loads((step / "meta" / "metadata").read_text(encoding="utf-8"))
        expected = json.loads((step / STEP_METADATA).read_text(encoding="utf-8"))["item_handlers"]
    except (OSError, ValueError, KeyError) as error:
        return [f"{getattr(error, 'filename', None) or step}: cannot be read ({error})"]
    for item in ("params", "trainer"):
        if item not in expected:
            continue
        # Orbax and TensorStore raise various errors for damaged files.
        try:
            # Checked before Orbax reads, which would leave unfinished reads.
            ts.KvStore.open(_store(step / item)).result().list().result()
            arrays = list_arrays(step / item)
        except Exception as error:
            problems.append(f"{item}: its list of arrays cannot be read ({_first_line(error)})")
            continue
        for name, entry in arrays.items() if read else ():
            try:
                array = read_array(step / item, name)
            except Exception as error:
                problems.append(f"{item}: {name} cannot be read ({_first_line(error)})")
                continue
            if (array.shape, array.dtype) != (tuple(entry.shape), np.dtype(entry.dtype)):
                problems.append(f"{item}: {name} is {array.dtype} {list(array.shape)}, and should be {_say(entry)}")
    return problems


def refuse_other_arrays(step: Path, wanted: dict[str, Any]) -> None:
    """Compare structure, shapes and dtypes with the expected ones, `{item: tree}`, because Orbax casts silently.

    Raises:
      UserError: lists every array that differs, with both.
    """
    differing = []
    for item, tree in wanted.items():
        there = {name: _say(entry) for name, entry in list_arrays(step / item).items()}
        here = {".".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path):
                _say(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
        differing += [f"{item}.{name}: {there.get(name, 'absent')} there, {here.get(name, 'absent')} here"
                      for name in sorted({*there, *here}) if there.get(name) != here.get(name)]
    if differing:
        raise UserError("\n  ".join([f"what is kept in {step} is not what this run would go on with:", *differing]))


def compare_arrays(first: Path, second: Path, *, item: str) -> Iterator[Difference]:
    """Every array of an item of two steps, by name; at most two of them in memory."""
    there, here = list_arrays(first / item), list_arrays(second / item)
    for name in sorted({*there, *here}):
        said = [_say(side[name]) if name in side else None for side in (there, here)]
        if None in said or there[name].shape != here[name].shape:
            yield Difference(name, *said)
            continue
        ours, other = read_array(first / item, name), read_array(second / item, name)
        same = ours.dtype == other.dtype and ours.tobytes() == other.tobytes()
        wide, other_wide = ours.astype(np.float64), other.astype(np.float64)
        norms = float(np.linalg.norm(wide)), float(np.linalg.norm(other_wide))
        yield Difference(name, *said, norms, 0.0 if same else float(np.max(np.abs(wide - other_wide), initial=0)), same)


def _store(item: Path) -> dict[str, Any]:
    return {"driver": "ocdbt", "base": f"{item}/" if is_remote(item) else f"file://{item.absolute()}/"}


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten nested dicts and lists: `blocks.down`, `opt_state.0.mu.head`; None and empty containers are left out."""
    if isinstance(tree, dict | list | tuple):
        entries = tree.items() if isinstance(tree, dict) else enumerate(tree)
        flat: dict[str, Any] = {}
        for name, entry in entries:
            flat |= _flatten(entry, f"{prefix}{name}.")
        return flat
    return {prefix[:-1]: tree} if hasattr(tree, "shape") else {}


def _say(entry: Any) -> str:
    return f"{np.dtype(entry.dtype)} {list(entry.shape)}"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
