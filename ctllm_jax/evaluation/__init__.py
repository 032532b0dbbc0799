"""Evaluation of a trained model: benchmarks, bits per byte with baselines, and LLM judges."""

from ctllm_jax.config.extras import need_train

need_train()
