"""Requests to an engine, and its events. No jax."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from ctllm_jax.config.generate import HIGHEST_TEMPERATURE, MOST_TOP_K, PENALTIES

MOST_STOP_IDS = 16
MOST_TOLD = 20
"""Largest number of reported log-probabilities besides the sampled token's, as in OpenAI's API."""
FAILED = "error"
"""Finish reason of a request on which the engine failed."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt, and settings for its continuation.

    Attributes:
      prompt: token ids, at least one; a document starts after the model's prefix id.
      max_tokens: largest number of new tokens; 0 only scores the prompt.
      temperature: 0 selects the likeliest token.
      top_k: draw from this many likeliest tokens; None: from all.
      top_p: draw from the likeliest tokens that together have this probability.
      min_p: draw no token that is less likely than this times the likeliest.
      repetition_penalty: above 1 makes tokens of prompt and text less likely.
      seed: 64 bits, signed or not. row: 32 bits. The random numbers depend only on them and the token's position.
      stop: texts that end it, and are not returned; the one that is complete first counts. Needs a tokenizer.
      stop_ids: ids that end it, at most `MOST_STOP_IDS`; not returned either.
      told: number of likeliest tokens that are reported for each token, at most `MOST_TOLD`.
      score_prompt: also report the log-probabilities of the prompt's tokens, and of the id that ended the text.
        lm-eval, which requests one new token to score a prompt, relies on that.
    """

    prompt: tuple[int, ...]
    max_tokens: int
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    row: int = 0
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    told: int = 0
    score_prompt: bool = False

    def __post_init__(self):
        # Comparisons with NaN are false, so it is out of every range.
        ranges = {"max_tokens": 0 <= self.max_tokens < 2**31,
                  "temperature": 0 <= self.temperature <= HIGHEST_TEMPERATURE,
                  "top_k": self.top_k is None or 1 <= self.top_k <= MOST_TOP_K, "top_p": 0 < self.top_p <= 1,
                  "min_p": 0 <= self.min_p < 1,
                  "repetition_penalty": PENALTIES[0] <= self.repetition_penalty <= PENALTIES[1],
                  "seed": -2**63 <= self.seed < 2**64, "row": 0 <= self.row < 2**32,
                  "stop_ids": len(self.stop_ids) <= MOST_STOP_IDS and all(0 <= each < 2**31 for each in self.stop_ids),
                  "told": 0 <= self.told <= MOST_TOLD}
        if wrong := [name for name, is_right in ranges.items() if not is_right]:
            raise ValueError(f"{wrong[0]}={getattr(self, wrong[0])} is out of range")
        if not self.prompt:
            raise ValueError("prompt: needs at least one token; a document starts behind the model's prefix id")
        if not self.max_tokens and not self.score_prompt:
            raise ValueError("max_tokens=0 only makes sense with score_prompt")


class Token(NamedTuple):
    """A token, the model's log-probability of it (before temperature and truncation; None for the first of a prompt),
    and the likeliest tokens at its position with theirs."""

    id: int
    logp: float | None
    told: tuple[tuple[int, float], ...] = ()


class Event(NamedTuple):
    """Result of a step for one request.

    Attributes:
      request: the number from `submit`.
      tokens: sampled in this step, without the id that ended it unless the prompt is scored.
      text: the newly final part of the text, if there is a tokenizer.
      finish: None while it continues; "stop" (a stop id or text), "length" (max_tokens), "cancelled", or `FAILED`.
      prompt: the prompt's tokens, once, with `score_prompt`.
    """

    request: int
    tokens: tuple[Token, ...] = ()
    text: str = ""
    finish: str | None = None
    prompt: tuple[Token, ...] | None = None
