"""Exported adapters, as PEFT reads them on transformers' Llama."""

import json

import jax
import numpy as np
import pytest

from ctllm_jax.config.lora import LoraConfig
from ctllm_jax.config.model import ModelConfig
from ctllm_jax.huggingface.peft import write_peft
from ctllm_jax.model.decoder import Decoder, head_weights, init_params
from ctllm_jax.model.lora import attach
from tests.model.test_lora import make_adapters

CONFIG = ModelConfig(vocab_size=250, vocab_multiple=64, hidden_size=32, num_layers=3, num_heads=4, num_kv_heads=2,
                     head_dim=8, ffn_size=48, context_length=512)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks transformers
@pytest.mark.parametrize("lora", [LoraConfig(rank=4, alpha=8), LoraConfig(rank=3, rslora=True, targets="out|query|up")],
                         ids=["all", "some"])
def test_peft_gives_our_logits(tmp_path, lora):
    import peft
    import torch

    from tests.model.llama import make_llama

    params, adapters = init_params(CONFIG, jax.random.key(0)), make_adapters(lora, config=CONFIG)
    # Larger than at initialisation, so that attention and norms are far from trivial.
    params = jax.tree.map(lambda x: x * 3 if x.ndim > 1 else x, params)
    tokens = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, 128)).astype(np.int32)

    def logits_of(params):
        return np.asarray(Decoder(CONFIG).apply({"params": params}, tokens)[0] @ head_weights(params))

    ours, without = logits_of(attach(params, adapters, scale=lora.scale)), logits_of(params)
    write_peft(tmp_path / "adapters", adapters["blocks"], lora, base_model="our/base")
    theirs = peft.PeftModel.from_pretrained(make_llama(CONFIG, params), tmp_path / "adapters")
    with torch.no_grad():
        logits = theirs(torch.tensor(tokens).long()).logits.numpy()
    assert np.abs(ours - without).max() > 0.1 * np.abs(without).max()
    np.testing.assert_allclose(ours, logits, atol=1e-4 * np.abs(logits).max(), rtol=0)
    written = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == "our/base" and written["r"] == lora.rank
