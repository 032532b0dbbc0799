"""What `auto` knows. Written by benchmarks/swiglu.py --write-table on the hardware itself: not to be edited by hand."""

MEASURED: dict[tuple[str, str, str, bool], float] = {
}
"""(chip, dtype, shape class, recompute) -> XLA's time over Pallas', forward and backward."""
