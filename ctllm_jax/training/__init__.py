"""The train step, the optimizer, checkpoints and the loop that every stage shares."""
