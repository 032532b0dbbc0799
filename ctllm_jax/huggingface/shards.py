"""Files of safetensors, read and written one tensor at a time. No jax here, and no PyTorch.

A file is 8 bytes with the length of its header, the header (JSON: name -> dtype, shape, place), and the bytes of the
tensors, little-endian and row by row. Several files have an index, `weight_map`: name -> file.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from ctllm_jax.config.errors import UserError
from ctllm_jax.huggingface.architecture import read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16)}
"""A dtype's name in the header -> numpy's; weights of others (integers, 8-bit floats, double precision) are refused."""
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_LARGEST_HEADER = 100 * 2**20  # as in the reference implementation
_SAMPLE = 4096  # bytes of each tensor that are hashed to distinguish models


@dataclass(frozen=True)
class Entry:
    """Place of a tensor."""

    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


class ShardReader:
    """The tensors of a folder with one safetensors file, or with several and their index.

    Raises:
      UserError: no weights, a missing or damaged file, a tensor that the index promises and no file has.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.entries: dict[str, Entry] = {}
        self.files = _files(directory)
        for path in self.files:
            self.entries |= _read_header(path)
        is_single = self.files == [directory / SINGLE]
        promised = {} if is_single else read_json(directory / INDEX)["weight_map"]
        for name, file in promised.items():
            entry = self.entries.get(name)
            if entry is None or entry.path.name != file:
                raise UserError(f"{directory / INDEX} says that {name} is in {file}, and that file has no such tensor")

    def read(self, name: str, first: int = 0, last: int | None = None) -> np.ndarray:
        """A tensor, or the rows `first` to `last` of it: only these are read."""
        entry = self.entries[name]
        rows = slice(first, last).indices(entry.shape[0])
        row_bytes = entry.nbytes // max(1, entry.shape[0])
        shape = (max(0, rows[1] - rows[0]), *entry.shape[1:])
        array = np.fromfile(entry.path, dtype=entry.dtype, count=math.prod(shape),
                            offset=entry.offset + rows[0] * row_bytes)
        return array.reshape(shape)

    def identity(self) -> str:
        """A hash of names, shapes, dtypes and a sample of each tensor: equal for copies, different for other
        weights."""
        content = hashlib.sha256()
        for name, entry in sorted(self.entries.items()):
            content.update(json.dumps([name, entry.shape, entry.dtype.name]).encode())
            size = min(_SAMPLE, entry.nbytes)
            with open(entry.path, "rb") as file:
                file.seek(entry.offset + (entry.nbytes - size) // 2)
                content.update(file.read(size))
        return content.hexdigest()


class ShardWriter:
    """Writes tensors, in any order, into files whose layout is decided before the first one.

    Args:
      directory: an existing folder.
      tensors: `(name, shape, dtype)` of all tensors to write, in file order.
      shard_bytes: most bytes of a file; a larger tensor has a file of its own.
      single: name of the file where one is enough.
    """

    def __init__(self, directory: Path, tensors: Iterable[tuple[str, tuple[int, ...], np.dtype]], *, shard_bytes: int,
                 single: str = SINGLE):
        shards: list[list[tuple[str, tuple[int, ...], np.dtype]]] = [[]]
        size = self.total_bytes = 0
        for name, shape, dtype in tensors:
            nbytes = math.prod(shape) * dtype.itemsize
            if shards[-1] and size + nbytes > shard_bytes:
                shards.append([])
                size = 0
            shards[-1].append((name, shape, dtype))
            size += nbytes
            self.total_bytes += nbytes
        self.entries: dict[str, Entry] = {}
        self._open: dict[Path, BinaryIO] = {}
        self._missing = {name for shard in shards for name, _, _ in shard}
        for number, shard in enumerate(shards, 1):
            many = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            self._begin(directory / (many if len(shards) > 1 else single), shard)
        if len(shards) > 1:
            index = {"metadata": {"total_size": self.total_bytes},
                     "weight_map": {name: entry.path.name for name, entry in self.entries.items()}}
            (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def write(self, name: str, array: np.ndarray) -> None:
        """Write a tensor to its place. The array must have the declared shape and dtype."""
        entry = self.entries[name]
        assert (array.shape, array.dtype) == (entry.shape, entry.dtype), (name, array.shape, array.dtype)
        file = self._open[entry.path]
        file.seek(entry.offset)
        # Row by row of the first dim: a transposed view is never copied whole.
        step = max(1, (16 << 20) // max(1, entry.nbytes // max(1, entry.shape[0])))
        for start in range(0, entry.shape[0], step):
            file.write(np.ascontiguousarray(array[start:start + step]).view(np.uint8).data)
        self._missing.remove(name)

    def close(self) -> None:
        """Everything on the disk; all tensors must have been written."""
        assert not self._missing, sorted(self._missing)
        for file in self._open.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()

    def _begin(self, path: Path, tensors: list[tuple[str, tuple[int, ...], np.dtype]]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, shape, dtype in tensors:
            end = offset + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # so that the tensors are aligned
        file = open(path, "wb")  # noqa: SIM115 - closed by `close`
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
        self._open[path] = file
        for name, shape, dtype in tensors:
            self.entries[name] = Entry(path, 8 + len(text) + header[name]["data_offsets"][0], shape, dtype)


def write_tensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """A safetensors file of tensors that are in memory."""
    announced = [(name, array.shape, array.dtype) for name, array in tensors.items()]
    writer = ShardWriter(path.parent, announced, shard_bytes=sum(array.nbytes for array in tensors.values()) + 1,
                         single=path.name)
    for name, array in tensors.items():
        writer.write(name, array)
    writer.close()


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a safetensors file. Raises UserError if it is damaged."""
    return {name: np.fromfile(path, dtype=entry.dtype, count=math.prod(entry.shape), offset=entry.offset)
            .reshape(entry.shape) for name, entry in _read_header(path).items()}


def _files(directory: Path) -> list[Path]:
    if (directory / SINGLE).is_file():
        return [directory / SINGLE]
    if (directory / INDEX).is_file():
        weight_map = read_json(directory / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{directory / INDEX} has no weight_map")
        for name, file in weight_map.items():
            if not isinstance(file, str) or Path(file).name != file:
                raise UserError(f"{directory / INDEX}: weight_map.{name}={file!r} must be the name of a file beside it")
        files = [directory / name for name in sorted(set(weight_map.values()))]
        missing = [path.name for path in files if not path.is_file()]
        if missing:
            raise UserError(f"{directory} is not whole: {', '.join(missing)} of {INDEX} "
                            f"{'is' if len(missing) == 1 else 'are'} missing")
        return files
    torch = sorted(path.name for path in directory.glob("pytorch_model*"))
    hint = f"; {torch[0]} is PyTorch's format: load it there, and save_pretrained writes safetensors" if torch else ""
    raise UserError(f"{directory} has no weights: neither {SINGLE} nor {INDEX}{hint}")


def _read_header(path: Path) -> dict[str, Entry]:
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(_LARGEST_HEADER, size - 8):
            raise UserError(f"{path} is not a safetensors file, or it is cut short")
        try:
            header = json.loads(file.read(length))
        except ValueError:
            raise UserError(f"{path} is not a safetensors file: its header is no JSON") from None
    if not isinstance(header, dict):
        raise UserError(f"{path} is not a safetensors file: its header is no JSON object")
    header.pop("__metadata__", None)
    return {name: _read_entry(path, name, given, start=8 + length, size=size) for name, given in header.items()}


def _read_entry(path: Path, name: str, given: Any, *, start: int, size: int) -> Entry:
    """The header entry of one tensor, whose bytes are between `start` and `size`."""
    given = given if isinstance(given, dict) else {}
    dtype, shape, offsets = (given.get(key) for key in ("dtype", "shape", "data_offsets"))
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or not all(type(number) is int and number >= 0 for number in numbers):
            raise UserError(f"{path} is damaged: its header gives {name} no shape and place")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise UserError(f"{path}: {name} is of the dtype {dtype}; there are {', '.join(DTYPES)}")
    entry = Entry(path, start + (offsets[0] if offsets else 0), tuple(shape), DTYPES[dtype])
    if len(offsets) != 2 or entry.offset + entry.nbytes > size or entry.nbytes != offsets[1] - offsets[0]:
        raise UserError(f"{path} is cut short or damaged: {name} is not all there")
    return entry
