"""Batches of preference pairs: from files of pairs to a `BatchSource`.

Both answers of a pair, each after its prompt, are segments of one row. B rows of a batch, S tokens of a row, M
segments of a row, N pairs; answer 2i is the chosen one of pair i, 2i + 1 the rejected one.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ctllm_jax.config.dpo import PairDataConfig
from ctllm_jax.config.errors import UserError
from ctllm_jax.data.batch import Batch, Preference, checked_rows, padding_row, stack_rows
from ctllm_jax.data.chat import ChatTemplate, Rendered
from ctllm_jax.data.epochs import PackedEpochs, best_fit
from ctllm_jax.data.pairs import Pair, read_pairs
from ctllm_jax.data.pretrain import HeldOutData
from ctllm_jax.data.sft import (
    Examples,
    content_sha256,
    draw_held_out,
    is_held_out,
    joined,
    pack_row,
    render_each,
    select,
)
from ctllm_jax.data.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


class PreferenceData:
    """Pairs packed into rows. A `BatchSource`.

    Steps, rows and epochs are those of `PackedEpochs`, with the training pairs as items. `num_segments` is
    M, twice the largest number of pairs in a row, the same for every batch. `answers` and `reference_logps` float32
    [2N], zeros until they are set, cover all pairs, including held-out ones. `report` describes what was read, left out
    and kept, as JSON. `pairs` are those that `answers` were made from, if requested.
    """

    def __init__(self, config: PairDataConfig, *, template: ChatTemplate, tokenizer: Tokenizer, sequence_length: int,
                 context_length: int, rows: int, seed: int, vocab_size: int, keep_pairs: bool = False):
        """
        Args:
          context_length: largest number of tokens of a prompt with its answer.
          rows: B, the rows of the global batch.
        """
        self.template = template
        self.group_names = sorted(set(config.groups.values()))
        self.answers, self.report, pairs = tokenize_sources(config, template, sequence_length=sequence_length,
                                                            context_length=context_length)
        self.pairs: list[Pair] | None = pairs if keep_pairs else None
        if (largest := int(self.answers.ids.max())) >= vocab_size:
            raise UserError(f"the pairs have ids up to {largest}: model.vocab_size={vocab_size} must be at least "
                            f"{largest + 1}")
        self._names = list(config.sources)
        self._groups = np.array([self.group_names.index(config.groups[name]) for name in self._names], np.int32)
        self._sequence_length, self._rows = sequence_length, rows
        self._lengths = self.answers.lengths.reshape(-1, 2).sum(axis=1)
        apart = held_out_pairs(self.answers, config.held_out)
        if apart.all():
            raise UserError(f"data.held_out={config.held_out} leaves none of {len(apart)} pairs to train on")
        self._trained, self._apart = np.flatnonzero(~apart), np.flatnonzero(apart)
        self._count(config)
        self._packed = PackedEpochs(self._lengths[self._trained], sequence_length, rows=rows, seed=seed,
                                    most=config.pairs_per_row)
        self.rows_per_epoch, self.steps_per_epoch = self._packed.rows_per_epoch, self._packed.steps_per_epoch
        self.steps = config.epochs * self.steps_per_epoch
        self.num_segments = 2 * self._packed.most_in_a_row
        self.reference_logps = np.zeros(len(self.answers.sources), np.float32)
        self.tokenizer_path: Path | None = tokenizer.path
        self.token_bytes: np.ndarray | None = None
        self.eod_id: int | None = template.stop_ids[0] if template.stop_ids else None
        filled = self._lengths[self._trained].sum() / (self.rows_per_epoch * sequence_length)
        self.report |= {"rows_per_epoch": self.rows_per_epoch, "steps_per_epoch": self.steps_per_epoch,
                        "num_segments": self.num_segments, "filled": round(filled, 6)}
        content = hashlib.sha256()
        for array in self.answers:
            content.update(np.ascontiguousarray(array))
        self.identity: dict[str, Any] = {"tokenizer_sha256": tokenizer.sha256, "template": template.fingerprint(),
                                         "sequence_length": sequence_length, "pairs_sha256": content.hexdigest()}
        self._held_out_share = config.held_out
        self.reference_identity: dict[str, Any] | None = None

    @property
    def fingerprint(self) -> dict[str, Any]:
        """See `BatchSource`; includes the identity of the reference once it is set."""
        return {"kind": "preference", "seed": self._packed.seed, "rows": self._rows, "groups": self.group_names,
                "pairs_per_row": self.num_segments // 2, "held_out": self._held_out_share, **self.identity,
                "reference": self.reference_identity}

    def __len__(self) -> int:
        """N, held-out pairs included."""
        return len(self._lengths)

    def all_rows(self) -> list[np.ndarray]:
        """Every pair once, int64 for each row: the rows of the first epoch, then those of held-out pairs."""
        return [*(self._trained[self._packed.items_at(0, place)] for place in range(self.rows_per_epoch)),
                *self._rows_of(self._apart)]

    def items(self, step: int, row: int) -> np.ndarray:
        """The pairs of a row of a step, int64; none in a row of padding."""
        return self._trained[self._packed.items(step, row)]

    def row(self, step: int, row: int) -> Batch:
        """One row of one step: a `Batch` of [S] and [M] arrays."""
        return self.pack(self.items(step, row))

    def pack(self, pairs: Sequence[int]) -> Batch:
        """Return a row of these pairs, answer after answer; without pairs, a row of padding."""
        pair_ids_M, is_chosen_M = np.zeros(self.num_segments, np.int32), np.zeros(self.num_segments, bool)
        group_M, reference_M = np.zeros_like(pair_ids_M), np.zeros(self.num_segments, np.float32)
        preference = Preference(pair_ids_M, is_chosen_M, group_M, reference_M)
        if not len(pairs):
            return padding_row(self._sequence_length)._replace(preference=preference)
        answers = np.asarray([answer for pair in pairs for answer in (2 * pair, 2 * pair + 1)])
        count = len(answers)
        pair_ids_M[:count] = np.arange(count) // 2 + 1
        is_chosen_M[:count] = answers % 2 == 0
        group_M[:count] = self._groups[self.answers.sources[answers]]
        reference_M[:count] = self.reference_logps[answers]
        return pack_row(self.answers, answers, self._sequence_length)._replace(preference=preference)

    def iterate(self, start_step: int, *, local_rows: Sequence[int]) -> Iterator[Batch]:
        """Batches of these rows from data step `start_step` on, without end."""
        local = checked_rows(local_rows, self._rows)

        def batches():
            for step in itertools.count(start_step):
                yield stack_rows([self.row(step, int(row)) for row in local])

        return batches()

    def held_out(self, *, rows: int, split: str, max_tokens: int) -> dict[str, Iterable[Batch]]:
        """The pairs of `config.held_out`, or a sample of them, by source; `split` is ignored. Batches contain the
        current `reference_logps`."""
        del split
        found: dict[str, Iterable[Batch]] = {}
        for index, name in enumerate(self._names):
            apart = self._apart[self.answers.sources[2 * self._apart] == index]
            packed = self._rows_of(draw_held_out(self.answers, apart, 2, max_tokens=max_tokens, source=name))
            if packed:
                found[name] = HeldOutData(_Rows(self, packed), rows=rows, sequence_length=self._sequence_length,
                                          count=len(packed), padding=self.pack([]))
        return found

    def _rows_of(self, pairs: np.ndarray) -> list[np.ndarray]:
        """Pack these pairs into rows, longest first, with at most as many per row as in training."""
        order = pairs[np.argsort(-self._lengths[pairs], kind="stable")]
        packing = best_fit(self._lengths[order], self._sequence_length, most=self.num_segments // 2)
        by_row = np.argsort(packing.row_of_rank, kind="stable")
        ends = np.cumsum(np.bincount(packing.row_of_rank, minlength=packing.rows))
        return np.split(order[by_row], ends[:-1]) if len(order) else []

    def _count(self, config: PairDataConfig) -> None:
        """Add to the report the training and held-out counts of each source and group."""
        groups: dict[str, dict[str, int]] = {}
        learned = np.add.reduceat(self.answers.weights > 0, self.answers.offsets[:-1]).reshape(-1, 2).sum(axis=1)
        for index, name in enumerate(self._names):
            own, apart = (chosen[self.answers.sources[2 * chosen] == index] for chosen in (self._trained, self._apart))
            figures = {"pairs": len(own), "tokens": int(self._lengths[own].sum()),
                       "learned_tokens": int(learned[own].sum())}
            answers = np.ravel([2 * apart, 2 * apart + 1])
            self.report["sources"][name] |= {**figures, "held_out": len(apart),
                                             "held_out_sha256": content_sha256(select(self.answers, answers))}
            group = groups.setdefault(config.groups[name], dict.fromkeys(figures, 0))
            for figure, value in figures.items():
                group[figure] += value
            logger.info("data.sources.%s: %s", name, self.report["sources"][name])
        self.report |= {"groups": groups, "held_out": len(self._apart)}

    def tokens_per_source(self, steps: int) -> dict[str, int]:
        """Tokens of each source's pairs, prompts twice, in the first `steps` steps; padding belongs to none."""
        tokens = np.bincount(self.answers.sources[2 * self._trained], minlength=len(self._names),
                             weights=self._packed.times_seen(steps) * self._lengths[self._trained])
        return {name: int(count) for name, count in zip(self._names, tokens, strict=True)}

    def tokens_at(self, steps: int) -> int:
        """Tokens of the first `steps` steps, without the padding."""
        return self._packed.tokens_at(steps)

    def epochs(self, steps: int) -> dict[str, float]:
        """Number of epochs of each source after `steps` steps."""
        return {name: tokens / max(1, self.report["sources"][name]["tokens"])
                for name, tokens in self.tokens_per_source(steps).items()}


