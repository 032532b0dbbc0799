"""Continuous batching: a request takes a slot as soon as one is free, and frees it when it ends.

    engine = Engine(decoder, params, tokenizer=tokenizer)
    engine.submit(Request(prompt=ids, max_tokens=100))
    while engine.busy:
        for event in engine.step():
            ...

The engine uses no thread and no clock: `step` does some work and returns events. `inference.worker` runs it in a
thread.
"""

from __future__ import annotations

import itertools
import logging
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from ctllm_jax.data.tokenizer import Tokenizer
from ctllm_jax.inference import cache, schedule
from ctllm_jax.inference.request import FAILED, MOST_STOP_IDS, Event, Request, Token
from ctllm_jax.inference.sampling import Sampling
from ctllm_jax.inference.schedule import Job, Slot
from ctllm_jax.inference.text import TextStream
from ctllm_jax.model.decoder import Decoder

TOGETHER = 4
"""Number of prompts in one prefill if that many wait, else one; so there are two programs per length."""
logger = logging.getLogger(__name__)


class Engine:
    """Serves requests and returns events.

    Args:
      decoder: its `remat`, `scan_layers`, `constrain` and `embed` do not matter here.
      params: the decoder's parameters; split into layers, in the decoder's dtype, unless `split` is false.
      tokenizer: for text and stop strings; None: events hold tokens alone.
      slots: number of concurrent requests.
      max_length: largest number of tokens of prompt and answer together; None: the model's context.
      mesh: the mesh that `params`, and then the cache, are sharded over. None: one device.
      steps: number of tokens sampled for all slots per step: more are faster, but arrive in bursts.
      split: False does not copy `params`, for an engine that is used only within one training step.

    Attributes:
      counts: work done so far, by name, in tokens or requests.
    """

    def __init__(self, decoder: Decoder, params: Any, *, tokenizer: Tokenizer | None = None, slots: int = 8,
                 max_length: int | None = None, mesh: Mesh | None = None, steps: int = 8, split: bool = True):
        # Two decoders that compute the same share one program.
        self._decoder = Decoder(decoder.config, decoder.dtype, decoder.attention, decoder.swiglu)
        self._params = cache.split_layers(params, dtype=decoder.dtype) if split else params
        self._tokenizer, self._mesh, self._steps = tokenizer, mesh, steps
        self.max_length = max_length or decoder.config.context_length
        self._length = -(-self.max_length // schedule.SMALLEST) * schedule.SMALLEST
        self._spans = schedule.spans(self._length)
        self._slots = [Slot(place) for place in range(slots)]
        self._cache = self._make_cache()
        self._waiting: deque[Job] = deque()
        self._jobs: dict[int, Job] = {}
        self._cancelled: set[int] = set()
        self._numbers, self._clock = itertools.count(), itertools.count(1)
        self.counts: Counter[str] = Counter()

    @property
    def busy(self) -> bool:
        """Whether a step has anything to do."""
        return bool(self._jobs)

    @property
    def waiting(self) -> int:
        """Requests without a slot."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Requests with one."""
        return sum(slot.job is not None for slot in self._slots)

    @property
    def slots(self) -> int:
        """Number of requests that can run at once."""
        return len(self._slots)

    def check(self, request: Request) -> None:
        """Check that a request can be served; may be called from any thread.

        Raises:
          ValueError: it is longer than `max_length`, has an unknown id, or has stop strings without a tokenizer.
        """
        if len(request.prompt) + request.max_tokens > self.max_length:
            raise ValueError(f"prompt of {len(request.prompt)} tokens and max_tokens={request.max_tokens} are longer "
                             f"than {self.max_length} together")
        if not 0 <= min(request.prompt) <= max(request.prompt) < self._decoder.config.vocab_size:
            raise ValueError(f"prompt: ids must be from 0 to {self._decoder.config.vocab_size - 1}")
        if request.stop and self._tokenizer is None:
            raise ValueError("stop: texts need a tokenizer")

    def submit(self, request: Request) -> int:
        """Queue a request, and return its number. Raises ValueError as `check`."""
        self.check(request)
        number = next(self._numbers)
        text = None if self._tokenizer is None else TextStream(self._tokenizer, request.prompt, stop=request.stop)
        self._jobs[number] = job = Job(number, request, text)
        self._waiting.append(job)
        self.counts["requests"] += 1
        return number

    def cancel(self, number: int) -> None:
        """Cancel a request; the next step reports it and frees its slot. An ended request is ignored."""
        if number in self._jobs:
            self._cancelled.add(number)

    def step(self) -> list[Event]:
        """Admit requests, prefill a part of their prompts, and sample tokens for complete prompts."""
        events = self._cancel()
        self._waiting = schedule.admit(self._waiting, self._slots, clock=self._clock)
        for group, size in schedule.parts([slot for slot in self._slots if slot.job and not slot.job.is_written],
                                          length=self._length, together=TOGETHER):
            events += self._prefill(group, size)
        if any(slot.job and slot.job.is_written for slot in self._slots):
            events += self._decode()
        return events

    def run(self, requests: Iterable[Request], *, ahead: int | None = None) -> Iterator[tuple[list[Token], str, str]]:
        """Yield (tokens, text, finish) of each request, in order. For an engine without other callers.

        Args:
          ahead: number of requests that are queued before the first result is taken; None: two per slot.
        """
        requests, ahead = iter(requests), ahead or 2 * self.slots
        order: deque[int] = deque()
        said: dict[int, tuple[list[Token], list[str]]] = {}
        ended: dict[int, str] = {}
        try:
            while True:
                for request in itertools.islice(requests, max(0, ahead - len(order))):
                    order.append(self.submit(request))
                    said[order[-1]] = ([], [])
                if not order:
                    return
                while order[0] not in ended:
                    for event in self.step():
                        if event.finish == FAILED:
                            raise RuntimeError("the engine failed on a request; the log has its traceback")
                        said[event.request][0].extend(event.tokens)
                        said[event.request][1].append(event.text)
                        if event.finish:
                            ended[event.request] = event.finish
                number = order.popleft()
                tokens, texts = said.pop(number)
                yield tokens, "".join(texts), ended.pop(number)
        finally:
            for number in order:
                self.cancel(number)

    def reset(self) -> list[int]:
        """Drop the cache and the requests that have a slot, for example after an error in a step.

        Waiting requests stay queued, unless no slot was in use: then one of them caused the error.

        Returns:
          the numbers of the dropped requests.
        """
        numbers = [slot.job.number for slot in self._slots if slot.job] or list(self._jobs)
        for number in numbers:
            self._forget(number)
        self._slots = [Slot(place) for place in range(len(self._slots))]
        self._cache = self._make_cache()
        return numbers

    def _forget(self, number: int) -> None:
        """Finish a request: only its slot's cached tokens are kept."""
        job = self._jobs.pop(number)
        self._cancelled.discard(number)
        if job in self._waiting:
            self._waiting.remove(job)
        for slot in self._slots:
            if slot.job is job:
                slot.job = None

    def _make_cache(self) -> cache.Slots:
        return cache.make_slots(self._decoder.config, slots=len(self._slots), length=self._length,
                                dtype=self._decoder.dtype, mesh=self._mesh,
                                device=min(self._params["embedding"].devices(), key=lambda device: device.id))

    def _cancel(self) -> list[Event]:
        events = []
        for number in sorted(self._cancelled):
            self._forget(number)
            self.counts["cancelled"] += 1
            events.append(Event(number, finish="cancelled"))
        return events

    def _prefill(self, group: list[Slot], size: int) -> list[Event]:
        """The next part, padded to `size`, of the prompts of these slots: one of them, or up to `TOGETHER`."""
        rows = 1 if len(group) == 1 else TOGETHER
        part = cache.Part(np.zeros((rows, size), np.int32), np.full(rows, len(self._slots), np.int32),
                          np.zeros(rows, np.int32), np.zeros(rows, np.int32), np.ones(rows, np.int32),
                          np.zeros((rows, size), np.int32))
        starts = []
        for row, slot in enumerate(group):
            job, prompt = slot.current, slot.current.request.prompt
            # If the padding of a part would exceed the slot, the part starts earlier, with tokens that are already
            # cached.
            start = min(job.written, self._length - size)
            tokens, targets = prompt[start:start + size], prompt[start + 1:start + size + 1]
            part.tokens[row, :len(tokens)], part.targets[row, :len(targets)] = tokens, targets
            part.slot[row], part.source[row] = slot.place, job.source
            part.start[row], part.count[row] = start, len(tokens)
            if start + len(tokens) == len(prompt) and job.request.repetition_penalty != 1:
                seen_V = np.zeros(self._decoder.config.padded_vocab_size, bool)
                seen_V[list(prompt)] = True
                self._cache = cache.mark_seen(self._cache, np.int32(slot.place), seen_V)
            starts.append(start)
        jobs = [slot.current for slot in group]
        drawn, scores, self._cache = cache.prefill(
            self._decoder, self._params, self._cache, part, _sampling(jobs, rows), mesh=self._mesh,
            span=schedule.smallest(self._spans, int(part.start.max()) + size), scores=jobs[0].request.score_prompt)
        drawn, scores = jax.device_get((drawn, scores))
        events = []
        for row, (slot, start) in enumerate(zip(group, starts, strict=True)):
            job, count = slot.current, int(part.count[row])
            self.counts["prefill_tokens"] += start + count - job.written
            if scores is not None:
                job.add_scores(scores, row, start=start, count=count)
            job.written, job.source = start + count, slot.place
            slot.cached = list(job.request.prompt[:job.written])
            if job.is_written:
                self.counts["reused_tokens"] += job.reused
                tokens = [(drawn.token[row], drawn.logp[row], drawn.told_ids[row], drawn.told_logps[row])]
                events.append(self._take(slot, tokens))
        return events

    def _decode(self) -> list[Event]:
        shape = len(self._slots)
        zeros = [np.zeros(shape, np.int32) for _ in range(3)]
        rows = cache.Rows(zeros[0], zeros[1], zeros[2], np.full((shape, MOST_STOP_IDS), -1, np.int32))
        jobs: list[Job | None] = [None] * shape
        longest = 0
        for slot in self._slots:
            rows.length[slot.place] = len(slot.cached)
            if (job := slot.job) is not None and job.is_written:
                jobs[slot.place] = job
                rows.token[slot.place], rows.left[slot.place] = job.last, job.request.max_tokens - job.drawn
                rows.stop[slot.place, :len(job.request.stop_ids)] = job.request.stop_ids
                longest = max(longest, len(slot.cached) + min(self._steps, int(rows.left[slot.place])))
        drawn, self._cache = cache.decode(
            self._decoder, self._params, self._cache, rows, _sampling(jobs, shape), mesh=self._mesh, steps=self._steps,
            span=schedule.smallest(self._spans, longest))
        drawn = jax.device_get(drawn)
        self.counts["steps"] += 1
        events = []
        for slot in self._slots:
            if (job := jobs[slot.place]) is not None:
                steps = range(min(self._steps, int(rows.left[slot.place])))
                events.append(self._take(slot, [tuple(array[step, slot.place] for array in drawn) for step in steps],
                                         fed=True))
        return events

    def _take(self, slot: Slot, drawn: list[tuple[Any, ...]], *, fed: bool = False) -> Event:
        """Convert tokens of a slot to events of its request: text, or its end. An error ends only this request."""
        number = slot.current.number
        try:
            return self._read(slot, drawn, fed=fed)
        except Exception:
            logger.exception("request %d failed; the others are not touched", number)
            self._forget(number)
            slot.cached = []
            self.counts["failed"] += 1
            return Event(number, finish=FAILED)

    def _read(self, slot: Slot, drawn: list[tuple[Any, ...]], *, fed: bool) -> Event:
        """The event of these tokens.

        Args:
          fed: whether the previous token was put into the cache before each of these tokens was sampled.
        """
        job, tokens, texts, finish = slot.current, [], [], None
        prompt, job.scores = (job.scored(), None) if job.scores is not None else (None, job.scores)
        if not job.request.max_tokens:
            finish = "length"
            drawn = []
        for token, logp, told_ids, told_logps in drawn:
            if fed:
                slot.cached.append(job.last)
            job.last, job.drawn = int(token), job.drawn + 1
            told = zip(told_ids[:job.request.told].tolist(), told_logps[:job.request.told].tolist(), strict=True)
            token = Token(job.last, float(logp), tuple(told))
            if job.last in job.request.stop_ids:
                finish = "stop"
                tokens += [token] * job.request.score_prompt
                break
            tokens.append(token)
            if job.text is not None:
                texts.append(job.text.push(job.last))
                if job.text.stopped:
                    finish = "stop"
                    break
            if job.drawn == job.request.max_tokens:
                finish = "length"
                break
        self.counts["generated_tokens"] += len(tokens)
        if finish:
            if job.text is not None:
                texts.append(job.text.finish())
                finish = "stop" if job.text.stopped else finish
            self._forget(job.number)
            del slot.cached[self._length - 1:]  # An inactive row writes after the cached tokens.
            self.counts["finished"] += 1
        return Event(job.number, tuple(tokens), "".join(texts), finish, prompt)


def _sampling(jobs: Sequence[Job | None], rows: int) -> Sampling:
    """Sampling settings of each request; `None` and missing ones are inactive."""
    sampling = Sampling(*np.zeros((1, rows), np.float32), np.zeros(rows, np.int32), np.ones(rows, np.float32),
                        np.zeros(rows, np.float32), np.ones(rows, np.float32), *np.zeros((3, rows), np.uint32),
                        *np.zeros((2, rows), np.int32))
    for row, job in enumerate(jobs):
        if job is not None:
            asked = job.request
            values = (asked.temperature, asked.top_k or 0, asked.top_p, asked.min_p, asked.repetition_penalty,
                      asked.seed >> 32 & 0xFFFFFFFF, asked.seed & 0xFFFFFFFF, asked.row, job.drawn, asked.told)
            for array, value in zip(sampling, values, strict=True):
                array[row] = value
    return sampling
