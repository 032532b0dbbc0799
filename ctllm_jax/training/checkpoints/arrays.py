"""The arrays of a checkpoint, one at a time: what they are, whether they can be read, how two checkpoints differ."""

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
    """An array of one checkpoint beside that of the same name of another.

    Attributes:
      there, here: shape and dtype in the first and the second; None where it has no such array.
      norms: of both, in float64; None unless the shapes are equal.
      largest: the largest absolute difference of two numbers in the same place, NaN where one of them is; or None.
      same: equal bit for bit.
    """

    name: str
    there: str | None
    here: str | None
    norms: tuple[float, float] | None = None
    largest: float | None = None
    same: bool = False


def list_arrays(item: Path) -> dict[str, Any]:
    """`name -> what Orbax says of it (shape, dtype)` of every array of an item (`STEP/params`, `STEP/trainer`)."""
    return _flatten(ocp.PyTreeCheckpointHandler().metadata(absolute(item)).tree)


def read_array(item: Path, name: str) -> np.ndarray:
    """One array, in the dtype that it is kept in."""
    stored = {"driver": "zarr", "kvstore": {**_store(item), "path": f"{name}/"}}
    return np.asarray(ts.open(stored, open=True).result().read().result())


def find_structural_damage(step: Path, *, read: bool = True) -> list[str]:
    """What is wrong with a step that has no manifest, as far as it can be seen: a line each.

    Its parts must be there, and with `read` every array of them must come out as Orbax says it is. That a bit was
    flipped inside an array cannot be seen.
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
        # Whatever it is that Orbax and TensorStore raise on files that are not what they were.
        try:
            # Before Orbax, which would leave unfinished reads behind.
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
    """Compare structure, shapes and dtypes with what is to be restored, `{item: tree}`: Orbax casts without a word.

    Raises:
      UserError: every array that differs, with both.
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
    """Nested dicts and lists as one: `blocks.down`, `opt_state.0.mu.head`; None and what holds nothing is left out."""
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
