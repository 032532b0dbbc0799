"""`python -m ctllm_jax.cli COMMAND …`, the same as `launch.py`."""

from ctllm_jax.cli import entry

if __name__ == "__main__":
    entry()
