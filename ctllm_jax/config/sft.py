"""`launch.py sft`: dialogues, how they are written out, which tokens are learned; the rest is as in pretraining."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import model_validator

from ctllm_jax.config.base import Section, key
from ctllm_jax.config.model import ModelConfig
from ctllm_jax.config.pretrain import PretrainConfig


class TemplateConfig(Section):
    """The chat template. A bare value is its kind."""

    shorthand = "kind"

    kind: Literal["baichuan2", "chatml", "plain", "jinja"] = key("baichuan2", "baichuan2: role ids around text; chatml: <|im_start|>role … <|im_end|>; plain: the texts below; jinja: a Hugging Face template")
    system: str | None = key(None, "system prompt of dialogues without one; the card of CT-LLM has 你是一个有用的人工智能助手。", text=True)
    user_id: int = key(195, "baichuan2: id before what the user says", ge=0)
    assistant_id: int = key(196, "baichuan2: id before an answer", ge=0)
    end_id: int | None = key(None, "baichuan2, plain: id that ends an answer; null: the tokenizer's EOS", ge=0)
    add_bos: bool = key(False, "begin a dialogue with the tokenizer's BOS; CT-LLM's pretraining has none. A jinja template writes its own")
    plain_system: str = key("{content}\n\n", "plain: a system prompt, around {content}", text=True)
    plain_user: str = key("用户：{content}\n", "plain: what the user says, around {content}", text=True)
    plain_assistant: str = key("助手：{content}\n", "plain: an answer, around {content}; end_id comes right after the answer", text=True)
    path: str | None = key(None, "jinja: a .jinja file, or a Hugging Face folder with chat_template.jinja or tokenizer_config.json", local=True)

    @model_validator(mode="after")
    def _check(self):
        if self.kind == "jinja" and self.path is None:
            raise ValueError("kind=jinja needs path: a .jinja file or a Hugging Face folder")
        if self.kind != "jinja" and self.path is not None:
            raise ValueError(f"path is only read with kind=jinja; kind={self.kind}")
        if self.kind == "jinja" and self.add_bos:
            raise ValueError("add_bos is not read with kind=jinja: the template writes its own BOS")
        for name in ("plain_system", "plain_user", "plain_assistant"):
            if getattr(self, name).count("{content}") != 1:
                raise ValueError(f"{name}={getattr(self, name)!r} must hold {{content}} exactly once")
        return self


class SFTSourceConfig(Section):
    """One source of dialogues. A bare value is its path."""

    shorthand = "path"

    path: str = key(..., "JSON lines (.jsonl, .gz, .zst), a JSON array (.json), Parquet, or a folder of these", local=True)
    group: str = key("", "what `ratio` and the report count it under, such as zh or en; empty: the source's name")
    layout: Literal["messages", "sharegpt", "alpaca", "prompt"] | None = key(None, "how a row holds its dialogue; null: detected, and named in the log")
    max_bad: int = key(0, "rows that cannot be read (malformed JSON, wrong fields) set aside before the run fails", ge=0)


class SFTDataConfig(Section):
    """The dialogues. A bare value is the path of a single source."""

    sources: dict[str, SFTSourceConfig] = key(..., "name -> source; names appear in the report", min_length=1)
    tokenizer: str | None = key(None, "tokenizer (.model or tokenizer.json); null: the one of the model that training starts from", local=True)
    template: TemplateConfig | None = key(None, "how messages become ids; null: as init has learned it, or baichuan2 where it has learned none")
    loss_on: Literal["answers", "last_answer", "everything"] = key("answers", "tokens that are learned: every answer with its end, the last one, or all tokens")
    over_length: Literal["drop", "truncate", "raise"] = key("drop", "a dialogue of more than sequence_length tokens: leave it out, cut its end off, or fail; counted in the report")
    ratio: str | None = key(None, "KEPT:DRAWN=a:b, such as zh:en=2:1: all rows of group KEPT, and b/a times as many of DRAWN; a smaller draw is part of a larger one. null: all rows")
    held_out: float = key(0.0, "share of each source's dialogues, chosen by a hash of their tokens before the ratio draws, that is only evaluated", ge=0, lt=1)
    epochs: int = key(3, "times that every dialogue is seen", ge=1, changeable=True)

    @classmethod
    def from_shorthand(cls, value: str) -> dict:
        """A path."""
        return {"sources": {"data": {"path": value}}}

    @model_validator(mode="after")
    def _check(self):
        ratio = self.parsed_ratio
        missing = [name for name in ratio[:2] if name not in self.groups.values()] if ratio else []
        if missing:
            raise ValueError(f"ratio={self.ratio} names the group {missing[0]!r}, which no source has; groups: {', '.join(sorted(set(self.groups.values())))}")
        return self

    @property
    def groups(self) -> dict[str, str]:
        """The group of each source."""
        return {name: source.group or name for name, source in self.sources.items()}

    @property
    def parsed_ratio(self) -> tuple[str, str, int, int] | None:
        """`ratio` as (kept, drawn, a, b)."""
        if self.ratio is None:
            return None
        match = re.fullmatch(r"\s*([^:=\s]+):([^:=\s]+)\s*=\s*(\d+):(\d+)\s*", self.ratio)
        if match is None or not int(match[3]) or match[1] == match[2]:
            raise ValueError(f"ratio={self.ratio} must be KEPT:DRAWN=a:b with two groups and a at least 1, such as zh:en=2:1")
        return match[1], match[2], int(match[3]), int(match[4])


class SFTConfig(PretrainConfig):
    """A fine-tuning run."""

    steps: int | None = key(None, "optimizer steps; null: as many as data.epochs take", ge=1, changeable=True)
    init: str = key(..., "MODEL to start from: a run directory, RUN@STEP, or a Hugging Face folder", changeable=True)
    model: ModelConfig | None = key(None, "the architecture; null: that of init")
    data: SFTDataConfig = key(..., "the dialogues")

    @property
    def isolated(self) -> bool:
        """Dialogues of a row never see each other."""
        return True
