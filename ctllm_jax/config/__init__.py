"""The schema of every command, and the loader. No jax here."""
