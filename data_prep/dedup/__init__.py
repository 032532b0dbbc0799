"""Near duplicates, similar lines, evaluation text: pure functions of texts, without files of the pipeline."""
