"""Bits per byte of a model on held-out text: dataset directories, read as in training, or plain text by documents.

Legend: B rows, S tokens of a row.

Text is scored document by document, after the id that preceded documents in training, with the id that ends one if the
model has it, in windows of the model's length. Its interval is over documents: 1.96 standard errors of a ratio of sums.
"""

from __future__ import annotations

import hashlib
import heapq
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ctllm_jax import sharding
from ctllm_jax.config.data import DataConfig
from ctllm_jax.config.errors import UserError
from ctllm_jax.config.evaluate import HeldOutConfig
from ctllm_jax.config.load import read_values
from ctllm_jax.data.batch import Batch
from ctllm_jax.data.pretrain import open_held_out_data
from ctllm_jax.dataset.manifest import find_dataset, read_manifest
from ctllm_jax.dataset.text import Quarantine, find_files, read_documents
from ctllm_jax.evaluation import results
from ctllm_jax.evaluation.bits_per_byte import evaluate_sources, make_evaluation_step
from ctllm_jax.evaluation.figures import BITS_TASK
from ctllm_jax.evaluation.scoring import Scorer
from ctllm_jax.inference.model import Model
from ctllm_jax.losses.cross_entropy import chunked_cross_entropy
from ctllm_jax.model.decoder import Decoder, head_weights
from ctllm_jax.training.run import place_batch

logger = logging.getLogger(__name__)
_BYTES_A_TOKEN = 16
"""Upper estimate of the bytes per token."""
_AT_ONCE = 65_536
"""Number of tokens of documents that are scored together."""


class HeldOut(NamedTuple):
    """The held-out data: text files by source, and the data config of datasets."""

    texts: dict[str, list[Path]]
    datasets: DataConfig | None
    sequence_length: int


def open_held_out(model_name: str, config: HeldOutConfig, *, run_dir: Path, context_length: int) -> HeldOut:
    """The sources of the config; without any, the held-out part of the run's training data.

    Raises:
      UserError: a source is missing, or there is none for a model that is not a pretraining run.
    """
    raw = read_values(path) if (path := run_dir / "config.yaml").is_file() else {}
    if not config.sources:
        data = raw.get("data") or {}
        if "loss_on" in data or "beta" in (raw.get("loss") or {}) or data.get("kind") != "mixture":
            raise UserError(f"tasks={BITS_TASK}: {model_name} holds no text out of its training; give "
                            "held_out.sources.NAME=PATH, a dataset directory or text")
        return HeldOut({}, DataConfig(**data), raw["batch"]["sequence_length"])
    texts, datasets = {}, {}
    for name, source in config.sources.items():
        if not Path(source.path).exists():
            raise UserError(f"held_out.sources.{name}={source.path} does not exist")
        if found := find_dataset(source.path):
            datasets[name] = found
        else:
            texts[name] = find_files([source.path])
    if not datasets:
        return HeldOut(texts, None, 0)
    kept = (raw.get("data") or {}) if "isolate_documents" in (raw.get("data") or {}) else {}
    records = read_manifest(next(iter(datasets.values()))).record_tokens
    length = (raw["batch"]["sequence_length"] if kept else
              next(size for size in range(min(records, context_length), 0, -1) if records % size == 0))
    data = DataConfig(sources={name: {"path": str(path)} for name, path in datasets.items()},
                      **{key: kept[key] for key in ("isolate_documents", "mask_eod") if key in kept})
    return HeldOut(texts, data, length)


