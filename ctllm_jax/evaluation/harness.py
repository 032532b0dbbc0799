"""A model of ours as lm-eval's tasks ask it, in this process, without PyTorch or transformers.

Requests are tokenized together, scored by `scoring.Scorer` and written by the engine; what was answered before is taken
from an `AnswerStore`. Figures are those of lm-eval's own Hugging Face model on the exported weights.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from ctllm_jax.config.errors import UserError
from ctllm_jax.data.chat import Message
from ctllm_jax.evaluation.answer_store import AnswerStore
from ctllm_jax.evaluation.scoring import BATCH_TOKENS, Scorer
from ctllm_jax.inference.model import Model, fingerprint
from ctllm_jax.inference.request import MOST_STOP_IDS, Request
from ctllm_jax.inference.schedule import rounded

MAX_GEN_TOKS = 256
"""New tokens where a task does not say how many, as with lm-eval's own models."""
_AT_ONCE = 4096
"""Requests that are tokenized together."""
_OPEN, _CLOSE = "\ue010", "\ue011"
"""Around the ids that a chat prompt begins with."""
_HEAD = re.compile(f"{_OPEN}([0-9 ]*){_CLOSE}")
_LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_DRAWING = {"temperature": float, "top_p": float, "min_p": float, "repetition_penalty": float, "top_k": int}

Bar = Callable[..., AbstractContextManager[Callable[[], None]]]
"""`(noun, total=…, done=…)`: a context that gives a function to count one more with, as `cli.progress.count_bar`."""


@contextlib.contextmanager
def no_bar(noun: str, *, total: int, done: int) -> Iterator[Callable[[], None]]:
    """A `Bar` that shows nothing."""
    yield lambda: None


