"""The dataset directory: the format on disk. No jax here."""
