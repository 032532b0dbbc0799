"""Generation of text, chat and serving."""

from ctllm_jax.config.extras import need_train

need_train()
