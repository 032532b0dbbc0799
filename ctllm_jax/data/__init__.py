"""Records in, Batch out."""
