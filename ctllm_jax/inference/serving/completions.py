"""Continue the prompts of a file with a model; the output file is continued after any interruption."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ctllm_jax.config.errors import UserError
from ctllm_jax.config.generate import GenerateConfig
from ctllm_jax.data.chat import Message
from ctllm_jax.dataset.text import json_lines
from ctllm_jax.inference.model import Model, encode_prompts, fingerprint
from ctllm_jax.inference.pair_file import PairFile
from ctllm_jax.inference.request import Request, Token

_WRITTEN = ("text", "finish", "tokens", "logprobs", "provenance")
"""Fields that we add to a row."""


class Item(NamedTuple):
    """A text to generate: its row, its key, and the prompt's ids."""

    row: dict[str, Any]
    key: str
    source: str
    ids: tuple[int, ...]
    sample: int


def settings_of(config: GenerateConfig, model: Model) -> dict[str, Any]:
    """Everything that determines the rows of an output except the prompts, as JSON."""
    options = config.model_dump(mode="json", include={
        "max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "stop", "seed", "dtype",
        "logprobs"})
    return {"model": {"step": model.step, "fingerprint": fingerprint(model)}, **options}


def read_items(path: Path | str, model: Model, *, num_samples: int) -> list[Item]:
    """The texts to generate for each row of a JSONL file: `prompt`, or `messages` that end with a question.

    Raises:
      UserError: a row is neither (the message names file and line), or has messages for a model without a template.
    """
    items: list[Item] = []
    copies: Counter[str] = Counter()
    for source, found in json_lines(path, key="prompts"):
        row, ids = _read(found, source, model)
        content = json.dumps([row.get("prompt"), row.get("messages")], ensure_ascii=False)
        copies[content] += 1
        for sample in range(num_samples):
            key = hashlib.sha256(json.dumps([content, copies[content], sample]).encode()).hexdigest()[:32]
            items.append(Item(row, key, source, ids, sample))
    if not items:
        raise UserError(f"prompts={path} has no row")
    return items


def complete_file(config: GenerateConfig, model: Model, items: Sequence[Item], *, file: PairFile,
                  advance: Callable[[], None] = lambda: None) -> int:
    """Generate the texts that `file` lacks, in the order of the rows; returns their number.

    A row's random numbers depend on the seed, its prompt, and the number of equal rows before it. An answer is shorter
    than `max_tokens` if the model's context is full.
    """
    wanted = [item for item in items if item.key not in file.done]
    if not wanted:
        return 0
    context = model.decoder.config.context_length
    rooms = [min(config.max_tokens, max(1, context - len(item.ids))) for item in wanted]
    requests = [Request(prompt=item.ids, max_tokens=room, temperature=config.temperature, top_k=config.top_k,
                        top_p=config.top_p, min_p=config.min_p, repetition_penalty=config.repetition_penalty,
                        stop=tuple(config.stop), stop_ids=model.stop_ids, seed=config.seed,
                        row=int(item.key[:8], 16), told=config.logprobs or 0)
                for item, room in zip(wanted, rooms, strict=True)]
    engine = model.engine(slots=min(config.slots, len(wanted)),
                          max_length=max(len(item.ids) + room for item, room in zip(wanted, rooms, strict=True)))
    for item, (tokens, text, finish) in zip(wanted, engine.run(requests), strict=True):
        row = {**item.row, "text": text, "finish": finish, "tokens": len(tokens)}
        if config.logprobs is not None:
            row["logprobs"] = [_shown(token) for token in tokens]
        row["provenance"] = {"key": item.key, "source": item.source, "sample": item.sample, "date": file.date,
                             "model": str(model.run_dir), "step": model.step}
        file.add(item.key, row)
        advance()
    return len(wanted)


def _read(row: Any, source: str, model: Model) -> tuple[dict[str, Any], tuple[int, ...]]:
    """A row, and the ids of its prompt."""
    if not isinstance(row, dict) or ("prompt" in row) == ("messages" in row):
        raise UserError(f"{source}: a row needs either prompt (text) or messages")
    if taken := [name for name in _WRITTEN if name in row]:
        raise UserError(f"{source}: the field {taken[0]} is written by this command: rename it")
    if "prompt" in row:
        if not isinstance(row["prompt"], str):
            raise UserError(f"{source}: prompt must be a text, or give messages")
        (ids,) = encode_prompts(model.tokenizer, [row["prompt"]], prefix_id=model.prefix_id, stop_id=model.stop_id)
    else:
        ids = _render(row["messages"], source, model)
    if len(ids) >= model.decoder.config.context_length:
        raise UserError(f"{source}: the prompt has {len(ids)} tokens, and the model's context of "
                        f"{model.decoder.config.context_length} leaves no room behind it")
    return row, tuple(ids)


def _render(messages: Any, source: str, model: Model) -> list[int]:
    if model.template is None:
        raise UserError(f"{source}: messages need a model that was taught to answer: {model.run_dir} has no template")
    is_list = isinstance(messages, list) and all(
        isinstance(each, dict) and isinstance(each.get("role"), str) and isinstance(each.get("content"), str)
        for each in messages)
    if not is_list:
        raise UserError(f"{source}: messages must be a list of {{role, content}}, both texts")
    try:
        return model.template.prompt_ids([Message(each["role"], each["content"]) for each in messages])
    except UserError as error:
        raise UserError(f"{source}: {error}") from None


def _shown(token: Token) -> dict[str, Any]:
    likeliest: Iterable[tuple[int, float]] = token.told
    return {"id": token.id, "logprob": token.logp, "top": [[each, logp] for each, logp in likeliest]}
