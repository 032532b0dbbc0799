"""Batches of supervised fine-tuning: from files of dialogues to a `BatchSource`.

Every dialogue is tokenized at the start and becomes part of one row. B rows of a batch, S tokens of a row, N dialogues,
R rows of an epoch, T tokens of a dialogue.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ctllm_jax.config.errors import UserError
from ctllm_jax.config.sft import SFTDataConfig, TemplateConfig
from ctllm_jax.data.batch import Batch, checked_rows, padding_row, stack_rows
from ctllm_jax.data.chat import ChatTemplate, Message, Rendered
from ctllm_jax.data.conversations import Dialogue, read_conversations
from ctllm_jax.data.epochs import PackedEpochs, best_fit
from ctllm_jax.data.pretrain import HeldOutData
from ctllm_jax.data.templates import open_template
from ctllm_jax.data.tokenizer import Tokenizer

_TOKENIZED_TOGETHER = 1024  # dialogues: enough for the tokenizer's threads
_REFUSED = "refused by the chat template"
logger = logging.getLogger(__name__)


class Examples(NamedTuple):
    """Concatenated tokenized dialogues: ids int32 and weights float32 of all tokens, N + 1 offsets into them, and the
    source index of each dialogue, int32 [N]."""

    ids: np.ndarray
    weights: np.ndarray
    offsets: np.ndarray
    sources: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """T of each, int64 [N]."""
        return np.diff(self.offsets)


class SFTData:
    """Dialogues packed into rows, each its own segment. A `BatchSource`.

    Row r of data step t is row `t % steps_per_epoch * B + r` of epoch `t // steps_per_epoch`: the last batch of an
    epoch is filled up with padding rows, and no batch spans two epochs. Each epoch draws anew which dialogues of equal
    length share rows, and the order of the rows; all epochs have the same number of rows. `report` describes what was
    read, left out and kept, as JSON. `dialogues` are those that `examples` were made from, if requested.
    """

    def __init__(self, config: SFTDataConfig, *, tokenizer: Tokenizer, sequence_length: int, rows: int, seed: int,
                 vocab_size: int, template: ChatTemplate | None = None, keep_dialogues: bool = False):
        self.template = template or open_template(config.template or TemplateConfig(), tokenizer)
        found = tokenize_sources(config, self.template, sequence_length=sequence_length, seed=seed)
        self.examples, self._held_out, self.report = found.trained, found.held_out, found.report
        self.dialogues: list[Dialogue] | None = found.dialogues if keep_dialogues else None
        largest = max(int(examples.ids.max(initial=0)) for examples in (self.examples, self._held_out))
        if largest >= vocab_size:
            raise UserError(f"the dialogues have ids up to {largest}: model.vocab_size={vocab_size} must be at least "
                            f"{largest + 1}")
        self._names = list(config.sources)
        self._sequence_length = sequence_length
        self._rows = rows
        self._seed = seed
        self._packed = PackedEpochs(self.examples.lengths, sequence_length, rows=rows, seed=seed)
        self.rows_per_epoch, self.steps_per_epoch = self._packed.rows_per_epoch, self._packed.steps_per_epoch
        self.steps = config.epochs * self.steps_per_epoch
        self.tokenizer_path: Path | None = tokenizer.path
        self.eod_id: int | None = self.template.stop_ids[0] if self.template.stop_ids else None
        self.token_bytes: np.ndarray | None = np.zeros(vocab_size, np.int32)
        known = min(vocab_size, tokenizer.vocab_size)
        self.token_bytes[:known] = tokenizer.token_bytes()[:known]
        filled = len(self.examples.ids) / (self.rows_per_epoch * sequence_length)
        self.report |= {"rows_per_epoch": self.rows_per_epoch, "steps_per_epoch": self.steps_per_epoch,
                        "filled": round(filled, 6)}
        logger.info("%d dialogues fill %.1f %% of %d rows of %d tokens: %d steps an epoch", len(self.examples.sources),
                    100 * filled, self.rows_per_epoch, sequence_length, self.steps_per_epoch)
        content = hashlib.sha256()
        for array in self.examples:
            content.update(np.ascontiguousarray(array))
        self.fingerprint: dict[str, Any] = {
            "kind": "sft", "seed": seed, "sequence_length": sequence_length, "rows": rows,
            "tokenizer_sha256": tokenizer.sha256, "template": self.template.fingerprint(), "loss_on": config.loss_on,
            "over_length": config.over_length, "ratio": config.ratio, "held_out": config.held_out,
            "examples_sha256": content.hexdigest()}

    def items(self, step: int, row: int) -> np.ndarray:
        """Which of `examples` fill a row of a step, int64; none in a row of padding."""
        return self._packed.items(step, row)

    def row(self, step: int, row: int) -> Batch:
        """One row of one step: a `Batch` of [S] arrays."""
        chosen = self.items(step, row)
        if not len(chosen):
            return padding_row(self._sequence_length)
        return pack_row(self.examples, chosen, self._sequence_length)

    def iterate(self, start_step: int, *, local_rows: Sequence[int]) -> Iterator[Batch]:
        """Batches of these rows from data step `start_step` on, without end."""
        local = checked_rows(local_rows, self._rows)

        def batches():
            step = start_step
            while True:
                yield stack_rows([self.row(step, int(row)) for row in local])
                step += 1

        return batches()

    def held_out(self, *, rows: int, split: str, max_tokens: int) -> dict[str, Iterable[Batch]]:
        """The dialogues of `config.held_out`, or a sample of them, by source; `split` is ignored."""
        del split
        found: dict[str, Iterable[Batch]] = {}
        for index, name in enumerate(self._names):
            own = select(self._held_out, np.flatnonzero(self._held_out.sources == index))
            if len(own.sources):
                chosen = draw_held_out(own, np.arange(len(own.sources)), 1, max_tokens=max_tokens, source=name)
                packed = PackedDialogues(select(own, chosen), self._sequence_length)
                found[name] = HeldOutData(packed, rows=rows, sequence_length=self._sequence_length, count=len(packed))
        return found

    def tokens_per_source(self, steps: int) -> dict[str, int]:
        """Tokens of each source's dialogues in the first `steps` steps; padding belongs to none."""
        seen = self._packed.times_seen(steps)
        tokens = np.bincount(self.examples.sources, weights=seen * self.examples.lengths, minlength=len(self._names))
        return {name: int(count) for name, count in zip(self._names, tokens, strict=True)}

    def tokens_at(self, steps: int) -> int:
        """Tokens of the first `steps` steps, without the padding."""
        return self._packed.tokens_at(steps)

    def epochs(self, steps: int) -> dict[str, float]:
        """Number of epochs of each source after `steps` steps."""
        whole = {name: self.report["sources"][name]["tokens"] for name in self._names}
        return {name: tokens / max(1, whole[name]) for name, tokens in self.tokens_per_source(steps).items()}


