"""Checks and estimates before a run uses a device."""

from ctllm_jax.config.extras import need_train

need_train()
