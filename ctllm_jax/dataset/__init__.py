"""The dataset directory: text files in, the format on disk, random access to it. No jax here."""

from ctllm_jax.config.extras import need_train

need_train()
