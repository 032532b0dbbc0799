"""FLOPs of a training step, counted analytically, because compilers count a scanned body only once."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from ctllm_jax.model.lora import count_adapters
from ctllm_jax.model.parameters import count_parameters

if TYPE_CHECKING:
    from ctllm_jax.config.lora import LoraConfig
    from ctllm_jax.config.model import ModelConfig


class FlopsPerToken(NamedTuple):
    """Floating-point operations of a forward and backward pass, per token; recomputation is not counted."""

    causal: float
    full: float


def flops_per_token(config: ModelConfig, *, sequence_length: int, lora: LoraConfig | None = None) -> FlopsPerToken:
    """FLOPs of one trained token: 6 for each matmul parameter, 12·N·H·S for each layer's attention (PaLM, appendix B).

    `full` counts attention to all S tokens, `causal` half of that; with a sliding window both count at most the window.
    The embedding lookup costs nothing; the head counts once, tied or not. With `lora` (the fields of LoraConfig) frozen
    weights have no gradient and count 4, adapters 6.
    """
    embedding = config.padded_vocab_size * config.hidden_size
    norms = (2 * config.num_layers + 1) * config.hidden_size
    biases = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim * config.num_layers * config.qkv_bias
    matmul = count_parameters(config) - norms - biases - embedding * (0 if config.tie_embeddings else 1)
    window = min(sequence_length, config.sliding_window or sequence_length)
    attention = 12 * config.num_layers * config.num_heads * config.head_dim * window
    causal_share = 1 - window / (2 * sequence_length)
    causal_keys = attention * (causal_share if window < sequence_length else 0.5)
    weights = 6 * matmul if lora is None else 4 * matmul + 6 * count_adapters(config, lora)
    return FlopsPerToken(causal=weights + causal_keys, full=weights + attention)
