"""Weights of a Hugging Face folder as our parameters: checked by name and shape, then read one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ctllm_jax.config.errors import UserError
from ctllm_jax.config.model import ModelConfig
from ctllm_jax.huggingface.layout import VOCABULARY, Piece, pieces
from ctllm_jax.huggingface.shards import ShardReader
from ctllm_jax.model.parameters import decoder_parameters, paths

_SHOWN = 8  # wrong tensors that a message names
_COMPARED_ROWS = 4096


class Weights:
    """The weights of a folder, whose tensors are exactly those of the architecture.

    Raises:
      UserError: tensors that are missing, of another shape, or that our decoder has no place for; names them.
    """

    def __init__(self, directory: Path, config: ModelConfig):
        self.directory, self.config = directory, config
        self.reader = ShardReader(directory)
        self.pieces: dict[str, list[Piece]] = {}
        for piece in pieces(config):
            self.pieces.setdefault(piece.path, []).append(piece)
        self._check()

    def dtype(self, path: str) -> np.dtype:
        """Dtype of a parameter: that of its tensors; float32 if its layers differ."""
        found = {self.reader.entries[piece.name].dtype for piece in self.pieces[path]}
        return found.pop() if len(found) == 1 else np.dtype(np.float32)

    def read(self, path: str, *, rows: int | None = None) -> np.ndarray:
        """A parameter, stacked over its layers, in its own dtype.

        Args:
          rows: of a vocabulary's parameter, cut or filled up with zeros; None: as many as there are.
        """
        first, *others = self.pieces[path]
        if first.layer is not None:
            stack = np.empty((len(others) + 1, *first.shape), self.dtype(path))
            for piece in (first, *others):
                stack[piece.layer] = piece.to_ours(self.reader.read(piece.name))
            return stack
        array = self.reader.read(first.name, 0, rows)
        if path in VOCABULARY and rows is not None and len(array) < rows:
            array = np.concatenate([array, np.zeros((rows - len(array), *array.shape[1:]), array.dtype)])
        return array.T if first.transposed else array

    def shapes(self) -> dict[str, Any]:
        """The tree of our parameters, as `jax.ShapeDtypeStruct`s of their own dtypes."""
        table = paths(decoder_parameters(self.config))
        return self._tree(lambda path: jax.ShapeDtypeStruct(table[path].shape, self.dtype(path)))

    def load(self, abstract: Any) -> Any:
        """All parameters as the shardings and dtypes of `abstract` want them.

        Every process reads one tensor at a time and keeps only the parts of its devices.
        """
        return self._tree(lambda path: self._place(path, reduce(getitem, path.split("/"), abstract)))

    def _tree(self, make: Callable[[str], Any]) -> dict[str, Any]:
        def build(tree: dict[str, Any], prefix: str) -> dict[str, Any]:
            return {name: build(entry, f"{prefix}{name}/") if isinstance(entry, dict) else make(prefix + name)
                    for name, entry in tree.items()}

        return build(decoder_parameters(self.config), "")

    def _place(self, path: str, wanted: jax.ShapeDtypeStruct) -> jax.Array:
        shape = wanted.shape
        placed = wanted.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
        indices = {_key(index, shape): index for index in placed.addressable_devices_indices_map(shape).values()}
        parts = {key: np.empty([stop - start for start, stop in key], wanted.dtype) for key in indices}
        for piece in self.pieces[path]:
            whole = piece.to_ours(self.reader.read(piece.name))
            for key, index in indices.items():
                if piece.layer is None:
                    parts[key][...] = whole[index]
                elif key[0][0] <= piece.layer < key[0][1]:
                    parts[key][piece.layer - key[0][0]] = whole[index[1:]]
        return jax.make_array_from_callback(shape, placed, lambda index: parts[_key(index, shape)])

    def _check(self) -> None:
        expected = {piece.name: piece.matrix for all_layers in self.pieces.values() for piece in all_layers}
        found = {name: entry.shape for name, entry in self.reader.entries.items()
                 if not name.endswith("rotary_emb.inv_freq")}  # old files keep what follows from rope_theta
        if self.config.tie_embeddings and "lm_head.weight" in found:
            found.pop("lm_head.weight")
            self._check_tied()
        problems = [f"{name}: {list(found[name]) if name in found else 'missing'} there,"
                    f" {list(shape)} by config.json" for name, shape in expected.items() if found.get(name) != shape]
        problems += [f"{name}: this architecture has no such tensor" for name in sorted(found.keys() - expected.keys())]
        if problems:
            more = len(problems) - _SHOWN
            raise UserError("\n  ".join([f"the weights of {self.directory} are not those of its config.json:",
                                         *problems[:_SHOWN], *([f"and {more} more"] if more > 0 else [])]))

    def _check_tied(self) -> None:
        entries = [self.reader.entries[name] for name in ("model.embed_tokens.weight", "lm_head.weight")]
        same = entries[0].shape == entries[1].shape
        for first in range(0, entries[0].shape[0] if same else 0, _COMPARED_ROWS):
            ours, theirs = (self.reader.read(name, first, first + _COMPARED_ROWS)
                            for name in ("model.embed_tokens.weight", "lm_head.weight"))
            same &= np.array_equal(ours, theirs)
        if not same:
            raise UserError(f"{self.directory}: tie_word_embeddings is true, but lm_head.weight is another matrix than"
                            " model.embed_tokens.weight: set it to false in config.json")


def _key(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