def measure_held_out(model: Model, held_out: HeldOut, config: HeldOutConfig, *, prefix_id: int, max_length: int | None,
                     batch_tokens: int) -> dict[str, dict[str, Any]]:
    """Return for each source `bits_per_byte`, `loss` (nats a token), `tokens`, `bytes`; of text also `documents`,
    `error` (the standard error of `bits_per_byte`) and `sha256`.

    Raises:
      UserError: a dataset of another tokenizer, or text that cannot be read.
    """
    figures: dict[str, dict[str, Any]] = {}
    if held_out.datasets is not None:
        figures |= _measure_datasets(model, held_out, config, batch_tokens=batch_tokens)
    scorer = Scorer(model, batch_tokens=batch_tokens, max_length=max_length)
    for name, files in held_out.texts.items():
        quarantine = Quarantine(None, max_bad=0)
        documents = (document.text for document in
                     read_documents(files, text_field=config.sources[name].text_field, quarantine=quarantine))
        figures[name] = measure_text(scorer, model, documents, prefix_id=prefix_id, max_tokens=config.max_tokens)
        measured, there = figures[name]["documents"], figures[name]["of_documents"]
        if measured < there:
            logger.warning("held_out.sources.%s: %d of %d documents are measured, a random sample of about held_out."
                           "max_tokens=%d tokens", name, measured, there, config.max_tokens)
        if not figures[name]["bytes"]:
            raise UserError(f"held_out.sources.{name}={config.sources[name].path} has no text")
    return {name: figures[name] for name in (config.sources or figures) if name in figures}


def measure_text(scorer: Scorer, model: Model, texts: Iterable[str], *, prefix_id: int,
                 max_tokens: int) -> dict[str, Any]:
    """Figures of documents, as in `measure_held_out`, and `of_documents`, the number of documents. If they have more
    than about `max_tokens` tokens, whole documents are sampled by a hash of their text."""
    digest, total = hashlib.sha256(), 0
    paid: list[tuple[float, int]] = []
    drawn, of_documents = _draw(texts, model.tokenizer, max_tokens)
    for texts_of_batch in _batches(drawn):
        rows = model.tokenizer.encode_batch(texts_of_batch)
        ends = [] if model.stop_id is None else [model.stop_id]
        requests, owners = [], []
        for owner, ids in enumerate(rows):
            tokens = [*ids, *ends]
            total += len(tokens)
            for start in range(0, len(tokens), scorer.max_length):
                requests.append(([prefix_id] if start == 0 else tokens[start - 1:start],
                                 tokens[start:start + scorer.max_length]))
                owners.append(owner)
        nats = [0.0] * len(rows)
        for owner, score in zip(owners, scorer.score(requests), strict=True):
            nats[owner] -= score.logp
        for text, cost in zip(texts_of_batch, nats, strict=True):
            digest.update(text.encode() + b"\0")
            paid.append((cost / math.log(2), len(text.encode())))
    bits, size = (math.fsum(each[place] for each in paid) for place in (0, 1))
    ratio = bits / size if size else 0.0
    error = None
    if len(paid) > 1 and size:
        squares = math.fsum((cost - ratio * length) ** 2 for cost, length in paid)
        error = math.sqrt(squares * len(paid) / (len(paid) - 1)) / size
    return {"bits_per_byte": ratio, "loss": bits * math.log(2) / max(total, 1), "tokens": total, "bytes": int(size),
            "documents": len(paid), "of_documents": of_documents, "error": error, "sha256": digest.hexdigest()}


