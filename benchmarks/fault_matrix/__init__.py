"""The rows of `benchmarks/faults.py`, by what is broken; importing this registers them all."""

from fault_matrix import kills, files, disks, signals, peers, data, devices  # noqa: F401, I001  in the table's order
