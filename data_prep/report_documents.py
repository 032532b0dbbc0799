"""Documents on the page of a corpus: single ones, and dropped duplicates next to the kept documents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher

from ctllm_jax.report.charts import spell
from ctllm_jax.report.readable import finite
from ctllm_jax.report.tables import shown

_COMPARED = 1500
"""Characters of two texts that are compared: the time grows with the square."""


def document(sample: Mapping, text: str = "") -> str:
    """A document with its value, id and address; `text` is its text if that is already HTML."""
    value = finite(sample.get("value"))
    facts = [] if value is None else [f"<b>{spell('plain', value) if value % 1 else f'{value:,.0f}'}</b>"]
    facts += [shown(sample[key]) for key in ("id", "url") if sample.get(key)]
    kind = "doc" if sample.get("kept") else "doc dropped"
    head = f"<header>{' · '.join(facts)}</header>" if facts else ""
    return f'<article class="{kind}">{head}<p dir="auto">{text or shown(sample.get("text") or "")}</p></article>'


def pairs(samples: Sequence[Mapping], stage: str) -> str:
    """Dropped documents of a stage next to the kept ones; equal ones only once."""
    found = [sample for sample in samples if sample.get("stage") == stage and sample.get("other")]
    same = [sample for sample in found if sample["other"] == sample.get("text")]
    parts = [f'<div class="docs">{"".join(map(document, same))}</div>'] if same else []
    for sample in found:
        if sample["other"] != sample.get("text"):
            left, right = _differences(sample.get("text") or "", sample["other"])
            parts.append(f'<div class="pair"><div><h4>dropped · {shown(sample.get("source"))}</h4>'
                         f"{document(sample, left)}</div><div><h4>stays</h4>{document({'kept': True}, right)}</div>"
                         f"</div>")
    return "".join(parts)


def _differences(left: str, right: str) -> tuple[str, str]:
    """Both texts as HTML, with the differences marked."""
    left, right = left[:_COMPARED], right[:_COMPARED]
    found: tuple[list[str], list[str]] = [], []
    for kind, *ends in SequenceMatcher(None, left, right, autojunk=False).get_opcodes():
        for text, into, start, stop in ((left, found[0], *ends[:2]), (right, found[1], *ends[2:])):
            if start < stop:
                piece = shown(text[start:stop])
                into.append(piece if kind == "equal" else f"<mark>{piece}</mark>")
    return "".join(found[0]), "".join(found[1])
