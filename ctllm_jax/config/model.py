"""The architecture (`model`), and how it is computed (`compute`, `mesh`)."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from ctllm_jax.config.axes import AXES
from ctllm_jax.config.base import Section, key

Implementation = Literal["auto", "pallas", "cudnn", "xla"]
Remat = Literal["none", "ffn", "attention", "block"]


class ModelConfig(Section):
    """The architecture: a Llama decoder. Defaults are CT-LLM's for keys that do not depend on the model's size."""

    vocab_size: int = key(..., "number of ids of the tokenizer, including added special ids", ge=2)
    vocab_multiple: int = key(128, "the embedding's rows are padded to a multiple of this", ge=1)
    hidden_size: int = key(..., "width of the residual stream (D)", ge=1)
    num_layers: int = key(..., "decoder blocks (L)", ge=1)
    num_heads: int = key(..., "query heads (N)", ge=1)
    num_kv_heads: int = key(..., "key and value heads (K); divides num_heads", ge=1)
    head_dim: int = key(128, "size of one head (H); even, for RoPE", ge=2)
    ffn_size: int = key(..., "width of the SwiGLU feed-forward (F)", ge=1)
    tie_embeddings: bool = key(False, "use the embedding as the output head")
    rope_theta: float = key(10_000.0, "base of the rotary frequencies", gt=0)
    norm_eps: float = key(1e-5, "epsilon of RMSNorm", gt=0)
    qkv_bias: bool = key(False, "bias on the query, key and value projections (Qwen2)")
    sliding_window: int | None = key(None, "a token attends to this many tokens, including itself (Mistral); null: all", ge=1)
    init_std: float = key(0.02, "standard deviation of the initial weights", gt=0)
    context_length: int = key(4096, "longest sequence the model is meant for", ge=1)

    @model_validator(mode="after")
    def _check(self):
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads={self.num_kv_heads} must divide num_heads={self.num_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even: RoPE rotates its two halves")
        return self

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding (V)."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple


class ComputeConfig(Section):
    """How the model is computed: numerics, memory and kernels. Only `dtype` changes the results of a run."""

    dtype: Literal["float32", "bfloat16"] = key("bfloat16", "type of activations and matmul inputs; parameters, softmax and logits stay float32")
    attention: Implementation = key("auto", "implementation of attention", changeable=True)
    swiglu: Implementation = key("auto", "implementation of the gate, up and activation", changeable=True)
    scan_layers: bool = key(True, "one compiled block scanned over the layers (short compile) instead of L copies (faster step)", changeable=True)
    remat: Remat = key("block", "what the backward pass recomputes: none; ffn (the FFN's wide activations); attention (all but attention's inputs and output); block (everything but each block's input)", changeable=True)
    loss_chunk: int = key(4096, "number of tokens per device whose logits are in memory at once", ge=1, changeable=True)
    gradient_rings: Literal["auto", "off", "remote_copies"] = key("auto", "how a TPU slice sums gradients over mesh.fsdp: auto (around its rings, where its compiler's permutes are asynchronous), off (by XLA's reductions), remote_copies (around its rings by our remote copies, which overlap with computation also on v5e of more than 16 chips)", changeable=True)
    xla_flags: Literal["auto", "none"] = key("auto", "auto: recommended XLA flags for this machine's chips, overridden by your own; none: only your own", changeable=True)
    compilation_cache: str = key("auto", "cache of compiled programs: auto (next to the run on TPUs and GPUs, none on CPUs), off, or a directory or gs:// path that all processes share", changeable=True)


class MeshConfig(Section):
    """Devices along each mesh axis; one of them may be -1 (all remaining devices)."""

    replica: int | None = key(None, "copies of the model over slices or nodes, which exchange gradients over the network; null: one per slice or node", ge=-1, changeable=True)
    data: int = key(-1, "copies of the model within a slice or node, each with its own part of the batch", ge=-1, changeable=True)
    fsdp: int = key(1, "parameters, gradients, optimizer state and the batch are sharded over this many devices", ge=-1, changeable=True)
    tensor: int = key(1, "heads, FFN and vocabulary are sharded over this many devices", ge=-1, changeable=True)
    context: int = key(1, "reserved: sequences are not split over devices yet", ge=-1, changeable=True)

    @model_validator(mode="after")
    def _check(self):
        sizes = {axis: getattr(self, axis) for axis in AXES}
        if self.context != 1:
            raise ValueError(f"context={self.context}: sequences cannot be split over devices yet; raise fsdp, or tensor, or lower batch.rows_per_device")
        if sum(size == -1 for size in sizes.values()) > 1:
            raise ValueError("at most one of replica, data, fsdp and tensor may be -1 (all remaining devices)")
        if 0 in sizes.values():
            raise ValueError("an axis has at least one device; 0 given")
        return self
