"""`launch.py import-hf` and `launch.py export-hf`: import and export of Hugging Face models."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from ctllm_jax.config.base import Section, key


class ImportConfig(Section):
    """`launch.py import-hf DIR`."""

    output: str = key(..., "run directory to write: a MODEL like any other", output="folder")
    template: bool = key(True, "keep its chat template; false: for a base model that you train on another one")
    vocab_multiple: int | None = key(None, "cut the embedding's rows beyond the tokenizer's ids, or add zero rows, to a multiple of this; null: unchanged", ge=1)


class ExportConfig(Section):
    """`launch.py export-hf MODEL`."""

    output: str = key(..., "folder to write", output="folder")
    dtype: Literal["float32", "bfloat16", "float16"] | None = key(None, "dtype of the weights; null: that of the checkpoint, which is float32 after training here")
    padding: Literal["keep", "cut"] = key("keep", "rows of the embedding beyond the tokenizer's ids")
    shard_gb: float = key(5.0, "largest size of a file in gigabytes; larger models get several files and an index", gt=0)
    allow_mismatch: bool = key(False, "adapters=true: allow a base_model that differs from the adapters' base or cannot be compared, and print the differences; false: refuse it")
    base: str | None = key(None, "MODEL that a run's adapters belong to, if it has moved; null: its recorded path")
    adapters: bool = key(False, "write only a run's adapters, in PEFT's format; false: the whole model, with adapters merged")
    base_model: str | None = key(None, "adapters=true: Hugging Face name or folder of the base for PEFT; null: the base's local path")

    @model_validator(mode="after")
    def _check(self):
        if self.base_model is not None and not self.adapters:
            raise ValueError("base_model is only read with adapters=true")
        if self.allow_mismatch and not self.adapters:
            raise ValueError("allow_mismatch is only read with adapters=true")
        wrong = [name for name in ("dtype", "padding", "shard_gb") if getattr(self, name) != type(self).model_fields[name].default]
        if self.adapters and wrong:
            raise ValueError(f"{wrong[0]} is not read with adapters=true: adapters are written as they are")
        return self
