"""Assignment of slots to requests, and division of prompts into parts. No jax."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ctllm_jax.inference.request import Request, Token
from ctllm_jax.inference.text import TextStream

SMALLEST = 32
"""Slots are multiples of this many tokens, and parts of prompts have at least this many."""
SIZES = (SMALLEST, 128, 512)
"""Lengths that parts of prompts are padded to. A longer prompt is computed in several parts, between which other
requests sample."""
LARGEST_SCORED = 128
"""A part whose tokens are scored has logits for each of them: at 125,696 ids 64 MB."""
SPANS = (128, 256, 512, 1024)
"""Attention reads this many tokens of each slot, then twice as many, and so on; the longest row decides."""
MOST_SLOTS = 64
"""Number of slots of an engine for a list of requests."""
WORTH_REUSE = 16
"""A shorter common prefix is recomputed."""


@dataclass
class Job:
    """A running or waiting request.

    Attributes:
      written: number of the prompt's tokens in the cache, including the `reused` ones of an earlier request.
      source: slot with the tokens before the next part.
      drawn: new tokens; `last` is the last one, which is not in the cache yet.
      scores: known scores of the prompt's tokens; None if not requested, or already reported.
    """

    number: int
    request: Request
    text: TextStream | None
    written: int = 0
    reused: int = 0
    source: int = 0
    drawn: int = 0
    last: int = 0
    scores: dict[int, Token] | None = None

    def __post_init__(self):
        if self.request.score_prompt:
            self.scores = {0: Token(self.request.prompt[0], None)}

    @property
    def is_written(self) -> bool:
        """Whether tokens can be drawn."""
        return self.written == len(self.request.prompt)

    def add_scores(self, scores: Any, row: int, *, start: int, count: int) -> None:
        """The scores that a part computed for the tokens after its own."""
        prompt, told = self.request.prompt, self.request.told
        for place in range(min(count, len(prompt) - 1 - start)):
            likeliest = zip(scores.told_ids[row, place, :told].tolist(), scores.told_logps[row, place, :told].tolist(),
                            strict=True)
            self.scores[start + place + 1] = Token(prompt[start + place + 1], float(scores.logp[row, place]),
                                                   tuple(likeliest))

    def scored(self) -> tuple[Token, ...]:
        """The prompt's tokens."""
        return tuple(self.scores[place] for place in range(len(self.request.prompt)))


@dataclass
class Slot:
    """A row of the cache: its tokens (which are kept after their request ends), its user, and its last user."""

    place: int
    cached: list[int] = field(default_factory=list)
    job: Job | None = None
    used: int = 0

    @property
    def current(self) -> Job:
        """Who uses it, of a slot that is used."""
        assert self.job is not None
        return self.job


def spans(length: int) -> list[int]:
    """All spans of slots of this length."""
    found = [span for span in SPANS if span < length]
    while found and found[-1] * 2 < length and found[-1] >= SPANS[-1]:
        found.append(found[-1] * 2)
    return [*found, length]


def smallest(sizes: Sequence[int], needed: int) -> int:
    """The smallest of ascending sizes that is enough, or the largest."""
    return next((size for size in sizes if size >= needed), sizes[-1])


def rounded(slots: int, length: int) -> dict[str, int]:
    """Number of slots and length for a list of requests, as for `Engine`: few sizes, so that lists share their
    programs."""
    return {"slots": smallest((1, 4, 16, MOST_SLOTS), slots),
            "max_length": max(SPANS[0], 1 << (length - 1).bit_length())}


def common(ours: Sequence[int], other: Sequence[int]) -> int:
    """Length of the common prefix; 0 if it is too short to reuse."""
    length = min(len(ours), len(other))
    if length < WORTH_REUSE or list(ours[:WORTH_REUSE]) != list(other[:WORTH_REUSE]):
        return 0
    differs = np.flatnonzero(np.asarray(ours[:length]) != np.asarray(other[:length]))
    return int(differs[0]) if len(differs) else length


def admit(waiting: deque[Job], slots: Sequence[Slot], *, clock: Iterator[int]) -> deque[Job]:
    """Assign free slots to waiting requests, first come, first served; returns those that still wait.

    A prefix of the prompt that a slot already contains is reused. A request that could reuse more from a prompt in
    progress waits until that is done.
    """
    waiting = deque(waiting)
    needed: set[int] = set()
    while waiting:
        job = waiting[0]
        prompt = job.request.prompt
        free = [slot for slot in slots if slot.job is None and slot.place not in needed]
        if not free:
            break
        reusable, source = 0, None
        if not job.request.score_prompt and len(prompt) > WORTH_REUSE:
            # The last token is recomputed, because the next token is sampled from it.
            shared = {slot.place: min(common(prompt, slot.cached), len(prompt) - 1) for slot in slots}
            source = max(slots, key=lambda slot: (shared[slot.place], slot in free))
            reusable = shared[source.place]
            begun = [common(prompt, slot.job.request.prompt) for slot in slots if slot.job and not slot.job.is_written]
            if max(begun, default=0) >= reusable + SMALLEST:
                break
        if reusable < WORTH_REUSE:
            reusable, source = 0, None
        # A slot with its own tokens needs no copy; else the least recently used slot.
        slot = source if source in free else min(free, key=lambda slot: (bool(slot.cached), slot.used))
        job.written = job.reused = reusable
        job.source = (source or slot).place
        needed.add(job.source)
        slot.job, slot.used = job, next(clock)
        slot.cached = list(prompt[:job.written]) if source is slot else []
        if source is not None:
            source.used = slot.used
        waiting.popleft()
    return waiting


def parts(slots: Sequence[Slot], *, length: int, together: int) -> Iterator[tuple[list[Slot], int]]:
    """Slots whose next parts are computed together, and the length that they are padded to."""
    groups: dict[tuple[int, bool], list[Slot]] = {}
    for slot in slots:
        scores = slot.job.request.score_prompt
        sizes = [size for size in SIZES if size <= min(length, LARGEST_SCORED if scores else length)]
        size = smallest(sizes, len(slot.job.request.prompt) - slot.job.written)
        groups.setdefault((size, scores), []).append(slot)
    for (size, scores), group in groups.items():
        most = 1 if scores else together
        full = len(group) - len(group) % most
        yield from ((group[start:start + most], size) for start in range(0, full, most))
        yield from (([slot], size) for slot in group[full:])
