"""Models in the formats of Hugging Face's libraries."""

from ctllm_jax.config.extras import need_train

need_train()
