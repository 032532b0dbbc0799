"""`python -m ctllm_jax COMMAND …`: the same as `python launch.py COMMAND …`."""

from ctllm_jax.cli import entry

if __name__ == "__main__":
    entry()