def _draw(texts: Iterable[str], tokenizer: Any, max_tokens: int) -> tuple[list[str], int]:
    """The texts with the smallest hashes that together have about `max_tokens` tokens, in their order, and the number
    of all texts. Memory holds only about that many tokens."""
    kept: list[tuple[int, int, str]] = []  # a heap: the largest hash first
    size = count = 0
    for index, text in enumerate(filter(None, texts)):
        count += 1
        key = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8, key=b"evaluated").digest(), "little")
        heapq.heappush(kept, (-key, index, text))
        size += len(text.encode())
        while size - len(kept[0][2].encode()) > _BYTES_A_TOKEN * max_tokens:
            size -= len(heapq.heappop(kept)[2].encode())
    left, chosen = max_tokens, []
    for _, index, text in sorted(kept, reverse=True):
        if left <= 0:
            break
        left -= len(tokenizer.encode(text)) + 1
        chosen.append((index, text))
    return [text for _, text in sorted(chosen)], count


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Documents in lists of about `_AT_ONCE` tokens, assuming at most one token per byte."""
    batch, size = [], 0
    for text in texts:
        if text:
            batch.append(text)
            size += len(text.encode()) // 3
        if size >= _AT_ONCE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _measure_datasets(model: Model, held_out: HeldOut, config: HeldOutConfig, *,
                      batch_tokens: int) -> dict[str, dict[str, Any]]:
    data, length = held_out.datasets, held_out.sequence_length
    for name, source in data.sources.items():
        if found := find_dataset(source.path):
            made_with = read_manifest(found).tokenizer.sha256
            if made_with != model.tokenizer.sha256:
                raise UserError(f"held_out.sources.{name}={source.path} was made with another tokenizer than the "
                                f"model's (sha256 {made_with[:12]}… and {model.tokenizer.sha256[:12]}…): give the text "
                                "itself")
    parts = 1 if model.mesh is None else sharding.axis_size(model.mesh, sharding.BATCH_AXES)
    rows = max(1, batch_tokens // length // parts) * parts
    sources = open_held_out_data(data, split=config.split, sequence_length=length, rows=rows,
                                 max_tokens=config.max_tokens, vocab_size=model.decoder.config.vocab_size)
    table = jnp.zeros(model.decoder.config.padded_vocab_size, jnp.float32)
    known = model.tokenizer.token_bytes()
    table = table.at[:len(known)].set(known.astype("float32"))

    def place(batch: Batch) -> Batch:
        if model.mesh is None:
            return batch
        local = sharding.local_rows(model.mesh, rows)
        return place_batch(jax.tree.map(lambda x: x[local], batch), sharding=sharding.batch_sharding(model.mesh),
                           rows=rows)

    step = _make_step(model.decoder, table, model.mesh, data.isolate_documents)
    figures = evaluate_sources(step, model.params, sources, place=place)
    return {name: {**each, "tokens": int(each["tokens"]), "bytes": int(each.get("bytes", 0))}
            for name, each in figures.items()}


def _make_step(decoder: Decoder, table: jax.Array, mesh: Any, isolated: bool) -> Callable:
    return make_evaluation_step(partial(_sum_loss, decoder, table, mesh, isolated),
                                out_sharding=None if mesh is None else sharding.replicated(mesh))


def _sum_loss(decoder: Decoder, table: jax.Array, mesh: Any, isolated: bool, params: Any, frozen: Any,
              batch: Batch) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """(nats, weight, {bytes}) of a batch, as the loss of pretraining counts them."""
    segment_ids_BS = batch.segment_ids if isolated else None
    hidden_BSD, _ = decoder.apply({"params": params}, batch.tokens, segment_ids_BS, batch.positions)
    loss, weight, _ = chunked_cross_entropy(
        hidden_BSD, head_weights(params), batch.targets, batch.loss_weights,
        vocab_size=decoder.config.vocab_size, mesh=mesh)
    return loss, weight, {"bytes": jnp.sum(table[batch.targets] * batch.loss_weights)}


def to_result(figures: Mapping[str, Mapping[str, Any]], described: Mapping[str, Any], *, date: float) -> dict[str, Any]:
    """Figures in the layout of lm-eval's results, a task `bits_per_byte_NAME` for each source."""
    found, intervals = {}, {}
    for name, each in figures.items():
        task, metric = f"{BITS_TASK}_{name}", f"{BITS_TASK},none"
        error = each.get("error")
        found[task] = {"alias": name, metric: each["bits_per_byte"], f"{BITS_TASK}_stderr,none": error or "N/A",
                       "loss,none": each["loss"],
                       **({"sample_len": each["documents"]} if "documents" in each else {})}
        if error:
            intervals[task] = {metric: {"low": each["bits_per_byte"] - results.Z_95 * error,
                                        "high": each["bits_per_byte"] + results.Z_95 * error, "method": "stderr"}}
    return {"results": found, "group_subtasks": {}, "configs": {}, "n-shot": {}, "date": date,
            results.OURS: {**described, "intervals": intervals, "chance": {}, "held_out": dict(figures)}}
