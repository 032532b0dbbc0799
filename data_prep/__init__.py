"""Raw text to tokenized shards. No jax here."""
