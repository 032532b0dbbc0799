"""`launch.py kernels check|bench|compile`: the kernels alone."""

from __future__ import annotations

from typing import Literal

from ctllm_jax.config.base import Section, key


class KernelsCheckConfig(Section):
    """Numerics on the local device."""

    op: str | None = key(None, "this op only; null: all")
    match: str = key("", "cases whose name contains this", text=True)
    output: str | None = key(None, "a JSON file for the table", output="file")


class KernelsBenchConfig(Section):
    """Timings on the local device."""

    op: str | None = key(None, "this op only; null: all")
    lengths: list[int] = key([2048, 4096, 8192, 16384], "sequence lengths")
    heads: int = key(16, "attention: query heads", ge=1)
    kv_heads: int = key(16, "attention: key and value heads", ge=1)
    head_dim: int = key(128, "attention: head dim", ge=1)
    hidden: int = key(2048, "swiglu: width of the input", ge=1)
    ffn: int = key(5504, "swiglu: width of the output", ge=1)
    rows: int = key(1, "rows of the batch", ge=1)
    dtype: Literal["bfloat16", "float32"] = key("bfloat16", "of the arrays")
    repeats: int = key(10, "timed calls; the fastest counts", ge=1)
    output: str | None = key("kernels_bench.json", "a JSON file for the table; null: none", output="file")


class KernelsCompileConfig(Section):
    """Ahead-of-time compilation for chips that may be absent."""

    op: str | None = key(None, "this op only; null: all")
    chips: list[Literal["v4", "v5e", "v5p", "v6e", "tpu7x"]] = key(
        ["v4", "v5e", "v5p", "v6e", "tpu7x"], "TPU chips to compile for")
    match: str = key("", "cases whose name contains this", text=True)
    output: str | None = key(None, "a JSON file for the table", output="file")
