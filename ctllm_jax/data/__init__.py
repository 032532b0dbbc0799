"""From records to batches."""

from ctllm_jax.config.extras import need_train

need_train()
