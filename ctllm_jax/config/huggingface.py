"""`launch.py import-hf` and `launch.py export-hf`: models of Hugging Face's libraries, in and out."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from ctllm_jax.config.base import Section, key


class ImportConfig(Section):
    """`launch.py import-hf DIR`."""

    output: str = key(..., "run directory to write: a MODEL like any other", output="folder")
    template: bool = key(True, "keep its chat template; false: for a base model that is to learn another one")
    vocab_multiple: int | None = key(None, "cut rows of the embedding beyond the tokenizer's ids, or add zeros, up to a multiple of this; null: as many rows as it has", ge=1)


class ExportConfig(Section):
    """`launch.py export-hf MODEL`."""

    output: str = key(..., "folder to write", output="folder")
    dtype: Literal["float32", "bfloat16", "float16"] | None = key(None, "type of the weights; null: what they are kept in, which is float32 for what was trained here")
    padding: Literal["keep", "cut"] = key("keep", "rows of the embedding beyond the tokenizer's ids")
    shard_gb: float = key(5.0, "most gigabytes of a file; more are several files and their index", gt=0)
    allow_mismatch: bool = key(False, "adapters=true: write a base_model that differs from the adapters' own, or that is not here to be compared, and print the differences; false: refuse it")
    base: str | None = key(None, "MODEL that a run's adapters belong to, where it lies elsewhere now; null: where it was")
    adapters: bool = key(False, "write a run's adapters alone, as PEFT reads them; false: the whole model, adapters merged")
    base_model: str | None = key(None, "adapters=true: Hugging Face name or folder of the base, as PEFT is to find it; null: where the base lies here")

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
