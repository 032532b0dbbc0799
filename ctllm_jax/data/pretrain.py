"""Batches of pretraining: from a config to a `BatchSource`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ctllm_jax.config.data import DataConfig
from ctllm_jax.config.errors import UserError
from ctllm_jax.data.batch import Batch, BatchSource, checked_rows, padding_row, stack_rows
from ctllm_jax.data.synthetic import SyntheticData

if TYPE_CHECKING:
    from ctllm_jax.data.sources import OpenedSource
    from ctllm_jax.dataset.damage import DamageLog


def open_training_data(config: DataConfig, *, sequence_length: int, rows: int, seed: int, vocab_size: int,
                       damage: DamageLog | None = None) -> BatchSource:
    """The training data of a config.

    `rows` is the global batch (B), `sequence_length` is S, `vocab_size` the model's. With `damage`, unreadable records
    are replaced and recorded there; without, they raise. Raises UserError if a source cannot be read, or does not match
    the model or the other sources.
    """
    if config.kind == "synthetic":
        return SyntheticData(sequence_length=sequence_length, rows=rows, seed=seed, vocab_size=vocab_size,
                             isolate_documents=config.isolate_documents, mask_eod=config.mask_eod)
    return MixtureData(config, sequence_length=sequence_length, rows=rows, seed=seed, vocab_size=vocab_size,
                       damage=damage)


def open_held_out_data(config: DataConfig, *, split: str, sequence_length: int, rows: int, max_tokens: int,
                       vocab_size: int, damage: DamageLog | None = None) -> dict[str, Iterable[Batch]]:
    """For each source, batches [rows, S] of its split `split`, in order from its first token.

    Each can be iterated repeatedly, and has a length. The last batch is filled up with rows of segment 0. At most
    `max_tokens` tokens of a source are read, but at least one row. Synthetic data has no sources.
    """
    if config.kind == "synthetic":
        return {}
    from ctllm_jax.data.packing import PackedRows

    opened = _open_sources(config, sequence_length=sequence_length, vocab_size=vocab_size)
    held_out = {}
    for name, source in opened.items():
        packed = PackedRows(source.dataset.split(split, damage=damage), sequence_length,
                            isolate_documents=config.isolate_documents, mask_eod=config.mask_eod)
        held_out[name] = HeldOutData(packed, rows=rows, sequence_length=sequence_length,
                                     count=min(len(packed), max(1, max_tokens // sequence_length)))
    return held_out


class HeldOutData:
    """The first `count` rows of a split, in order, as batches [rows, S]; the last is filled up with `padding`."""

    def __init__(self, packed: Sequence[Batch], *, rows: int, sequence_length: int, count: int,
                 padding: Batch | None = None):
        self._packed = packed
        self._rows = rows
        self._padding = padding_row(sequence_length) if padding is None else padding
        self._count = count

    def __len__(self) -> int:
        return -(-self._count // self._rows)

    def __iter__(self) -> Iterator[Batch]:
        for start in range(0, self._count, self._rows):
            rows = [self._packed[index] for index in range(start, min(start + self._rows, self._count))]
            yield stack_rows(rows + [self._padding] * (self._rows - len(rows)))


class MixtureData:
    """Dataset directories mixed by weight, read by Grain. A `BatchSource`."""

    def __init__(self, config: DataConfig, *, sequence_length: int, rows: int, seed: int, vocab_size: int,
                 damage: DamageLog | None = None):
        from ctllm_jax.data.mixture import Mixture
        from ctllm_jax.data.packing import PackedRows
        from ctllm_jax.data.tokenizer import load_tokenizer
        from ctllm_jax.dataset.manifest import manifest_sha256

        opened = _open_sources(config, sequence_length=sequence_length, vocab_size=vocab_size)
        packed = {name: PackedRows(source.dataset.split(source.split, damage=damage), sequence_length,
                                   isolate_documents=config.isolate_documents, mask_eod=config.mask_eod)
                  for name, source in opened.items()}
        weights = {name: config.sources[name].weight for name in opened}
        self.damage = damage
        self._config = config
        self._sequence_length = sequence_length
        self._rows = rows
        self._vocab_size = vocab_size
        self._mixture = Mixture(packed, weights, rows=rows, seed=seed)
        first = next(iter(opened.values())).dataset
        manifest = first.manifest
        self.tokenizer_path: Path | None = first.tokenizer_path
        self.eod_id: int | None = manifest.eod_id
        self.token_bytes: np.ndarray | None = np.zeros(vocab_size, np.int32)
        self.token_bytes[:manifest.tokenizer.vocab_size] = load_tokenizer(first.tokenizer_path).token_bytes()
        self.fingerprint: dict[str, Any] = {
            "kind": "mixture", "seed": seed, "sequence_length": sequence_length, "rows": rows,
            "isolate_documents": config.isolate_documents, "mask_eod": config.mask_eod,
            "tokenizer_sha256": manifest.tokenizer.sha256, "eod_id": manifest.eod_id,
            "order_sha256": self._mixture.order_sha256(),
            "sources": {name: {"manifest_sha256": manifest_sha256(source.dataset.directory), "split": source.split,
                               "weight": weights[name]} for name, source in opened.items()}}

    def iterate(self, start_step: int, *, local_rows: Sequence[int]) -> Iterator[Batch]:
        """Batches of these rows from data step `start_step` on, prefetched by threads or worker processes."""
        import grain

        local = checked_rows(local_rows, self._rows)
        config = self._config
        batches = self._mixture.batches(local_rows=local, start_step=start_step)
        dataset = batches.to_iter_dataset(grain.ReadOptions(num_threads=config.threads,
                                                            prefetch_buffer_size=max(config.threads, config.prefetch)))
        if config.workers:
            from absl import flags

            # Grain reads absl flags in the workers, which nobody parses outside an absl program.
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()
            dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(
                num_workers=config.workers, per_worker_buffer_size=-(-config.prefetch // config.workers)))

        def closing() -> Iterator[Batch]:
            iterator = iter(dataset)
            try:
                for batch in iterator:
                    # A worker's arrays are in shared memory that it reuses; our copies must outlive the iterator.
                    yield Batch(*map(np.array, batch[:5])) if config.workers else batch
            finally:
                iterator.close()

        return closing()

    def held_out(self, *, rows: int, split: str, max_tokens: int) -> dict[str, Iterable[Batch]]:
        """See `open_held_out_data`."""
        return open_held_out_data(self._config, split=split, sequence_length=self._sequence_length, rows=rows,
                                  max_tokens=max_tokens, vocab_size=self._vocab_size, damage=self.damage)

    def tokens_per_source(self, steps: int) -> dict[str, int]:
        """Tokens drawn from each source in the first `steps` steps, by arithmetic."""
        return {name: count * self._sequence_length for name, count in self._mixture.rows_per_source(steps).items()}

    def tokens_at(self, steps: int) -> int:
        """See `BatchSource`."""
        return steps * self._rows * self._sequence_length

    def epochs(self, steps: int) -> dict[str, float]:
        """Number of epochs of each source after `steps` steps."""
        return {name: count / self._mixture.sizes[name] for name, count in self._mixture.rows_per_source(steps).items()}


def _open_sources(config: DataConfig, *, sequence_length: int, vocab_size: int) -> dict[str, OpenedSource]:
    """The sources of a config by name, checked against each other and the model."""
    from ctllm_jax.data.sources import check_room, open_source
    from ctllm_jax.data.tokenizer import load_tokenizer

    opened = {name: open_source(name, source, config, sequence_length=sequence_length)
              for name, source in config.sources.items()}
    check_room([source.dataset for source in opened.values()], config)
    first_name, (first, _) = next(iter(opened.items()))
    for name, (dataset, _) in opened.items():
        manifest, wanted = dataset.manifest, first.manifest
        if manifest.tokenizer.sha256 != wanted.tokenizer.sha256:
            raise UserError(f"data.sources.{name} and data.sources.{first_name} were made with different tokenizers "
                            f"(sha256 {manifest.tokenizer.sha256[:12]}… of {dataset.directory}, "
                            f"{wanted.tokenizer.sha256[:12]}… of {first.directory}): prepare both with one")
        if manifest.eod_id != wanted.eod_id:
            raise UserError(f"data.sources.{name} ends documents with id {manifest.eod_id}, data.sources.{first_name} "
                            f"with {wanted.eod_id}: prepare both with one eod_id")
        if manifest.id_count > vocab_size:
            raise UserError(f"data.sources.{name} has ids up to {manifest.id_count - 1} (tokenizer of "
                            f"{manifest.tokenizer.vocab_size} pieces, eod_id {manifest.eod_id}): model.vocab_size="
                            f"{vocab_size} must be at least {manifest.id_count}")
        if hashlib.sha256(dataset.tokenizer_path.read_bytes()).hexdigest() != manifest.tokenizer.sha256:
            raise UserError(f"{dataset.tokenizer_path} is not the tokenizer that the manifest beside it names: it was "
                            "changed after the data was prepared")
    if config.tokenizer is not None and load_tokenizer(config.tokenizer).sha256 != first.manifest.tokenizer.sha256:
        raise UserError(f"data.tokenizer={config.tokenizer} is not the tokenizer that data.sources.{first_name} "
                        f"({first.directory}) was made with: leave it out, or prepare the data with it")
    return opened