class HarnessModel(TemplateLM):
    """`lm_eval.evaluate(HarnessModel(model), task_dict=…)`.

    Args:
      batch_tokens, max_length: as of `Scorer`.
      store: answers that are there; None: none are kept.
      bar: shows how far it is.
      seed: of what tasks have drawn; the n-th of equal requests has random numbers of its own.
    """

    def __init__(self, model: Model, *, batch_tokens: int = BATCH_TOKENS, max_length: int | None = None,
                 store: AnswerStore | None = None, bar: Bar = no_bar, seed: int = 0):
        super().__init__()
        self.model = model
        self.scorer = Scorer(model, batch_tokens=batch_tokens, max_length=max_length)
        self.max_length = self.scorer.max_length
        self.store = store or AnswerStore(None, None)
        self._bar, self._seed, self._batch_tokens = bar, seed, batch_tokens
        self._heads: set[bytes] = set()
        self.prefix_source, self._prefix_id = find_prefix(model)

    @property
    def eot_token_id(self) -> int:
        """The id that ends a document."""
        return self.prefix_token_id if self.model.stop_id is None else self.model.stop_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before an empty context, and before a document whose perplexity is asked."""
        return self._prefix_id

    @property
    def tokenizer_name(self) -> str:
        """The hashes of tokenizer and template."""
        template = self.model.template
        hashes = [self.model.tokenizer.sha256, *([] if template is None else [template.fingerprint()])]
        return "-".join(each[:16] for each in hashes)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The learned template as Jinja; a description where its markers have no names. None unless asked."""
        if not chat_template or self.model.template is None:
            return None
        try:
            return self.model.template.to_jinja()
        except UserError:
            return f"{self.model.template.kind} {self.model.template.fingerprint()}"

    def apply_chat_template(self, chat_history: Sequence[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A prompt as one text that begins with ids between two private characters, which `tok_encode` reads back.

        What a question spells between such characters stays text: only the beginnings made here are ids.

        Raises:
          UserError: the model has learned no template.
        """
        if self.model.template is None:
            raise UserError("apply_chat_template=true, but the model was not taught to answer: leave it out, or give "
                            "template")
        messages = [Message(each["role"], each["content"]) for each in chat_history]
        if add_generation_prompt == (messages[-1].role == "assistant"):
            raise UserError(f"a prompt that ends with the {messages[-1].role}'s message cannot be rendered with "
                            f"add_generation_prompt={str(add_generation_prompt).lower()}")
        *before, last = self.model.template.stretches(messages)
        texts = iter(self.model.template.encode_texts([part for part in before if isinstance(part, str)]))
        ids = [token for part in before for token in (next(texts) if isinstance(part, str) else part)]
        if add_generation_prompt:
            # What stands before an answer is given as ids to its end: lm-eval would count blanks there as the answer's.
            ids += self.model.template.encode_texts([last])[0] if isinstance(last, str) else last
            last = ""
        head = f"{_OPEN}{' '.join(map(str, ids))}{_CLOSE}"
        self._heads.add(_digest(head))
        return head + last

    def _split(self, text: str) -> tuple[list[int] | None, str]:
        """The ids that a chat prompt of ours begins with, and the text after them; (None, the text) of any other."""
        match = _HEAD.match(text)
        if match is None or _digest(match[0]) not in self._heads:
            return None, text
        return list(map(int, match[1].split())), text[match.end():]

    def readable(self, text: str) -> str:
        """A prompt as a reader wants it: markers by name."""
        ids, rest = self._split(text)
        if ids is None:
            return text
        names = self.model.template.marker_names()
        runs = itertools.groupby(ids, key=lambda token: token in names)
        return "".join("".join(map(names.get, run)) if named else self.model.template.decode(run)
                       for named, run in runs) + rest

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids of a text: behind the id that preceded documents in training, if one did; a chat prompt as it is."""
        return self.encode_all([string], add_prefix=add_special_tokens is not False)[0]

    def encode_all(self, texts: Sequence[str], *, add_prefix: bool) -> list[list[int]]:
        """As `tok_encode`, of many texts; without a prefix none is a chat prompt."""
        encoded: list[list[int]] = [[]] * len(texts)
        heads = {place: found for place, text in enumerate(texts) if add_prefix and (found := self._split(text))[0]
                 is not None}
        plain = [place for place in range(len(texts)) if place not in heads]
        prefix = [self.model.prefix_id] if add_prefix and self.model.prefix_id is not None else []
        for place, ids in zip(plain, self.model.tokenizer.encode_batch([texts[place] for place in plain]), strict=True):
            encoded[place] = prefix + ids
        for place, (ids, rest) in heads.items():
            encoded[place] = ids + (self.model.template.encode_texts([rest])[0] if rest else [])
        return encoded

    def encode_pairs(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
        """(context, continuation) as ids, split as `TemplateLM` splits them: spaces at the end of the context belong to
        the continuation, and what the text has more than the context is the continuation. Each text is encoded once."""
        bare = [(context.rstrip(), context[len(context.rstrip()):] + continuation) if context else ("", continuation)
                for context, continuation in pairs]
        texts = {text: None for context, rest in bare if context for text in (context, context + rest)}
        known = dict(zip(texts, self.encode_all(list(texts), add_prefix=True), strict=True))
        alone = {rest: None for context, rest in bare if not context}
        known_alone = dict(zip(alone, self.encode_all(list(alone), add_prefix=False), strict=True))
        encoded = []
        for context, rest in bare:
            if context:
                ids = known[context]
                encoded.append((ids, known[context + rest][len(ids):]))
            else:
                ids = known_alone[rest]
                begins = ids[:1] == [self.prefix_token_id]
                encoded.append((ids[:1], ids[1:]) if begins else ([self.prefix_token_id], ids))
        return encoded

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log p of the continuation, whether it is what greedy decoding would write) of each request."""
        def ask(questions: list[tuple[str, str]], keep: Callable) -> None:
            for start in range(0, len(questions), 16 * _AT_ONCE):
                several = questions[start:start + 16 * _AT_ONCE]
                pairs = [pair for begin in range(0, len(several), _AT_ONCE)
                         for pair in self.encode_pairs(several[begin:begin + _AT_ONCE])]
                self._score(pairs, lambda new, start=start: keep(
                    [(start + place, [score.logp, score.is_greedy]) for place, score in new]))

        return [tuple(answer) for answer in self._answer("loglikelihood", "log-likelihoods", requests, ask)]

    def _loglikelihood_tokens(self, requests: Sequence[tuple[Any, list[int], list[int]]],
                              **kwargs: Any) -> list[tuple[float, bool]]:
        """As `loglikelihood`, of ids, for whoever of lm-eval has them already; nothing is kept."""
        return [tuple(score) for score in self.scorer.score([pair for _, *pair in requests])]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """log p of each text behind the prefix id, in windows of the model's length, each token counted once."""
        def ask(questions: list[tuple[str]], keep: Callable) -> None:
            texts = self.encode_all([text for text, in questions], add_prefix=False)
            windows = [[make_disjoint_window(window) for window in get_rolling_token_windows(
                ids, prefix_token=self.prefix_token_id, max_seq_len=self.max_length, context_len=1)] for ids in texts]
            owners = np.repeat(np.arange(len(texts)), [len(each) for each in windows])
            left, sums = [len(each) for each in windows], [0.0] * len(texts)
            keep([(place, 0.0) for place, count in enumerate(left) if not count])

            def collect(new: list) -> None:
                finished = []
                for place, score in new:
                    owner = int(owners[place])
                    left[owner] -= 1
                    sums[owner] += score.logp
                    if not left[owner]:
                        finished.append((owner, sums[owner]))
                keep(finished)

            self._score([window for each in windows for window in each], collect)

        return self._answer("loglikelihood_rolling", "documents", requests, ask)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What the model writes behind each context, up to a stop text."""
        def ask(questions: list[tuple[str, dict[str, Any], int]], keep: Callable) -> None:
            made = [self._request(ids, settings, row) for ids, (_, settings, row) in zip(
                self.encode_all([context for context, *_ in questions], add_prefix=True), questions, strict=True)]
            longest = max(len(request.prompt) + request.max_tokens for request in made)
            options = rounded(len(made), longest)
            # The slots' keys and values take a few times what those of a scored batch do.
            options["slots"] = min(options["slots"], max(1, 4 * self._batch_tokens // options["max_length"]))
            for place, (_, text, _) in enumerate(self.model.engine(**options).run(made)):
                keep([(place, text)])

        return self._answer("generate_until", "texts", requests, ask)

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval's results say of a model."""
        import jax

        return {"model_num_parameters": sum(leaf.size for leaf in jax.tree.leaves(self.model.params)),
                "model_dtype": str(np.dtype(self.model.decoder.dtype)), "model_revision": str(self.model.step),
                "model_sha": fingerprint(self.model)}

    def _score(self, pairs: list[tuple[list[int], list[int]]], report: Callable) -> None:
        try:
            self.scorer.score(pairs, report=report)
        except ValueError as error:
            raise UserError(f"a question cannot be asked: {error}") from None

    def _answer(self, kind: str, noun: str, requests: Sequence[Any], ask: Callable) -> list[Any]:
        """Answers from the store, and what it lacks from `ask(questions, keep)`; equal questions are asked once."""
        questions = [tuple(request.args) for request in requests]
        if kind == "generate_until":
            copies: Counter[str] = Counter()
            questions = [(*question, self._copy(question, copies)) for question in questions]
        keys = [self.store.key(kind, *question) for question in questions]
        answers = {key: self.store.get(key) for key in keys}
        missing = {key: question for key, question in zip(keys, questions, strict=True) if answers[key] is None}
        if missing:
            order = list(missing)
            with self._bar(noun, total=len(answers), done=len(answers) - len(missing)) as advance:
                def keep(new: list[tuple[int, Any]]) -> None:
                    found = [(order[place], answer) for place, answer in new]
                    self.store.add(found)
                    answers.update(found)
                    for _ in found:
                        advance()

                ask(list(missing.values()), keep)
        return [answers[key] for key in keys]

    def _copy(self, question: tuple[str, dict[str, Any]], copies: Counter[str]) -> int:
        """The how manieth of equal questions this is, where it is drawn; else 0: the answer is the same."""
        context, settings = question
        if not settings.get("do_sample", float(settings.get("temperature") or 0) > 0):
            return 0
        key = self.store.key(context, settings)
        copies[key] += 1
        return copies[key] - 1

    def _request(self, ids: list[int], settings: dict[str, Any], row: int) -> Request:
        """A request of the engine from a task's generation settings, under the names that lm-eval knows.

        Raises:
          UserError: a setting that the engine does not have, or no room for a prompt.
        """
        settings = dict(settings)
        lengths = [settings.pop(name, None) for name in _LENGTH_NAMES]
        max_tokens = int(next((length for length in lengths if length is not None), MAX_GEN_TOKS))
        until = settings.pop("until", None) or []
        given = {name: kind(settings.pop(name)) for name, kind in _DRAWING.items() if settings.get(name) is not None}
        drawn = settings.pop("do_sample", None)
        drawn = given.get("temperature", 0) > 0 if drawn is None else drawn
        if settings.pop("num_beams", 1) != 1:
            raise UserError("generation setting num_beams: beams are not searched here, only 1 works")
        if unknown := [name for name, value in settings.items() if value is not None]:
            raise UserError(f"generation setting {unknown[0]}={settings[unknown[0]]} is not known here; there are "
                            f"{', '.join(['until', 'do_sample', *_LENGTH_NAMES, *_DRAWING])}")
        if not drawn:
            given = {name: value for name, value in given.items() if name == "repetition_penalty"}
        elif not given.get("temperature"):
            given["temperature"] = 1.0
        given = {name: value for name, value in given.items() if not (name == "top_k" and value == 0)}
        room = self.max_length - max_tokens
        if room < 1:
            raise UserError(f"a task asks for {max_tokens} new tokens, and the model sees {self.max_length} at once: "
                            "there is no room for a prompt")
        stops = [until] if isinstance(until, str) else until
        stop_ids = dict.fromkeys([*self.model.stop_ids, *([] if self.model.tokenizer.eos_id is None
                                                          else [self.model.tokenizer.eos_id])])
        try:
            return Request(prompt=tuple(ids[-room:] or [self.prefix_token_id]), max_tokens=max_tokens,
                           stop=tuple(stop for stop in stops if stop), stop_ids=tuple(stop_ids)[:MOST_STOP_IDS],
                           seed=self._seed, row=row, **{"temperature": 0.0, **given})
        except ValueError as error:
            raise UserError(f"generation setting {error}") from None


def _digest(head: str) -> bytes:
    return hashlib.blake2b(head.encode(), digest_size=16).digest()


def identify(model: Model, *, max_length: int | None, seed: int) -> dict[str, Any]:
    """All that decides a model's answers but the questions, as an `AnswerStore` wants it."""
    return {"model": fingerprint(model), "dtype": str(np.dtype(model.decoder.dtype)), "prefix": find_prefix(model)[1],
            "adds_prefix": model.prefix_id is not None, "seed": seed,
            "max_length": max_length or model.decoder.config.context_length}


def find_prefix(model: Model) -> tuple[str, int]:
    """Where the id comes from that stands before a document whose context is empty, and the id.

    The checkpoint's `prefix_id`, if documents were seen behind one in training; else the id that ends a document.

    Raises:
      UserError: there is none.
    """
    tokenizer = model.tokenizer
    candidates = {"prefix_id of the checkpoint": model.prefix_id, "end of document": model.stop_id,
                  "EOS of the tokenizer": tokenizer.eos_id, "BOS of the tokenizer": tokenizer.bos_id}
    for source, token in candidates.items():
        if token is not None:
            return source, token
    raise UserError(f"{model.run_dir}: neither the checkpoint nor {tokenizer.path} has an id that begins or ends a "
                    "document, which an empty context needs")