class PackedDialogues:
    """Dialogues packed into rows, longest first; each row is a `Batch` of [S] arrays."""

    def __init__(self, examples: Examples, sequence_length: int):
        self._examples, self._sequence_length = examples, sequence_length
        order = np.argsort(-examples.lengths, kind="stable")
        packing = best_fit(examples.lengths[order], sequence_length)
        self._rows = [order[packing.row_of_rank == row] for row in range(packing.rows)]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Batch:
        return pack_row(self._examples, self._rows[index], self._sequence_length)


def pack_row(examples: Examples, chosen: Sequence[int], sequence_length: int) -> Batch:
    """Concatenate these dialogues, each as a segment: a `Batch` of [S] arrays."""
    tokens_S, targets_S, segment_ids_S, positions_S = np.zeros((4, sequence_length), np.int32)
    loss_weights_S = np.zeros(sequence_length, np.float32)
    start = 0
    for segment, example in enumerate(chosen, 1):
        first, last = examples.offsets[example:example + 2]
        length = int(last - first)
        here, targeted = slice(start, start + length), slice(start, start + length - 1)
        tokens_S[here] = examples.ids[first:last]
        targets_S[targeted] = examples.ids[first + 1:last]
        loss_weights_S[targeted] = examples.weights[first + 1:last]
        segment_ids_S[here] = segment
        positions_S[here] = np.arange(length)
        start += length
    return Batch(tokens_S, targets_S, loss_weights_S, segment_ids_S, positions_S)


