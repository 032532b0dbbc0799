"""Records in, Batch out."""

from ctllm_jax.config.extras import need_train

need_train()
