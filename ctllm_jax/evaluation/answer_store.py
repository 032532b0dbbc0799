"""A store of a model's answers by question, so that an evaluation continues where it stopped. No jax.

A file of JSON lines [key, answer], appended to as answers come. The key is a hash of everything that determines the
answer, including the model's weights. So one file serves every task, and answers of another model are never used.
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
      path: the file; None stores nothing. An incomplete last line is removed.
      identity: everything that determines an answer except the question, as JSON.
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
        """Close the file; no answer can be added afterwards."""
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
        """Store answers in one append, so that a later kill loses none of them."""
        answers = list(answers)
        self._answers.update(answers)
        if self._file is not None and answers:
            self._file.write("".join(json.dumps(each, ensure_ascii=False) + "\n" for each in answers).encode())
