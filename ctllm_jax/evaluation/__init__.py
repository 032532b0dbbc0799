"""Measuring a trained model: bits per byte, and the baselines to hold it against."""