def is_held_out(ids: np.ndarray, fraction: float) -> bool:
    """Whether a hash of these int32 ids selects them as held out; about `fraction` of all are.

    Only the ids decide, so duplicates are on the same side, also in another run's data.
    """
    digest = hashlib.blake2b(ids.tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < fraction * 2**64


def draw_held_out(examples: Examples, items: np.ndarray, size: int, *, max_tokens: int, source: str) -> np.ndarray:
    """Sample as many items as have about `max_tokens` tokens on average, at least one, in their order.

    Item i is `size` consecutive examples from the example `size * i` on. The sample is drawn by a hash of the ids, so
    it depends neither on lengths and order nor on the seed of the run. The log states its size.
    """
    starts, ends = examples.offsets[size * items], examples.offsets[size * (items + 1)]
    total = int((ends - starts).sum())
    if total <= max_tokens:
        return items
    count = max(1, len(items) * max_tokens // total)
    drawn = [hashlib.blake2b(examples.ids[start:end].tobytes(), digest_size=8, key=b"evaluated").digest()
             for start, end in zip(starts, ends, strict=True)]
    logger.warning("data.sources.%s: %d of %d held-out %s are evaluated, a random sample of about "
                   "evaluation.max_tokens=%d tokens", source, count, len(items),
                   "dialogues" if size == 1 else "pairs", max_tokens)
    return items[np.sort(np.argsort(np.array(drawn), kind="stable")[:count])]


def joined(rendered: Sequence[Rendered], sources: Sequence[int]) -> Examples:
    """Convert tokenized dialogues with their source indices to `Examples`."""
    nothing = Rendered(np.empty(0, np.int32), np.empty(0, np.float32))
    return Examples(*(np.concatenate(arrays) for arrays in zip(*(rendered or [nothing]), strict=True)),
                    np.cumsum([0, *(len(each.ids) for each in rendered)], dtype=np.int64),
                    np.asarray(sources, np.int32))


def content_sha256(examples: Examples) -> str:
    """A hash of tokenized dialogues that is independent of their order and source."""
    parts = sorted(hashlib.sha256(examples.ids[first:last].tobytes()).digest()
                   for first, last in itertools.pairwise(examples.offsets))
    return hashlib.sha256(b"".join(parts)).hexdigest()


class Tokenized(NamedTuple):
    """The dialogues of a config: training and held-out ones, the report, and the texts of the training ones."""

    trained: Examples
    held_out: Examples
    report: dict[str, Any]
    dialogues: list[Dialogue]


class _Kept(NamedTuple):
    rendered: Rendered
    key: int
    dialogue: Dialogue


def select(examples: Examples, chosen: np.ndarray) -> Examples:
    """Select dialogues, in this order."""
    parts = [slice(*examples.offsets[index:index + 2]) for index in chosen]
    empty = slice(0, 0)
    return Examples(np.concatenate([examples.ids[part] for part in parts or [empty]]),
                    np.concatenate([examples.weights[part] for part in parts or [empty]]),
                    np.cumsum([0, *examples.lengths[chosen]], dtype=np.int64), examples.sources[chosen])


def tokenize_sources(config: SFTDataConfig, template: ChatTemplate, *, sequence_length: int, seed: int) -> Tokenized:
    """Read all training and held-out dialogues of a config, in the order of sources and rows.

    Held-out dialogues are chosen before the ratio is applied, so every ratio is evaluated on the same ones. For each
    source and group, the report has the number of training dialogues, their tokens and their trained tokens; for each
    source, it has the number left out, by reason. Raises UserError if a source cannot be read, a dialogue is too long
    with over_length=raise, or a group is too small for the ratio.
    """
    kept: dict[str, list[_Kept]] = {}
    apart: dict[str, list[Rendered]] = {}
    sources: dict[str, dict[str, Any]] = {}
    for name, source in config.sources.items():
        try:
            read = read_conversations(source.path, layout=source.layout, max_bad=source.max_bad)
        except UserError as error:
            raise UserError(f"data.sources.{name}: {error}") from None
        counts = {"over_length": 0, "cut": 0, "nothing_learned": 0, "not_drawn": 0}
        kept[name], apart[name] = [], []
        for dialogue, (rendered,) in render_each(read.dialogues, template, loss_on=config.loss_on, dropped=read.dropped,
                                                 dialogues_of=lambda dialogue: [dialogue.messages]):
            if len(rendered.ids) > sequence_length:
                if config.over_length == "raise":
                    raise UserError(f"{dialogue.file}:{dialogue.row}: {len(rendered.ids)} tokens are more than "
                                    f"sequence_length={sequence_length}; data.over_length=drop or truncate lets "
                                    "training go on")
                if config.over_length == "drop":
                    counts["over_length"] += 1
                    continue
                counts["cut"] += 1
                rendered = Rendered(rendered.ids[:sequence_length], rendered.weights[:sequence_length])
            if not rendered.weights[1:].any():
                counts["nothing_learned"] += 1
                continue
            if is_held_out(rendered.ids, config.held_out):
                apart[name].append(rendered)
            else:
                kept[name].append(_Kept(rendered, _draw_key(seed, name, dialogue), dialogue))
        sources[name] = {"group": config.groups[name], "layouts": sorted(set(read.layouts.values())), "read": read.rows,
                         "dropped": read.dropped, **counts}
    if config.parsed_ratio is not None:
        _draw(config, kept, sources)
    held_out = {name: joined(rendered, [index] * len(rendered)) for index, (name, rendered) in enumerate(apart.items())}
    groups: dict[str, dict[str, int]] = {}
    for name, rows in kept.items():
        figures = {"rows": len(rows), "tokens": sum(len(each.rendered.ids) for each in rows),
                   "learned_tokens": sum(int(np.count_nonzero(each.rendered.weights[1:])) for each in rows)}
        sources[name] |= {**figures, "held_out": len(apart[name]), "held_out_sha256": content_sha256(held_out[name])}
        group = groups.setdefault(config.groups[name], dict.fromkeys(figures, 0))
        for figure, value in figures.items():
            group[figure] += value
        logger.info("data.sources.%s: %s", name, sources[name])
    rows = [each for each_source in kept.values() for each in each_source]
    total = sum(map(len, apart.values()))
    if not rows and total:
        raise UserError(f"data.held_out={config.held_out} leaves none of {total} dialogues to train on")
    if not rows:
        raise UserError(f"no dialogue is left to train on with sequence_length={sequence_length}: {sources}")
    owners = np.repeat(np.arange(len(kept)), [len(each) for each in kept.values()])
    return Tokenized(joined([each.rendered for each in rows], owners),
                     joined([each for each_source in apart.values() for each in each_source],
                            np.repeat(np.arange(len(apart)), [len(each) for each in apart.values()])),
                     {"sources": sources, "groups": groups, "ratio": config.ratio, "held_out": total},
                     [each.dialogue for each in rows])


def render_each(items: Sequence[Any], template: ChatTemplate, *, loss_on: str, dropped: dict[str, int],
                dialogues_of: Callable[[Any], Sequence[Sequence[Message]]]) -> Iterator[tuple[Any, list[Rendered]]]:
    """Yield each item with its dialogues as ids. Items that the template refuses are left out and counted in `dropped`;
    the first of them is logged with its reason."""
    for start in range(0, len(items), _TOKENIZED_TOGETHER):
        together = [(item, dialogues_of(item)) for item in items[start:start + _TOKENIZED_TOGETHER]]
        try:
            found = iter(template.render_many([one for _, dialogues in together for one in dialogues], loss_on=loss_on))
            rendered = [(item, [next(found) for _ in dialogues]) for item, dialogues in together]
        except UserError:
            rendered = []
            for item, dialogues in together:
                try:
                    rendered.append((item, template.render_many(dialogues, loss_on=loss_on)))
                except UserError as error:
                    if not dropped.get(_REFUSED):
                        logger.warning("%s:%d is left out, and so is each row like it: %s", item.file, item.row, error)
                    dropped[_REFUSED] = dropped.get(_REFUSED, 0) + 1
        yield from rendered


def _draw(config: SFTDataConfig, kept: dict[str, list[_Kept]], sources: dict[str, dict[str, Any]]) -> None:
    """Keep the rows of the drawn group with the smallest keys, so that a smaller draw is a subset of a larger one."""
    whole, drawn, parts, drawn_parts = config.parsed_ratio
    groups = config.groups
    wanted = sum(len(kept[name]) for name in kept if groups[name] == whole) * drawn_parts // parts
    candidates = sorted((each.key, name, index) for name in kept if groups[name] == drawn
                        for index, each in enumerate(kept[name]))
    if wanted > len(candidates):
        raise UserError(f"data.ratio={config.ratio} needs {wanted} rows of group {drawn!r}, which has "
                        f"{len(candidates)}: give it more data, or choose a smaller share")
    chosen = {(name, index) for _, name, index in candidates[:wanted]}
    for name in [name for name in kept if groups[name] == drawn]:
        rows = [row for index, row in enumerate(kept[name]) if (name, index) in chosen]
        sources[name]["not_drawn"] = len(kept[name]) - len(rows)
        kept[name] = rows


def _draw_key(seed: int, name: str, dialogue: Dialogue) -> int:
    """The sort key of a row for the draw: a hash of its content, so other rows and sources do not matter."""
    said = json.dumps([seed, name, dialogue.messages], ensure_ascii=True).encode()
    return int.from_bytes(hashlib.blake2b(said, digest_size=8).digest(), "little")
