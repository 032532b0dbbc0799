"""The dataset directory: text files in, the format on disk, random access to it. No jax here."""
