"""The numbers of a run as one HTML page."""
