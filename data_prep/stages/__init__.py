"""The stages of the pipeline that work on one part at a time: each a function `(unit, options) -> counters`."""
