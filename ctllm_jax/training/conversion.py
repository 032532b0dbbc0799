"""Convert a Hugging Face folder to a run directory and back: streamed, verified by reading back, and renamed into place
when complete."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from ctllm_jax.config.errors import UserError
from ctllm_jax.config.load import FORMAT, FORMAT_KEY
from ctllm_jax.config.lora import LoraConfig
from ctllm_jax.data.chat import ChatTemplate
from ctllm_jax.data.jinja_chat import read_settings
from ctllm_jax.data.tokenizer import Tokenizer, find_tokenizer
from ctllm_jax.huggingface import architecture, peft
from ctllm_jax.huggingface import model as huggingface
from ctllm_jax.huggingface.layout import VOCABULARY, pieces
from ctllm_jax.huggingface.shards import ShardReader, ShardWriter, read_tensors
from ctllm_jax.huggingface.tokenizer import SETTINGS, check_tokenizer, keep_settings, write_tokenizer
from ctllm_jax.huggingface.weights import Weights
from ctllm_jax.model.parameters import decoder_parameters, paths
from ctllm_jax.training.checkpoints.checkpoint import HUGGINGFACE, MILESTONES, Kept, load_adapters, read_model_config
from ctllm_jax.training.checkpoints.streaming import (
    Lazy,
    parameter_dtypes,
    read_parameter,
    stream_parameters,
    write_streamed,
)

Progress = Callable[[str, int, int], None]
"""`(what, bytes done, bytes in all)`."""


class Exported(NamedTuple):
    """Summary of the output: tensors, their bytes, files, dtype, ids, rows of the embedding; `notes` are hints for the
    user."""

    tensors: int
    nbytes: int
    files: int
    dtype: str
    ids: int
    rows: int
    notes: list[str]


def import_model(directory: Path, output: Path, *, template: bool = True, vocab_multiple: int | None = None,
                 progress: Progress = lambda *_: None) -> dict[str, Any]:
    """Write a run directory with one checkpoint at step 0, with the weights in their own dtypes.

    Args:
      template: keep the folder's chat template.
      vocab_multiple: rows of the embedding are cut or padded to a multiple of this; None: unchanged.

    Returns:
      `meta` of the checkpoint.

    Raises:
      UserError: the folder is not a supported model; nothing is written.
    """
    weights, meta = huggingface.open_weights(directory), huggingface.read_meta(directory)
    source = weights.config
    config = source if vocab_multiple is None else source.model_copy(update={"vocab_multiple": vocab_multiple})
    rows = None if config == source else config.padded_vocab_size
    if not template:
        meta |= {"template": None, "template_problem": None}
    elif meta["template"]:
        meta["template"]["config"]["path"] = str(output / SETTINGS)
    table = paths(decoder_parameters(config))

    def read(path: str) -> np.ndarray:
        return weights.read(path, rows=rows if path in VOCABULARY else None)

    sizes = {path: parameter.size * weights.dtype(path).itemsize for path, parameter in table.items()}

    def counted(what: str) -> Callable[[str], None]:
        done: list[int] = []

        def count(path: str) -> None:
            done.append(sizes[path])
            progress(what, sum(done), sum(sizes.values()))

        return count

    written, read_back = counted("written"), counted("read back")

    def lazy(path: str) -> Lazy:
        def make() -> np.ndarray:
            written(path)
            return np.ascontiguousarray(read(path))

        return Lazy(table[path].shape, weights.dtype(path), make)

    with _made_whole(output) as made:
        write_streamed(made, _nest({path: lazy(path) for path in table}), meta=meta)
        kept = Kept(0, "milestone", made / MILESTONES / "0", meta)
        for path in table:
            read_back(path)
            if _digest(read_parameter(kept, path)) != _digest(read(path)):
                raise RuntimeError(f"{path} is not what was written: a faulty disk?")
        tokenizer = find_tokenizer(directory)
        shutil.copyfile(tokenizer, made / tokenizer.name)
        keep_settings(made, tokenizer=tokenizer, template=str(directory) if meta["template"] else None)
        # Last: a folder is a run directory once it has its config.
        told = {FORMAT_KEY: FORMAT, "run": {"dir": str(output)}, "imported": str(directory),
                "model": config.model_dump(mode="json")}
        (made / "config.yaml").write_text(yaml.safe_dump(told, allow_unicode=True, sort_keys=False), encoding="utf-8")
    return meta


def export_model(kept: Kept, output: Path, *, tokenizer: Tokenizer, template: ChatTemplate | None,
                 dtype: str | None = None, cut: bool = False, shard_bytes: int, base: str | None = None,
                 progress: Progress = lambda *_: None) -> Exported:
    """Write a Hugging Face folder, read it back, and compare it with the checkpoint.

    Args:
      kept: the checkpoint; `tokenizer` and `template` belong to it.
      dtype: dtype of all weights; None: that of each in the checkpoint.
      cut: omit the embedding's rows beyond the tokenizer's ids.
      shard_bytes: largest size of a file in bytes.
      base: MODEL that adapters belong to, if it has moved.

    Raises:
      UserError: the format cannot express something, or the tokenizer fails its check; nothing is written then.
    """
    config = read_model_config(kept.run_dir)
    if cut:
        config = config.model_copy(update={"vocab_multiple": 1})
    rows, order = config.padded_vocab_size, pieces(config)
    dtypes = {path: np.dtype(dtype or found) for path, found in parameter_dtypes(kept, base=base).items()}
    settings = read_settings(kept.run_dir if kept.kind == HUGGINGFACE else kept.run_dir / SETTINGS)
    with _made_whole(output) as made:
        ids = write_tokenizer(made, tokenizer, template, settings=settings, context_length=config.context_length,
                              meta=kept.meta)
        notes = check_tokenizer(made, tokenizer, template)
        described = architecture.describe_architecture(config, rows=rows, dtype=str(dtypes["embedding"]), ids=ids)
        (made / architecture.CONFIG).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
        writer = ShardWriter(made, [(piece.name, piece.matrix, dtypes[piece.path]) for piece in order],
                             shard_bytes=shard_bytes)
        by_path = {path: [piece for piece in order if piece.path == path] for path in dtypes}
        digests, done = {}, 0
        for path, array in stream_parameters(kept, base=base):
            for piece in by_path[path]:
                part = array if piece.layer is None else array[piece.layer]
                if cut and path in VOCABULARY:
                    part = part[:rows] if path == "embedding" else part[:, :rows]
                part = part.astype(dtypes[path], copy=False)
                digests[piece.name] = _digest(part)
                writer.write(piece.name, piece.to_theirs(part))
                done += part.nbytes
                progress("written", done, writer.total_bytes)
            del array, part  # before the next one is read
        writer.close()
        read = Weights(made, architecture.read_model_config(made, vocab_size=config.vocab_size))
        if read.config.model_copy(update={"vocab_multiple": config.vocab_multiple}) != config:
            raise RuntimeError(f"config.json reads as another architecture than it was written of: {read.config}")
        done = 0
        for piece in order:
            done += read.reader.entries[piece.name].nbytes
            progress("read back", done, writer.total_bytes)
            if _digest(piece.to_ours(read.reader.read(piece.name))) != digests[piece.name]:
                raise RuntimeError(f"{piece.name} is not what was written: a faulty disk?")
        files = len(ShardReader(made).files)
    return Exported(len(order), writer.total_bytes, files, described["torch_dtype"], config.vocab_size, rows, notes)


def export_adapters(kept: Kept, output: Path, *, base_model: str) -> int:
    """Write a run's adapters in PEFT's format, and return the number of tensors. `base_model`: how PEFT finds the
    base."""
    adapters = load_adapters(kept)
    with _made_whole(output) as made:
        peft.write_peft(made, adapters, LoraConfig(**kept.meta["lora"]), base_model=base_model)
        written, wanted = read_tensors(made / peft.WEIGHTS), peft.to_peft(adapters)
        if written.keys() != wanted.keys() or any(_digest(written[name]) != _digest(wanted[name]) for name in wanted):
            raise RuntimeError("the adapters are not what was written: a faulty disk?")
    return len(wanted)


def check_new(output: Path) -> None:
    """Raise UserError if the output already exists."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"output={output} is there already: name a new directory")


@contextmanager
def _made_whole(output: Path) -> Iterator[Path]:
    """A temporary folder next to `output`, renamed to it on success and removed on failure."""
    check_new(output)
    made = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        made.mkdir(parents=True)
        yield made
        os.replace(made, output)
    except OSError as error:
        raise UserError(f"{output} could not be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _digest(array: np.ndarray) -> bytes:
    """Equality of dtype, shape and every bit."""
    content = hashlib.blake2b(f"{array.dtype} {array.shape}".encode())
    rows = max(1, (16 << 20) // max(1, array.nbytes // max(1, len(array))))
    for start in range(0, len(array), rows):
        content.update(np.ascontiguousarray(array[start:start + rows]).view(np.uint8))
    return content.digest()


def _nest(flat: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree
