"""Supervision of a run: its lock, signals, requests, watchdog, recovery and goodput."""
