"""Sums around a ring: the cases of `launch.py kernels`. What they run is `ctllm_jax.gathered`."""
