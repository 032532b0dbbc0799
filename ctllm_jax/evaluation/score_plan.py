"""Plan the computation of log-probabilities of continuations with as few tokens as possible. No jax.

Requests with equal inputs become one input (the choices A to D of a question differ only in their targets). Inputs with
a common beginning share a prefix, such as few-shot examples, which is computed once (`Shared`). The inputs after it are
packed into rows, in which common beginnings are again stored once: a row is a forest, in which a token attends to its
ancestors. Inputs without a useful common prefix are packed by segments (`Packed`).

Legend: B rows, S tokens of a row, G groups (of one prefix each, and B / G rows), P tokens of a prefix, N scored tokens.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

LENGTHS = (32, 64, 128, 256, 384, 512, 768, 1024)
"""Lengths that rows and prefixes are padded to; longer ones are multiples of half the last. Few lengths mean few
programs."""
OVERHEAD = 64
"""Number of tokens that a separate prefix must save in addition to its own; otherwise it is not worth two more
programs."""
BUNDLE = 8
"""Inputs of a group with at least this many more common tokens share a row, which stores these tokens once."""
ROW = 256
"""Row length after a prefix, unless an input is longer: attention computes the whole row, masked or not."""


class Packed(NamedTuple):
    """Rows of segments, each an input: int32 [B, S]; and the scored tokens, int32 [N]: an index of the flattened rows,
    the token that follows, and the request that it counts for."""

    tokens: np.ndarray
    segment_ids: np.ndarray
    positions: np.ndarray
    places: np.ndarray
    targets: np.ndarray
    requests: np.ndarray


class Shared(NamedTuple):
    """Rows behind prefixes: `prefix` int32 [G, P], padded on the right, and `prefix_lengths` [G]. `ends` [B, S]: a
    token is visible to itself and to later tokens of its row, up to this index; 0 for padding. The rest as in `Packed`.
    Batches in a row with the same `prefix` object need it computed once."""

    prefix: np.ndarray
    prefix_lengths: np.ndarray
    tokens: np.ndarray
    ends: np.ndarray
    positions: np.ndarray
    places: np.ndarray
    targets: np.ndarray
    requests: np.ndarray


@dataclass(eq=False)
class Input:
    """Input tokens, and the continuations that end after the last one, by request.

    `first` is the first scored index: no token from there on can be in a shared prefix.
    """

    ids: np.ndarray
    first: int
    continuations: list[tuple[int, Sequence[int]]]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(eq=False)
class Group:
    """Inputs that begin with the same `length` tokens, and the group whose prefix it extends."""

    length: int
    parent: Group | None
    inputs: list[Input] = field(default_factory=list)


def collect_inputs(requests: Iterable[tuple[Sequence[int], Sequence[int]]], *, max_length: int) -> list[Input]:
    """The different inputs of requests (context, continuation), in the order of their ids.

    A context that is too long loses its first tokens, as in lm-eval's own models: an input has at most `max_length`
    tokens, not counting the last token of a continuation.

    Raises:
      ValueError: an empty context, or a continuation longer than `max_length`.
    """
    found: dict[bytes, Input] = {}
    for number, (context, continuation) in enumerate(requests):
        if not len(context):
            raise ValueError(f"request {number}: the context is empty; it needs the id that begins a document")
        if len(continuation) > max_length:
            raise ValueError(f"request {number}: a continuation of {len(continuation)} tokens is longer than the "
                             f"{max_length} that the model sees at once")
        if not len(continuation):
            continue  # Nothing to be scored: log 1.
        ids = np.asarray([*context, *continuation][-(max_length + 1):-1], ">u4")
        # Sorted as bytes, big-endian numbers have the order of tuples, at memcmp's speed.
        each = found.setdefault(ids.tobytes(), Input(ids.astype(np.int32), len(ids), []))
        each.first = min(each.first, len(ids) - len(continuation))
        each.continuations.append((number, continuation))
    return [found[key] for key in sorted(found)]


def find_groups(inputs: Sequence[Input], *, overhead: int = OVERHEAD) -> tuple[list[Group], list[Input]]:
    """The prefixes that are worth a separate computation, each with its inputs; and the remaining inputs.

    Prefixes are considered from short to long; one is used if it saves its inputs more tokens than it has. An input
    belongs to its longest prefix.
    """
    common = np.zeros(len(inputs) + 1, np.int64)  # with the input before
    for place in range(1, len(inputs)):
        common[place] = common_length(inputs[place - 1].ids, inputs[place].ids)
    firsts = np.asarray([each.first for each in inputs])
    root = Group(0, None)
    groups = [root]
    stack = [(0, len(inputs), root)]
    while stack:
        start, stop, group = stack.pop()
        if stop - start == 1:
            group.inputs.append(inputs[start])
        if stop - start < 2:
            continue
        depth = int(common[start + 1:stop].min())
        length = min(depth, int(firsts[start:stop].min()))
        if (stop - start) * (length - group.length) - length > overhead:
            group = Group(length, group)
            groups.append(group)
        cuts = [start, *(np.flatnonzero(common[start + 1:stop] == depth) + start + 1).tolist(), stop]
        stack += [(one, other, group) for one, other in zip(cuts, cuts[1:], strict=False)]
    kept = []
    # Children follow their parents; those with too few inputs of their own return them.
    for group in reversed(groups[1:]):
        saved = (len(group.inputs) - 1) * (group.length - group.parent.length) - group.parent.length
        if group.inputs and saved > overhead:
            kept.append(group)
        else:
            group.parent.inputs += group.inputs
    for group in kept:
        group.inputs.sort(key=lambda each: each.ids.astype(">u4").tobytes())
    return kept[::-1], root.inputs


def common_length(one: np.ndarray, other: np.ndarray) -> int:
    """Tokens that both begin with."""
    length = min(len(one), len(other))
    differs = np.flatnonzero(one[:length] != other[:length])
    return int(differs[0]) if len(differs) else length


def padded(length: int) -> int:
    """The length that a row or prefix of this many tokens is padded to."""
    step = max(LENGTHS[-1] // 2, 1 << max(0, (length - 1).bit_length() - 2))
    return next((size for size in LENGTHS if size >= length), -(-length // step) * step)


def fill_rows(lengths: Sequence[int], *, size: int | None = None) -> list[list[int]]:
    """Pack items into rows: the longest remaining one, then repeatedly the longest one that still fits.

    Args:
      size: of every row; None: the padded length of a row's first item.
    """
    order = sorted(range(len(lengths)), key=lambda item: lengths[item])
    ascending = [lengths[item] for item in order]
    rows = []
    while order:
        room = size or padded(ascending[-1])
        row = []
        while (place := bisect.bisect_right(ascending, room)):
            room -= ascending.pop(place - 1)
            row.append(order.pop(place - 1))
        rows.append(row)
    return rows


def plan(inputs: Sequence[Input], *, batch_tokens: int, multiple: int = 1,
         share: bool = True) -> Iterator[Packed | Shared]:
    """Batches of rows for all inputs, each input in one of them; long ones first.

    Args:
      batch_tokens: of a batch, padding and prefixes included; one row may have more.
      multiple: the number of rows is a multiple of this, as a mesh requires.
      share: False: each input goes through the model by itself.
    """
    groups, single = find_groups(inputs) if share else ([], list(inputs))
    small: dict[tuple[int, int], list[tuple[Group, list[Input]]]] = {}
    for group in sorted(groups, key=lambda each: -each.length):
        bundles = bundle(group)
        sizes = [tokens for _, tokens in bundles]
        longest, total = max(sizes), sum(sizes)
        if total <= max(ROW, longest):
            small.setdefault((padded(group.length), padded(total)), []).append((group, group.inputs))
            continue
        rows = fill_rows(sizes, size=padded(max(longest, ROW)))
        prefix = _prefixes([group], padded(group.length))
        size = padded(max(longest, ROW))
        most = _rows_at_once(size, batch_tokens=batch_tokens, multiple=multiple)
        for start in range(0, len(rows), most):
            contents = [[each for item in row for each in bundles[item][0]] for row in rows[start:start + most]]
            count = _row_count(len(contents), most=most, multiple=multiple)
            yield Shared(*prefix, *_forests(contents, [group.length] * len(contents), rows=count, size=size))
    for (prefix_size, size), several in sorted(small.items(), reverse=True):
        most = _rows_at_once(prefix_size + size, batch_tokens=batch_tokens, multiple=multiple)
        for start in range(0, len(several), most):
            part = several[start:start + most]
            count = _row_count(len(part), most=most, multiple=multiple)
            prefixes = _prefixes([group for group, _ in part], prefix_size, rows=count)
            yield Shared(*prefixes, *_forests([contents for _, contents in part],
                                              [group.length for group, _ in part], rows=count, size=size))
    yield from _packed(single, batch_tokens=batch_tokens, multiple=multiple)


def bundle(group: Group) -> list[tuple[list[Input], int]]:
    """The inputs of a group in bundles for one row, each with its number of tokens there."""
    bundles: list[tuple[list[Input], int]] = []
    longest = max(len(each) for each in group.inputs) - group.length
    for each in group.inputs:
        new = len(each) - group.length
        if bundles:
            shared = common_length(bundles[-1][0][-1].ids, each.ids) - group.length
            # An input may be a prefix of another one, which then contains it.
            taken = bundles[-1][1] + new - shared
            if shared >= BUNDLE and taken <= max(ROW, longest):
                bundles[-1] = [*bundles[-1][0], each], taken
                continue
        bundles.append(([each], new))
    return bundles


def _prefixes(groups: Sequence[Group], size: int, rows: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Prefixes [G, P] and their lengths [G]."""
    tokens_GP, lengths_G = np.zeros((rows or len(groups), size), np.int32), np.zeros(rows or len(groups), np.int32)
    for row, group in enumerate(groups):
        tokens_GP[row, :group.length], lengths_G[row] = group.inputs[0].ids[:group.length], group.length
    return tokens_GP, lengths_G


