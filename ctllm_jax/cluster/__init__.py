"""Processes, chips and flags."""
