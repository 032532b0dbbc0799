"""The decoder: Flax Linen modules over one table of parameters."""