class _Rows:
    """Rows of pairs, packed on access."""

    def __init__(self, data: PreferenceData, pairs: list[np.ndarray]):
        self.data, self.pairs = data, pairs

    def __getitem__(self, index: int) -> Batch:
        return self.data.pack(self.pairs[index])


def held_out_pairs(answers: Examples, fraction: float) -> np.ndarray:
    """bool [N]: select the pairs of about `fraction` of the prompts, by a hash of a prompt's ids.

    All pairs of a prompt are on the same side, regardless of their answers and order, so no training prompt is held
    out.
    """
    chosen = np.zeros(len(answers.sources) // 2, bool)
    if fraction:
        for pair in range(len(chosen)):
            here = slice(*answers.offsets[2 * pair:2 * pair + 2])
            prompt = int(np.argmax(answers.weights[here] > 0))
            chosen[pair] = is_held_out(answers.ids[here][:prompt], fraction)
    return chosen


def tokenize_sources(config: PairDataConfig, template: ChatTemplate, *, sequence_length: int,
                     context_length: int) -> tuple[Examples, dict[str, Any], list[Pair]]:
    """Return the answers of all usable pairs, in the order of sources and rows; the report; and the pairs.

    Raises UserError if a source cannot be read, a pair is too long with over_length=raise, or none is left.
    """
    answers: list[Rendered] = []
    owners: list[int] = []
    pairs: list[Pair] = []
    sources: dict[str, dict[str, Any]] = {}
    for index, (name, source) in enumerate(config.sources.items()):
        try:
            read = read_pairs(source.path, layout=source.layout, max_bad=source.max_bad)
        except UserError as error:
            raise UserError(f"data.sources.{name}: {error}") from None
        counts = {"over_length_prompt": 0, "over_length": 0, "cut": 0, "equal_ids": 0}
        kept: list[Rendered] = []
        for pair, both in render_each(read.pairs, template, loss_on="last_answer", dropped=read.dropped,
                                      dialogues_of=Pair.dialogues):
            fitted, reason = _fitted(both, sequence_length, context_length)
            if reason and config.over_length == "raise":
                raise UserError(f"{pair.file}:{pair.row}: {len(both[0].ids)} and {len(both[1].ids)} tokens, prompts "
                                f"included, do not fit into sequence_length={sequence_length} (and "
                                f"context_length={context_length} each); data.over_length=drop or truncate lets "
                                "training go on")
            if reason == "cut" and config.over_length == "drop":
                reason, fitted = "over_length", None
            if fitted is not None and np.array_equal(fitted[0].ids, fitted[1].ids):
                reason, fitted = "equal_ids", None
            if reason:
                counts[reason] += 1
            if fitted is not None:
                kept += fitted
                pairs.append(pair)
        answers += kept
        owners += [index] * len(kept)
        sources[name] = {"group": config.groups[name], "layouts": sorted(set(read.layouts.values())), "read": read.rows,
                         "dropped": read.dropped, **counts}
        for reason, meaning in _REASONS.items():
            if counts[reason]:
                logger.warning("data.sources.%s: %d of %d pairs %s", name, counts[reason], read.rows,
                               meaning.format(S=sequence_length, context=context_length))
    if not answers:
        raise UserError(f"no pair is left to train on with sequence_length={sequence_length}: {sources}")
    return joined(answers, owners), {"sources": sources}, pairs


_REASONS = {
    "over_length_prompt": "are left out: their prompts, which stand before both answers, leave no room for answers in "
                          "rows of {S} tokens and a context of {context}",
    "over_length": "are left out: both answers with their prompts are more than {S} tokens, or one more than "
                   "{context}; data.over_length=truncate keeps them",
    "cut": "are cut at the end of an answer, to fit into {S} tokens and a context of {context}",
    "equal_ids": "are left out: as tokens, or once cut, their answers are equal",
}


def _fitted(both: tuple[Rendered, Rendered], sequence_length: int,
            context_length: int) -> tuple[tuple[Rendered, Rendered] | None, str]:
    """Return the answers fitted to a row, or None; and the reason if they are not complete: "", "over_length_prompt" or
    "cut"."""
    prompt = int(np.flatnonzero(both[0].weights)[0])
    if 2 * (prompt + 1) > sequence_length or prompt + 1 > context_length:
        return None, "over_length_prompt"
    # The shorter answer gets at most half of the row, the longer one the rest.
    lengths = [min(len(each.ids), context_length) for each in both]
    shorter = min(*lengths, sequence_length // 2)
    fitted = tuple(Rendered(each.ids[:most], each.weights[:most]) for each, most in
                   zip(both, (min(length, sequence_length - shorter) for length in lengths), strict=True))
    if sum(len(each.ids) for each in fitted) > sequence_length:  # both are longer than half
        fitted = tuple(Rendered(each.ids[:sequence_length // 2], each.weights[:sequence_length // 2])
                       for each in both)
    return fitted, "cut" if any(len(new.ids) < len(old.ids) for new, old in zip(fitted, both, strict=True)) else ""
