"""A transformers LlamaForCausalLM with the weights of one of our trees: transposes and reshapes only."""

import numpy as np


def make_llama(config, params):
    """The model in float32, evaluation mode. `config`: ModelConfig; `params`: our tree, numpy or jax."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    llama = LlamaForCausalLM(LlamaConfig(
        vocab_size=config.padded_vocab_size, hidden_size=config.hidden_size, intermediate_size=config.ffn_size,
        num_hidden_layers=config.num_layers, num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads, head_dim=config.head_dim, rms_norm_eps=config.norm_eps,
        rope_theta=config.rope_theta, tie_word_embeddings=config.tie_embeddings,
        max_position_embeddings=config.context_length, attn_implementation="eager")).float().eval()
    missing, unexpected = llama.load_state_dict(
        {name: torch.tensor(value) for name, value in to_llama(config, params).items()}, strict=False)
    assert not unexpected and set(missing) <= ({"lm_head.weight"} if config.tie_embeddings else set())
    llama.tie_weights()
    return llama


def to_llama(config, params):
    """Our tree under transformers' names, each matrix [out, in]."""
    D = config.hidden_size
    tensors = {"model.embed_tokens.weight": params["embedding"], "model.norm.weight": params["final_norm"]}
    if "head" in params:
        tensors["lm_head.weight"] = np.asarray(params["head"]).T
    names = {"query": "self_attn.q_proj", "key": "self_attn.k_proj", "value": "self_attn.v_proj",
             "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}
    for layer in range(config.num_layers):
        block = {name: np.asarray(stack[layer]) for name, stack in params["blocks"].items()}
        prefix = f"model.layers.{layer}."
        for ours, theirs in names.items():
            tensors[f"{prefix}{theirs}.weight"] = block[ours].reshape(block[ours].shape[0], -1).T
        tensors[f"{prefix}self_attn.o_proj.weight"] = block["out"].reshape(-1, D).T
        tensors[f"{prefix}input_layernorm.weight"] = block["attention_norm"]
        tensors[f"{prefix}post_attention_layernorm.weight"] = block["ffn_norm"]
    return {name: np.array(value) for name, value in tensors.items()}
