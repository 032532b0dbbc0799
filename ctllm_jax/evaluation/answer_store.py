"""What a model answered, by what it was asked: an evaluation goes on where it was stopped. No jax here.

A file of JSON lines [key, answer], appended to as answers come. The key is a hash of all that decides the answer, the
model's weights included, so that one file serves every task, and answers of another model are never taken.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any


class AnswerStore:
    """Answers of one model.

    Args:
      path: the file; None keeps nothing. What a kill left of a last line is cut off.
      identity: all that decides an answer but the question, as JSON.
    """

    def __init__(self, path: Path | None, identity: Any):
        self._identity = json.dumps(identity, sort_keys=True, ensure_ascii=False).encode()
        self._answers: dict[str, Any] = {}
        self._file = None
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        content = path.read_bytes() if path.exists() else b""
        whole = content[:content.rfind(b"\n") + 1]
        if whole != content:
            os.truncate(path, len(whole))
        for line in whole.splitlines():
            try:
                key, self._answers[key] = json.loads(line)
            except ValueError:
                continue  # A disk that was full, or a crash of the machine; it is asked again.
        self._file = open(path, "ab", buffering=0)  # Closed by `close`.

    def __enter__(self) -> AnswerStore:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """No answer can be added any more."""
        if self._file is not None:
            self._file.close()

    def key(self, *question: Any) -> str:
        """The key of a question: values of JSON."""
        asked = json.dumps(question, sort_keys=True, ensure_ascii=False).encode()
        return hashlib.sha256(self._identity + b"\0" + asked).hexdigest()[:32]

    def get(self, key: str) -> Any:
        """The answer, or None."""
        return self._answers.get(key)

    def add(self, answers: Iterable[tuple[str, Any]]) -> None:
        """Keep answers, in one append: a kill afterwards costs none of them."""
        answers = list(answers)
        self._answers.update(answers)
        if self._file is not None and answers:
            self._file.write("".join(json.dumps(each, ensure_ascii=False) + "\n" for each in answers).encode())
