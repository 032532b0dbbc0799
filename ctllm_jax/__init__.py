"""CT-LLM in JAX: from raw Chinese web text to an aligned chat model. Importing this package imports nothing else."""

__version__ = "0.2.0"
