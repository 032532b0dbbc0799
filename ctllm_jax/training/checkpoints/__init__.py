"""Checkpoints on disk and in object stores: writing, listing, verifying and loading them."""
