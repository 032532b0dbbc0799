"""Read and write the weights of a checkpoint one parameter at a time, so that conversions never hold a whole model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from ctllm_jax.config.lora import LoraConfig
from ctllm_jax.huggingface.model import open_weights
from ctllm_jax.model.lora import merge
from ctllm_jax.storage import absolute
from ctllm_jax.training.checkpoints.checkpoint import (
    HUGGINGFACE,
    MILESTONES,
    Kept,
    find_base,
    load_adapters,
    read_tree,
    refuse_damage,
)
from ctllm_jax.training.checkpoints.files import FORMAT, write_manifest

_CHUNK = 64 << 20


@dataclass(frozen=True)
class Lazy:
    """An array that is made when it is written, and released afterwards."""

    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray]


def stream_parameters(checkpoint: Kept, *, base: str | None = None) -> Iterator[tuple[str, np.ndarray]]:
    """Yield `(path, array)` of every parameter, in its stored dtype; adapters are merged into their base in float32.

    Args:
      base: MODEL that adapters belong to, if it has moved.

    Raises:
      UserError: the base is missing, or files are damaged.
    """
    refuse_damage(checkpoint)
    if checkpoint.meta.get("lora") is None:
        if checkpoint.kind == HUGGINGFACE:
            weights = open_weights(checkpoint.path)
            yield from ((path, weights.read(path)) for path in weights.pieces)
        else:
            for path, _ in _leaves(read_tree(checkpoint)):
                yield path, read_parameter(checkpoint, path)
        return
    found = find_base(checkpoint.meta["init"], run_dir=checkpoint.run_dir, model=base)
    scale = LoraConfig(**checkpoint.meta["lora"]).scale
    adapters = {f"blocks/{name}": adapter for name, adapter in load_adapters(checkpoint).items()}
    for path, array in stream_parameters(found):
        adapter = adapters.get(path)
        yield path, array if adapter is None else np.asarray(merge(jnp.asarray(array, jnp.float32), adapter["a"],
                                                                   adapter["b"], scale=scale))


def parameter_dtypes(checkpoint: Kept, *, base: str | None = None) -> dict[str, np.dtype]:
    """The dtype of each parameter from `stream_parameters`, in its order."""
    if checkpoint.meta.get("lora") is not None:
        adapted = {f"blocks/{name}" for name in load_adapters(checkpoint)}
        found = find_base(checkpoint.meta["init"], run_dir=checkpoint.run_dir, model=base)
        return {path: np.dtype(np.float32) if path in adapted else dtype
                for path, dtype in parameter_dtypes(found).items()}
    if checkpoint.kind == HUGGINGFACE:
        weights = open_weights(checkpoint.path)
        return {path: weights.dtype(path) for path in weights.pieces}
    return {path: np.dtype(leaf.dtype) for path, leaf in _leaves(read_tree(checkpoint))}


def read_parameter(checkpoint: Kept, path: str) -> np.ndarray:
    """Read one parameter of a checkpoint in its stored dtype."""
    def nest(leaf: Any) -> Any:
        for name in reversed(path.split("/")):
            leaf = {name: leaf}
        return leaf

    wanted = nest(ocp.RestoreArgs(restore_type=np.ndarray))
    found = ocp.PyTreeCheckpointHandler().restore(absolute(checkpoint.path / "params"), args=ocp.args.PyTreeRestore(
        item=nest(0), restore_args=wanted, partial_restore=True))
    return np.asarray(jax.tree.leaves(found)[0])


def write_streamed(run_dir: Path, params: dict[str, Any], *, meta: dict[str, Any]) -> None:
    """Save weights permanently, as a milestone at `meta["step"]`; the leaves of `params` are `Lazy`.

    The result equals that of `checkpointer.write_weights` for the same arrays.
    """
    registry = ocp.type_handlers.create_type_handler_registry(
        (Lazy, LazyHandler()), (jax.Array, ocp.type_handlers.ArrayHandler()))
    path = absolute(run_dir / MILESTONES / str(meta["step"]))
    handler = ocp.CompositeCheckpointHandler(
        params=ocp.PyTreeCheckpointHandler(type_handler_registry=registry), meta=ocp.JsonCheckpointHandler())
    with ocp.Checkpointer(handler) as checkpointer:
        # Chunked, so that a process reads little more than its own part of an array.
        chunked = jax.tree.map(lambda lazy: ocp.SaveArgs(
            chunk_byte_size=_CHUNK, shard_axes=(0,) if len(lazy.shape) > 2 else ()), params)
        checkpointer.save(path, args=ocp.args.Composite(
            params=ocp.args.PyTreeSave(params, save_args=chunked), meta=ocp.args.JsonSave({**meta, "format": FORMAT})))
    write_manifest(path)


class LazyHandler(ocp.type_handlers.NumpyHandler):
    """Writes `Lazy` leaves as numpy arrays, one after the other."""

    def __init__(self):
        super().__init__(deepcopy_host_arrays=False)

    async def serialize(self, values, infos, args=None):
        """Write every leaf before this returns."""
        for index, (value, info) in enumerate(zip(values, infos, strict=True)):
            for written in await super().serialize([value.make()], [info], args and [args[index]]):
                written.result()
            del written  # it holds the array
        return []

    async def _open_and_write(self, value, tspec, ts_context):
        """Write chunk by chunk along the first dim; a single write would first copy all of them."""
        stored = await ts.open(ts.Spec(tspec), create=True, open=True, context=ts_context)
        rows = stored.chunk_layout.write_chunk.shape[0]
        for start in range(0, len(value), rows):
            part = slice(start, min(start + rows, len(value)))
            await stored[part].write(value[part], can_reference_source_data_indefinitely=True)


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, entry in tree.items():
        if isinstance(entry, dict):
            yield from _leaves(entry, f"{prefix}{name}/")
        else:
            yield prefix + name, entry
