"""The train step, the optimizer, checkpoints and the loop that every stage shares."""

from ctllm_jax.config.extras import need_train

need_train()
