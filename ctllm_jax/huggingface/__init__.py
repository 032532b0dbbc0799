"""Models in the formats of Hugging Face's libraries."""
