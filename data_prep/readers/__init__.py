"""Text in: files of any kind to records, bad ones put aside."""

from data_prep.readers.plan import describe, plan_files
from data_prep.readers.read import read_unit
from data_prep.readers.unit import InputUnit, Quarantine, Tally

__all__ = ["InputUnit", "Quarantine", "Tally", "describe", "plan_files", "read_unit"]
