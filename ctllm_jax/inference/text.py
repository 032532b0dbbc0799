"""Convert new tokens to text as it becomes final: never half a character, and no part of a stop string. No jax."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ctllm_jax.data.tokenizer import Tokenizer

_UNFINISHED = "\ufffd"
"""The decoded form of an incomplete character."""
_CONTEXT = 32
"""Number of prompt tokens that are decoded with the new ones, to keep spaces and complete characters at the
boundary."""


class TextStream:
    """The text after a prompt.

    Args:
      prompt: its ids, of which the last ones are used.
      stop: texts that end it. The one that is complete first counts, of several that end at one character the first in
        this list, for any token boundaries; it is not returned. This equals vLLM.

    Attributes:
      text: all text returned so far.
      stopped: a stop string occurred. Later tokens are ignored.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = (), *, stop: Iterable[str] = ()):
        self._decode = tokenizer.decode
        self._stops = [each for each in stop if each]
        # Ids whose text precedes new text, and ids since then.
        self._before, self._new = list(prompt[-_CONTEXT:]), []
        self._given = 0  # number of characters of the new ids' text that were returned
        self._held = ""
        self.text = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Return the text that became final with this token."""
        self._new.append(token)
        text = self._read()
        certain = text.rstrip(_UNFINISHED)
        new, self._given = certain[self._given:], max(self._given, len(certain))
        if certain != text:
            return self._give(new, last=False)
        self._given = 0
        # After ids without text, such as markers, a tokenizer may treat a space as the start of a text.
        self._before, self._new = self._new if text else [*self._before, *self._new], []
        return self._give(new, last=False)

    def finish(self) -> str:
        """Return the text that was held back."""
        return self._give(self._read()[self._given:] if self._new else "", last=True)

    def _read(self) -> str:
        """The text of the new ids, decoded after the earlier ones."""
        before, whole = self._decode(self._before), self._decode([*self._before, *self._new])
        # New bytes may change earlier text; then they are decoded separately.
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
