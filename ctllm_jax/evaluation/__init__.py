"""Measuring a trained model: bits per byte, and the baselines to hold it against."""

from ctllm_jax.config.extras import need_train

need_train()
