"""Sums around a ring: cases of `launch.py kernels` that test `ctllm_jax.gathered`."""
