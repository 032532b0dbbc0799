"""The one way in: `python launch.py COMMAND [ACTION] [TARGET ...] [key=value ...]`; `--help` lists the commands."""

from ctllm_jax.cli import entry

if __name__ == "__main__":
    entry()
