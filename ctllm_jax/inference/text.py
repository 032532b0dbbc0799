"""New tokens to text as it becomes certain: never half a character, and nothing of a stop string. No jax here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ctllm_jax.data.tokenizer import Tokenizer

_UNFINISHED = "\ufffd"
"""What the bytes of a character decode to while some of them are still to come."""
_CONTEXT = 32
"""Tokens of the prompt that are decoded with the new ones: blanks at the seam stay, begun characters are finished."""


class TextStream:
    """The text behind a prompt.

    Args:
      prompt: its ids; the last ones are read.
      stop: texts that end it. The one that is complete first counts, of several that end at one character the first in
        this list, wherever tokens begin and end; it is not given. So vLLM has it.

    Attributes:
      text: all that was given.
      stopped: a stop string was met. What comes after it is ignored.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = (), *, stop: Iterable[str] = ()):
        self._decode = tokenizer.decode
        self._stops = [each for each in stop if each]
        # Ids whose text stands before what comes, and those that came since.
        self._before, self._new = list(prompt[-_CONTEXT:]), []
        self._given = 0  # characters of the new ids' text that were given
        self._held = ""
        self.text = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that became certain with this token."""
        self._new.append(token)
        text = self._read()
        certain = text.rstrip(_UNFINISHED)
        new, self._given = certain[self._given:], max(self._given, len(certain))
        if certain != text:
            return self._give(new, last=False)
        self._given = 0
        # Behind ids without a text, such as markers, a tokenizer may take a blank for the first of all.
        self._before, self._new = self._new if text else [*self._before, *self._new], []
        return self._give(new, last=False)

    def finish(self) -> str:
        """What was held back."""
        return self._give(self._read()[self._given:] if self._new else "", last=True)

    def _read(self) -> str:
        """The text of the new ids, read behind those before."""
        before, whole = self._decode(self._before), self._decode([*self._before, *self._new])
        # Bytes may take away from what they complete; then they are read by themselves.
        return whole[len(before):] if whole.startswith(before) else self._decode(self._new)

    def _give(self, text: str, *, last: bool) -> str:
        if self.stopped:
            return ""
        text = self._held + text
        found = [(place + len(each), place) for each in self._stops if (place := text.find(each)) >= 0]
        if found:
            self.stopped = True
            _, place = min(found, key=lambda each: each[0])
            text, self._held = text[:place], ""
        else:
            kept = 0 if last else self._begun(text)
            text, self._held = text[:len(text) - kept], text[len(text) - kept:]
        self.text += text
        return text

    def _begun(self, text: str) -> int:
        """Characters at the end that a stop string may begin with."""
        return max((size for stop in self._stops for size in range(min(len(text), len(stop) - 1), 0, -1)
                    if text.endswith(stop[:size])), default=0)
