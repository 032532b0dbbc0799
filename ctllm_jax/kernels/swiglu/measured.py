"""Measurements for `auto`. Written by benchmarks/swiglu.py --write-table on the hardware; do not edit by hand."""

MEASURED: dict[tuple[str, str, str, bool], float] = {
}
"""(chip, dtype, shape class, recompute) -> XLA's time over Pallas', forward and backward."""
