"""Many requests at once on one model: a request enters as soon as a slot is free, and leaves it when it ends.

    engine = Engine(decoder, params, tokenizer=tokenizer)
    engine.submit(Request(prompt=ids, max_tokens=100))
    while engine.busy:
        for event in engine.step():
            ...

No thread and no clock: `step` does some work and says what came of it. `inference.worker` puts a thread around it.
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
"""Prompts that are written at a time, where so many wait; else one: two programs a length."""
logger = logging.getLogger(__name__)


class Engine:
    """Requests in, events out.

    Args:
      decoder: its `remat`, `scan_layers`, `constrain` and `embed` do not matter here.
      params: of the decoder; taken apart into layers, in the decoder's dtype, unless `split` is false.
      tokenizer: for text and stop strings; None: events hold tokens alone.
      slots: requests at once.
      max_length: most tokens of prompt and answer together; None: the model's context.
      mesh: what `params` are split over; the cache then is too. None: one device.
      steps: tokens that are drawn for all slots before anyone is told: more of them cost less, and come in bursts.
      split: False leaves `params` as they are, for one that lives as long as a step of training.

    Attributes:
      counts: what was done so far, by name, in tokens or requests.
    """

    def __init__(self, decoder: Decoder, params: Any, *, tokenizer: Tokenizer | None = None, slots: int = 8,
                 max_length: int | None = None, mesh: Mesh | None = None, steps: int = 8, split: bool = True):
        # Of two decoders that compute the same, one program.
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
        """Requests that run at once."""
        return len(self._slots)

    def check(self, request: Request) -> None:
        """Whether a request can be served; from any thread.

        Raises:
          ValueError: longer than `max_length`, an id that the model lacks, or stop strings without a tokenizer.
        """
        if len(request.prompt) + request.max_tokens > self.max_length:
            raise ValueError(f"prompt of {len(request.prompt)} tokens and max_tokens={request.max_tokens} are longer "
                             f"than {self.max_length} together")
        if not 0 <= min(request.prompt) <= max(request.prompt) < self._decoder.config.vocab_size:
            raise ValueError(f"prompt: ids must be from 0 to {self._decoder.config.vocab_size - 1}")
        if request.stop and self._tokenizer is None:
            raise ValueError("stop: texts need a tokenizer")

    def submit(self, request: Request) -> int:
        """Line a request up; its number. ValueError as of `check`."""
        self.check(request)
        number = next(self._numbers)
        text = None if self._tokenizer is None else TextStream(self._tokenizer, request.prompt, stop=request.stop)
        self._jobs[number] = job = Job(number, request, text)
        self._waiting.append(job)
        self.counts["requests"] += 1
        return number

    def cancel(self, number: int) -> None:
        """End a request; the next step says so, and its slot is free. One that has ended already is left alone."""
        if number in self._jobs:
            self._cancelled.add(number)

    def step(self) -> list[Event]:
        """Let requests in, write a part of their prompts, draw tokens for those that are written."""
        events = self._cancel()
        self._waiting = schedule.admit(self._waiting, self._slots, clock=self._clock)
        for group, size in schedule.parts([slot for slot in self._slots if slot.job and not slot.job.is_written],
                                          length=self._length, together=TOGETHER):
            events += self._prefill(group, size)
        if any(slot.job and slot.job.is_written for slot in self._slots):
            events += self._decode()
        return events

    def run(self, requests: Iterable[Request], *, ahead: int | None = None) -> Iterator[tuple[list[Token], str, str]]:
        """(tokens, text, finish) of each request, in their order. For an engine that nobody else asks.

        Args:
          ahead: requests that are lined up before the first one is taken; None: two for each slot.
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
        """Forget all that is cached, and the requests that have a slot, as after an error in a step.

        Requests that wait stay lined up, unless no slot was in use: then the error came from one of them.

        Returns:
          the numbers of the requests that were forgotten.
        """
        numbers = [slot.job.number for slot in self._slots if slot.job] or list(self._jobs)
        for number in numbers:
            self._forget(number)
        self._slots = [Slot(place) for place in range(len(self._slots))]
        self._cache = self._make_cache()
        return numbers

    def _forget(self, number: int) -> None:
        """A request has ended: nothing but its slot's cached tokens is left of it."""
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
            # A part ends within the slot, though what pads it would not: it begins earlier then, with what is there.
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
        """What tokens mean for the request in a slot: text, or its end. An error ends this request alone."""
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
          fed: before each of these tokens was drawn, the one before it went into the cache.
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
            del slot.cached[self._length - 1:]  # A row that draws nothing writes behind what is kept.
            self.counts["finished"] += 1
        return Event(job.number, tuple(tokens), "".join(texts), finish, prompt)


def _sampling(jobs: Sequence[Job | None], rows: int) -> Sampling:
    """How each of these draws, and `None` and what is beyond them not at all."""
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