def _forests(contents: Sequence[Sequence[Input]], starts: Sequence[int], *, rows: int,
             size: int) -> tuple[np.ndarray, ...]:
    """tokens, ends, positions [B, S]; places, targets, requests [N] of rows that hold these inputs from a start on."""
    tokens_BS, ends_BS, positions_BS = np.zeros((3, rows, size), np.int32)
    scored = _Scored()
    for row, (inputs, start) in enumerate(zip(contents, starts, strict=True)):
        used = 0
        path, before = np.zeros(0, np.int64), None
        for each in inputs:
            shared = 0 if before is None else max(0, common_length(before.ids, each.ids) - start)
            new = len(each) - start - shared
            path = np.concatenate([path[:shared], np.arange(used, used + new)])
            tokens_BS[row, used:used + new] = each.ids[start + shared:]
            positions_BS[row, used:used + new] = np.arange(start + shared, len(each))
            used += new
            ends_BS[row, path] = used
            scored.add(each, row * size + path)
            before = each
    return tokens_BS, ends_BS, positions_BS, *scored.arrays()


def _packed(inputs: Sequence[Input], *, batch_tokens: int, multiple: int) -> Iterator[Packed]:
    by_size: dict[int, list[list[int]]] = {}
    for row in fill_rows([len(each) for each in inputs]):
        by_size.setdefault(padded(len(inputs[row[0]])), []).append(row)
    for size, rows in sorted(by_size.items(), reverse=True):
        most = _rows_at_once(size, batch_tokens=batch_tokens, multiple=multiple)
        for start in range(0, len(rows), most):
            part = rows[start:start + most]
            count = _row_count(len(part), most=most, multiple=multiple)
            tokens_BS, segment_ids_BS, positions_BS = np.zeros((3, count, size), np.int32)
            scored = _Scored()
            for row, items in enumerate(part):
                used = 0
                for segment, each in enumerate((inputs[item] for item in items), 1):
                    here = slice(used, used + len(each))
                    tokens_BS[row, here], segment_ids_BS[row, here] = each.ids, segment
                    positions_BS[row, here] = np.arange(len(each))
                    scored.add(each, row * size + np.arange(used, used + len(each)))
                    used += len(each)
            yield Packed(tokens_BS, segment_ids_BS, positions_BS, *scored.arrays())


class _Scored:
    """Places, targets and requests, as they come."""

    def __init__(self):
        self._parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def add(self, each: Input, path: np.ndarray) -> None:
        """Add an input whose last tokens are at these indices of the flattened rows."""
        for request, continuation in each.continuations:
            count = len(continuation)
            self._parts.append((path[-count:], np.asarray(continuation), np.full(count, request)))

    def arrays(self) -> tuple[np.ndarray, ...]:
        return tuple(np.concatenate(arrays).astype(np.int32) for arrays in zip(*self._parts, strict=True))


def _rows_at_once(size: int, *, batch_tokens: int, multiple: int) -> int:
    return max(1, batch_tokens // (size * multiple)) * multiple


def _row_count(rows: int, *, most: int, multiple: int) -> int:
    """The padded number of rows: a power of two times `multiple`, for few programs."""
    return min(most, multiple << (-(-rows // multiple) - 1).bit_length())
