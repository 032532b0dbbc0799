"""A small model whose choices are clear, and what it says by a full forward pass without a cache."""

from functools import partial

import jax
import numpy as np

from ctllm_jax.config.load import load
from ctllm_jax.config.pretrain import PretrainConfig
from ctllm_jax.model.decoder import Decoder, head_weights, init_params

LONGEST = 256


def make_model(*overrides):
    """(decoder, params) of the debug model, with weights large enough that its text has turns."""
    config = load(PretrainConfig, target="debug/pretrain", overrides=["model.init_std=0.3", *overrides]).model
    return Decoder(config), init_params(config, jax.random.key(0))


@partial(jax.jit, static_argnums=0)
def _forward(decoder, params, tokens_1S, real_1S):
    hidden_1SD, _ = decoder.apply({"params": params}, tokens_1S, real_1S)
    logits_SV = hidden_1SD[0] @ head_weights(params)
    return jax.nn.log_softmax(logits_SV[:, :decoder.config.vocab_size], axis=-1)


def full_logps(model, tokens):
    """Log-probabilities behind each of up to `LONGEST` tokens, [tokens, vocabulary]."""
    padded = np.zeros((1, LONGEST), np.int32)
    padded[0, :len(tokens)] = tokens
    real = (np.arange(LONGEST) < len(tokens)).astype(np.int32)[None]
    return np.asarray(_forward(*model, padded, real))[:len(tokens)]
