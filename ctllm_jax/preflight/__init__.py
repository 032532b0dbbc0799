"""What can be known before a device is touched."""

from ctllm_jax.config.extras import need_train

need_train()
